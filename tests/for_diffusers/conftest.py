"""What several files of this folder share."""

import importlib
import sys

import pytest


@pytest.fixture(scope="session")
def work():
    """The module `shared_work.py`, for what one process computes alone; `start_ranks` runs it in several."""
    return importlib.import_module(".shared_work", __package__)


@pytest.fixture(autouse=True)
def usual_backend():
    """A model's `set_attention_backend` also chooses for all others that have none of their own."""
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)

"""What several files of this folder share."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def work():
    """The module `shared_work.py`, for what one process computes alone; `start_ranks` runs it in several."""
    spec = importlib.util.spec_from_file_location("shared_work", Path(__file__).with_name("shared_work.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def usual_backend():
    """A model's `set_attention_backend` also chooses for all others that have none of their own."""
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)

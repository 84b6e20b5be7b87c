"""What several files of this folder share."""

import pytest


@pytest.fixture(scope="module")
def wan(tiny_wan):
    """Wan T2V, two layers, random weights."""
    return tiny_wan.load("t2v")

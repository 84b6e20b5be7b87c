"""What several files of this folder share."""

import functools
import types

import pytest


@pytest.fixture(scope="module")
def model(tiny_wan):
    """Wan T2V, two layers, random weights."""
    return tiny_wan.load("t2v")


@pytest.fixture
def sample(tiny_wan):
    """sample(model, ...) through ComfyUI's KSampler: the latent."""
    return tiny_wan.sample


@pytest.fixture
def kernel_calls(monkeypatch):
    """Every call of the kernels: q, the configuration, what else it was given, and its result."""
    from comfyui_psa.sampling import self_attention

    calls = []
    genuine = self_attention.pyramid_sparse_attention

    def attention(q, k, v, config, **given):
        result = genuine(q, k, v, config, **given)
        calls.append(types.SimpleNamespace(q=q.clone(), config=config, given=given, result=result))
        return result

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    return calls


@pytest.fixture
def compiler():
    """The compiler's counters, from nothing."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def models(tiny_families):
    """models(kind): a tiny model of that kind, kept until another is asked for."""
    return functools.lru_cache(maxsize=1)(tiny_families.load)

"""Nodes that change which calls there are: caches, context windows, compilers, guidance and batches."""

import pytest
import torch

from comfyui_psa.patching.patch import patch_model

from .core_nodes import cached, compiled, windowed
from .patched import FULL, PATCH, distance, report, sparse_calls


@pytest.mark.parametrize("first", ["cache", "psa"])
@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_easy_cache(model, sample, first, name):
    def with_cache(model):
        return cached(model, name, 3.0, 0.3, 0.9)

    def with_both(inputs):
        return with_cache(patch_model(model, **inputs)) if first == "psa" else patch_model(with_cache(model), **inputs)

    psa, full = with_both(PATCH), with_both(FULL)
    out = sample(psa, steps=10)
    assert torch.isfinite(out).all()
    skipped = 10 * 2 - sum(step["sparse_calls"] + step["dense_calls"] for step in report(psa)["steps"])
    assert skipped > 0, "the cache did skip model calls"
    assert report(psa)["fallbacks"] == []
    assert distance(sample(full, steps=10), sample(with_cache(model), steps=10)) < 1e-3


def test_context_windows(model, sample):
    size = (1, 16, 5, 32, 32)  # windows of 3 latent frames that share 2
    psa = windowed(patch_model(model, **PATCH), 9, 5)
    sample(psa, steps=4, size=size)
    calls = sparse_calls(psa)
    assert calls[0] == 0
    assert min(calls[1:]) >= 4, "more than one window a step"
    assert report(psa)["fallbacks"] == []
    assert report(psa)["grid"][0] < 5
    full, stock = windowed(patch_model(model, **FULL), 9, 5), windowed(model, 9, 5)
    assert distance(sample(full, size=size), sample(stock, size=size)) < 1e-4


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize(("first", "before"), [("psa", True), ("bypassed", False), ("bypassed", True)])
def test_compile_on_bypassed_on(model, sample, compiler, first, before):
    stock, expected = sample(model, steps=4), sample(patch_model(model, **PATCH), steps=4)
    bypassed = compiled(model)
    psa = compiled(patch_model(model, **PATCH)) if before else patch_model(bypassed, **PATCH)
    order = [psa, bypassed, psa, bypassed] if first == "psa" else [bypassed, psa, bypassed, psa]
    for which in order:
        out = sample(which, steps=4)
        if which is psa:
            assert distance(out, expected) < 1e-5
            assert sparse_calls(psa) == [0, 2, 2, 2], "the gate is not frozen into the graph"
        else:
            assert distance(out, stock) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("first", ["psa", "bypassed"])
def test_single_blocks_compiled(model, sample, compiler, first):
    """As packs do it that compile block by block, with guards on transformer_options dropped."""
    stock, expected = sample(model, steps=4), sample(patch_model(model, **PATCH), steps=4)
    bypassed = compiled(model, [f"diffusion_model.blocks.{block}" for block in range(2)])
    psa = patch_model(bypassed, **PATCH)
    order = [psa, bypassed, psa] if first == "psa" else [bypassed, psa, bypassed]
    for which in order:
        assert distance(sample(which, steps=4), expected if which is psa else stock) < 1e-5
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert report(psa)["notes"] == []


def test_guidance_batched_and_split(model, sample, tiny_wan):
    for negative, forwards in ((tiny_wan.conditioning(seed=4), 1), (tiny_wan.conditioning(text=21, seed=4), 2)):
        arguments = {"cfg": 5.0, "negative": negative}
        assert distance(sample(patch_model(model, **FULL), **arguments), sample(model, **arguments)) < 1e-4
        psa = patch_model(model, **PATCH)
        sample(psa, steps=4, **arguments)
        assert sparse_calls(psa) == [0, *[2 * forwards] * 3]


def test_batches(model, sample):
    size = (3, 16, 3, 32, 32)
    assert distance(sample(patch_model(model, **FULL), size=size, cfg=4.0), sample(model, size=size, cfg=4.0)) < 1e-4
    psa = patch_model(model, **PATCH)
    sample(psa, steps=4, size=size, cfg=4.0)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert report(psa)["mean_sparsity"] == pytest.approx(0.6, abs=0.05)

"""PSA on a small random Wan model, through ComfyUI's own sampler: what it changes, and what it must not change."""

import logging
import re

import pytest
import torch

from comfyui_psa.patching.patch import patch_model, remove_patch

from .patched import by_step, distance, report, sparse_calls

INPUTS = {"preset": "auto", "start_percent": 0.25, "end_percent": 1.0, "min_tokens": 0}
SIZE = (1, 16, 5, 32, 32)


@pytest.fixture(scope="module")
def sample(tiny_wan):
    """sample(model, ...) in four steps, with a prompt of `tokens` tokens."""

    def run(model, steps=4, size=SIZE, tokens=13, **more):
        prompt = tiny_wan.conditioning(tokens)
        return tiny_wan.sample(model, steps, size=size, positive=prompt, negative=prompt, **more)

    return run


def patched(model, sparsity=0.7, **changes):
    return patch_model(model, **INPUTS | {"sparsity": sparsity} | changes)


@pytest.fixture(scope="module")
def stock(model, sample):
    return sample(model)


@pytest.mark.parametrize("mode", ["budget", "topk"])
def test_sparse_steps_meet_the_slider(model, sample, stock, mode):
    psa = patched(model, 0.7, mode=mode, block_kv="32")
    out = sample(psa)
    steps = report(psa)["steps"]
    assert [step["sparsity"] is None for step in steps] == [True, False, False, False]
    assert sparse_calls(psa) == [0, 2, 2, 2]
    for step in steps[1:]:
        assert step["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, stock)


def test_the_log_says_what_was_set_and_what_came_of_it(model, sample, caplog):
    with caplog.at_level(logging.INFO):
        sample(patched(model, 0.7, mode="topk"))
        sample(patched(model, start_percent=0.9), steps=2)
        patched(model, 0.0)
    lines = [record.message for record in caplog.records if record.name == "ComfyUI-PSA"]
    assert lines[0].startswith("PSA: Wan t2v, hidden size 256: sparsity 0.7 from 25% to 100% of the schedule; preset ")
    assert lines[0].endswith(
        "(topk 1: 0.1, 2: 0.05, 8: 0.2, curve order, pooled importance, blocks of 128 and 64, correction auto)"
    )
    assert lines[1] == "PSA: correction: full, about 1 MB in CPU memory"
    assert re.fullmatch(
        r"PSA: 3 of 4 steps sparse at 0\.\d\d \(torch\), \d+\.\d\d s each, all corrected \(full\); "
        r"the dense ones \d+\.\d\d s",
        lines[2],
    )
    assert lines[4].startswith("PSA: 0 of 2 steps sparse: no step is between start_percent and end_percent; lower ")
    assert lines[5:] == ["PSA: sparsity is 0: the model is the stock one"]


@pytest.mark.parametrize("correction", ["off", "auto"])
def test_all_blocks_in_full_equal_dense(model, sample, correction):
    """With a correction too: what such calls lose is nothing, and there is nothing to renew."""
    psa = patched(model, 0.01, mode="topk", pyramid="1: 1.0", start_percent=0.0, correction=correction)
    out, stock = sample(psa, steps=10), sample(model, steps=10)
    first = 0 if correction == "auto" else 2  # it measures what is lost
    assert sparse_calls(psa) == [first, *[2] * 9]
    assert sum(by_step(psa, "corrected_calls")) == (18 if correction == "auto" else 0)
    # One of 20 key blocks may be reduced to its mean at sparsity 0.01; none is after rounding to whole blocks.
    assert distance(out, stock) < 1e-4


def test_the_model_that_was_patched_is_untouched_and_sparsity_zero_is_stock(model, sample, stock):
    before = {kind: dict(keys) for kind, keys in model.wrappers.items()}
    sample(patched(model))
    assert {kind: dict(keys) for kind, keys in model.wrappers.items()} == before
    assert torch.equal(sample(model), stock)
    assert torch.equal(sample(patched(model, 0.0)), stock)


def test_an_earlier_override_is_kept_and_gets_what_psa_declines(model, sample):
    calls = []

    def earlier(func, *args, **kwargs):
        calls.append(args[0].shape[1] == args[1].shape[1])
        return func(*args, **kwargs)

    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = earlier
    psa = patched(other)
    sample(psa)
    # 2 layers x 4 cross-attention calls, and the 2 self-attention calls of the dense first step.
    assert calls.count(False) == 8
    assert calls.count(True) == 2
    restored = remove_patch(psa).model_options["transformer_options"]["optimized_attention_override"]
    assert restored is earlier


def test_patching_twice_replaces_the_first(model, sample):
    twice = patched(patched(model, 0.9), 0.5)
    assert twice.model_options["transformer_options"]["optimized_attention_override"].previous is None
    sample(twice)
    assert report(twice)["target_sparsity"] == 0.5
    assert sum(sparse_calls(twice)) == 6


@pytest.mark.parametrize(
    ("changes", "size", "tokens", "reason"),
    [
        ({"min_tokens": 5000}, (1, 16, 5, 32, 32), 13, "fewer than min_tokens 5000"),
        ({"dense_blocks": "0-1"}, (1, 16, 5, 32, 32), 13, "listed in dense_blocks"),
        ({"backend": "triton"}, (1, 16, 5, 32, 32), 13, "needs a GPU"),
        ({}, (1, 16, 2, 32, 32), 512, "cannot tell self-attention from cross-attention"),
    ],
)
def test_what_psa_cannot_serve_stays_dense_with_one_line(model, sample, caplog, changes, size, tokens, reason):
    expected = sample(model, size=size, tokens=tokens)
    psa = patched(model, **changes)
    with caplog.at_level(logging.WARNING):
        out = sample(psa, size=size, tokens=tokens)
    assert torch.equal(out, expected)
    assert report(psa)["mean_sparsity"] is None
    lines = [record.message for record in caplog.records if "staying dense" in record.message]
    assert any(reason in line for line in lines)
    assert len(lines) == len(set(lines)) <= 2


@pytest.mark.parametrize(
    "words",
    ["out of shared memory\nsecond line", "at 38:12:\n    x = tl.arange(0, 48)\n        ^\nout of shared memory"],
)
def test_a_failure_in_the_kernels_ends_in_the_dense_path(model, sample, stock, caplog, monkeypatch, words):
    from comfyui_psa.sampling import self_attention

    def broken(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", broken)
    psa = patched(model)
    assert torch.equal(sample(psa), stock)
    fallbacks = report(psa)["fallbacks"]
    assert [entry["reason"] for entry in fallbacks] == [
        "the kernels failed on this machine (out of shared memory); this size stays dense for the rest of the run, the "
        "next one tries again; please report it if it fails every time"
    ]
    assert sum("out of shared memory" in record.message for record in caplog.records) == 1


def test_an_interrupted_run_leaves_nothing_behind(model, sample, stock):
    class Interrupted(Exception):
        pass

    def stop(step, *_):
        if step == 2:
            raise Interrupted

    psa = patched(model)
    with pytest.raises(Interrupted):
        sample(psa, callback=stop)
    assert "psa_run" not in psa.model_options["transformer_options"]
    assert len(report(psa)["steps"]) == 3
    assert torch.equal(sample(psa), sample(psa))
    assert torch.equal(sample(model), stock)


def test_odd_latents_are_padded_like_the_model_pads_them(model, sample):
    psa = patched(model)
    out = sample(psa, size=(1, 16, 5, 31, 33))
    assert out.shape == (1, 16, 5, 31, 33)
    assert report(psa)["grid"] == [5, 16, 17]
    assert report(psa)["mean_sparsity"] == pytest.approx(0.7, abs=0.02)


def test_a_model_that_is_not_wan_stays_dense(model, caplog):
    class Other:
        pass

    other = model.clone()
    other.model = Other()
    other.model.model_config = Other()
    other.model.model_config.unet_config = {"image_model": "flux"}
    out = patched(other)
    assert "optimized_attention_override" not in out.model_options["transformer_options"]
    assert "flux" in caplog.text


@pytest.mark.parametrize(("steps", "start", "dense"), [(16, 0.25, 4), (20, 0.25, 5), (20, 0.2, 4), (10, 0.3, 3)])
def test_a_step_on_the_bound_itself_is_sparse(comfyui, steps, start, dense):
    import comfy.model_sampling
    import comfy.samplers

    from comfyui_psa.sampling.run import is_active

    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=12.0)
    sigmas = [float(sigma) for sigma in comfy.samplers.simple_scheduler(sampling, steps)[:-1]]
    bounds = sampling.percent_to_sigma(start), sampling.percent_to_sigma(1.0)
    assert [is_active(sigma, *bounds) for sigma in sigmas] == [False] * dense + [True] * (steps - dense)

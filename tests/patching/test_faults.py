"""What goes wrong while sampling ends in dense attention or in the user's own error; the next run is right again."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.patching import core
from comfyui_psa.patching.override import RUN_KEY
from comfyui_psa.patching.patch import KEY, patch_model
from comfyui_psa.reports.show import show_report
from comfyui_psa.sampling import self_attention

from .patched import PATCH, PLAIN, distance, kinds, report, sparse_calls


def failing(monkeypatch, error, when=lambda call, q: True):
    """Make the kernels raise `error` where `when(number of the call, q)` is true."""
    calls = []

    def attention(q, *args, **kwargs):
        calls.append(tuple(q.shape))
        if when(len(calls) - 1, q):
            raise error
        return pyramid_sparse_attention(q, *args, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    return calls


def test_out_of_memory_is_tried_again_with_fewer_heads(model, sample, monkeypatch, caplog):
    psa = patch_model(model, **PLAIN)
    expected = sample(psa, steps=4)
    calls = failing(monkeypatch, torch.OutOfMemoryError("full"), lambda _, q: q.shape[1] > 1)
    out = sample(psa, steps=4)
    assert distance(out, expected) < 1e-5  # topk: the heads do not know of each other
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert [shape[1] for shape in calls] == [2, *[1] * 12], "once found, the size stays for the run"
    assert caplog.text.count("out of memory") == 1
    assert report(psa)["fallbacks"] == []


def test_out_of_memory_without_end_is_dense_and_said_once(model, sample, monkeypatch, caplog):
    psa, stock = patch_model(model, **PLAIN), sample(model, steps=4)
    with monkeypatch.context() as patch:
        calls = failing(patch, torch.OutOfMemoryError("full"))
        assert torch.equal(sample(psa, steps=4), stock)
    assert len(calls) == 2
    assert caplog.text.count("staying dense: PSA ran out of memory, even with one head at a time") == 1
    sample(psa, steps=4)
    assert report(psa)["fallbacks"] == [], "the next run tries again"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered\nmore lines"),
        RuntimeError("ptxas failed with error code 255"),
        ImportError("DLL load failed"),
        AssertionError(),
        OSError("no space left on device"),
    ],
)
def test_whatever_the_kernels_raise_is_dense_with_one_line(model, sample, monkeypatch, caplog, error):
    psa, stock = patch_model(model, **PATCH), sample(model, steps=4)
    expected = sample(psa, steps=4)
    with monkeypatch.context() as patch:
        failing(patch, error)
        assert torch.equal(sample(psa, steps=4), stock)
    (line,) = [record.message for record in caplog.records if "staying dense" in record.message]
    assert type(error).__name__ not in line
    assert "Triton" in line if isinstance(error, ImportError) else str(error).split("\n")[0] in line
    assert "\n" not in line
    assert torch.equal(sample(psa, steps=4), expected)


def test_a_failure_in_the_middle_of_a_step_leaves_the_rest_dense(model, sample, monkeypatch):
    psa = patch_model(model, **PLAIN)
    failing(monkeypatch, RuntimeError("gone"), lambda call, _: call == 3)
    out = sample(psa, steps=4)
    assert torch.isfinite(out).all()
    assert sparse_calls(psa) == [0, 2, 1, 0]


def test_a_step_that_is_differentiated_is_dense_and_the_next_is_not(model, sample, monkeypatch, caplog):
    """As nodes guide: a gradient of the model's answer with respect to the latent, in one of the steps."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", True)  # the core's switch to parts that have a gradient

    def gradient(apply_model, given):
        with torch.enable_grad():
            latent = given["input"].detach().requires_grad_()
            out = apply_model(latent, given["timestep"], **given["c"])
            (found,) = torch.autograd.grad(out.square().sum(), latent)
        gradients.append(found)
        return out.detach()

    def guide(apply_model, given):
        calls.append(1)
        if len(calls) == 3:
            return gradient(apply_model, given)
        return apply_model(given["input"], given["timestep"], **given["c"])

    gradients, calls = [], []
    psa = patch_model(model, **PATCH)
    psa.set_model_unet_function_wrapper(guide)
    sample(psa, steps=4)
    assert gradients[0].abs().max() > 0
    assert sparse_calls(psa) == [0, 2, 0, 2]
    assert caplog.text.count("staying dense: gradients are asked for") == 1


class Stopped(BaseException):
    """As ComfyUI's interrupt: no Exception."""


STAGES = ["wrapper", "kernel", "dense", "callback"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_at_any_stage_leaves_nothing_behind(model, sample, monkeypatch, stage):
    stock, psa = sample(model, steps=4), patch_model(model, **PATCH)
    expected = sample(psa, steps=4)
    stopping = psa.clone()

    def stop(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patch:
        arguments = {}
        if stage == "wrapper":
            core.add_wrappers(stopping, "psa_test", sampling=lambda run, *a, **k: run(*a, **k), before_call=stop)
        elif stage == "kernel":
            failing(patch, Stopped(), lambda call, _: call == 1)
        elif stage == "dense":
            stopping = model.clone()
            core.set_override(stopping, stop)
            stopping = patch_model(stopping, **PATCH)
        else:
            arguments["callback"] = lambda step, *_: stop() if step == 2 else None
        with pytest.raises(Stopped):
            sample(stopping, steps=4, **arguments)
    assert RUN_KEY not in stopping.model_options["transformer_options"]
    assert stopping.get_attachment(KEY).report is not None, "what was done until then is reported"
    assert torch.equal(sample(psa, steps=4), expected)
    assert torch.equal(sample(model, steps=4), stock)


def test_the_step_that_was_broken_off_is_not_shown_as_done(model, sample, monkeypatch, caplog):
    told, ended = [], []
    psa = patch_model(model, **PATCH | {"on_step": told.append, "on_end": ended.append, "verbose": True})

    def stop(*args, **kwargs):
        if len(told) == 2:
            raise Stopped
        return genuine(*args, **kwargs)

    genuine = self_attention.pyramid_sparse_attention
    with monkeypatch.context() as patch:
        patch.setattr(self_attention, "pyramid_sparse_attention", stop)
        with pytest.raises(Stopped), caplog.at_level("INFO"):
            sample(psa, steps=4)
    assert [figures["step"] for figures in told] == [0, 1]
    assert kinds(psa) == ["dense", "sparse", "interrupted"]
    assert (ended[0]["completed"], ended[0]["kinds"]) == (False, {"dense": 1, "sparse": 1, "interrupted": 1})
    assert "steps sparse" not in caplog.text
    assert show_report(psa, {}, -1, 0, None)
    sample(psa, steps=4)
    assert kinds(psa) == ["dense", *["sparse"] * 3]
    assert ended[1]["completed"] is True
    assert ended[1]["sparsity"] == report(psa)["mean_sparsity"]


def test_an_error_of_the_user_s_own_attention_is_the_user_s(model, sample):
    def broken(func, *args, **kwargs):
        raise ValueError("not ours")

    clone = model.clone()
    core.set_override(clone, broken)
    with pytest.raises(ValueError, match="not ours"):
        sample(patch_model(clone, **PATCH))


@pytest.mark.parametrize("preset", ["module-default", "wan2.1-14b", "wan2.1-14b (published)"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_goes_no_further_than_in_dense_attention(preset, where, bad):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(2, 2, 1024, 64, generator=generator) for name in "qkv"}
    tensors[where][0, 1, 333] = bad
    config = load_presets()[preset].config(0.8)
    output = pyramid_sparse_attention(*tensors.values(), config).output
    dense = F.scaled_dot_product_attention(*tensors.values())
    assert not (~output.isfinite() & dense.isfinite()).any()
    assert (~dense.isfinite()).any()


def test_a_nan_in_the_latent_does_not_outlive_its_run(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH)
    expected = sample(psa, steps=4)
    noise = tiny_wan.normal(*tiny_wan.SIZE, seed=1)
    noise[0, 0, 1, 3, 3] = float("nan")
    sample(psa, steps=4, noise=noise)
    assert torch.equal(sample(psa, steps=4), expected)

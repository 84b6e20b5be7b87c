"""What users combine PSA with on a GPU: low VRAM, LoRAs, fp8, caches, context windows, compilers, a second GPU.

ComfyUI takes one device for a whole process:
`PSA_TEST_DEVICE=cuda python dev.py test tests/patching/test_stacking_gpu.py`.
"""

import threading

import pytest
import torch

from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.patching import core
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling import self_attention

from .core_nodes import cached, compiled, windowed, with_lora
from .patched import FULL, PATCH, distance, report, sparse_calls

pytestmark = pytest.mark.gpu(comfyui=True)
ROUNDING = 2e-2
"""Relative error of a bfloat16 model whose sums are taken in another order."""


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v", torch.bfloat16)


@pytest.mark.parametrize("with_loras", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.8])
def test_weights_that_stay_in_main_memory(tiny_wan, sample, monkeypatch, kept, with_loras):
    import comfy.model_management
    import comfy.model_patcher

    def load(self, device_to=None, lowvram_model_memory=0, *args, **kwargs):
        return real(
            self, device_to, max(0.1, kept * self.model_size()), *args, **kwargs | {"full_load": False}
        )  # as for a GPU that is full

    def loaded():
        model = tiny_wan.load("t2v", torch.bfloat16)
        return with_lora(model) if with_loras else model

    places = set()

    def look(*_):
        linear = (x for x in core.network_of(psa).modules() if isinstance(x, torch.nn.Linear))
        places.update(layer.weight.device.type for layer in linear)

    resident = loaded()
    expected = sample(patch_model(resident, **PATCH), steps=4)
    comfy.model_management.unload_all_models()
    real = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load)
    offloaded = loaded()
    psa = patch_model(offloaded, **PATCH)
    out = sample(psa, steps=4, callback=look)
    assert places == ({"cpu", "cuda"} if kept else {"cpu"})
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert distance(out, expected) < ROUNDING
    assert distance(sample(patch_model(offloaded, **FULL)), sample(offloaded)) < ROUNDING
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights(tiny_wan, sample, kernel_calls, dtype, fast):
    import comfy.sd

    options = {"dtype": dtype, "fp8_optimizations": fast}
    eight = comfy.sd.load_diffusion_model_state_dict(tiny_wan.state_dict("t2v", torch.bfloat16), model_options=options)
    assert core.network_of(eight).blocks[0].self_attn.q.weight.dtype == dtype
    assert distance(sample(patch_model(eight, **FULL)), sample(eight)) < ROUNDING
    psa = patch_model(eight, **PATCH)
    assert torch.isfinite(sample(psa, steps=4)).all()
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert {call.result.backend for call in kernel_calls} == {"triton"}


@pytest.mark.parametrize("first", ["cache", "psa"])
def test_easy_cache(model, sample, first):
    limits = {"threshold": 3.0, "start": 0.3, "end": 0.9}
    if first == "psa":
        psa = cached(patch_model(model, **PATCH), **limits)
    else:
        psa = patch_model(cached(model, **limits), **PATCH)
    assert torch.isfinite(sample(psa, steps=10)).all()
    skipped = 10 * 2 - sum(step["sparse_calls"] + step["dense_calls"] for step in report(psa)["steps"])
    assert skipped > 0, "the cache did skip model calls"
    assert sum(sparse_calls(psa)) > 0
    assert report(psa)["fallbacks"] == []


def test_context_windows(model, sample):
    size = (1, 16, 5, 32, 32)  # windows of 3 latent frames that share 2
    psa = windowed(patch_model(model, **PATCH), 9, 5)
    sample(psa, steps=4, size=size)
    calls = sparse_calls(psa)
    assert calls[0] == 0
    assert min(calls[1:]) >= 4, "more than one window a step"
    assert report(psa)["fallbacks"] == []
    assert report(psa)["grid"][0] < 5
    full = sample(windowed(patch_model(model, **FULL), 9, 5), size=size)
    assert distance(full, sample(windowed(model, 9, 5), size=size)) < ROUNDING


@pytest.mark.parametrize("before", [True, False])
def test_compiled_on_bypassed_on(model, sample, compiler, before):
    stock, expected = sample(model, steps=4), sample(patch_model(model, **PATCH), steps=4)
    bypassed = compiled(model, backend="inductor")
    psa = compiled(patch_model(model, **PATCH), backend="inductor") if before else patch_model(bypassed, **PATCH)
    for which in (psa, bypassed, psa, bypassed, psa):
        out = sample(which, steps=4)
        if which is psa:
            assert distance(out, expected) < ROUNDING
            assert sparse_calls(psa) == [0, 2, 2, 2], "the gate is not frozen into the graph"
            assert report(psa)["fallbacks"] == []
        else:
            assert distance(out, stock) < ROUNDING
    assert sum(compiler["graph_break"].values()) < 12


def test_two_gpus(tiny_wan, sample, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    import comfy.multigpu

    model = tiny_wan.load("t2v", torch.bfloat16)
    model.cached_patcher_init = (lambda *_, **__: tiny_wan.load("t2v", torch.bfloat16), ())
    arguments = {"cfg": 5.0, "negative": tiny_wan.conditioning(seed=4), "steps": 4}
    expected = sample(patch_model(model, **PATCH), **arguments)
    devices = set()

    def attention(q, *args, **kwargs):
        devices.add((q.device, threading.get_ident()))
        return pyramid_sparse_attention(q, *args, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    told = []
    psa = comfy.multigpu.create_multigpu_deepclones(patch_model(model, **PATCH, on_step=told.append), 2)
    out = sample(psa, **arguments)
    assert len(devices) == 2
    assert distance(out, expected) < ROUNDING
    assert sparse_calls(psa) == [0, 4, 4, 4]
    assert report(psa)["fallbacks"] == []
    assert len(told) == 4

"""Corrected runs on a GPU: with losses on the host, against the torch backend, and what they leave in memory.

ComfyUI takes one device for a whole process: `PSA_TEST_DEVICE=cuda python dev.py test tests/patching`.
"""

import dataclasses

import pytest
import torch

from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.kernels.config import PyramidConfig
from comfyui_psa.kernels.delta import measure_delta
from comfyui_psa.kernels.order import TokenLayout, make_order
from comfyui_psa.patching import override
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling.correction import Memory

from . import patched
from .patched import distance, report

pytestmark = [pytest.mark.usefixtures("in_short_runs"), pytest.mark.gpu]
PATCH = patched.PATCH | {"correction": "full"}
GRID = (4, 24, 32)


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v", torch.bfloat16)


def on_the_host(monkeypatch):
    """ComfyUI with no room on the GPU."""
    memory = override.COMFYUI.memory
    without = Memory(lambda device: 0, memory.free_on_host, memory.pin, memory.unpin)
    monkeypatch.setattr(override, "COMFYUI", dataclasses.replace(override.COMFYUI, memory=without))


@pytest.mark.gpu(comfyui=True)
def test_losses_on_the_host_give_the_same_latents(model, sample, monkeypatch):
    import comfy.model_management as management

    here = patch_model(model, **PATCH)
    sample(here, steps=12, cfg=3.0)  # the dense attention of a process's first run differs, also without PSA
    expected = sample(here, steps=12, cfg=3.0)
    pinned = management.TOTAL_PINNED_MEMORY
    on_the_host(monkeypatch)
    there = patch_model(model, **PATCH)
    assert torch.equal(sample(there, steps=12, cfg=3.0), expected)
    one, other = report(here)["correction"], report(there)["correction"]
    assert (one["where"], other["where"]) == ("GPU memory", "host memory")
    assert one["bytes"] == other["bytes"] > 0
    assert one["corrected_calls"] == other["corrected_calls"] > 0
    assert pinned == management.TOTAL_PINNED_MEMORY


@pytest.mark.gpu(comfyui=True)
@pytest.mark.parametrize("host", [False, True])
def test_memory_is_flat_over_runs(model, sample, monkeypatch, host):
    import comfy.model_management as management

    if host:
        on_the_host(monkeypatch)
    psa, seen = patch_model(model, **PATCH), []
    for _ in range(12):
        sample(psa, steps=8, cfg=3.0)
        torch.cuda.synchronize()
        seen.append((torch.cuda.memory_allocated(), management.TOTAL_PINNED_MEMORY))
    assert len(set(seen[2:])) == 1


@pytest.mark.gpu(comfyui=True)
@pytest.mark.parametrize("host", [False, True])
def test_a_run_that_is_stopped_unpins(model, sample, monkeypatch, host):
    import comfy.model_management as management

    class Stopped(BaseException):
        pass

    def stop(step, *_):
        if step == 6:
            raise Stopped

    if host:
        on_the_host(monkeypatch)
    psa = patch_model(model, **PATCH)
    sample(psa, steps=10)  # the dense attention of a process's first run differs from all others, also without PSA
    expected, pinned = sample(psa, steps=10), management.TOTAL_PINNED_MEMORY
    with pytest.raises(Stopped):
        sample(psa, steps=10, callback=stop)
    assert pinned == management.TOTAL_PINNED_MEMORY
    assert torch.equal(sample(psa, steps=10), expected)


def tensors(dim, device="cuda", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    length = GRID[0] * GRID[1] * GRID[2]
    made = [torch.randn(1, 4, length, dim, generator=generator).bfloat16() for _ in range(4)]
    return [x.to(device, dtype) for x in made]


def kept_call(dim, group, device="cuda", dtype=torch.bfloat16, backend="auto"):
    """A call with kept levels and a correction: a function that makes it."""
    config = PyramidConfig(shares={1: 0.1, 2: 0.1, 4: 0.2}, mode="topk", sparsity=0.7, order="curve")
    q, k, v, dense = tensors(dim, device, dtype)
    layout, order = TokenLayout(GRID), make_order("curve", GRID, device=device)
    reference = pyramid_sparse_attention(*(x.float().cpu() for x in (q, k, v)), config, layout=layout, backend="torch")
    lists = dataclasses.replace(
        reference.lists,
        **{name: getattr(reference.lists, name).to(device) for name in ("blocks", "ends", "density", "best")},
    ).packed()  # fmt: skip
    on_device = make_order("curve", GRID)
    delta = measure_delta(dense.float().cpu(), reference.output, on_device, group)
    delta = dataclasses.replace(delta, values=delta.values.to(device), scales=delta.scales.to(device))
    out = torch.empty_like(q)
    return lambda: (
        pyramid_sparse_attention(
            q, k, v, config, layout=layout, order=order, lists=lists, delta=delta, out=out, backend=backend
        ).output
    )


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_a_kept_call_is_that_of_the_torch_backend(dim, group):
    found = kept_call(dim, group)()
    expected = kept_call(dim, group, "cpu", torch.float32, "torch")()
    assert distance(found, expected) < 1e-2


def launches(call):
    for _ in range(3):  # compiled and tuned
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_a_kept_call_has_few_launches():
    wide, narrow = launches(kept_call(128, 1)), launches(kept_call(64, 1))
    assert 0 < len(wide) <= 6, wide
    assert 0 < len(narrow) < len(wide), narrow

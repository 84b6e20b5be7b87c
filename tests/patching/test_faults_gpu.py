"""What goes wrong on a GPU: full memory, kernels that cannot run, NaN, interrupts. The next run is right again.

ComfyUI takes one device for a whole process:
`PSA_TEST_DEVICE=cuda python dev.py test tests/patching/test_faults_gpu.py`.
"""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.kernels.gpu.tiles import AttendTile
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling import self_attention

from .patched import PATCH, distance, report, sparse_calls

pytestmark = pytest.mark.gpu(comfyui=True)


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v", torch.bfloat16)


@pytest.fixture
def allowance(monkeypatch):
    """allowance["bytes"]: what PSA's kernels may still allocate; beyond that the GPU really is full."""
    limit = {"bytes": None, "needed": 0, "heads": []}

    def attention(q, *args, **kwargs):
        limit["heads"].append(q.shape[1])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
        filler = []
        if limit["bytes"] is not None:
            torch.cuda.set_per_process_memory_fraction((before + limit["bytes"]) / total)
        if limit["bytes"] == 0:  # what the allocator holds may still have room for a head
            for size in (2**24, 2**21, 2**20, 2**16, 2**9):
                with contextlib.suppress(torch.OutOfMemoryError):
                    while True:
                        filler.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        torch.cuda.reset_peak_memory_stats()
        try:
            return pyramid_sparse_attention(q, *args, **kwargs)
        finally:
            filler.clear()
            torch.cuda.set_per_process_memory_fraction(1.0)
            limit["needed"] = max(limit["needed"], torch.cuda.max_memory_reserved() - before)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    return limit


def test_a_full_gpu_is_retried_with_fewer_heads_and_then_dense(tiny_wan, sample, allowance, caplog):
    model = tiny_wan.load("t2v", torch.bfloat16, dim=1024, num_heads=8)
    size = (1, 16, 8, 64, 64)  # 8192 tokens: 16 MB for q
    psa = patch_model(model, **PATCH | {"start_percent": 0.0})
    sample(model, steps=2, size=size)  # the dense attention of a process's first run differs from all others
    stock, expected = sample(model, steps=2, size=size), sample(psa, steps=2, size=size)
    needed = allowance["needed"]
    assert needed > 2**24
    seen = {}
    for share in (1.5, 0.8, 0.6, 0.4, 0.25, 0.0):
        allowance.update(bytes=int(share * needed), heads=[])
        caplog.clear()
        out = sample(psa, steps=2, size=size)
        assert torch.isfinite(out).all()
        said = caplog.text.count("continuing"), caplog.text.count("staying dense: PSA ran out of memory, even with")
        seen[share] = allowance["heads"], said
        if report(psa)["fallbacks"]:
            assert said[1] == 1, "said once"
            # Calls before the one that went dense may have found room, one head at a time.
            assert sum(sparse_calls(psa)) or torch.equal(out, stock)
        else:
            assert sparse_calls(psa) == [2, 2]
            assert distance(out, expected) < 1e-3, "the heads do not know of each other"
    assert seen[1.5] == ([8] * 4, (0, 0))
    assert seen[0.0] == ([8, 4, 2, 1], (3, 1)), "not tried again after that"
    assert sparse_calls(psa) == [0, 0]
    fewer = [heads for heads, (retries, dense) in seen.values() if retries and not dense]
    assert fewer, f"no allowance was met with fewer heads: {seen}"
    allowance["bytes"] = None
    assert torch.equal(sample(psa, steps=2, size=size), expected), "the next run is right"


@pytest.mark.parametrize(
    ("tile", "says"),
    [(AttendTile(rows=128, warps=4, stages=9), "shared memory"), (AttendTile(48, 4, 2), "power of 2")],
    ids=["does not fit the GPU", "does not compile"],
)
def test_a_kernel_that_cannot_run_here_is_tried_once(model, sample, monkeypatch, caplog, tile, says):
    from comfyui_psa.kernels.gpu import backend

    psa, stock = patch_model(model, **PATCH), sample(model, steps=4)
    expected = sample(psa, steps=4)
    tries = []
    with monkeypatch.context() as broken:
        broken.setattr(backend, "choose_tile", lambda *_: tries.append(1) or tile)
        assert torch.equal(sample(psa, steps=4), stock)
    assert len(tries) == 1, "remembered for the run"
    (line,) = [record.message for record in caplog.records if "staying dense" in record.message]
    assert says in line
    assert sparse_calls(psa) == [0] * 4
    assert torch.equal(sample(psa, steps=4), expected), "the next run is right"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("preset", ["module-default", "wan2.1-14b", "wan2.1-14b (published)"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_goes_no_further_than_in_dense_attention(preset, precision, where, bad):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(2, 2, 1024, 64, generator=generator).cuda().bfloat16() for name in "qkv"}
    tensors[where][0, 1, 333] = bad
    config = dataclasses.replace(load_presets()[preset].config(0.8), precision=precision)
    result = pyramid_sparse_attention(*tensors.values(), config)
    dense = F.scaled_dot_product_attention(*(x.float() for x in tensors.values()))
    assert result.backend == "triton"
    assert not (~result.output.isfinite() & dense.isfinite()).any()


def test_a_nan_in_the_latent_does_not_outlive_its_run(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH)
    expected, noise = sample(psa, steps=4), tiny_wan.normal(*tiny_wan.SIZE, seed=1)
    noise[0, 0, 1, 3, 3] = float("nan")
    sample(psa, steps=4, noise=noise)
    assert torch.equal(sample(psa, steps=4), expected)


def test_an_interrupt_leaves_nothing_behind(model, sample):
    class Stopped(BaseException):
        pass

    def stop(step, *_):
        if step == 2:
            raise Stopped

    psa, stock = patch_model(model, **PATCH), sample(model, steps=4)
    expected = sample(psa, steps=4)
    with pytest.raises(Stopped):
        sample(psa, steps=4, callback=stop)
    assert torch.equal(sample(psa, steps=4), expected)
    assert torch.equal(sample(model, steps=4), stock)

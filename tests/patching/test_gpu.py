"""PSA in ComfyUI on a GPU, where the Triton kernels compute: what goes wrong there, and what users combine it with.

The same ground as the neighbouring files, which sample in float32 on a CPU, as far as a GPU makes a difference. ComfyUI
takes one device for a whole process: `PSA_TEST_DEVICE=cuda python dev.py test tests/patching/test_gpu.py`.
"""

import contextlib
import dataclasses
import os
import threading

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.kernels.delta import Delta
from comfyui_psa.kernels.gpu.tiles import AttendTile
from comfyui_psa.kernels.levels import BlockLists
from comfyui_psa.kernels.order import TokenOrder
from comfyui_psa.patching import core
from comfyui_psa.patching.patch import KEY, patch_model
from comfyui_psa.sampling import self_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and os.environ.get("PSA_TEST_DEVICE") != "cuda",
        reason="needs PSA_TEST_DEVICE=cuda, which has ComfyUI sample on the GPU",
    ),
]

PATCH = {"sparsity": 0.6, "preset": "auto", "mode": "topk", "min_tokens": 0, "start_percent": 0.25, "end_percent": 1.0}
FULL = PATCH | {"sparsity": 0.01, "pyramid": "1: 1.0", "start_percent": 0.0}
ROUNDING = 2e-2
"""Relative error of a bfloat16 model whose sums are taken in another order."""
FRAME = 256


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v", torch.bfloat16)


@pytest.fixture
def sample(tiny_wan):
    return tiny_wan.sample


def report(model):
    return model.get_attachment(KEY).report


def sparse_calls(model):
    return [step["sparse_calls"] for step in report(model)["steps"]]


def reasons(model):
    return [entry["reason"] for entry in report(model)["fallbacks"]]


def error(one, other):
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm() / other.norm())


@dataclasses.dataclass
class Call:
    """A call that PSA took: its layout and backend, and its distance to the torch reference, and to dense attention."""

    layout: tuple
    backend: str
    from_reference: float
    from_dense: float


@pytest.fixture
def calls(monkeypatch):
    """Every call that PSA takes, computed again on the host in float32, at the levels that the GPU chose."""
    seen = []

    def attention(q, k, v, config, **arguments):
        result = pyramid_sparse_attention(q, k, v, config, **arguments)
        q, k, v = (x.float().cpu() for x in (q, k, v))
        layout, lists, order = arguments["layout"], result.lists, arguments["order"]
        lists = BlockLists(
            lists.blocks.cpu(), lists.ends.cpu(), lists.levels, lists.density.cpu(), key_blocks=lists.key_blocks
        )
        delta = arguments.get("delta")
        delta = None if delta is None else Delta(delta.values.cpu(), delta.scales.cpu(), delta.group)
        order = TokenOrder(*(None if x is None else x.cpu() for x in (order.index, order.inverse)))
        expected = pyramid_sparse_attention(
            q, k, v, config, layout=layout, order=order, lists=lists, delta=delta, backend="torch"
        )
        dense = F.scaled_dot_product_attention(q, k, v)
        place = layout.before, layout.grid, layout.after
        distances = error(result.output, expected.output), error(result.output, dense)
        seen.append(Call(place, result.backend, *distances))
        return result

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    return seen


def reference(tiny):
    return {"reference_latents": [tiny.normal(1, 16, 1, 32, 32, seed=5)]}


def appended(tiny):
    return {"time_dim_concat": tiny.normal(1, 16, 2, 32, 32, seed=5)}


def both(tiny):
    references = [tiny.normal(1, 16, 1, 32, 32, seed=seed) for seed in (5, 6)]
    return {"reference_latents": references, "pose_video_latent": tiny.normal(1, 16, 3, 16, 16, seed=7)}


VARIANTS = {
    "nothing beside the grid": ("t2v", (1, 16, 3, 32, 32), None, (0, (3, 16, 16), 0)),
    "odd sizes": ("t2v", (1, 16, 3, 31, 33), None, (0, (3, 16, 17), 0)),
    "a reference in front": ("fun", (1, 16, 3, 32, 32), reference, (FRAME, (3, 16, 16), 0)),
    "the first frame": ("animate", (1, 16, 4, 32, 32), None, (FRAME, (3, 16, 16), 0)),
    "frames behind": ("t2v", (1, 16, 3, 32, 32), appended, (0, (3, 16, 16), 2 * FRAME)),
    "in front and behind": ("scail", (1, 16, 3, 32, 32), both, (2 * FRAME, (3, 16, 16), 192)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_before_and_behind_the_grid(tiny_wan, sample, calls, name):
    kind, size, extra, layout = VARIANTS[name]
    model, extra = tiny_wan.load(kind, torch.bfloat16), extra and extra(tiny_wan)
    psa = patch_model(model, **PATCH | {"start_percent": 0.0})
    assert torch.isfinite(sample(psa, size=size, extra=extra, cfg=3.0)).all()
    assert {(call.layout, call.backend) for call in calls} == {(layout, "triton")}
    assert max(call.from_reference for call in calls) < 1e-2
    calls.clear()
    full = sample(patch_model(model, **FULL), size=size, extra=extra, cfg=3.0)
    assert max(call.from_dense for call in calls) < 1e-2
    assert error(full, sample(model, size=size, extra=extra, cfg=3.0)) < ROUNDING


def test_the_text_of_cogvideox_in_front(comfyui, tiny_wan, sample, calls):
    import comfy.ldm.cogvideo.model
    import comfy.ops
    import comfy.sd

    blank = comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel(
        num_attention_heads=2, num_layers=2, text_embed_dim=4096, use_rotary_positional_embeddings=True,
        operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    state = {key: (tiny_wan.normal(*x.shape) * 0.05).bfloat16() for key, x in blank.state_dict().items()}
    model = comfy.sd.load_diffusion_model_state_dict(state)
    psa = patch_model(model, **PATCH | {"start_percent": 0.0})
    extra = {"positive": tiny_wan.conditioning(226), "negative": tiny_wan.conditioning(226, seed=4)}
    assert torch.isfinite(sample(psa, **extra)).all()
    assert {(call.layout, call.backend) for call in calls} == {((226, (3, 16, 16), 0), "triton")}
    assert max(call.from_reference for call in calls) < 1e-2


def test_bypassed_and_sparsity_0_are_stock_bit_for_bit(model, sample):
    stock = sample(model, steps=4)
    psa = patch_model(model, **PATCH)
    assert not torch.equal(sample(psa, steps=4), stock)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert report(psa)["time"]["sparse_attention"] > 0
    assert torch.equal(sample(model, steps=4), stock)
    assert torch.equal(sample(patch_model(model, **PATCH | {"sparsity": 0.0}), steps=4), stock)


def test_figures_of_every_step_arrive(model, sample):
    told = []
    sample(patch_model(model, **PATCH, on_step=told.append), steps=4)
    assert [figures["step"] for figures in told] == [0, 1, 2, 3]
    assert [figures["sparsity"] is None for figures in told] == [True, False, False, False]


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
        if reasons(psa):
            assert said[1] == 1, "said once"
            # Calls before the one that went dense may have found room, one head at a time.
            assert sum(sparse_calls(psa)) or torch.equal(out, stock)
        else:
            assert sparse_calls(psa) == [2, 2]
            assert error(out, expected) < 1e-3, "the heads do not know of each other"
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


def lora(scale=0.05):
    """Weights of a LoRA on the attention of both blocks, as ComfyUI loads them."""
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for block in (0, 1):
        for name in ("q", "k", "v", "o"):
            prefix = f"diffusion_model.blocks.{block}.self_attn.{name}."
            weights[prefix + "lora_A.weight"] = torch.randn(4, 256, generator=generator) * scale
            weights[prefix + "lora_B.weight"] = torch.randn(256, 4, generator=generator) * scale
    return weights


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.8])
def test_weights_that_stay_in_main_memory(tiny_wan, sample, monkeypatch, kept, with_lora):
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd

    def load(self, device_to=None, lowvram_model_memory=0, *args, **kwargs):
        return real(
            self, device_to, max(0.1, kept * self.model_size()), *args, **kwargs | {"full_load": False}
        )  # as for a GPU that is full

    def loaded():
        model = tiny_wan.load("t2v", torch.bfloat16)
        return comfy.sd.load_lora_for_models(model, None, lora(), 1.0, 0.0)[0] if with_lora else model

    places = set()

    def look(step, *_):
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
    assert error(out, expected) < ROUNDING
    assert error(sample(patch_model(offloaded, **FULL)), sample(offloaded)) < ROUNDING
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights(tiny_wan, sample, calls, dtype, fast):
    import comfy.sd

    options = {"dtype": dtype, "fp8_optimizations": fast}
    eight = comfy.sd.load_diffusion_model_state_dict(tiny_wan.state_dict("t2v", torch.bfloat16), model_options=options)
    assert core.network_of(eight).blocks[0].self_attn.q.weight.dtype == dtype
    assert error(sample(patch_model(eight, **FULL)), sample(eight)) < ROUNDING
    psa = patch_model(eight, **PATCH)
    assert torch.isfinite(sample(psa, steps=4)).all()
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert {call.backend for call in calls} == {"triton"}


@pytest.mark.parametrize("first", ["cache", "psa"])
def test_easy_cache(model, sample, first):
    import comfy_extras.nodes_easycache as nodes

    def cached(model):
        return nodes.EasyCacheNode.execute(model, 3.0, 0.3, 0.9, False).result[0]

    psa = cached(patch_model(model, **PATCH)) if first == "psa" else patch_model(cached(model), **PATCH)
    assert torch.isfinite(sample(psa, steps=10)).all()
    skipped = 10 * 2 - sum(step["sparse_calls"] + step["dense_calls"] for step in report(psa)["steps"])
    assert skipped > 0, "the cache did skip model calls"
    assert sum(sparse_calls(psa)) > 0
    assert reasons(psa) == []


def test_context_windows(model, sample):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    def windowed(model):
        values = {
            "context_length": 9, "context_overlap": 5, "context_schedule": "standard_static", "context_stride": 1,
            "closed_loop": False, "fuse_method": "pyramid", "freenoise": False,
        }  # fmt: skip
        return WanContextWindowsManualNode.execute(model, **values).result[0]

    size = (1, 16, 5, 32, 32)  # windows of 3 latent frames that share 2
    psa = windowed(patch_model(model, **PATCH))
    sample(psa, steps=4, size=size)
    calls = sparse_calls(psa)
    assert calls[0] == 0
    assert min(calls[1:]) >= 4, "more than one window a step"
    assert reasons(psa) == []
    assert report(psa)["grid"][0] < 5
    full = sample(windowed(patch_model(model, **FULL)), size=size)
    assert error(full, sample(windowed(model), size=size)) < ROUNDING


@pytest.mark.parametrize("before", [True, False])
def test_compiled_on_bypassed_on(model, sample, before):
    import torch._dynamo.utils
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def compiled(model):
        clone, options = model.clone(), {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model=clone, backend="inductor", options=options)
        return clone

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stock, expected = sample(model, steps=4), sample(patch_model(model, **PATCH), steps=4)
    bypassed = compiled(model)
    psa = compiled(patch_model(model, **PATCH)) if before else patch_model(bypassed, **PATCH)
    for which in (psa, bypassed, psa, bypassed, psa):
        out = sample(which, steps=4)
        if which is psa:
            assert error(out, expected) < ROUNDING
            assert sparse_calls(psa) == [0, 2, 2, 2], "the gate is not frozen into the graph"
            assert reasons(psa) == []
        else:
            assert error(out, stock) < ROUNDING
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) < 12
    torch._dynamo.reset()


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
    assert error(out, expected) < ROUNDING
    assert sparse_calls(psa) == [0, 4, 4, 4]
    assert reasons(psa) == []
    assert len(told) == 4

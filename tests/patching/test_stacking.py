"""PSA together with what users put beside it. STACKING is README's table: every row names the tests that prove it."""

import re
import threading
from pathlib import Path

import pytest
import torch

from comfyui_psa.patching import core
from comfyui_psa.patching.override import RUN_KEY, PSAOverride
from comfyui_psa.patching.patch import KEY, patch_model, remove_patch

ROOT = Path(__file__).resolve().parents[2]

STACKING = {
    ("attention override set before (Sage, Model Attention Backend)", "it computes what PSA leaves dense"): (
        "test_an_earlier_override_gets_what_psa_declines",
        "test_no_growth_over_100_steps",
    ),
    ("override set behind that asks the earlier one", "both act"): ("test_a_later_override_that_chains_keeps_psa",),
    ("override set behind that replaces the earlier one", "it acts, PSA says so in the log"): (
        "test_a_later_override_that_replaces_is_named",
    ),
    ("core's Model Sparse Attention before PSA Patch", "PSA acts; the other in the dense steps"): (
        "test_an_earlier_sparse_override_acts_in_the_dense_steps",
    ),
    ("EasyCache, LazyCache", "both act, in either order"): ("test_easy_cache",),
    ("context windows", "sparse in every window"): ("test_context_windows",),
    ("TorchCompileModel", "compiled around PSA; on, bypassed, on again are right"): (
        "test_compile_on_bypassed_on",
        "test_compile_settles",
    ),
    ("LoRA stacks", "before or behind, the same"): ("test_loras",),
    ("LoRA hooks, masked prompts", "sparse"): ("test_hooks_and_masks",),
    ("CFG, batched or split", "sparse"): ("test_guidance_batched_and_split",),
    ("several videos in one batch", "sparse"): ("test_batches",),
    ("fp8 weights", "sparse"): ("test_fp8_weights",),
    ("several PSA Patches in one graph", "each with its own settings; on one model the last"): (
        "test_several_patches_in_one_graph",
    ),
    ("two models at once", "kept apart"): ("test_two_models_at_once",),
}

PATCH = {"sparsity": 0.6, "preset": "auto", "mode": "topk", "min_tokens": 0, "start_percent": 0.25, "end_percent": 1.0}
FULL = PATCH | {"sparsity": 0.01, "pyramid": "1: 1.0", "start_percent": 0.0}


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v")


@pytest.fixture
def sample(tiny_wan):
    return tiny_wan.sample


def report(model):
    return model.get_attachment(KEY).report


def sparse_calls(model):
    return [step["sparse_calls"] for step in report(model)["steps"]]


def assert_close(one, other, tolerance=1e-4):
    assert (one - other).norm() / other.norm() < tolerance


def overridden(model, override):
    clone = model.clone()
    core.set_override(clone, override)
    return clone


class Counting:
    """An attention override as other packs write them: counts self-attention calls, by default computes them dense."""

    def __init__(self, previous=None):
        self.previous, self.calls = previous, 0

    def __call__(self, func, *args, **kwargs):
        self.calls += args[0].shape == args[1].shape
        return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)


def test_readme_has_this_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Together with other nodes\n(.*?)^## ", text, re.M | re.S)[1]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if "|" in line]
    assert rows[2:] == list(STACKING)
    for tests in STACKING.values():
        assert all(callable(globals()[name]) for name in tests)


def test_an_earlier_override_gets_what_psa_declines(model, sample, caplog):
    earlier = Counting()
    with caplog.at_level("INFO"):
        psa = patch_model(overridden(model, earlier), **PATCH)
    assert "override that was there before computes what PSA leaves dense" in caplog.text
    sample(psa, steps=4)
    assert (earlier.calls, sparse_calls(psa)) == (2, [0, 2, 2, 2])
    assert core.get_override(remove_patch(psa)) is earlier


def test_no_growth_over_100_steps(model, sample):
    earlier = Counting()
    psa = patch_model(overridden(model, earlier), **PATCH)
    chains, sizes = set(), set()

    def look(step, *_):
        override = core.get_override(psa)
        chains.add((type(override), override.previous is earlier, len(psa.model_options["transformer_options"])))
        sizes.add(sum(len(by_key) for by_key in psa.wrappers.values()))

    sample(psa, steps=100, size=(1, 16, 2, 16, 32), callback=look)
    assert chains == {(PSAOverride, True, 1)}
    assert len(sizes) == 1
    assert len(report(psa)["steps"]) == 100


def test_a_later_override_that_chains_keeps_psa(model, sample):
    psa = patch_model(model, **PATCH)
    later = Counting(core.get_override(psa))
    both = overridden(psa, later)
    assert torch.equal(sample(both, steps=4), sample(psa, steps=4))
    assert later.calls == 8
    assert sparse_calls(psa) == [0, 2, 2, 2]


def test_a_later_override_that_replaces_is_named(model, sample, caplog):
    later = Counting()
    psa = overridden(patch_model(model, **PATCH), later)
    assert torch.equal(sample(psa), sample(model))
    assert caplog.text.count("a node has put its own attention in front") == 1
    assert later.calls == 2
    assert "wire PSA Patch behind that node" in report(psa)["fallbacks"][0]["reason"]


def test_an_earlier_sparse_override_acts_in_the_dense_steps(model, sample):
    def sparse_of_the_core(func, q, k, v, heads, *args, **kwargs):
        acted.append(q.shape == k.shape)
        return func(q, k, v, heads, *args, **kwargs)

    acted = []
    psa = patch_model(overridden(model, sparse_of_the_core), **PATCH)
    sample(psa, steps=4)
    assert acted.count(True) == 2
    assert sparse_calls(psa) == [0, 2, 2, 2]


@pytest.mark.parametrize("first", ["cache", "psa"])
@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_easy_cache(model, sample, first, name):
    import comfy_extras.nodes_easycache as nodes

    def cached(model):
        (out,) = getattr(nodes, name).execute(model, 3.0, 0.3, 0.9, False).result
        return out

    psa = cached(patch_model(model, **PATCH)) if first == "psa" else patch_model(cached(model), **PATCH)
    full = cached(patch_model(model, **FULL)) if first == "psa" else patch_model(cached(model), **FULL)
    out = sample(psa, steps=10)
    assert torch.isfinite(out).all()
    skipped = 10 * 2 - sum(step["sparse_calls"] + step["dense_calls"] for step in report(psa)["steps"])
    assert skipped > 0, "the cache did skip model calls"
    assert report(psa)["fallbacks"] == []
    assert_close(sample(full, steps=10), sample(cached(model), steps=10), 1e-3)


def test_context_windows(model, sample):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    def windowed(model):
        inputs = (9, 5, "standard_static", 1, False, "pyramid", False)
        names = (
            "context_length",
            "context_overlap",
            "context_schedule",
            "context_stride",
            "closed_loop",
            "fuse_method",
        )
        return WanContextWindowsManualNode.execute(
            model, **dict(zip((*names, "freenoise"), inputs, strict=True))
        ).result[0]

    size = (1, 16, 5, 32, 32)  # windows of 3 latent frames that share 2
    psa = windowed(patch_model(model, **PATCH))
    sample(psa, steps=4, size=size)
    calls = sparse_calls(psa)
    assert calls[0] == 0
    assert min(calls[1:]) >= 4, "more than one window a step"
    assert report(psa)["fallbacks"] == []
    assert report(psa)["grid"][0] < 5
    assert_close(sample(windowed(patch_model(model, **FULL)), size=size), sample(windowed(model), size=size))


def compiled(model):
    """As TorchCompileModel does it, its guard filter included, but without the minutes that generating code takes."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


@pytest.fixture
def compiler():
    """The compiler's counters, from nothing."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(("first", "before"), [("psa", True), ("bypassed", False), ("bypassed", True)])
def test_compile_on_bypassed_on(model, sample, compiler, first, before):
    stock, expected = sample(model, steps=4), sample(patch_model(model, **PATCH), steps=4)
    bypassed = compiled(model)
    psa = compiled(patch_model(model, **PATCH)) if before else patch_model(bypassed, **PATCH)
    order = [psa, bypassed, psa, bypassed] if first == "psa" else [bypassed, psa, bypassed, psa]
    for which in order:
        out = sample(which, steps=4)
        if which is psa:
            assert_close(out, expected, 1e-5)
            assert sparse_calls(psa) == [0, 2, 2, 2], "the gate is not frozen into the graph"
        else:
            assert_close(out, stock, 1e-5)


def test_compile_settles(tiny_wan, sample, compiler):
    deep = tiny_wan.load("t2v", num_layers=6)
    psa = compiled(patch_model(deep, **PATCH))
    sample(psa, steps=4)
    breaks, graphs = sum(compiler["graph_break"].values()), compiler["stats"]["unique_graphs"]
    assert breaks < 12, "breaks are counted per code, not per layer"
    assert graphs < 20
    sample(psa, steps=6)  # ComfyUI's own wrapper code learns that the number of noise levels varies
    compiler.clear()
    sample(psa, steps=5)
    sample(patch_model(psa, **PATCH | {"start_percent": 0.0}), steps=3)
    assert not compiler["graph_break"]
    assert not compiler["stats"].get("unique_graphs"), "later runs compile nothing"


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


def with_lora(model, strength=1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(), strength, 0.0)[0]


def test_loras(model, sample):
    stacked = with_lora(with_lora(model), 0.5)
    dense = sample(stacked)
    assert (dense - sample(model)).norm() / dense.norm() > 1e-6
    assert_close(sample(patch_model(stacked, **FULL)), dense)
    psa = patch_model(stacked, **PATCH)
    behind = with_lora(with_lora(patch_model(model, **PATCH)), 0.5)
    assert torch.equal(sample(psa, steps=4), sample(behind, steps=4))
    assert sparse_calls(psa) == sparse_calls(behind) == [0, 2, 2, 2]
    assert torch.equal(sample(stacked), dense)


def test_hooks_and_masks(model, sample, tiny_wan):
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora(), 1.0, 0.0)
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :16] = 1.0
    left = comfy.hooks.set_conds_props([tiny_wan.conditioning()], 1.0, "default", mask=mask, hooks=hooks)[0]
    right = comfy.hooks.set_conds_props([tiny_wan.conditioning(seed=8)], 1.0, "default", mask=1 - mask)[0]
    arguments = {"positive": left + right, "negative": tiny_wan.conditioning(seed=4), "cfg": 3.0}
    dense = sample(model, **arguments)
    assert_close(sample(patch_model(model, **FULL), **arguments), dense)
    psa = patch_model(model, **PATCH)
    sample(psa, steps=4, **arguments)
    calls = sparse_calls(psa)
    assert calls[0] == 0
    assert min(calls[1:]) >= 4, "the hooked prompt has a model call of its own"
    assert report(psa)["fallbacks"] == []
    assert torch.equal(sample(model, **arguments), dense)


def test_guidance_batched_and_split(model, sample, tiny_wan):
    for negative, forwards in ((tiny_wan.conditioning(seed=4), 1), (tiny_wan.conditioning(text=21, seed=4), 2)):
        arguments = {"cfg": 5.0, "negative": negative}
        assert_close(sample(patch_model(model, **FULL), **arguments), sample(model, **arguments))
        psa = patch_model(model, **PATCH)
        sample(psa, steps=4, **arguments)
        assert sparse_calls(psa) == [0, *[2 * forwards] * 3]


def test_batches(model, sample):
    size = (3, 16, 3, 32, 32)
    assert_close(sample(patch_model(model, **FULL), size=size, cfg=4.0), sample(model, size=size, cfg=4.0))
    psa = patch_model(model, **PATCH)
    sample(psa, steps=4, size=size, cfg=4.0)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert report(psa)["mean_sparsity"] == pytest.approx(0.6, abs=0.05)


def test_fp8_weights(tiny_wan, sample):
    import comfy.sd

    eight = comfy.sd.load_diffusion_model_state_dict(
        tiny_wan.state_dict("t2v"), model_options={"dtype": torch.float8_e4m3fn}
    )
    assert core.network_of(eight).blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    assert_close(sample(patch_model(eight, **FULL)), sample(eight))
    psa = patch_model(eight, **PATCH)
    assert torch.isfinite(sample(psa, steps=4)).all()
    assert sparse_calls(psa) == [0, 2, 2, 2]


def test_several_patches_in_one_graph(model, sample):
    high, low = patch_model(model, **PATCH), patch_model(model, **PATCH | {"sparsity": 0.3})
    twice = patch_model(high, **PATCH | {"sparsity": 0.8})
    assert core.get_override(twice).previous is None
    for psa, target in ((high, 0.6), (low, 0.3), (twice, 0.8), (high, 0.6)):
        sample(psa, steps=4)
        assert report(psa)["mean_sparsity"] == pytest.approx(target, abs=0.06)
    assert RUN_KEY not in high.model_options["transformer_options"]


def test_two_models_at_once(model, sample, tiny_wan):
    # The second model is sampled in the middle of the first one's run, as a callback or a preview may do.
    other = patch_model(tiny_wan.load("animate"), **PATCH)
    psa = patch_model(model, **PATCH)
    alone, other_alone = sample(psa, steps=4), sample(other, steps=2, size=(1, 16, 4, 32, 32))
    inner = []

    def in_between(step, *_):
        if step == 1:
            inner.append(sample(other, steps=2, size=(1, 16, 4, 32, 32)))

    assert torch.equal(sample(psa, steps=4, callback=in_between), alone)
    assert torch.equal(inner[0], other_alone)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert sparse_calls(other) == [0, 5]


def on_two_devices(model, tiny_wan):
    """As MultiGPU CFG Split does it, with a copy of the weights; the CPU by another name stands for the second GPU."""
    both = model.clone()
    both.cached_patcher_init = (tiny_wan.load, ("t2v",))
    second = both.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    both.set_additional_models("multigpu", [second])
    both.match_multigpu_clones()
    return both


@pytest.mark.parametrize("before", [True, False])
def test_two_gpus(model, sample, tiny_wan, before, monkeypatch):
    from comfyui_psa.patching import override

    threads, at_once = set(), threading.Barrier(2, timeout=60)
    real = override.pyramid_sparse_attention

    def attention(*args, **kwargs):
        threads.add(threading.get_ident())
        at_once.wait()  # both are inside the same layer of the same step
        return real(*args, **kwargs)

    arguments = {"cfg": 5.0, "negative": tiny_wan.conditioning(seed=4), "steps": 4}
    one = patch_model(model, **PATCH)
    expected, stock = sample(one, **arguments), sample(on_two_devices(model, tiny_wan), **arguments)
    assert_close(stock, sample(model, **arguments), 1e-5)
    shown = []
    patch = PATCH | {"on_step": shown.append}
    two = (
        on_two_devices(patch_model(model, **patch), tiny_wan)
        if before
        else patch_model(on_two_devices(model, tiny_wan), **patch)
    )
    with monkeypatch.context() as watching:
        watching.setattr(override, "pyramid_sparse_attention", attention)
        out = sample(two, **arguments)
    assert len(threads) == 2
    assert_close(out, expected, 1e-5)
    assert sparse_calls(one) == [0, 2, 2, 2]
    assert sparse_calls(two) == [0, 4, 4, 4]
    assert report(two)["mean_sparsity"] == pytest.approx(report(one)["mean_sparsity"], abs=1e-4)
    assert report(two)["fallbacks"] == []
    assert [figures["step"] for figures in shown] == [0, 1, 2, 3]


def test_a_failure_on_one_of_two_gpus_is_its_own(model, sample, tiny_wan, monkeypatch):
    from comfyui_psa.patching import override

    heads, here = {"cpu": [], "cpu:0": []}, threading.local()
    real, real_try = override.pyramid_sparse_attention, override._try

    def attempt(run, q, k, v, call):
        here.device = str(call["transformer_options"]["multigpu_thread_device"])
        return real_try(run, q, k, v, call)

    def attention(q, *args, **kwargs):
        heads[here.device].append(q.shape[1])
        if here.device == "cpu:0" and q.shape[1] > 1:
            raise torch.OutOfMemoryError("full")
        return real(q, *args, **kwargs)

    monkeypatch.setattr(override, "_try", attempt)
    monkeypatch.setattr(override, "pyramid_sparse_attention", attention)
    psa = patch_model(on_two_devices(model, tiny_wan), **PATCH | {"start_percent": 0.0})
    assert torch.isfinite(sample(psa, cfg=5.0, negative=tiny_wan.conditioning(seed=4), steps=3)).all()
    assert heads["cpu:0"] == [2, *[1] * 12], "the one whose memory is full goes on in two groups"
    assert heads["cpu"] == [2] * 6, "the other knows nothing of it"
    assert sparse_calls(psa) == [4, 4, 4]


def test_two_clones_in_two_threads(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH)
    # A model that is being sampled holds its state, so each thread has one of its own; the patch is what they share.
    clones = [psa.clone(), psa.clone(model_override=(tiny_wan.load("t2v").model, ({}, {}, {}, set())))]
    sizes = [(1, 16, 3, 32, 32), (1, 16, 2, 48, 32)]
    expected = [sample(psa, steps=4, size=size) for size in sizes]
    outputs = [None, None]

    def work(number):
        outputs[number] = sample(clones[number], steps=4, size=sizes[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(out, wanted)
    assert sparse_calls(psa) == [0, 2, 2, 2]

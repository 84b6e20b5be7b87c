"""PSA together with other nodes. STACKING is the table in docs/compatibility.md: every row names the tests that
prove it."""

import functools
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
    ("attention override set before (Sage and others)", "it computes what PSA leaves dense"): (
        "test_an_earlier_override_gets_what_psa_declines",
        "test_no_growth_over_100_steps",
    ),
    ("later override that asks the earlier one", "both act"): ("test_a_later_override_that_chains_keeps_psa",),
    ("later override that replaces the earlier one", "it acts, PSA logs it"): (
        "test_a_later_override_that_replaces_is_named",
    ),
    ("core's Model Attention Backend before PSA Patch (stand-in)", "it computes what PSA leaves dense"): (
        "test_the_backend_of_the_core",
    ),
    ("core's Model Attention Backend after PSA Patch (stand-in)", "it acts, PSA logs it"): (
        "test_the_backend_of_the_core",
    ),
    (
        "core's Model Sparse Attention, before or after (stand-in)",
        "it acts in its part of the schedule, PSA in the rest; if nothing is left, PSA logs it",
    ): ("test_the_sparse_node_of_the_core", "test_a_sparse_node_that_stays_behind_psa"),
    ("EasyCache, LazyCache", "both act, in either order"): ("test_easy_cache",),
    ("context windows", "sparse in every window"): ("test_context_windows",),
    ("TorchCompileModel, before or after", "in the graph; on, bypassed, on again are right"): (
        "test_compile_on_bypassed_on",
    ),
    ("packs that compile block by block", "in the graph of every block"): ("test_single_blocks_compiled",),
    ("LoRA stacks", "before or after, the same"): ("test_loras",),
    ("LoRA hooks, masked prompts", "sparse"): ("test_hooks_and_masks",),
    ("CFG, batched or split", "sparse"): ("test_guidance_batched_and_split",),
    ("several videos in one batch", "sparse"): ("test_batches",),
    ("fp8 weights", "sparse"): ("test_fp8_weights",),
    ("weights in main memory (low VRAM), LoRAs too", "sparse"): ("test_weights_that_stay_in_main_memory",),
    ("GGUF weights (stand-in)", "sparse"): ("test_packed_weights_and_a_patcher_of_their_own",),
    ("several PSA Patches in one graph", "each with its own settings; on one model the last"): (
        "test_several_patches_in_one_graph",
        "test_a_patch_before_another_node_leaves_the_calls_to_the_latest",
    ),
    ("two models at once", "kept apart"): ("test_two_models_at_once", "test_two_clones_in_two_threads"),
    ("MultiGPU CFG Split (the CPU as two devices)", "sparse on every GPU, before or after"): (
        "test_two_gpus",
        "test_a_failure_on_one_of_two_gpus_is_its_own",
    ),
    (
        "Dual Model CFG Guider",
        "PSA Patch on `model` acts on both models; on `model_negative` alone it is never asked",
    ): ("test_two_models_of_one_guider",),
}

PATCH = {"sparsity": 0.6, "preset": "auto", "mode": "topk", "min_tokens": 0, "start_percent": 0.25, "end_percent": 1.0}
PLAIN = PATCH | {"correction": "off"}
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


def reports_nothing(model):
    return report(model)["fallbacks"] == report(model)["notes"] == []


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


def test_the_page_has_this_table():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
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
    assert "put PSA Patch after that node" in report(psa)["notes"][0]


def backend_of_the_core(model):
    """Core's Model Attention Backend, which the ComfyUI of these tests does not have: another dense attention for all
    calls, instead of whatever override was there."""
    from comfy.ldm.modules.attention import attention_pytorch

    def backend(_, *args, **kwargs):
        backend.calls += args[0].shape == args[1].shape
        return attention_pytorch(*args, **kwargs)

    backend.calls = 0
    return overridden(model, backend), backend


def test_the_backend_of_the_core(model, sample, caplog):
    chosen, backend = backend_of_the_core(model)
    psa = patch_model(chosen, **PATCH)
    sample(psa, steps=4)
    assert (backend.calls, sparse_calls(psa)) == (2, [0, 2, 2, 2])
    assert reports_nothing(psa)

    psa = patch_model(model, **PATCH)
    behind, backend = backend_of_the_core(psa)
    sample(behind, steps=4)
    assert backend.calls == 8
    assert caplog.text.count("a node has put its own attention in front") == 1
    assert "put PSA Patch after that node" in report(psa)["notes"][0]


class SparseOfTheCore:
    """Core's Model Sparse Attention, which the ComfyUI of these tests does not have, as far as others notice it: its
    override passes what it declines to the earlier one, and moves to the front again before every step."""

    def __init__(self, start):
        self.start, self.installed, self.calls = start, set(), 0

    def on(self, model, *, moves=True):
        from comfy.patcher_extension import CallbacksMP

        clone = model.clone()
        self.sigma = clone.get_model_object("model_sampling").percent_to_sigma(self.start)
        self.install(clone.model_options["transformer_options"])
        if moves:
            clone.add_callback_with_key(
                CallbacksMP.ON_PREPARE_STATE,
                "sparse",
                lambda patcher, timestep, options, *_: self.install(options["transformer_options"]),
            )
        return clone

    def install(self, options):
        previous = options.get(core.OVERRIDE_KEY)
        if previous in self.installed:
            return

        def override(func, q, k, v, heads, **kwargs):
            if q.shape == k.shape and float(kwargs["transformer_options"]["sigmas"][0]) <= self.sigma:
                self.calls += 1
                return func(q, k, v, heads, **kwargs)
            return (func if previous is None else functools.partial(previous, func))(q, k, v, heads, **kwargs)

        self.installed.add(override)
        options[core.OVERRIDE_KEY] = override


@pytest.mark.parametrize("before", [True, False])
def test_the_sparse_node_of_the_core(model, sample, caplog, before):
    def both(sparse):
        return patch_model(sparse.on(model), **PATCH) if before else sparse.on(patch_model(model, **PATCH))

    early, late = SparseOfTheCore(0.2), SparseOfTheCore(0.7)
    psa = both(late)
    sample(psa, steps=4)
    assert (late.calls, sparse_calls(psa)) == (2, [0, 2, 2, 0]), "it takes its part, PSA the rest"
    assert "in front" not in caplog.text

    psa = both(early)
    assert torch.equal(sample(psa, steps=4), sample(model, steps=4))
    assert (early.calls, sparse_calls(psa)) == (6, [0] * 4)
    assert caplog.text.count("a node has put its own attention in front") == 1
    assert "Model Sparse Attention, which always goes first" in report(psa)["notes"][0]
    assert len(early.installed) <= 2, "no chain that grows with the steps"


def test_a_sparse_node_that_stays_behind_psa(model, sample):
    sparse = SparseOfTheCore(0.0)
    psa = patch_model(sparse.on(model, moves=False), **PATCH)
    sample(psa, steps=4)
    assert (sparse.calls, sparse_calls(psa)) == (2, [0, 2, 2, 2]), "it acts in the steps that PSA leaves dense"


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
            assert_close(out, expected, 1e-5)
            assert sparse_calls(psa) == [0, 2, 2, 2], "the gate is not frozen into the graph"
        else:
            assert_close(out, stock, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["psa", "bypassed"])
def test_single_blocks_compiled(model, sample, compiler, first):
    """As packs do it that compile block by block, with guards on transformer_options dropped."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    stock, expected = sample(model, steps=4), sample(patch_model(model, **PATCH), steps=4)
    bypassed = model.clone()
    keys = [f"diffusion_model.blocks.{block}" for block in range(2)]
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=bypassed, backend="eager", options=options, keys=keys)
    psa = patch_model(bypassed, **PATCH)
    order = [psa, bypassed, psa] if first == "psa" else [bypassed, psa, bypassed]
    for which in order:
        assert_close(sample(which, steps=4), expected if which is psa else stock, 1e-5)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert report(psa)["notes"] == []


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


@pytest.mark.parametrize("with_loras", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.8])
def test_weights_that_stay_in_main_memory(tiny_wan, sample, monkeypatch, kept, with_loras):
    """As ComfyUI loads a model for a GPU that is full: a part of the layers, or none, the others layer by layer."""
    import comfy.model_patcher

    def load(self, device_to=None, lowvram_model_memory=0, *args, **kwargs):
        return real(self, device_to, max(0.1, kept * self.model_size()), *args, **kwargs | {"full_load": False})

    def loaded():
        model = tiny_wan.load("t2v")
        return with_lora(model) if with_loras else model

    expected = sample(patch_model(loaded(), **PATCH), steps=4)
    real = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load)
    offloaded = loaded()
    psa, cast = patch_model(offloaded, **PATCH), set()

    def look(step, *_):
        linear = (x for x in core.network_of(psa).modules() if isinstance(x, torch.nn.Linear))
        cast.update(layer.comfy_cast_weights for layer in linear)

    out = sample(psa, steps=4, callback=look)
    assert psa.model.model_lowvram
    assert cast == ({False, True} if kept else {True})
    if not kept:
        assert bool(psa.lowvram_patch_counter()) == with_loras, "LoRAs are added in every call"
    assert_close(out, expected, 1e-5)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert_close(sample(patch_model(offloaded, **FULL)), sample(offloaded))


def packed(model_state):
    """A MODEL as GGUF loaders make it: layers that hold packed weights and unpack them in every call, and a
    ModelPatcher of its own class, which hands LoRAs to the layers instead of adding them to the weights."""
    import comfy.lora
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd
    import comfy.utils

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            patches = ()

            def _load_from_state_dict(self, state, prefix, *_):
                weight, bias = state[prefix + "weight"], state.get(prefix + "bias")
                self.step = weight.abs().amax(1, keepdim=True) / 127
                values = (weight / self.step).round().to(torch.int8)
                self.weight = torch.nn.Parameter(values, requires_grad=False)
                self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

            def forward(self, x):
                weight = self.weight.to(x) * self.step.to(x)
                if self.patches:
                    weight = comfy.lora.calculate_weight(self.patches, weight, "")
                return torch.nn.functional.linear(x, weight.to(x), None if self.bias is None else self.bias.to(x))

    class PackedPatcher(comfy.model_patcher.ModelPatcher):
        def patch_weight_to_device(self, key, *args, **kwargs):
            layer = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
            if not key.endswith(".weight") or not isinstance(layer, Operations.Linear):
                return super().patch_weight_to_device(key, *args, **kwargs)
            if key in self.patches:
                layer.patches = self.patches[key]
            return None

        def unpatch_model(self, device_to=None, unpatch_weights=True):
            for layer in self.model.modules() if unpatch_weights else ():
                if isinstance(layer, Operations.Linear):
                    layer.patches = ()
            return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

        def load(self, *args, force_patch_weights=False, **kwargs):
            super().load(*args, force_patch_weights=True, **kwargs)

        def clone(self, *args, **kwargs):
            own, self.__class__ = self.__class__, PackedPatcher
            clone = super().clone(*args, **kwargs)
            self.__class__ = own
            return clone

    model = comfy.sd.load_diffusion_model_state_dict(model_state, model_options={"custom_operations": Operations})
    return PackedPatcher.clone(model)


def test_packed_weights_and_a_patcher_of_their_own(tiny_wan, sample):
    model = packed(tiny_wan.state_dict("t2v"))
    assert core.network_of(model).blocks[0].self_attn.q.weight.dtype == torch.int8
    stock = sample(model)
    assert_close(stock, sample(tiny_wan.load("t2v")), 0.05)
    psa = patch_model(model, **PATCH)
    assert type(psa) is type(model)
    assert_close(sample(patch_model(model, **FULL)), stock)
    plain = sample(psa, steps=4)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    before, behind = patch_model(with_lora(model, 8.0), **PATCH), with_lora(patch_model(model, **PATCH), 8.0)
    with_it = sample(before, steps=4)
    assert torch.equal(with_it, sample(behind, steps=4))
    assert sparse_calls(before) == sparse_calls(behind) == [0, 2, 2, 2]
    assert not torch.equal(with_it, plain)
    assert torch.equal(sample(psa, steps=4), plain)
    assert torch.equal(sample(model), stock)


def test_several_patches_in_one_graph(model, sample):
    high, low = patch_model(model, **PATCH), patch_model(model, **PATCH | {"sparsity": 0.3})
    twice = patch_model(high, **PATCH | {"sparsity": 0.8})
    assert core.get_override(twice).previous is None
    for psa, target in ((high, 0.6), (low, 0.3), (twice, 0.8), (high, 0.6)):
        sample(psa, steps=4)
        assert report(psa)["mean_sparsity"] == pytest.approx(target, abs=0.06)
    assert RUN_KEY not in high.model_options["transformer_options"]


@pytest.mark.parametrize("changes", [{}, {"correction": "off"}, {"dense_blocks": "1"}])
def test_a_patch_before_another_node_leaves_the_calls_to_the_latest(model, sample, changes):
    """The node's override asks the one before it for what it is handed."""
    first = patch_model(model, **PATCH | {"sparsity": 0.3})
    between = overridden(first, Counting(core.get_override(first)))
    latest, alone = (patch_model(start, **PATCH | changes) for start in (between, model))
    assert torch.equal(sample(latest, steps=4), sample(alone, steps=4))
    for measured in ("saved", "fallbacks", "notes"):
        assert report(latest)[measured] == report(alone)[measured]
    for counted in ("kind", "sparse_calls", "dense_calls"):
        assert [step[counted] for step in report(latest)["steps"]] == [step[counted] for step in report(alone)["steps"]]
    assert torch.equal(sample(patch_model(between, **PATCH | {"sparsity": 0.0})), sample(model))


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
    """As in MultiGPU CFG Split, with a copy of the weights; the CPU under another name plays the second GPU."""
    both = model.clone()
    both.cached_patcher_init = (tiny_wan.load, ("t2v",))
    second = both.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    both.set_additional_models("multigpu", [second])
    both.match_multigpu_clones()
    return both


@pytest.mark.parametrize("before", [True, False])
def test_two_gpus(model, sample, tiny_wan, before, monkeypatch):
    from comfyui_psa.sampling import self_attention

    threads, at_once = set(), threading.Barrier(2, timeout=60)
    real = self_attention.pyramid_sparse_attention

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
        watching.setattr(self_attention, "pyramid_sparse_attention", attention)
        out = sample(two, **arguments)
    assert len(threads) == 2
    assert_close(out, expected, 1e-5)
    assert sparse_calls(one) == [0, 2, 2, 2]
    assert sparse_calls(two) == [0, 4, 4, 4]
    assert report(two)["mean_sparsity"] == pytest.approx(report(one)["mean_sparsity"], abs=1e-4)
    assert report(two)["fallbacks"] == []
    assert [figures["step"] for figures in shown] == [0, 1, 2, 3]


def test_a_failure_on_one_of_two_gpus_is_its_own(model, sample, tiny_wan, monkeypatch):
    from comfyui_psa.sampling import self_attention

    heads, here = {"cpu": [], "cpu:0": []}, threading.local()
    real, real_sparse = self_attention.pyramid_sparse_attention, PSAOverride._sparse

    def attempt(*args, **kwargs):
        here.device = str(kwargs["transformer_options"]["multigpu_thread_device"])
        return real_sparse(*args, **kwargs)

    def attention(q, *args, **kwargs):
        heads[here.device].append(q.shape[1])
        if here.device == "cpu:0" and q.shape[1] > 1:
            raise torch.OutOfMemoryError("full")
        return real(q, *args, **kwargs)

    monkeypatch.setattr(PSAOverride, "_sparse", attempt)
    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    psa = patch_model(on_two_devices(model, tiny_wan), **PLAIN | {"start_percent": 0.0})
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


def test_two_models_of_one_guider(model, tiny_wan):
    """The core computes both prompts with the options of the first model."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    other, noise = tiny_wan.load("t2v", scale=0.04), tiny_wan.normal(*tiny_wan.SIZE, seed=1)

    def sample(one, two):
        prompts = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
        (guider,) = DualModelGuider.execute(one, prompts[0], 3.0, two, prompts[1]).args
        sigmas = comfy.samplers.calculate_sigmas(one.get_model_object("model_sampling"), "simple", 4)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=1)

    stock, full = sample(model, other), FULL | {"correction": "off"}
    psa, beside = patch_model(model, **full), patch_model(other, **full)
    assert_close(sample(psa, other), stock)
    assert sparse_calls(psa) == [4] * 4, "two blocks of either model"
    assert torch.equal(sample(model, beside), stock)
    assert not report(beside)

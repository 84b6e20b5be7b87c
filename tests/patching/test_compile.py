"""Models that are compiled, as a whole and block by block: one graph serves every step, and no graph breaks at PSA."""

import functools
import importlib
import sys
import threading

import pytest
import torch

from comfyui_psa.patching import core, written
from comfyui_psa.patching.operator import attention_operator, model_call
from comfyui_psa.patching.override import PSAOverride
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.workshop.tools.paths import ROOT

from .core_nodes import compiled
from .patched import PATCH, calls, distance

LAYERS = 3
BLOCKS = [f"diffusion_model.blocks.{block}" for block in range(LAYERS)]
PARTS = pytest.mark.parametrize("keys", [None, BLOCKS], ids=["whole", "blocks"])

pytestmark = pytest.mark.slow(seconds=15)


@pytest.fixture
def sample(tiny_wan):
    return functools.partial(tiny_wan.sample, steps=4)


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v", num_layers=LAYERS)


def loaded_with_lora(model, strength):
    clone = model.clone()
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    down = torch.randn(1, 256, generator=torch.Generator().manual_seed(5))
    clone.add_patches({key: ("diff", (0.1 * down.T @ down,))}, strength)
    return clone


@pytest.mark.parametrize(
    ("keys", "guards_on_options"),
    [(None, False), (BLOCKS, False), (BLOCKS, True)],
    ids=["whole", "blocks", "blocks with all guards"],
)
def test_one_graph_serves_every_step_and_every_setting(model, sample, compiler, keys, guards_on_options):
    def run(changes=PATCH, strength=0.0, **how):
        psa = patch_model(loaded_with_lora(model, strength), **changes)
        expected = sample(psa, **how)
        wanted = calls(psa)
        psa = compiled(psa, keys, guards_on_options=guards_on_options, fullgraph=True)
        assert torch.equal(sample(psa, **how), expected)
        assert calls(psa) == wanted
        made = compiler["stats"].pop("unique_graphs", 0)
        assert not compiler["graph_break"]
        return made

    assert run() <= 2, "the first block is one of its own without PSA, too: its input has other strides"
    run(steps=6)  # ComfyUI's own wrapper code learns that the number of noise levels varies
    assert run(steps=5) == 0, "per step"
    assert run(PATCH | {"sparsity": 0.8}) == 0, "per sparsity"
    assert run(PATCH | {"start_percent": 0.0, "dense_blocks": "1"}) == 0
    assert run(strength=0.5) == run(strength=0.8) == 0, "per LoRA strength"
    assert run(positive=[[torch.randn(1, 13, 4096), {}]]) == 0, "per prompt"
    assert run(PATCH | {"correction": "full"}) == 0, "learning and corrected steps"
    graphs = run(size=(1, 16, 3, 32, 24))
    assert graphs <= (1 if keys is None else 2), "once per grid and kind of block"


@PARTS
@pytest.mark.parametrize("first", ["psa", "sparsity 0"])
def test_with_and_without_psa_in_one_session(model, sample, compiler, keys, first):
    stock = compiled(model, keys)
    expected = sample(model)
    psa = patch_model(stock, **PATCH)
    wanted = sample(patch_model(model, **PATCH))
    without = patch_model(stock, **PATCH | {"sparsity": 0.0}) if first == "sparsity 0" else stock
    for which in (psa, without, psa, without) if first == "psa" else (without, psa, without, psa):
        assert torch.equal(sample(which), wanted if which is psa else expected)
    assert calls(psa) == ([(0, LAYERS), *[(LAYERS, 0)] * 3], [], [])


def test_compiled_blocks_that_are_patched_into_the_model(model, sample, compiler):
    """The other way of packs, without ComfyUI's wrapper, which also compiles for a model that is not patched."""
    clone = model.clone()
    for key in BLOCKS:
        clone.add_object_patch(key, torch.compile(clone.get_model_object(key), backend="eager", fullgraph=True))
    for settings in (PATCH | {"sparsity": 0.0}, PATCH | {"correction": "full"}, PATCH):
        wanted = patch_model(model, **settings)
        expected = sample(wanted)
        psa = patch_model(clone, **settings)
        assert torch.equal(sample(psa), expected)
        assert settings["sparsity"] == 0.0 or calls(psa) == calls(wanted)


def test_code_that_the_compiler_generates(model, sample, compiler):
    psa = patch_model(model, **PATCH)
    expected = sample(psa)
    out = sample(compiled(psa, BLOCKS[:1], backend="inductor", fullgraph=True))
    assert distance(out, expected) < 1e-4
    assert calls(psa) == ([(0, LAYERS), *[(LAYERS, 0)] * 3], [], [])


@PARTS
@pytest.mark.parametrize("kind", ["vace", "t2v"])
def test_blocks_keep_their_numbers(tiny_wan, sample, compiler, keys, kind):
    """With what each block learned; a mix-up would correct it with another one's loss."""
    seen = []

    def previous(func, *args, **kwargs):
        seen.append(kwargs["transformer_options"].get("block_index"))
        return func(*args, **kwargs)

    model = tiny_wan.load(kind, num_layers=LAYERS)
    core.set_override(model, torch.compiler.disable(previous))  # like Sage: it breaks graphs at cross-attention
    psa = patch_model(model, **PATCH | {"correction": "full", "dense_blocks": "1"})
    expected, wanted, seen_by = sample(psa, cfg=4.0), calls(psa), seen.copy()
    seen.clear()
    assert torch.equal(sample(compiled(psa, keys), cfg=4.0), expected)
    assert calls(psa) == wanted
    assert seen == seen_by


@PARTS
def test_another_node_breaks_the_graph_between_blocks(model, sample, compiler, keys):
    def replacement(args, extra):
        torch._dynamo.graph_break()
        return extra["original_block"](args)

    clone = model.clone()
    for block in range(LAYERS):
        clone.set_model_patch_replace(replacement, "dit", "double_block", block)
    psa = patch_model(clone, **PATCH | {"correction": "full", "dense_blocks": "1"})
    expected, wanted = sample(psa), calls(psa)
    assert torch.equal(sample(compiled(psa, keys)), expected)
    assert calls(psa) == wanted


def as_it_is(func):
    return func


def closure(func):
    return lambda *args, **kwargs: func(*args, **kwargs)


class Owned:
    def __init__(self, func):
        self.func = func

    def __call__(self, *args, **kwargs):
        return self.func(*args, **kwargs)


@pytest.mark.parametrize(
    ("changed", "extra", "breaks"),
    [
        (as_it_is, {"low_precision": 3, "factor": 1.5, "flag": True, "type": torch.float16}, False),
        (as_it_is, {"plan": {}}, True),
        (closure, {}, True),
        (functools.partial, {}, True),
        (Owned, {}, True),
    ],
)
def test_a_later_node_with_its_own_dense_attention(model, sample, compiler, changed, extra, breaks):
    """All arguments arrive; what cannot be part of a graph breaks it instead of ending the prompt."""
    given = []

    def previous(func, *args, **kwargs):
        given.append({name: kwargs[name] for name in extra})
        return func(*args, **{name: value for name, value in kwargs.items() if name not in extra})

    clone = model.clone()
    core.set_override(clone, previous)
    psa = patch_model(clone, **PATCH)
    ours = core.get_override(psa)

    def later(func, *args, **kwargs):
        if args[0].shape != args[1].shape:
            return func(*args, **kwargs)
        return ours(changed(func), *args, **kwargs, **extra)

    core.set_override(psa, later)
    expected, wanted, arrived = sample(psa), calls(psa), given.copy()
    given.clear()
    assert torch.equal(sample(compiled(psa, BLOCKS, fullgraph=not breaks)), expected)
    assert calls(psa) == wanted
    assert given == arrived != []


def test_two_threads(tiny_wan, sample, compiler):
    """Each with a model of its own: core puts compiled parts into a model while it runs."""
    patched = [
        patch_model(tiny_wan.load("t2v", num_layers=LAYERS), **setting)
        for setting in (PATCH, PATCH | {"start_percent": 0.6})
    ]
    expected = [sample(psa) for psa in patched]
    models = [compiled(psa, BLOCKS) for psa in patched]
    outputs = {}

    def run(which):
        outputs[which] = sample(models[which])

    run(0)  # graphs are made one at a time
    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(outputs[which], expected[which]) for which in (0, 1))


def test_after_an_error_graphs_find_no_run(model, sample, compiler):
    """A graph outside of a run, left by one that failed, computes the model's dense attention."""
    psa = compiled(patch_model(model, **PATCH), BLOCKS)

    def interrupt(step, *_):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(psa, callback=interrupt)
    dense, x = inner(), torch.randn(3, 1, 64, 256)
    operator = attention_operator()
    found = operator(*x, "comfy.ldm.modules.attention:attention_pytorch:1", [], [2], [], "int", -1, "")
    assert torch.equal(found, dense(*x, 2))
    assert torch.equal(sample(psa), sample(patch_model(model, **PATCH)))


def inner():
    """The function that the core hands to an override."""
    import comfy.ldm.modules.attention

    return comfy.ldm.modules.attention.attention_pytorch.__wrapped__


def test_gradients_pass_through_the_dense_attention(comfyui, compiler):
    override, dense = PSAOverride(None), inner()
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 64, 256))

    def attend(q, k, v):
        return override(dense, q, k, v, 2, transformer_options={})

    torch.compile(attend, backend="aot_eager")(q, k, v).sum().backward()
    expected = torch.autograd.grad(dense(q, k, v, 2).sum(), (q, k, v))
    assert all(torch.allclose(x.grad, wanted) for x, wanted in zip((q, k, v), expected, strict=True))


@pytest.mark.parametrize("by_heads", [False, True])
@pytest.mark.parametrize("keeps_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_torchs_rules(comfyui, by_heads, keeps_heads, dtype):
    import comfy.ldm.modules.attention  # noqa: F401

    shape = (2, 3, 64, 32) if by_heads else (2, 64, 96)
    q, k, v = torch.randn(3, *shape).to(dtype)
    place = "comfy.ldm.modules.attention:attention_pytorch:1"
    words = f"int,mask=tensor,scale=float,skip_reshape={by_heads},skip_output_reshape={keeps_heads}"
    mask = torch.zeros(64, 64, dtype=dtype)
    arguments = (q, k, v, place, [mask], [3], [0.25], words, -1, "")
    torch.library.opcheck(attention_operator(), arguments)
    found = attention_operator()(*arguments)
    form = {"skip_reshape": by_heads, "skip_output_reshape": keeps_heads}
    assert torch.equal(found, inner()(q, k, v, 3, mask=mask, scale=0.25, **form))


def test_the_operator_is_kept_out_of_cuda_graphs():
    assert torch.Tag.cudagraph_unsafe in attention_operator().tags


def test_the_pack_loaded_twice_has_two_operators(comfyui):
    """As a custom node and as a library: each finds its own model calls."""
    import comfy.ldm.modules.attention  # noqa: F401

    name = "comfyui_psa_again"
    importlib.import_module("comfyui_psa.workshop.pack").load_package(name, ROOT)
    try:
        other = importlib.import_module(f"{name}.patching.operator")
        x = torch.randn(3, 1, 64, 256)
        call = (*x, "comfy.ldm.modules.attention:attention_pytorch:1", [], [2], [], "int", -1, "")
        with model_call(lambda func, q, k, v, *_, **__: q + 1, {}):
            assert torch.equal(attention_operator()(*call), x[0] + 1)
            assert torch.equal(other.attention_operator()(*call), inner()(*x, 2))
    finally:
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((2,), {}),
        ((2, None, torch.float16, True), {"scale": 0.5, "mask": torch.ones(2), "heads": 3}),
        ((torch.zeros(1), 1, torch.ones(1)), {"a": 2, "b": 0.25, "c": False, "d": torch.bfloat16, "e": None, "f": 7}),
    ],
)
def test_arguments_come_back_as_they_were_written(args, kwargs):
    found_args, found_kwargs = written.read(*written.write(args, kwargs))
    assert list(found_kwargs) == list(kwargs)
    for found, given in zip([*found_args, *found_kwargs.values()], [*args, *kwargs.values()], strict=True):
        assert found is given or (type(found) is type(given) and found == given)


def test_what_cannot_be_written_down_is_told():
    assert written.write((2,), {"plan": {}}) is None


def returns_an_input(q, k, v, heads):
    return v


def test_an_attention_that_returns_its_input(compiler):
    """As nodes do that disturb guidance on purpose: an operator must not, so it is copied."""
    q, k, v = torch.randn(3, 1, 64, 256)
    override = PSAOverride(None)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(q, k, v):
        return override(returns_an_input, q, k, v, 2, transformer_options={})

    with torch.no_grad():
        found = attend(q, k, v)
    assert torch.equal(found, v)
    assert found.data_ptr() != v.data_ptr()

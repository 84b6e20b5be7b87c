"""What newer cores offer an attention override: q, k, v in containers, an attention that the checkpoint prefers, and a
recording of what a block allocates. Stand-ins, written from their source, where the core under test has none of it.
"""

import contextlib
import functools
import sys
import weakref

import pytest
import torch

from comfyui_psa.patching import core, override
from comfyui_psa.patching.patch import patch_model

from . import patched
from .patched import calls

PATCH = patched.PATCH | {"correction": "full", "dense_blocks": "1"}
STEPS = 4


@pytest.fixture
def model(tiny_wan):
    return tiny_wan.load("t2v")


@pytest.fixture
def sample(tiny_wan):
    return functools.partial(tiny_wan.sample, steps=STEPS)


class Container:
    """A tensor that its only owner takes out."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "taken twice"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


@pytest.fixture
def hands_over(monkeypatch, comfyui):
    """The models' attention takes containers, Wan hands them over, and the backend frees them before it returns."""
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model

    genuine = comfy.ldm.modules.attention.optimized_attention
    inner = genuine.__wrapped__
    freed = []

    def attention(*args, preferred_attention=None, **kwargs):
        ours = (
            None if "_inside_attn_wrapper" in kwargs else kwargs.get("transformer_options", {}).get(core.OVERRIDE_KEY)
        )
        kwargs["_inside_attn_wrapper"] = True
        in_containers = isinstance(args[0], Container)
        if ours is not None and in_containers and hasattr(ours, "container_function"):
            return ours.container_function(*args, **kwargs)
        if in_containers and ours is None:
            return backend(*args, **kwargs)
        taken = [*(container.take() for container in args[:3]), *args[3:]] if in_containers else args
        return inner(*taken, **kwargs) if ours is None else ours(inner, *taken, **kwargs)

    def backend(q, k, v, *args, **kwargs):
        tensors = [container.take() for container in (q, k, v)]
        output = inner(*tensors, *args, **kwargs)
        owners = [weakref.ref(tensor) for tensor in tensors]
        del tensors
        freed.append(all(owner() is None for owner in owners))
        return output

    attention.__wrapped__ = inner

    def in_containers(q, k, v, *args, **kwargs):
        tensors = [Container(x.view_as(x)) for x in (q, k, v)]  # of which nobody else knows
        return attention(*tensors, *args, **kwargs)

    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", attention)
    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", in_containers)
    return freed


def test_the_override_takes_containers(model, sample, request):
    psa = patch_model(model, **PATCH)
    expected, wanted = sample(psa), calls(psa)
    freed = request.getfixturevalue("hands_over")
    assert torch.equal(sample(psa), expected)
    assert calls(psa) == wanted
    assert freed == [True] * (2 * STEPS), "cross-attention stays in its containers"


def test_dense_steps_stay_in_containers(model, sample, hands_over):
    """The backend is their only owner, as without PSA."""
    psa = patch_model(model, **PATCH | {"start_percent": 0.99, "correction": "off"})
    assert torch.equal(sample(psa), sample(model))
    assert calls(psa)[0] == [(0, 2)] * STEPS
    assert hands_over == [True] * (2 * 4 * STEPS)


@pytest.mark.parametrize("takes", [False, True])
def test_an_earlier_override_gets_containers_only_if_it_takes_them(model, sample, hands_over, takes):
    given = []

    def previous(func, q, k, v, *args, **kwargs):
        given.append(q)
        return func(q, k, v, *args, **kwargs)

    def containers(q, k, v, *args, **kwargs):
        given.append(q)
        wrapped, _ = core.dense_attention()
        return wrapped(q, k, v, *args, **kwargs)

    if takes:
        previous.container_function = containers
    expected = sample(patch_model(model, **PATCH))
    clone = model.clone()
    core.set_override(clone, previous)
    psa = patch_model(clone, **PATCH)
    assert torch.equal(sample(psa), expected)
    assert {type(q) for q in given} == ({torch.Tensor, Container} if takes else {torch.Tensor})


@pytest.mark.parametrize("compiles", [False, True])
def test_the_core_takes_its_containers_itself(comfyui, compiles):
    """What `hands_over` imitates, on a core that has it."""
    import comfy.ldm.modules.attention as attention

    if not hasattr(attention, "AttentionTensorContainer"):
        pytest.skip("this core has no containers")
    q, k, v = torch.randn(3, 1, 64, 256)
    options = {core.OVERRIDE_KEY: override.PSAOverride(None)}

    def attend(q, k, v):
        containers = [attention.AttentionTensorContainer(x) for x in (q, k, v)]
        return attention.optimized_attention(*containers, heads=2, transformer_options=options)

    if compiles:
        attend = torch.compile(attend, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), attention.optimized_attention(q, k, v, heads=2))


def attend_in_int8(seen):
    """A checkpoint's own attention: tells where it was called, and computes something else."""

    def attention(q, k, v, heads, **kwargs):
        seen.append((kwargs["transformer_options"]["block_index"], q.shape == k.shape))
        return v * 0.5 if q.shape == v.shape else q * 0.5

    return attention


class Preferring(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.config, self.function = None, function


def test_dense_calls_use_what_the_checkpoint_prefers(model, sample):
    """In its own block, for self-attention and cross-attention; PSA's sparse calls are PSA's."""
    expected, seen = sample(patch_model(model, **PATCH)), []
    block = core.network_of(model).blocks[1]
    for part in (block.self_attn, block.cross_attn):
        part.comfy_attention = Preferring(attend_in_int8(seen))
    psa = patch_model(model, **PATCH | {"dense_blocks": "", "correction": "off"})
    assert not torch.equal(sample(psa), expected)
    assert calls(psa)[0] == [(0, 2), *[(2, 0)] * (STEPS - 1)]
    assert seen == [(1, True), *[(1, False)] * STEPS]


def test_an_earlier_override_wins_over_what_the_checkpoint_prefers(model, sample):
    """As it does in the core without PSA."""
    seen = []
    core.network_of(model).blocks[1].self_attn.comfy_attention = Preferring(attend_in_int8(seen))
    clone = model.clone()
    core.set_override(clone, lambda func, *args, **kwargs: func(*args, **kwargs))
    sample(patch_model(clone, **PATCH))
    assert seen == []


def test_a_block_without_a_function_prefers_nothing(model):
    network = core.network_of(model)
    assert core.preferred_attention(network) == {}
    network.blocks[1].cross_attn.comfy_attention = Preferring(None)
    network.blocks[0].cross_attn.comfy_attention = Preferring(print)
    assert core.preferred_attention(network) == {("blocks", 0): [print]}


def test_each_kind_of_block_has_its_own_preference():
    found = {("double_blocks", 0): [min], ("single_blocks", 0): [max], ("double_blocks", 1): [abs]}

    def preferred(number, kind):
        return core.preferred_in_block({core.PREFERRED_KEY: found, "block_index": number, "block_type": kind})

    assert (preferred(0, "double"), preferred(0, "single"), preferred(1, "double")) == ([min], [max], [abs])
    assert preferred(2, "double") == core.preferred_in_block({}) == []
    found = {("blocks", 0): [min], ("vace_blocks", 0): [max]}
    assert preferred(0, "double") == [min]


def test_a_core_that_records_nothing_is_not_asked_to_stop(comfyui, monkeypatch):
    prefetch = pytest.importorskip("comfy.model_prefetch")
    monkeypatch.delattr(prefetch, "pause_malloc_graph", raising=False)
    assert isinstance(core.outside_malloc_graph(), contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", None)  # as before there was one
    assert isinstance(core.outside_malloc_graph(), contextlib.nullcontext)


def test_what_psa_keeps_is_made_outside_the_recording(model, sample, monkeypatch):
    """And the model's own dense attention inside it."""
    import comfy.model_prefetch as prefetch

    from comfyui_psa.sampling.correction import LossStore
    from comfyui_psa.sampling.kept import Kept
    from comfyui_psa.sampling.record import Record

    paused, seen = [], []

    @contextlib.contextmanager
    def pause():
        paused.append(True)
        yield
        paused.pop()

    def watch(owner, name):
        genuine = getattr(owner, name)

        def watched(self, *args, **kwargs):
            seen.append((name, bool(paused)))
            return genuine(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    monkeypatch.setattr(prefetch, "pause_malloc_graph", pause, raising=False)
    for owner, name in ((LossStore, "put"), (Kept, "put"), (Record, "sparse_call"), (Record, "learned_call")):
        watch(owner, name)

    def previous(func, *args, **kwargs):
        seen.append(("dense", bool(paused)))
        return func(*args, **kwargs)

    core.set_override(model, previous)
    sample(patch_model(model, **PATCH | {"reuse_steps": 2}))
    sample(patch_model(model, **PATCH | {"reuse_steps": 2, "correction": "off"}))
    assert dict(seen) == {"put": True, "sparse_call": True, "learned_call": True, "dense": False}
    assert len(set(seen)) == 4
    assert not paused

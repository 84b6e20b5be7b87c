"""Other nodes with an attention of their own, and a second PSA Patch: which of them computes what."""

import functools

import pytest
import torch

from comfyui_psa.patching import core
from comfyui_psa.patching.override import RUN_KEY, PSAOverride
from comfyui_psa.patching.patch import patch_model, remove_patch

from .patched import PATCH, report, reports_nothing, sparse_calls


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
    after, backend = backend_of_the_core(psa)
    sample(after, steps=4)
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


def test_a_sparse_node_that_does_not_move_to_the_front(model, sample):
    sparse = SparseOfTheCore(0.0)
    psa = patch_model(sparse.on(model, moves=False), **PATCH)
    sample(psa, steps=4)
    assert (sparse.calls, sparse_calls(psa)) == (2, [0, 2, 2, 2]), "it acts in the steps that PSA leaves dense"


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

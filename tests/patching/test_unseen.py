"""Attention that PSA never sees: caches that answer for the model, and packs that bring a forward of their own."""

import pytest

from comfyui_psa.patching import core
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.reports.show import show_report

from .core_nodes import cached
from .patched import PATCH, kinds, report


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("first", ["psa", "cache"])
def test_a_cache_that_answers_all_active_steps(model, sample, caplog, node, first):
    told = []
    patch = PATCH | {"start_percent": 0.6, "on_step": told.append}
    psa = cached(patch_model(model, **patch), node) if first == "psa" else patch_model(cached(model, node), **patch)
    sample(psa, steps=8)
    (note,) = report(psa)["notes"]
    assert "a cache answered all 3 steps in which PSA is active" in note
    assert "in front" not in caplog.text
    assert caplog.text.count("a cache answered all") == 1
    assert kinds(psa).count("skipped") >= 3
    assert kinds(psa)[0] == "dense"
    assert len(kinds(psa)) == 8
    assert [figures["kind"] for figures in told] == kinds(psa)


def test_skipped_steps_are_not_dense(model, sample, caplog):
    psa = patch_model(cached(model, start=0.4, end=0.8), **PATCH)
    with caplog.at_level("INFO"):
        sample(psa, steps=10)
    skipped = kinds(psa).count("skipped")
    assert skipped
    assert kinds(psa).count("dense") == 3
    line = next(record.message for record in caplog.records if "steps sparse" in record.message)
    assert f"{skipped} skipped" in line
    assert "the dense ones 0.00 s" not in line
    time, steps = report(psa)["time"], report(psa)["steps"]
    assert time["dense_steps"] == pytest.approx(sum(s["seconds"] for s in steps if s["kind"] == "dense"), abs=1e-3)
    from comfyui_psa.reports.draw_report import headline

    assert f"{skipped} skipped by a cache" in headline(report(psa))


def test_a_schedule_without_a_step_is_no_fault_of_a_cache(model, tiny_wan, caplog):
    """The first half of a schedule that was split at its first step. The report stays that of the run before."""
    psa = patch_model(model, **PATCH)
    assert tiny_wan.sample_custom(psa, [1.0]).shape == tiny_wan.SIZE
    assert report(psa) is None
    assert caplog.text == ""
    tiny_wan.sample_custom(psa, [1.0, 0.5, 0.0])
    before = report(psa)
    tiny_wan.sample_custom(psa, [0.5])
    assert report(psa) == before


def without_options(network):
    """As in TeaCache and MagCache packs: their own forward, whose blocks get no transformer_options."""

    def forward_orig(x, t, context, clip_fea=None, freqs=None, transformer_options=None, **kwargs):
        blocks = [block.forward for block in network.blocks]
        for block, genuine in zip(network.blocks, blocks, strict=True):
            block.forward = lambda x, genuine=genuine, **kw: genuine(x, **{**kw, "transformer_options": {}})
        try:
            return type(network).forward_orig(
                network, x, t, context, clip_fea=clip_fea, freqs=freqs, transformer_options=transformer_options or {},
                **kwargs,
            )  # fmt: skip
        finally:
            for block in network.blocks:
                del block.forward

    return forward_orig


@pytest.mark.parametrize("before", [True, False])
def test_a_pack_that_replaces_the_forward(model, sample, caplog, before):
    from unittest.mock import patch

    def with_pack(model):
        clone = model.clone()

        def wrapper(apply, given):
            network = core.network_of(clone)
            with patch.object(network, "forward_orig", without_options(network)):
                return apply(given["input"], given["timestep"], **given["c"])

        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    psa = patch_model(with_pack(model), **PATCH) if before else with_pack(patch_model(model, **PATCH))
    sample(psa, steps=4)
    (note,) = report(psa)["notes"]
    assert "replaced the model's own forward (forward_orig)" in note
    assert "changing the order of the nodes does not help" in note
    assert "put PSA Patch" not in caplog.text
    assert kinds(psa) == ["unseen"] * 4


def own_attention(block):
    """As patches of Sage Attention that save memory: the forward of the block's self-attention, without asking."""
    attention = block.self_attn

    def forward(x, freqs, transformer_options=None, **kwargs):
        return type(attention).forward(attention, x, freqs, transformer_options={}, **kwargs)

    return forward


def test_a_patch_of_the_self_attention(model, sample):
    clone = patch_model(model, **PATCH)
    for i, block in enumerate(core.network_of(model).blocks):
        clone.add_object_patch(f"diffusion_model.blocks.{i}.self_attn.forward", own_attention(block))
    sample(clone, steps=4)
    (note,) = report(clone)["notes"]
    assert "replaced the model's own forward (blocks.0.self_attn.forward and 1 more)" in note
    assert kinds(clone) == ["unseen"] * 4
    plain = patch_model(model, **PATCH)
    sample(plain, steps=4)
    assert report(plain)["notes"] == [], "nothing of it is left on the model"


def test_blocks_that_psa_never_saw_are_named(tiny_wan, sample, caplog):
    deep = tiny_wan.load("t2v", num_layers=5)
    clone = patch_model(deep, **PATCH)
    blocks = core.network_of(deep).blocks
    for i in (0, 3, 4):
        clone.add_object_patch(f"diffusion_model.blocks.{i}.self_attn.forward", own_attention(blocks[i]))
    sample(clone, steps=4)
    (note,) = report(clone)["notes"]
    assert note.startswith("PSA never saw blocks 0, 3-4: ")
    assert caplog.text.count("PSA never saw") == 1
    assert show_report(clone, {}, -1, 0, None)

"""Presets: the published numbers are the published numbers, and every preset can be used."""

from pathlib import Path

import pytest

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.kernels import ConfigError

# Cumulative bounds as published: mode, order, block_q, block_kv, bounds at the pooling factors 1, 2, 4, 8.
PUBLISHED = {
    "wan2.1-14b": ("threshold", "curve", 128, 128, (0.40, 0.50, 0.60, 0.80)),
    "wan2.1-1.3b": ("threshold", "curve", 128, 128, (0.50, 0.60, 0.70, 0.80)),
    "wan2.1-1.3b-topk": ("topk", "curve", 128, 32, (0.05, 0.10, 0.15, 0.25)),
    "wan2.2-a14b": ("threshold", "curve", 128, 32, (0.50, 0.60, 0.60, 0.80)),
    "wan2.2-5b": ("threshold", "curve", 128, 32, (0.60, 0.70, 0.70, 0.80)),
    "cogvideox1.5-5b": ("topk", "curve", 128, 32, (0.10, 0.15, 0.15, 0.35)),
    "cogvideox-5b": ("topk", "raster", 128, 128, (0.10, 0.15, 0.15, 0.35)),
    "cogvideox-5b-4step": ("topk", "raster", 128, 128, (0.05, 0.15, 0.25, 0.50)),
    "module-default": ("topk", "raster", 128, 64, (0.10, 0.15, 0.15, 0.35)),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_numbers(name):
    mode, order, block_q, block_kv, bounds = PUBLISHED[name]
    config = load_presets()[name + " (published)"].config(None)
    assert (config.mode, config.order, config.block_q, config.block_kv) == (mode, order, block_q, block_kv)
    cumulative, before = {}, 0.0
    for factor, bound in zip((1, 2, 4, 8), bounds, strict=True):
        if bound > before:
            cumulative[factor] = bound
        before = bound
    assert config.factors == tuple(cumulative)
    assert config.bounds == pytest.approx(tuple(cumulative.values()))
    assert config.importance == "sampled"
    assert config.sample_share == 0.25
    assert config.reduction == "max"
    assert not config.tail
    capped = name == "wan2.1-1.3b"
    assert config.similarity_cap == ({2: 0.70, 4: 0.65, 8: 0.60} if capped else {})


def test_every_published_preset_has_one_of_ours():
    assert set(load_presets()) == {
        *PUBLISHED,
        *(name + " (published)" for name in PUBLISHED),
        "wan-4step-lora",
        "generic",
    }


def test_the_generic_preset_has_the_levels_of_the_default():
    presets = load_presets()
    assert presets["generic"].config(0.85) == presets["module-default"].config(0.85)


def test_the_4_step_preset_says_its_dense_share_in_steps_and_is_the_default_otherwise():
    presets = load_presets()
    assert {name: preset.dense_steps for name, preset in presets.items() if preset.dense_steps is not None} == {
        "wan-4step-lora": 1
    }
    assert presets["wan-4step-lora"].config(0.85) == presets["module-default"].config(0.85)


@pytest.mark.parametrize("name", list(PUBLISHED))
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.85, 0.96])
def test_ours_take_a_sparsity(name, sparsity):
    preset = load_presets()[name]
    config = preset.config(sparsity)
    assert config.sparsity == sparsity
    assert not config.tail
    assert preset.about
    assert config.bounds == load_presets()[name + " (published)"].config(None).bounds


def test_the_default_is_what_its_evidence_measured():
    preset = load_presets()["module-default"]
    config = preset.config(0.85)
    assert (config.mode, config.order, config.block_q, config.block_kv) == ("topk", "curve", 128, 64)
    assert (config.importance, config.reduction) == ("pooled", "mean")
    page = Path(__file__).resolve().parents[2] / preset.evidence
    assert "`module-default`" in page.read_text(encoding="utf-8")


def test_changes_win_over_the_preset():
    preset = load_presets()["wan2.1-14b (published)"]
    config = preset.config(0.8, mode="budget", block_kv=32, tail=True)
    assert (config.mode, config.sparsity, config.block_kv, config.tail) == ("budget", 0.8, 32, True)
    assert preset.config(0.8).sparsity is None  # threshold: the data decide


def test_an_impossible_change_names_its_field():
    with pytest.raises(ConfigError) as caught:
        load_presets()["wan2.1-14b"].config(0.8, block_q=50)
    assert caught.value.field == "block_q"


def test_loading_twice_shares_nothing():
    first, second = load_presets(), load_presets()
    first["module-default"].settings["shares"][1] = 0.9
    assert second["module-default"].settings["shares"][1] == 0.1
    assert load_presets()["module-default (published)"].settings["shares"][1] == 0.1

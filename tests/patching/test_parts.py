"""Prompts for parts of the video: each part has a grid of its own, in the run and in the report."""

import json

import pytest

from comfyui_psa.patching.patch import KEY, patch_model
from comfyui_psa.reports import show
from comfyui_psa.sampling import self_attention

from .patched import PATCH, report


@pytest.mark.parametrize("first", [True, False])
def test_area_prompts(model, sample, tiny_wan, first):
    part = tiny_wan.area(8, 32, 16, 0, 0)
    whole = tiny_wan.conditioning()
    psa = patch_model(model, **PATCH)
    out = sample(psa, steps=4, positive=part + whole if first else whole + part)
    found = report(psa)
    assert found is not None
    assert found["grid"] == [3, 16, 16]
    assert [entry["grid"] for entry in found["grids"]] == [[3, 16, 16], [3, 16, 8]]
    assert [entry["sparse_calls"] for entry in found["grids"]] == [6, 6]
    assert all(entry["sparsity"] == pytest.approx(0.6, abs=0.05) for entry in found["grids"])
    assert found["level_map"]["grid"] == [3, 16, 16]
    assert len(found["level_map"]["token_levels"]) == 3 * 16 * 16
    maps = psa.get_attachment(KEY).maps
    assert (maps.grid, maps.whole, sorted(maps.blocks)) == ((3, 16, 16), True, [0, 1])
    picture = show.show_report(psa, {"samples": out}, -1, 0, None)[1]
    assert picture.shape[1] > 600
    json.dumps(found)


def test_kernels_that_fail_at_one_size_leave_the_others_sparse(model, sample, tiny_wan, monkeypatch, caplog):
    genuine, tried = self_attention.pyramid_sparse_attention, []

    def attention(*args, **kwargs):
        tried.append(kwargs["layout"].grid)
        if kwargs["layout"].grid == (3, 16, 8):
            raise RuntimeError("not at this size")
        return genuine(*args, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    psa = patch_model(model, **PATCH)
    sample(psa, steps=4, positive=tiny_wan.area(8, 32, 16, 0, 0) + tiny_wan.conditioning())
    assert [(entry["grid"], entry["sparse_calls"]) for entry in report(psa)["grids"]] == [
        ([3, 16, 16], 6),
        ([3, 16, 8], 0),
    ]
    assert tried.count((3, 16, 8)) == 1
    ((reason, calls),) = [entry.values() for entry in report(psa)["fallbacks"]]
    assert ("not at this size" in reason, calls) == (True, 6)
    assert caplog.text.count("staying dense") == 1


def test_areas_that_are_all_parts(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH)
    sides = tiny_wan.area(8, 32, 20, 0, 0) + tiny_wan.area(9, 32, 12, 0, 20)
    out = sample(psa, steps=4, positive=sides)
    maps = psa.get_attachment(KEY).maps
    assert (maps.grid, maps.whole) == ((3, 16, 10), False), "the largest, and known to be a part"
    assert "a part of the video of 3x16x10 tokens" in show._maps(maps, -1, 0)["where"]
    assert show.show_report(psa, {"samples": out}, -1, 0, None)[1].shape[1] > 600


def test_a_part_that_is_too_small_leaves_the_others_sparse(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH | {"sparsity": 0.85, "start_percent": 0.0, "block_kv": "128"})
    sample(psa, steps=2, positive=tiny_wan.area(8, 32, 16, 0, 0) + tiny_wan.conditioning())
    assert [entry["sparse_calls"] for entry in report(psa)["grids"]] == [4, 0]
    (entry,) = report(psa)["fallbacks"]
    assert "384 video tokens (9 frames of 128x256)" in entry["reason"]

"""The preset `generic`: a video model of no family, taken for a plain grid. Cosmos 1 is one that ComfyUI runs."""

import logging

import pytest
import torch

from comfyui_psa.patching.patch import KEY, patch_model

from .patched import distance, report, reports_nothing

KIND = "cosmos 1"
INPUTS = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}


@pytest.fixture(scope="module")
def model(tiny_families):
    return tiny_families.load(KIND)


def test_it_is_sparse_and_says_what_it_assumes(model, tiny_families, caplog):
    with caplog.at_level(logging.WARNING):
        psa = patch_model(model, sparsity=0.5, preset="generic", **INPUTS)
    (told,) = (record.message for record in caplog.records if "nobody has tried" in record.message)
    assert "(cosmos)" in told
    assert "all 2 blocks" in told
    assert "patches of 1x2x2" in told
    stock = tiny_families.sample(model, KIND)
    out = tiny_families.sample(psa, KIND)
    assert report(psa)["steps"][0]["sparse_calls"] == 2
    assert reports_nothing(psa)
    assert report(psa)["grid"] == [3, 14, 16]
    assert 1e-5 < distance(out, stock) < 0.5
    full = patch_model(model, sparsity=0.01, preset="generic", pyramid="1: 1.0", **INPUTS)
    assert distance(tiny_families.sample(full, KIND), stock) < 1e-5


def test_with_auto_the_model_stays_dense_and_generic_is_offered(model, tiny_families):
    psa = patch_model(model, sparsity=0.5, preset="auto", **INPUTS)
    assert "set preset to generic" in psa.get_attachment(KEY).note
    assert torch.equal(tiny_families.sample(psa, KIND), tiny_families.sample(model, KIND))


@pytest.mark.parametrize(
    ("size", "words"), [(4, "over 672 tokens and not 168"), (1, "over 2688 tokens, so this model")]
)
def test_a_model_that_is_no_plain_grid_stays_dense_and_says_so(model, tiny_families, monkeypatch, size, words):
    from comfyui_psa.patching import generic

    stock = tiny_families.sample(model, KIND)
    monkeypatch.setattr(generic, "_patch_size", lambda _: (1, size, size))  # as if the network's tokens were others
    psa = patch_model(model, sparsity=0.5, preset="generic", **INPUTS)
    assert torch.equal(tiny_families.sample(psa, KIND), stock)
    (found,) = [entry["reason"] for entry in report(psa)["fallbacks"]] + report(psa)["notes"]
    assert words in found
    assert "set preset to auto" in found


def test_an_image_stays_dense(model, tiny_families):
    psa = patch_model(model, sparsity=0.5, preset="generic", **INPUTS)
    size = (1, 16, 1, 28, 32)
    assert torch.equal(tiny_families.sample(psa, KIND, size=size), tiny_families.sample(model, KIND, size=size))
    assert [entry["reason"][:24] for entry in report(psa)["fallbacks"]] == ["a single image is sample"]


def test_a_network_that_says_nothing_stays_dense(model):
    from comfyui_psa.patching.generic import plain_grid

    clone = model.clone()
    clone.add_object_patch("diffusion_model", torch.nn.Linear(1, 1))
    assert "does not say" in plain_grid(clone)


def test_a_known_model_takes_it_as_any_other_preset(tiny_families):
    psa = patch_model(tiny_families.load("mochi"), sparsity=0.5, preset="generic", **INPUTS)
    tiny_families.sample(psa, "mochi")
    assert reports_nothing(psa)
    assert report(psa)["preset"] == "generic"

"""What a report says of a correction, that the slider's meaning stays, and the settings that it depends on."""

import pytest
import torch

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.patching.patch import patch_model

from .core_nodes import compiled
from .patched import PATCH, by_step, distance, report

pytestmark = pytest.mark.usefixtures("in_short_runs")

WIDE = {"steps": 14, "size": (1, 16, 3, 32, 48)}  # 18 blocks of keys


def given_to_sparse_calls(kernel_calls, name):
    """Whether each was given levels ("lists") or a correction ("delta"); what runs beside a dense call is left out."""
    return [call.given.get(name) is not None for call in kernel_calls if "out" in call.given]


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.85])
def test_the_slider_is_the_mean_over_sparse_steps_with_renewals(model, sample, kernel_calls, sparsity):
    psa = patch_model(model, **PATCH | {"sparsity": sparsity, "correction": "full"})
    sample(psa, **WIDE)
    found = report(psa)
    steps = [step for step in found["steps"] if step["kind"] == "sparse"]
    renewed = sum(step["learned_calls"] for step in steps)
    assert bool(renewed) == (sparsity <= 0.8)
    assert found["mean_sparsity"] == pytest.approx(sparsity, abs=0.01)
    assert sum(step["sparsity"] for step in steps) / len(steps) == pytest.approx(sparsity, abs=0.01)
    # Saved is what was not computed of all calls, learning counted.
    calls = 2 * WIDE["steps"]
    dense = sum(by_step(psa, "dense_calls"))
    last_turns = sum(by_step(psa, "learned_calls")[-1:])  # dense, but nothing is measured any more
    assert len(kernel_calls) == calls - dense + sum(by_step(psa, "learned_calls")) - last_turns
    computed = dense + sum(float(call.result.density) for call in kernel_calls)
    assert found["saved"] == pytest.approx(1 - computed / calls, abs=1e-4)


@pytest.mark.parametrize("sparsity", [0.75, 0.8])
def test_a_video_too_short_to_pay_for_renewals_is_corrected_without(model, sample, loops, sparsity):
    """6 key blocks: half of the work that is left at 0.8 is out of reach, what the slider says is not."""
    patch = PATCH | {"sparsity": sparsity, "correction": "full"}
    arguments = {"steps": 12, "size": (1, 16, 3, 16, 32)}
    renew = 8 if sparsity == 0.75 else 0
    expected, _ = loops.looped(model, sample, patch, arguments, grids={384: (3, 8, 16)}, renew=renew)
    psa = patch_model(model, **patch)
    assert distance(sample(psa, **arguments), expected) < 2e-5
    assert report(psa)["fallbacks"] == []
    assert report(psa)["mean_sparsity"] == pytest.approx(sparsity, abs=0.05)


def test_the_figures_of_a_correction(model, sample, caplog):
    psa = patch_model(model, **PATCH | {"correction": "half"})
    with caplog.at_level("INFO"):
        sample(psa, steps=10, cfg=3.0)
    found, correction = report(psa), report(psa)["correction"]
    rows = 2 * 2  # blocks and prompts
    levels = correction["bytes"] - rows * 2 * 384 * (128 + 4)
    assert 0 < levels < rows * 2 * 6 * 12 * 4, "besides bytes and scales of every second token, kept levels"
    assert (correction["size"], correction["reason"], correction["without_room"]) == ("half", None, 0)
    assert "CPU" in correction["where"]
    assert correction["corrected_calls"] == sum(by_step(psa, "corrected_calls")) == sum(by_step(psa, "sparse_calls"))
    assert correction["learned_calls"] == sum(by_step(psa, "learned_calls")) > 2
    dense = by_step(psa, "sparse_calls").count(0)
    assert by_step(psa, "learned_calls")[: dense - 1] == [0] * (dense - 1)
    assert found["notes"] == found["fallbacks"] == []
    (line,) = [record.message for record in caplog.records if "steps sparse" in record.message]
    assert "all corrected (half)" in line
    (line,) = [record.message for record in caplog.records if "correction: half, about" in record.message]
    assert "CPU memory" in line


def test_off_is_off(model, sample):
    psa = patch_model(model, **PATCH | {"correction": "off"})
    sample(psa, steps=8)
    assert report(psa)["correction"] is None
    assert set(by_step(psa, "corrected_calls")) == set(by_step(psa, "learned_calls")) == {0}


@pytest.mark.parametrize("name", [name for name in load_presets() if name.endswith("(published)")])
def test_published_presets_are_corrected_only_if_asked(model, sample, name):
    patch = {key: value for key, value in PATCH.items() if key != "mode"} | {"preset": name}
    outputs = []
    for correction in ("auto", "off", "full"):
        psa = patch_model(model, **patch | {"correction": correction})
        outputs.append(sample(psa, steps=5, size=(1, 16, 3, 16, 32)))
        assert bool((report(psa)["correction"] or {}).get("corrected_calls")) == (correction == "full")
    assert torch.equal(outputs[0], outputs[1])


def test_a_workflow_from_before_has_what_fits(model, sample):
    psa = patch_model(model, **PATCH)
    sample(psa, steps=8)
    assert report(psa)["correction"]["size"] == "full"
    assert report(psa)["correction"]["corrected_calls"] > 0


@pytest.mark.parametrize("correction", ["auto", "full"])
def test_an_order_that_follows_the_data_says_why_there_is_none(model, sample, caplog, correction):
    psa = patch_model(model, **PATCH | {"order": "semantic", "correction": correction})
    sample(psa, steps=5)
    reason = report(psa)["correction"]["reason"]
    assert "no correction with the order semantic" in reason
    assert caplog.text.count(reason) == 1
    assert "staying dense" not in caplog.text
    assert [step["kind"] for step in report(psa)["steps"]].count("sparse") >= 3


@pytest.mark.parametrize(
    ("changes", "steps", "kept"),
    [({}, 12, True), ({"falling": 0.5}, 12, False), ({}, 5, False), ({"start_percent": 0.0, "falling": 0.5}, 9, False)],
)
def test_levels_are_kept_unless_they_change_from_step_to_step(model, sample, kernel_calls, changes, steps, kept):
    psa = patch_model(model, **PATCH | {"correction": "full"} | changes)
    sample(psa, steps=steps)
    assert set(given_to_sparse_calls(kernel_calls, "delta")) == {True}
    assert set(given_to_sparse_calls(kernel_calls, "lists")) == {kept}
    if "falling" in changes:
        assert report(psa)["mean_sparsity"] == pytest.approx(0.6, abs=0.03)


def test_levels_are_reused_beside_a_correction_that_keeps_none(model, sample, kernel_calls):
    psa = patch_model(model, **PATCH | {"correction": "full", "reuse_steps": 2})
    sample(psa, steps=5)  # too few to keep levels for all of them
    assert set(given_to_sparse_calls(kernel_calls, "delta")) == {True}
    assert given_to_sparse_calls(kernel_calls, "lists")[:4] == [False, False, True, True]


@pytest.mark.slow(seconds=15)
def test_compiled_is_what_it_is_without(model, sample, compiler):
    patch = PATCH | {"correction": "full"}
    eager = patch_model(model, **patch)
    expected = sample(eager, steps=8)
    psa = patch_model(compiled(model), **patch)
    assert distance(sample(psa, steps=8), expected) < 1e-5
    for kind in ("sparse_calls", "corrected_calls", "learned_calls", "dense_calls"):
        assert by_step(psa, kind) == by_step(eager, kind)

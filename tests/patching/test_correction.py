"""What sparse steps get back: whole runs against a loop that was written from the description alone, and when a run
learns what it loses."""

import pytest
import torch

from comfyui_psa.choices.correction import Correction
from comfyui_psa.patching.patch import KEY, patch_model

from .core_nodes import cached
from .patched import PATCH, by_step, distance, report

pytestmark = pytest.mark.usefixtures("in_short_runs")


ARGUMENTS = {
    "renewal and kept levels": ({}, {"steps": 14}, {"renew": 8}),
    "as many of both prompts": ({}, {"steps": 10, "cfg": 4.0}, {"renew": 8}),
    "little work, so nothing is renewed": ({"sparsity": 0.85}, {"steps": 10}, {}),
    "few steps choose their levels": ({}, {"steps": 5}, {"keep": False}),
    "an eighth": ({"correction": "eighth"}, {"steps": 10, "cfg": 3.0}, {"group": 8, "renew": 8}),
    "half": ({"correction": "half"}, {"steps": 8}, {"group": 2}),
    "no dense step": ({"start_percent": 0.0}, {"steps": 12}, {"renew": 8}),
    "an end before the end": ({"end_percent": 0.8}, {"steps": 14}, {"renew": 8}),
    "two videos": ({}, {"steps": 5, "size": (2, 16, 3, 32, 32)}, {"keep": False}),
    "budget": ({"mode": "budget"}, {"steps": 9}, {"renew": 8}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_run_is_that_of_the_loop(model, sample, loops, case):
    changes, arguments, settings = ARGUMENTS[case]
    patch = PATCH | {"correction": "full"} | changes
    expected, loop = loops.looped(model, sample, patch, arguments, **settings)
    psa = patch_model(model, **patch)
    out = sample(psa, **arguments)
    plain = sample(patch_model(model, **patch | {"correction": "off"}), **arguments)
    assert distance(out, expected) < 2e-5
    assert distance(plain, expected) > 1e-3, "the correction does something"
    rows = sum(loop.corrected)
    per_call = 1 if arguments.get("cfg", 1.0) == 1.0 else 2
    assert sum(by_step(psa, "corrected_calls")) * per_call * arguments.get("size", (1,))[0] == rows
    assert report(psa)["fallbacks"] == report(psa)["notes"] == []


DECISIONS = {
    "long": ({}, 20, {"renew": 8, "gamma": 1.0}),
    "long, half of the work": ({"sparsity": 0.5}, 20, {"renew": 4, "gamma": 1.0}),
    "long, little work": ({"sparsity": 0.85}, 20, {"gamma": 0.9}),
    "shorter": ({}, 13, {"gamma": 0.9}),
    "short": ({}, 8, {"keep": False, "gamma": 0.8}),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_what_a_run_does_follows_from_its_steps_and_density(model, sample, loops, monkeypatch, case):
    monkeypatch.undo()  # the limits that users have
    changes, steps, settings = DECISIONS[case]
    patch = PATCH | {"correction": "full"} | changes
    expected, _ = loops.looped(model, sample, patch, {"steps": steps}, **settings)
    assert distance(sample(patch_model(model, **patch), steps=steps), expected) < 2e-5


def test_all_of_the_loss_is_given_back_at_gamma_1(model, sample, loops, monkeypatch):
    """With levels in full nothing is lost, and with gamma 1 a step like the last dense one is dense again."""
    from comfyui_psa.choices import presets

    monkeypatch.setattr(presets, "OURS", Correction(gamma=1.0, renew=0))
    patch = PATCH | {"preset": "module-default (published)", "correction": "full", "mode": "topk"}
    settings = patch_model(model, **patch).get_attachment(KEY).settings
    assert settings.correction == Correction(size="full", gamma=1.0, renew=0)
    expected, _ = loops.looped(model, sample, patch, {"steps": 9}, gamma=1.0)
    assert distance(sample(patch_model(model, **patch), steps=9), expected) < 2e-5


# When a run learns


def learned(model):
    """Steps in which PSA was measured beside dense calls, with how many calls."""
    return {step: calls for step, calls in enumerate(by_step(model, "learned_calls")) if calls}


def dense_steps(model):
    return [step["index"] for step in report(model)["steps"] if step["kind"] == "dense"]


LOW = PATCH | {"sparsity": 0.85, "correction": "full"}  # nothing is renewed


def test_the_last_dense_step_learns_and_no_other(model, sample):
    psa = patch_model(model, **LOW)
    sample(psa, steps=10)
    dense = dense_steps(psa)
    assert learned(psa) == {dense[-1]: 2}
    assert by_step(psa, "corrected_calls") == [0] * len(dense) + [2] * (10 - len(dense))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_run_that_begins_in_the_sparse_part_learns_in_its_first_step_if_two_follow(model, sample, steps):
    psa = patch_model(model, **LOW | {"start_percent": 0.0})
    sample(psa, steps=steps)
    found = learned(psa), dense_steps(psa), by_step(psa, "corrected_calls")
    assert found == (({}, [], [0] * steps) if steps < 3 else ({0: 2}, [0], [0] + [2] * (steps - 1)))


def test_a_second_sampler_learns_for_itself(model, sample):
    psa = patch_model(model, **LOW)
    latent = sample(psa, steps=12, last_step=6, force_full_denoise=False)
    first = by_step(psa, "corrected_calls")
    sample(psa, steps=12, start_step=6, disable_noise=True, noise=torch.zeros_like(latent), latent=latent)
    assert (learned(psa), by_step(psa, "corrected_calls")) == ({0: 2}, [0] + [2] * 5)
    assert first[-1] == 2


def test_image_to_image_learns_in_its_first_step(model, sample):
    psa = patch_model(model, **LOW)
    sample(psa, steps=6, denoise=0.5)
    assert (learned(psa), by_step(psa, "corrected_calls")) == ({0: 2}, [0] + [2] * 5)


SMALL = (1, 16, 2, 24, 32)
SAMPLERS = [
    "heun", "dpm_2", "dpmpp_2s_ancestral", "seeds_3", "res_multistep", "dpm_fast", "dpm_adaptive", "uni_pc"
]  # fmt: skip


@pytest.mark.parametrize(
    ("sampler", "start"),
    [(name, start) for name in SAMPLERS for start in (0.25, 0.0) if (name, start) != ("dpm_adaptive", 0.0)],
)
def test_samplers_that_evaluate_between_steps(model, sample, sampler, start):
    psa = patch_model(model, **LOW | {"start_percent": start})
    assert torch.isfinite(sample(psa, steps=5, sampler=sampler, size=SMALL)).all()
    steps = report(psa)["steps"]
    sparse = [step for step in steps if step["sparse_calls"]]
    assert sparse
    assert all(step["corrected_calls"] == step["sparse_calls"] for step in sparse), "whatever was sparse, was corrected"
    if sampler != "dpm_adaptive":  # it returns to where it was whenever a step was too long
        (step,) = learned(psa)
        assert step <= sparse[0]["index"]
    assert report(psa)["correction"]["without_room"] == 0
    assert report(psa)["notes"] == report(psa)["fallbacks"] == []


def test_restarts_that_go_back_to_dense_levels_learn_there_again(model, tiny_wan):
    start = model.get_model_object("model_sampling").percent_to_sigma(LOW["start_percent"])
    up, down = start * 1.02, start * 0.98
    psa = patch_model(model, **LOW)
    tiny_wan.sample_custom(psa, [1.0, up, down, 0.5, up, down, 0.4, 0.2, 0.0])
    assert learned(psa) == {1: 2, 4: 2}
    assert by_step(psa, "corrected_calls") == [0, 0, 2, 2, 0, 2, 2, 2]


@pytest.mark.parametrize("windows", [(0.1, 0.35), (0.1, 0.7), (0.5, 0.8)])
def test_a_cache_that_skips_the_learning_step_or_sparse_ones(model, sample, windows):
    psa = cached(patch_model(model, **LOW), start=windows[0], end=windows[1])
    sample(psa, steps=20, size=SMALL)
    kinds = [step["kind"] for step in report(psa)["steps"]]
    skipped = [step for step, kind in enumerate(kinds) if kind == "skipped"]
    assert skipped
    (step,) = learned(psa)
    assert step not in skipped
    calls = [(step["sparse_calls"], step["corrected_calls"]) for step in report(psa)["steps"]]
    assert sum(sparse for sparse, _ in calls) >= 8
    assert all(sparse == corrected for sparse, corrected in calls), "what was computed after that was corrected"
    assert next(one for one, (sparse, _) in enumerate(calls) if sparse) > step


def test_nothing_is_held_after_the_sparse_part(model, sample):
    held = []
    psa = patch_model(model, **LOW | {"end_percent": 0.6})
    runs = watch_runs(psa, held)
    sample(runs, steps=12)
    sparse = [step["kind"] == "sparse" for step in report(psa)["steps"]]
    last = len(sparse) - 1 - sparse[::-1].index(True)
    assert last < 11
    assert max(held) > 0
    assert held[last + 1 :] == [0] * (11 - last)


def watch_runs(model, held):
    """A clone that notes after every step how many bytes of losses its run holds."""
    from comfyui_psa.patching.override import RUN_KEY

    clone = model.clone()

    def wrapper(apply, given):
        out = apply(given["input"], given["timestep"], **given["c"])
        held.append(given["c"]["transformer_options"][RUN_KEY].losses.nbytes)
        return out

    clone.set_model_unet_function_wrapper(wrapper)
    return clone

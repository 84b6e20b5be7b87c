"""In which model calls PSA is active: by the noise level of each, with any sampler, sampler pair or shift."""

import pytest

from comfyui_psa.patching import core
from comfyui_psa.patching.override import RUN_KEY
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling.position import Position
from comfyui_psa.sampling.schedule import Schedule

from .patched import PATCH, report


@pytest.fixture(scope="module")
def calls(tiny_wan):
    """calls(model, ...) samples as `tiny.sample` does: (percent of the schedule, active) of every forward."""

    def run(model, shift=8.0, sample=tiny_wan.sample, **arguments):
        seen, watched = [], model.clone()

        def before_call(network, x, context, options, conds):
            sigma = core.current_sigma(options)
            seen.append((1 - sigma / (shift - (shift - 1) * sigma), options[RUN_KEY].position.active))

        core.add_wrappers(watched, "psa_test", sampling=lambda run, *a, **k: run(*a, **k), before_call=before_call)
        sample(watched, **arguments)
        return seen

    return run


def active(seen):
    return [is_active for _, is_active in seen]


def shifted(model, shift):
    import comfy_extras.nodes_model_advanced

    return comfy_extras.nodes_model_advanced.ModelSamplingSD3().patch(model, shift=shift)[0]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 1.0, [True] * 8),
        (0.25, 1.0, [False] * 2 + [True] * 6),
        (0.5, 0.75, [False] * 4 + [True] * 2 + [False] * 2),
        (0.3, 1.0, [False] * 3 + [True] * 5),
        (0.0, 0.1, [True] + [False] * 7),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_percent_of_a_plain_sampler(model, calls, start, end, expected, shift):
    psa = patch_model(shifted(model, shift), **PATCH | {"start_percent": start, "end_percent": end})
    assert active(calls(psa, shift, steps=8, scheduler="simple")) == expected


@pytest.mark.parametrize(
    "sampler", ["dpm_2", "heun", "dpmpp_2s_ancestral", "dpm_fast", "uni_pc", "res_multistep", "lcm"]
)
def test_samplers_that_evaluate_between_steps(model, calls, sampler):
    seen = calls(patch_model(model, **PATCH | {"start_percent": 0.4, "end_percent": 0.8}), steps=5, sampler=sampler)
    assert len(seen) >= 5
    for percent, is_active in seen:
        if min(abs(percent - 0.4), abs(percent - 0.8)) > 1e-4:
            assert is_active == (0.4 < percent < 0.8)
    assert {True, False} == set(active(seen))


@pytest.mark.parametrize("late", [False, True])
def test_a_shift_before_and_after_the_patch(model, calls, late):
    # Percent counts in the schedule that is sampled, so 3 of 10 steps lie before 0.3 whatever the shift is.
    psa = patch_model(model if late else shifted(model, 3.0), **PATCH | {"start_percent": 0.3})
    psa = shifted(psa, 3.0) if late else psa
    assert active(calls(psa, 3.0, steps=10)) == [False] * 3 + [True] * 7


def test_a_pair_of_samplers_is_one_schedule(model, calls):
    psa = patch_model(model, **PATCH | {"start_percent": 0.5})
    first = calls(psa, steps=8, last_step=3, force_full_denoise=False)
    second = calls(psa, steps=8, start_step=3, disable_noise=True)
    assert active(first) == [False] * 3
    assert active(second) == [False] + [True] * 4
    assert len(report(psa)["steps"]) == 5


def test_custom_sigmas(model, calls, tiny_wan):
    psa = patch_model(model, **PATCH | {"start_percent": 0.5})  # at shift 8: sigma 0.8889
    seen = calls(psa, sample=tiny_wan.sample_custom, sigmas=[1.0, 0.95, 0.89, 0.88, 0.3, 0.0])
    assert active(seen) == [False] * 3 + [True] * 2


@pytest.mark.parametrize("scheduler", ["simple", "beta", "sgm_uniform", "normal"])
@pytest.mark.parametrize("shift", [5.0, 8.0])
def test_the_4_step_preset_keeps_one_step_dense(model, calls, scheduler, shift):
    psa = patch_model(shifted(model, shift), **PATCH | {"preset": "wan-4step-lora", "start_percent": 0.9})
    assert active(calls(psa, shift, steps=4, sampler="lcm", scheduler=scheduler)) == [False] + [True] * 3
    assert active(calls(psa, shift, steps=6, scheduler=scheduler)) == [False] + [True] * 5


def test_the_4_step_preset_counts_the_steps_of_a_pair_once(model, calls, caplog):
    # Wan 2.2: two experts share the schedule, each with a patch of its own; only the first begins it.
    with caplog.at_level("INFO"):
        psa = patch_model(model, **PATCH | {"preset": "wan-4step-lora"})
    assert "dense steps: 1; start_percent has no effect" in caplog.text
    assert active(calls(psa, steps=4, last_step=2, force_full_denoise=False)) == [False, True]
    assert active(calls(psa, steps=4, start_step=2, disable_noise=True)) == [True, True]
    assert active(calls(psa, steps=1)) == [False]


def test_no_dense_steps_where_a_video_is_only_reworked(model, calls):
    psa = patch_model(model, **PATCH | {"preset": "wan-4step-lora"})
    assert active(calls(psa, steps=4, denoise=0.5)) == [True] * 4


def walk(levels, sigmas, sparse=lambda sigma: True, together=1):
    schedule = Schedule(levels, sparse, together)
    places = [schedule.move(sigma) for sigma in sigmas]
    return [place.step for place in places], [place.share for place in places]


LEVELS = [1.0, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize(
    ("levels", "sigmas", "steps", "shares"),
    [
        (LEVELS, LEVELS, [0, 1, 2, 3, 4], [0, 0.25, 0.5, 0.75, 1]),
        # Two prompts or windows at one level are one evaluation.
        (LEVELS, [1.0, 1.0, 0.8, 0.8, 0.6], [0, 0, 1, 1, 2], [0, 0, 0.25, 0.25, 0.5]),
        # What a solver asks between two levels belongs to the upper one, and counts as the mean.
        (LEVELS, [1.0, 0.9, 0.8, 0.7, 0.6, 0.3], [0, 0, 1, 1, 2, 3], [0, 0.5, 0.25, 0.5, 0.5, 0.5]),
        # Back to levels that were left, as the schedule says, and as it does not.
        ([1.0, 0.8, 0.6, 0.8, 0.6], [1.0, 0.8, 0.6, 0.8, 0.6], [0, 1, 2, 3, 4], [0, 0.25, 0.5, 0.75, 1]),
        (LEVELS, [1.0, 0.8, 0.6, 0.8, 0.6, 0.4], [0, 1, 2, 1, 2, 3], [0, 0.25, 0.5, 0.5, 0.5, 0.75]),
        # float32 and float64 differ; a cache leaves levels out; nobody knows the levels.
        (LEVELS, [1.0, 0.8 * (1 + 1e-7), 0.2], [0, 1, 4], [0, 0.25, 1]),
        (None, [1.0, 1.0, 0.7, 0.9], [0, 0, 1, 2], [0.5] * 4),
        ([1.0], [1.0], [0], [0.5]),
    ],
)
def test_a_schedule_is_walked_along(levels, sigmas, steps, shares):
    assert walk(levels, sigmas) == (steps, pytest.approx(shares))


@pytest.mark.parametrize(
    ("calls", "steps"),
    [
        # One prompt, two prompts in one call, and in a call each; two windows.
        ([(1.0, "a"), (0.8, "a"), (0.8, "a"), (0.8, "a"), (0.4, "a")], [0, 1, 2, 3, 4]),
        ([(1.0, "ab"), (0.8, "ab"), (0.8, "ab"), (0.8, "ab"), (0.4, "ab")], [0, 1, 2, 3, 4]),
        ([(1.0, "a"), (1.0, "b"), (0.8, "a"), (0.8, "b"), (0.8, "a"), (0.8, "b"), (0.8, "b")], [0, 0, 1, 1, 2, 2, 3]),
        # Batched in one step and split in the next; a prompt that is there in one of them only.
        ([(0.8, "ab"), (0.8, "a"), (0.8, "b"), (0.8, "b"), (0.4, "ab")], [1, 2, 2, 3, 4]),
        # A sampler that looks at the next level first has one more; a cache answered two of them.
        ([(1.0, "a"), (0.8, "a"), (0.8, "a"), (0.8, "a"), (0.8, "a"), (0.4, "a")], [0, 1, 2, 3, 3, 4]),
        ([(1.0, "a"), (0.8, "a"), (0.4, "a")], [0, 1, 4]),
        # Levels that are nearly the same.
        ([(1.0, "a"), (0.80001, "a"), (0.8, "a"), (0.79999, "a"), (0.4, "a")], [0, 1, 2, 3, 4]),
    ],
)
def test_a_level_that_the_schedule_has_several_times_is_several_steps(calls, steps):
    schedule = Schedule([1.0, 0.8, 0.8, 0.8, 0.4], lambda sigma: True)
    assert [schedule.move(sigma, rows).step for sigma, rows in calls] == steps


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_run_with_a_level_several_times_has_all_its_steps(model, tiny_wan, sampler, cfg):
    psa = patch_model(model, **PATCH)
    sigmas = [1.0, 0.97, 0.97, 0.6, 0.6, 0.6, 0.3, 0.0]
    tiny_wan.sample_custom(psa, sigmas, sampler, cfg=cfg, size=(1, 16, 2, 24, 32))
    assert [step["index"] for step in report(psa)["steps"]] == list(range(7))
    assert {step["kind"] for step in report(psa)["steps"]} == {"dense", "sparse"}


@pytest.mark.parametrize(
    ("sigmas", "begun", "left"),
    [
        ([1.0, 0.8, 0.6], [[0], [1], [2]], [3, 4]),
        # A cache leaves two steps out.
        ([1.0, 0.4], [[0], [1, 2, 3]], [4]),
        # A solver looks ahead and returns, once more than it has steps.
        ([1.0, 0.8, 0.6, 0.8, 0.6, 0.4], [[0], [1], [2], [], [], [3]], [4]),
        ([1.0, 0.8, 0.6, 0.8], [[0], [1], [2], []], []),
        ([1.0, 0.75, 1.0, 0.9, 0.75, 0.6], [[0], [1], [], [], [], [2]], [3, 4]),
    ],
)
def test_a_step_begins_once(sigmas, begun, left):
    position = Position(1.0, 0.0)
    position.plan([*LEVELS, 0.0])
    found = [[step for step, _ in position.begin_model_call(sigma, None, ())] for sigma in sigmas]
    assert (found, [step for step, _ in position.steps_left()]) == (begun, left)


def test_a_sampler_that_looks_ahead_has_as_many_steps_as_it_was_given(model, tiny_wan):
    psa = patch_model(model, **PATCH)
    tiny_wan.sample(psa, steps=6, sampler="heunpp2", size=(1, 16, 2, 24, 32))
    assert [step["index"] for step in report(psa)["steps"]] == [0, 1, 2, 3, 4, 5]


def test_the_share_is_that_of_the_sparse_steps():
    assert walk(LEVELS, LEVELS, lambda sigma: sigma < 0.9)[1] == pytest.approx([0.5, 0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("together", "shares"), [(2, [0.125, 0.125, 0.625, 0.625, 1]), (3, [0.25] * 3 + [0.875] * 2), (9, [0.5] * 5)]
)
def test_steps_that_belong_together_share_their_mean(together, shares):
    assert walk(LEVELS, LEVELS, together=together)[1] == pytest.approx(shares)
    assert sum(shares) / 5 == 0.5

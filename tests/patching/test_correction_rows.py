"""Every row gets back what it lost itself, however prompts, videos, areas and windows are batched in a step."""

import itertools
import threading

import pytest
import torch

from comfyui_psa.patching import core
from comfyui_psa.patching.patch import patch_model

from . import patched
from .core_nodes import lora, on_two_devices, windowed
from .patched import by_step, distance, report

pytestmark = pytest.mark.usefixtures("in_short_runs")

PATCH = patched.PATCH | {"correction": "full"}
STEPS = 9


def mixed_up(places):
    """Rows that are known by less than all there is, so that one gets another's loss."""
    return lambda *row: tuple(row[place] for place in places)


UUID, VIDEO, WINDOW, TOKENS, WITHOUT = range(5)
OTHERS = {UUID: (1, 2, 3, 4), VIDEO: (0, 2, 3, 4), WINDOW: (0, 1, 3, 4), WITHOUT: (0, 1, 2, 3)}


def check_against_loop(
    model, sample, loops, arguments, apart, around=lambda model: model, grids=None, patched=None, **settings
):
    """A run equals the loop's, and the loop's with rows mixed up that differ in `apart` is another one."""
    arguments = {"steps": STEPS, "size": (1, 16, 3, 16, 32)} | arguments
    stock = around(model)
    settings = {"renew": 8, "grids": grids or {384: (3, 8, 16)}} | settings
    expected, _ = loops.looped(stock, sample, PATCH, arguments, **settings)
    wrong, _ = loops.looped(stock, sample, PATCH, arguments, known=mixed_up(OTHERS[apart]), **settings)
    psa = around(patch_model(model, **PATCH)) if patched is None else patched
    out = sample(psa, **arguments)
    close, far = distance(out, expected), distance(wrong, expected)
    assert close < 2e-5
    assert far > max(5 * close, 4e-5), "another row's loss would show"
    assert report(psa)["fallbacks"] == []
    return psa


def in_turns(model, monkeypatch):
    """Memory for all prompts in one step and for one of them in the next, as the core sees it."""
    calls = itertools.count()
    genuine = model.model.memory_required

    def required(input_shape, *args, **kwargs):
        many = input_shape[0] > 1
        return 1e30 if many and next(calls) % 2 else genuine(input_shape, *args, **kwargs)

    monkeypatch.setattr(model.model, "memory_required", required, raising=False)


def test_guidance_batched_in_one_step_and_split_in_the_next(model, sample, loops, monkeypatch):
    batches = []

    def watch(network, x, context, options, conds):
        batches.append(len(x))

    def around(model):
        clone = model.clone()
        core.add_wrappers(clone, "psa_watch", before_call=watch)
        return clone

    in_turns(model, monkeypatch)
    check_against_loop(model, sample, loops, {"cfg": 5.0}, UUID, around)
    assert {1, 2} == set(batches)


def test_prompts_of_other_lengths_are_split_in_every_step(model, sample, loops, tiny_wan):
    check_against_loop(model, sample, loops, {"cfg": 5.0, "negative": tiny_wan.conditioning(text=21, seed=4)}, UUID)


def test_several_videos(model, sample, loops):
    check_against_loop(model, sample, loops, {"size": (2, 16, 3, 16, 32), "cfg": 3.0, "steps": 8}, VIDEO)


def test_prompts_by_area(model, sample, loops, tiny_wan):
    left, right = tiny_wan.area(8, 32, 16, 0, 0), tiny_wan.area(9, 32, 16, 0, 16)
    psa = check_against_loop(
        model, sample, loops, {"positive": left + right + tiny_wan.conditioning(), "size": (1, 16, 3, 32, 32)}, UUID,
        grids={768: (3, 16, 16), 384: (3, 16, 8)},
    )  # fmt: skip
    assert len(report(psa)["grids"]) == 2
    by_grid = sum(grid["sparse_calls"] for grid in report(psa)["grids"])
    assert by_grid == sum(step["sparse_calls"] for step in report(psa)["steps"])


APPEARS = {
    "another prompt": (0.5, lambda tiny: {"positive": tiny.conditioning(end_percent=0.5) + late(tiny)}),
    "one more": (0.5, lambda tiny: {"positive": tiny.conditioning() + late(tiny)}),
    "guidance that begins": (0.5, lambda tiny: {"cfg": 3.0, "negative": late(tiny)}),
    "one that was there in the first steps": (0.5, lambda tiny: {"positive": split_in_time(tiny)}),
}


def late(tiny_wan, start=0.5, **extra):
    return tiny_wan.conditioning(seed=8, start_percent=start, **extra)


def split_in_time(tiny_wan):
    """One prompt until the sparse part is near, and again in the second half; another one between."""
    first = tiny_wan.conditioning(seed=8)
    parts = [(first, 0.0, 0.1), (tiny_wan.conditioning(), 0.1, 0.5), (first, 0.5, 1.0)]
    return [[tensor, {"start_percent": start, "end_percent": end}] for ((tensor, _),), start, end in parts]


@pytest.mark.parametrize("case", APPEARS)
def test_a_run_learns_again_with_a_prompt_that_appears_midway(model, sample, loops, tiny_wan, case):
    percent, arguments = APPEARS[case]
    arguments = {"steps": 20} | arguments(tiny_wan)
    psa = check_against_loop(model, sample, loops, arguments, UUID, again=(percent, 0, True))
    steps = report(psa)["steps"]
    assert all(step["sparse_calls"] == step["corrected_calls"] for step in steps)
    assert report(psa)["correction"]["without_room"] == 0


def test_a_run_learns_again_with_prompts_that_are_split(model, sample, tiny_wan):
    """The call for the known one came first in that step, and was corrected."""
    psa = patch_model(model, **PATCH)
    sample(psa, steps=20, size=(1, 16, 3, 16, 32), cfg=3.0, negative=late(tiny_wan, text=21))
    assert by_step(psa, "sparse_calls") == by_step(psa, "corrected_calls")
    again = by_step(psa, "learned_calls")[10]
    assert (again, by_step(psa, "sparse_calls")[10]) in ((2, 2), (4, 0))
    assert by_step(psa, "dense_calls")[10] == again


def test_a_prompt_that_appears_too_late_to_pay_for_learning_has_no_loss(model, sample, loops, tiny_wan):
    early = tiny_wan.conditioning(end_percent=0.65)
    arguments = {"positive": early + late(tiny_wan, 0.65), "steps": 12}
    psa = check_against_loop(model, sample, loops, arguments, UUID)
    steps = report(psa)["steps"]
    calls = [(step["sparse_calls"], step["corrected_calls"]) for step in steps if step["sparse_calls"]]
    assert calls[0] == (2, 2)
    assert (2, 0) in calls, "plain while nothing is known of it"
    assert report(psa)["correction"]["corrected_calls"] < sum(sparse for sparse, _ in calls)


def test_prompts_that_change_in_every_step_are_learned_once(model, sample, tiny_wan):
    bounds = [0.0, *(step / 20 - 0.001 for step in range(6, 20)), 1.0]
    parts = [
        tiny_wan.conditioning(seed=seed, start_percent=start, end_percent=end)
        for seed, (start, end) in enumerate(itertools.pairwise(bounds), 8)
    ]
    psa = patch_model(model, **PATCH)
    sample(psa, positive=list(itertools.chain(*parts)), steps=20, size=(1, 16, 3, 16, 32))
    steps = report(psa)["steps"]
    first = next(index for index, step in enumerate(steps) if step["sparse_calls"])
    assert sum(not step["sparse_calls"] for step in steps[first:]) <= 1


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_context_windows(model, sample, loops, schedule):
    """Windows that move on have no loss where they have not been before."""
    psa = check_against_loop(
        model,
        sample,
        loops,
        {"size": (1, 16, 6, 16, 32)},
        WINDOW,
        lambda model: windowed(model, 9, 4, schedule),  # 3 latent frames that share 1
        grids={128 * frames: (frames, 8, 16) for frames in range(1, 7)},
    )
    steps = report(psa)["steps"]
    sparse, corrected = (sum(step[kind] for step in steps) for kind in ("sparse_calls", "corrected_calls"))
    assert corrected == sparse if schedule == "standard_static" else 0 < corrected <= sparse


def test_a_lora_of_one_prompt(model, sample, loops, tiny_wan):
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora(0.5), 1.0, 0.0)
    mask = torch.zeros(1, 16, 32)
    mask[:, :, :16] = 1.0
    left = comfy.hooks.set_conds_props([tiny_wan.conditioning()], 1.0, "default", mask=mask, hooks=hooks)[0]
    right = comfy.hooks.set_conds_props([tiny_wan.conditioning(seed=8)], 1.0, "default", mask=1 - mask)[0]
    check_against_loop(model, sample, loops, {"positive": left + right, "cfg": 3.0}, UUID)


def keyframed(tiny_wan, changes):
    """A prompt with a LoRA whose strength changes: {share of the run: strength}."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora(0.5), 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for start, strength in changes.items():
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    return comfy.hooks.set_conds_props([tiny_wan.conditioning()], 1.0, "default", hooks=hooks)[0]


@pytest.mark.parametrize(
    "changes", [{0.0: 1.0, 0.5: 0.0}, {0.0: 0.0, 0.5: 1.0}, {0.0: 0.3, 0.1: 0.5, 0.5: 1.0}], ids=str
)
def test_a_run_learns_again_where_a_lora_changes_its_strength(model, sample, loops, tiny_wan, changes, caplog):
    arguments = {"steps": 20, "size": (1, 16, 3, 16, 32), "positive": keyframed(tiny_wan, changes)}
    settings = {"renew": 8, "grids": {384: (3, 8, 16)}}
    expected, _ = loops.looped(model, sample, PATCH, arguments, again=(0.5, 0, True), **settings)
    stale, _ = loops.looped(model, sample, PATCH, arguments, **settings)
    psa = patch_model(model, **PATCH)
    out = sample(psa, **arguments)
    assert distance(out, expected) < 2e-5
    assert distance(stale, expected) > 1e-3
    assert all(step["sparse_calls"] == step["corrected_calls"] for step in report(psa)["steps"])
    assert report(psa)["correction"]["reason"] is None
    assert "strength" not in caplog.text


ENDS = {
    "too late to pay for learning": {0.0: 1.0, 0.8: 0.0},
    "goes on changing": {0.0: 1.0} | {0.4 + 0.03 * part: 0.9 - 0.1 * part for part in range(10)},
}


@pytest.mark.parametrize("case", ENDS)
def test_a_lora_whose_strength_changes_too_late_or_too_often(model, sample, tiny_wan, case, caplog):
    """What was lost with other weights is not given back."""
    arguments = {"steps": 12, "size": (1, 16, 3, 16, 32)}
    psa = patch_model(model, **PATCH)
    sample(psa, positive=keyframed(tiny_wan, ENDS[case]), **arguments)
    corrected = by_step(psa, "corrected_calls")
    assert corrected[-1] == 0
    assert any(corrected), "until it changes"
    assert "strength" in report(psa)["correction"]["reason"]
    assert sum("strength" in line for line in caplog.messages) == 1


def test_a_lora_whose_strength_stays_keeps_its_correction(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH)
    sample(psa, positive=keyframed(tiny_wan, {0.0: 0.7, 0.6: 0.7}), steps=12)
    assert all(step["sparse_calls"] == step["corrected_calls"] for step in report(psa)["steps"])
    assert report(psa)["correction"]["reason"] is None


def test_guidance_by_a_model_without_some_blocks(model, sample, loops):
    """It asks for the same prompt a second time in the same step, and loses something else there."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def around(model):
        return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "0", "").result[0]

    check_against_loop(model, sample, loops, {"cfg": 3.0}, WITHOUT, around)


def test_another_grid_with_as_many_tokens_in_a_later_run(model, sample):
    psa = patch_model(model, **PATCH)
    sample(psa, steps=STEPS)
    wide = (1, 16, 3, 16, 64)
    assert torch.equal(sample(psa, steps=STEPS, size=wide), sample(patch_model(model, **PATCH), steps=STEPS, size=wide))


def test_two_gpus_hold_what_their_own_rows_lost(model, sample, loops, tiny_wan, monkeypatch):
    from comfyui_psa.sampling import self_attention

    threads = set()
    genuine = self_attention.learn

    def learn(run, q, *args, **kwargs):
        threads.add(threading.get_ident())
        return genuine(run, q, *args, **kwargs)

    arguments = {"cfg": 5.0, "negative": tiny_wan.conditioning(seed=4)}
    from comfyui_psa.patching import override

    monkeypatch.setattr(override, "learn", learn)
    two = patch_model(on_two_devices(model, tiny_wan), **PATCH)
    check_against_loop(model, sample, loops, arguments, UUID, patched=two)
    assert len(threads) == 2
    one = patch_model(model, **PATCH)
    sample(one, steps=STEPS, size=(1, 16, 3, 16, 32), **arguments)
    assert report(two)["correction"]["bytes"] == report(one)["correction"]["bytes"] > 0
    assert report(two)["correction"]["size"] == "full"
    assert report(two)["mean_sparsity"] == pytest.approx(report(one)["mean_sparsity"], abs=1e-4)

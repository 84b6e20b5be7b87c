"""Steps are counted along the schedule, and kept levels by their calls, whatever the sampler and the windows."""

import itertools

import pytest
import torch

from comfyui_psa.patching.patch import KEY, patch_model

from .core_nodes import windowed
from .patched import PLAIN, kinds, report, reports_nothing, sparse_calls

RESTART = [1.0, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.2, 0.0]


def longest_use(kernel_calls):
    """How many calls of one block in a row used the same choice; two blocks, one call each per evaluation."""
    longest = run = 0
    for call in kernel_calls[::2]:
        run = 1 if call.given["lists"] is None else run + 1
        longest = max(longest, run)
    return longest


def test_a_restart_schedule_is_walked_along(model, tiny_wan, kernel_calls):
    psa = patch_model(model, **PLAIN | {"reuse_steps": 2, "falling": 0.5, "start_percent": 0.0})
    tiny_wan.sample_custom(psa, RESTART)
    assert [step["index"] for step in report(psa)["steps"]] == list(range(11))
    assert kinds(psa) == ["sparse"] * 11
    assert longest_use(kernel_calls) == 2
    densities = [1 - call.config.sparsity for call in kernel_calls]
    assert sum(densities) / len(densities) == pytest.approx(0.4)
    assert densities == sorted(densities, reverse=True)


@pytest.mark.parametrize("reuse_steps", [2, 6])
def test_levels_that_are_kept_while_the_density_falls_are_those_of_the_mean_of_their_steps(model, sample, reuse_steps):
    """Those of the first of them would be too dense for the others, and save less than the slider says."""
    changes = {"sparsity": 0.7, "falling": 0.5, "reuse_steps": reuse_steps, "start_percent": 0.0}
    psa = patch_model(model, **PLAIN | changes)
    sample(psa, steps=6, size=(1, 16, 2, 64, 64))
    assert report(psa)["mean_sparsity"] == pytest.approx(0.7, abs=0.015)


def restarting(model, x, sigmas, extra_args=None, callback=None, disable=None, **_):
    """A sampler that goes back twice to a level it has left, which the schedule that ComfyUI knows does not show."""
    ones = x.new_ones([x.shape[0]])
    walk = [*sigmas[:4].tolist(), *sigmas[1:4].tolist(), *sigmas[1:].tolist()]
    for sigma, following in itertools.pairwise(walk):
        denoised = model(x, sigma * ones, **(extra_args or {}))
        x = x + (x - denoised) / max(sigma, 1e-6) * (following - sigma)
    return x


def test_a_restart_that_the_schedule_does_not_show(model, tiny_wan, kernel_calls):
    import comfy.samplers

    psa = patch_model(model, **PLAIN | {"reuse_steps": 2, "falling": 0.5, "start_percent": 0.0})
    sampler = comfy.samplers.KSAMPLER(restarting)
    tiny_wan.sample_custom(psa, [1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0], sampler)
    assert longest_use(kernel_calls) == 2
    densities = [1 - call.config.sparsity for call in kernel_calls]
    assert len(densities) == 2 * 12
    assert sum(densities) / len(densities) == pytest.approx(0.4)
    assert set(kinds(psa)) == {"sparse"}


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "seeds_3", "res_multistep", "dpm_fast"])
def test_samplers_that_evaluate_several_times_keep_levels_for_two_calls(model, sample, kernel_calls, sampler):
    psa = patch_model(model, **PLAIN | {"reuse_steps": 2, "falling": 0.5})
    sample(psa, steps=6, sampler=sampler)
    assert longest_use(kernel_calls) == 2
    densities = [1 - call.config.sparsity for call in kernel_calls]
    assert sum(densities) / len(densities) == pytest.approx(0.4, rel=0.06)
    assert report(psa)["notes"] == []
    assert set(kinds(psa)) <= {"dense", "sparse"}


def test_windows_of_5_of_13_frames_with_kept_levels(model, sample, kernel_calls):
    psa = patch_model(model, **PLAIN | {"reuse_steps": 2})
    sample(windowed(psa, 17, 8), steps=4, size=(1, 16, 13, 16, 16))  # 5 latent frames that share 2
    windows = sparse_calls(psa)[1] // 2
    assert sparse_calls(psa) == [0, 2 * windows, 2 * windows, 2 * windows]
    assert windows >= 4
    first, second, third = (kernel_calls[2 * windows * step : 2 * windows * (step + 1)] for step in range(3))
    assert all(call.given["lists"] is None for call in first + third), "every window chooses its own levels"
    for chosen, kept in zip(first, second, strict=True):
        assert kept.given["lists"].density is chosen.result.lists.density, "a window keeps its own, not another one's"
    assert reports_nothing(psa)
    assert psa.get_attachment(KEY).maps.whole is False


def test_pairs_without_importance_count_once_where_levels_are_kept(tiny_wan, sample, kernel_calls):
    model = tiny_wan.load("t2v")
    with torch.no_grad():
        model.get_model_object("diffusion_model").blocks[0].self_attn.q.weight[0, 0] = torch.inf
    patched = patch_model(model, **PLAIN | {"reuse_steps": 3})
    sample(patched, steps=4)
    assert sparse_calls(patched) == [0, 2, 2, 2]
    assert [call.given["lists"] is None for call in kernel_calls] == [True] * 2 + [False] * 4
    # The dense step has left nothing finite in the video, so no pair of the two calls that rank has an importance.
    pairs = sum(call.result.lists.blocks.numel() for call in kernel_calls[:2])
    (note,) = report(patched)["notes"]
    assert f"the importance of {pairs} pairs of blocks " in note

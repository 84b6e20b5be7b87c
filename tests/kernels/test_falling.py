"""A density that falls over the steps: its mean, its ends, and what is refused."""

import pytest

from comfyui_psa.kernels import PyramidConfig
from comfyui_psa.kernels.config import ConfigError
from comfyui_psa.kernels.falling import check_falling, config_at, place_among

CONFIG = PyramidConfig({1: 0.1, 2: 0.05, 8: 0.2}, mode="topk", sparsity=0.85, tail=False)


@pytest.mark.parametrize("steps", [2, 3, 15])
def test_the_mean_over_the_steps_is_the_sliders(steps):
    sigmas = [1 - step / 20 for step in range(steps)]
    densities = [1 - config_at(CONFIG, 0.6, place_among(sigmas, sigma)).sparsity for sigma in sigmas]
    assert sum(densities) / steps == pytest.approx(0.15)
    assert densities[0] == pytest.approx(0.15 * 1.6)
    assert densities[-1] == pytest.approx(0.15 * 0.4)
    assert densities == sorted(densities, reverse=True)


def test_without_falling_the_pyramid_is_the_same_one():
    assert config_at(CONFIG, 0.0, 0.0) is CONFIG


def test_calls_between_the_steps_and_schedules_that_are_not_known():
    sigmas = [0.9, 0.6, 0.3]
    assert [place_among(sigmas, sigma) for sigma in (0.9, 0.7, 0.6, 0.1)] == [0, 0.5, 0.5, 1]
    assert place_among(sigmas, 0.9 * (1 - 1e-7)) == 0, "float32 and float64 differ by more"
    assert place_among([0.5], 0.5) == place_among([], 0.5) == 0.5
    assert config_at(CONFIG, 0.6, 0.5).sparsity == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("falling", "config"),
    [
        (-0.1, CONFIG),
        (0.9, CONFIG),
        (float("nan"), CONFIG),
        (0.6, PyramidConfig({1: 0.3}, mode="threshold", sparsity=None)),
        (0.6, PyramidConfig({1: 0.3}, mode="topk", sparsity=None)),
        (0.6, PyramidConfig({1: 0.3}, mode="topk", sparsity=0.3, tail=False)),  # the first step would need 1.12
        (0.6, PyramidConfig({1: 0.3}, mode="topk", sparsity=0.97)),  # the last would be below the tail's 1/64
    ],
)
def test_what_is_out_of_reach_is_refused_before_a_run(falling, config):
    with pytest.raises(ConfigError, match=r"^falling: .* was given; allowed: "):
        check_falling(falling, config)


def test_what_a_run_can_meet_is_accepted():
    for falling in (0.0, 0.3, 0.8):
        check_falling(falling, CONFIG)
    check_falling(0.0, PyramidConfig({1: 0.3}, mode="threshold", sparsity=None))

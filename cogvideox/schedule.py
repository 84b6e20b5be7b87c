"""The noise schedule of CogVideoX in ComfyUI's terms, and the steps that diffusers takes through it.

Sigma is sqrt((1 - a) / a) for diffusers' cumulative alpha a. The schedule ends in pure noise (a = 0), where ComfyUI
needs a finite sigma; code that computes with alphas uses 0 there. ComfyUI's sampling type for CogVideoX,
V_PREDICTION_DDPM, gives the model noise scaled by sqrt(1 + sigma^2). Its V_PREDICTION scales it back, which is right
for every core sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..choices.errors import InputError, require_model

# ComfyUI's own value for the last alpha of a schedule with zero terminal SNR: sigma 4518.8.
_SMALLEST_ALPHA = 4.8973451890853435e-08
_PURE_NOISE_SIGMA = 1000.0


def make_sampling(schedule: Mapping[str, Any], model_config: Any) -> Any:
    """A ModelSampling object of ComfyUI with the schedule of diffusers' CogVideoX schedulers.

    Args:
        schedule: arguments of `CogVideoXDDIMScheduler`; model_config: read for its sampling settings.
    """
    import comfy.model_sampling
    from diffusers import CogVideoXDDIMScheduler

    class CogVideoXSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    scheduler: Any = CogVideoXDDIMScheduler(**schedule)  # Any: to a type checker diffusers has placeholders
    alphas = scheduler.alphas_cumprod.double()
    alphas = alphas.clamp(min=_SMALLEST_ALPHA)
    sampling = CogVideoXSampling(model_config)
    sampling.set_sigmas(((1 - alphas) / alphas).sqrt())
    return sampling


def table_alphas(sampling: Any) -> torch.Tensor:
    """Cumulative alphas of a ModelSampling's table, float64 [steps], least noise first; pure noise is exactly 0."""
    sigmas = sampling.sigmas.double().cpu()
    alphas = 1 / (1 + sigmas**2)
    if sigmas[-1] > _PURE_NOISE_SIGMA:
        alphas[-1] = 0
    return alphas


def trailing_sigmas(model: Any, steps: int, denoise: float) -> torch.Tensor:
    """The sigmas of diffusers' trailing timesteps, most noise first, with 0 at the end: float32 [steps + 1].

    Args:
        model: a ComfyUI MODEL; denoise: below 1 the last `steps` of int(steps / denoise), as ComfyUI's schedulers do.

    Raises:
        InputError: the model has no table of noise levels that ends in pure noise, or fewer levels than the steps asked
            for.
    """
    require_model(model, "PSA CogVideoX Sigmas")
    sigmas = getattr(model.get_model_object("model_sampling"), "sigmas", None)
    if sigmas is None or sigmas.ndim != 1 or sigmas[-1] <= _PURE_NOISE_SIGMA:  # tables of flow models end at 1
        do = "connect the model of PSA CogVideoX Loader or PSA CogVideoX Fix"
        raise InputError("model", "another model", "a CogVideoX model", "PSA CogVideoX Sigmas", do=do)
    if denoise != denoise:
        raise InputError("denoise", denoise, "0 to 1", "PSA CogVideoX Sigmas", do="set denoise to 1")
    if denoise <= 0:
        return torch.empty(0)
    total = int(min(steps / denoise, 1e9))
    if not 1 <= steps <= total <= len(sigmas):
        allowed = f"1 to {len(sigmas)} steps, counted at denoise 1; denoise {denoise} makes them {total}"
        raise InputError("steps", steps, allowed, "PSA CogVideoX Sigmas", do="take fewer steps or more denoise")
    timesteps = trailing_timesteps(total, len(sigmas))[-steps:]
    return torch.cat([sigmas.cpu()[timesteps].float(), torch.zeros(1)])


def trailing_timesteps(steps: int, levels: int = 1000) -> torch.Tensor:
    """Timesteps of diffusers' trailing spacing, int64 [steps], most noise first."""
    from diffusers import CogVideoXDDIMScheduler

    scheduler: Any = CogVideoXDDIMScheduler(num_train_timesteps=levels, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler.timesteps[:steps]  # rounding can add a step of -1


@dataclasses.dataclass(frozen=True)
class Walk:
    """How to set up a diffusers scheduler so that it walks through a schedule.

    Attributes:
        alphas: its table, float64, least noise first.
        steps: its number of inference steps; each step goes down by len(alphas) // steps.
        timesteps: indices into `alphas`, one per step, most noise first.
        sigmas: from the model's table, one per step, plus the one at which the walk ends.
    """

    alphas: torch.Tensor
    steps: int
    timesteps: list[int]
    sigmas: list[float]


def plan_walk(sampling: Any, sigmas: torch.Tensor) -> Walk:
    """The walk along `sigmas` [n + 1] (any ComfyUI schedule, whole or in part), on the model's table.

    Trailing steps are walked as diffusers walks them, so results agree for every step count. Any other schedule goes
    from each listed level to the next.

    Raises:
        InputError: the schedule goes up.
    """
    ends_clean = float(sigmas[-1]) == 0
    visited = sampling.timestep(sigmas[:-1] if ends_clean else sigmas).cpu()
    visited = torch.unique_consecutive(visited)  # levels finer than the table
    if (visited.diff() > 0).any():
        do = "take the schedule of PSA CogVideoX Sigmas or of another scheduler"
        allowed, node = "noise levels that go down", "PSA CogVideoX Sampler"
        raise InputError("sigmas", "a schedule that goes up", allowed, node, do=do)
    table = sampling.sigmas.double().cpu()
    levels = [*table[visited].tolist(), *[0.0] * ends_clean]
    timesteps = [*visited.tolist(), *[-1] * ends_clean]
    alphas = table_alphas(sampling)
    steps = _trailing_count(timesteps, len(alphas))
    if steps:
        return Walk(alphas, steps, timesteps[:-1], levels)
    own = alphas[visited.flip(0)]
    first = len(own) - 1
    return Walk(own, len(own), list(range(first, first - len(timesteps) + 1, -1)), levels)


def _trailing_count(timesteps: list[int], levels: int) -> int:
    """The number of steps of the trailing schedule that contains `timesteps` as a run, or 0."""
    taken = len(timesteps) - 1
    if taken < 1 or timesteps[0] <= timesteps[-1]:
        return 0
    steps = round(levels * taken / (timesteps[0] - timesteps[-1]))
    if not 1 <= steps <= levels:
        return 0
    whole = [*trailing_timesteps(steps, levels).tolist(), -1]
    if timesteps[0] not in whole:
        return 0
    start = whole.index(timesteps[0])
    return steps if whole[start : start + taken + 1] == timesteps else 0

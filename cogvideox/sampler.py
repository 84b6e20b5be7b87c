"""diffusers' CogVideoX schedulers as a ComfyUI sampler: what the models and the 4-step LoRA were made for.

The schedulers do the stepping; this file only translates. ComfyUI's latent is x * sqrt(1 + sigma^2), where x is
diffusers' latent. ComfyUI's model returns the clean latent, and the predicted v follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..choices.errors import InputError
from .schedule import plan_walk

NODE = "PSA CogVideoX Sampler"
SOLVERS = ("dpm", "ddim")


def make_sampler(solver: str) -> Any:
    """A ComfyUI SAMPLER: `dpm` is CogVideoXDPMScheduler (adds noise in every step), `ddim` CogVideoXDDIMScheduler.

    Raises:
        InputError: no such solver.
    """
    import comfy.samplers

    if solver not in SOLVERS:
        raise InputError.of_choice("solver", solver, SOLVERS, NODE)
    return comfy.samplers.KSAMPLER(sample, {"solver": solver})


@torch.no_grad()
def sample(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    solver: str = "dpm",
) -> torch.Tensor:
    """Sample x [B, C, T, H, W] along `sigmas`, in the calling convention of ComfyUI's sampler functions.

    The noise of `dpm` is drawn on the CPU from the seed, as a diffusers pipeline with a CPU generator draws it after
    its starting noise. So a seed gives the same noise on every device.

    Raises:
        InputError: the model's sampling type is not the one that PSA CogVideoX Loader and PSA CogVideoX Fix set.
    """
    from comfy.utils import model_trange

    extra_args = extra_args or {}
    sampling = _checked_sampling(model)
    walk = plan_walk(sampling, sigmas)
    if not walk.timesteps:
        return x
    scheduler = _scheduler(solver, walk)
    generator = torch.Generator().manual_seed(extra_args.get("seed") or 0)
    latent = _scaled(x, walk.sigmas[0], -1).transpose(1, 2)  # diffusers: [B, T, C, H, W]
    torch.randn(latent.shape, generator=generator)  # here a pipeline draws its starting noise
    batch = x.new_ones(len(x))
    clean = None
    for i in model_trange(len(walk.timesteps), disable=disable):
        timestep, sigma = walk.timesteps[i], walk.sigmas[i]
        denoised = model(x, sigma * batch, **extra_args)
        if callback is not None:
            callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        scale = (1 + sigma**2) ** 0.5
        v = (latent / scale - denoised.transpose(1, 2)) * (scale / sigma)
        if solver == "dpm":
            back = walk.timesteps[i - 1] if i else None
            latent, clean = scheduler.step(v, clean, timestep, back, latent, generator=generator, return_dict=False)
        else:
            latent = scheduler.step(v, timestep, latent, return_dict=False)[0]
        x = _scaled(latent.transpose(1, 2), walk.sigmas[i + 1], 1)
    return x


def _scaled(x: torch.Tensor, sigma: float, power: int) -> torch.Tensor:
    """Convert between diffusers' latent and ComfyUI's: times sqrt(1 + sigma^2) to the given power."""
    return x * (1 + sigma**2) ** (power / 2)


def _scheduler(solver: str, walk: Any) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    kind = CogVideoXDPMScheduler if solver == "dpm" else CogVideoXDDIMScheduler
    scheduler: Any = kind(num_train_timesteps=len(walk.alphas), prediction_type="v_prediction", clip_sample=False)
    scheduler.alphas_cumprod = walk.alphas
    scheduler.num_inference_steps = walk.steps
    return scheduler


def _checked_sampling(model: Any) -> Any:
    """The model's ModelSampling; raises InputError unless its latents are scaled as this sampler expects."""
    import comfy.model_sampling

    sampling = model.inner_model.inner_model.model_sampling
    if not isinstance(sampling, comfy.model_sampling.V_PREDICTION) or not hasattr(sampling, "log_sigmas"):
        allowed = "a model from PSA CogVideoX Loader or PSA CogVideoX Fix, without another sampling node after it"
        do = "put PSA CogVideoX Fix before the sampler"
        raise InputError("model", "a model with another kind of sampling", allowed, NODE, do=do)
    return sampling

"""Samples a trained model directly, without ComfyUI but with the same results, using any attention function.

Uses Euler steps over the `simple` schedule, like `workflows/psa_demo.json`. The model comes from a folder: the demo's,
or the large one, which has another vocabulary and is sampled with guidance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..training.files import ModelFolder, load_autoencoder, load_transformer, read_folder
from ..training.flow import guided
from ..training.latents import to_vae_space
from ..training.wan_dit import rotary_table
from .setting import Schedule, shifted

WEIGHTS = Path(__file__).resolve().parents[2] / "demo" / "weights"
SHIFT = 12.0
# Clips decoded at once on a GPU, and on a CPU.
_DECODED_AT_ONCE = 4, 1


@dataclasses.dataclass(frozen=True)
class Video:
    """Size of the sampled video in pixels; frames must be 1 + 4n, sides divisible by 16."""

    frames: int = 33
    height: int = 512
    width: int = 512

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """Shape [C, T, H, W] of its latent."""
        return 16, 1 + (self.frames - 1) // 4, self.height // 8, self.width // 8

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        return self.latent[1], self.latent[2] // 2, self.latent[3] // 2


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is sampled: a scene of the model's world, and the seed of its noise."""

    scene: Any
    seed: int
    name: str


class Attention(Protocol):
    """An attention function that is informed when a step begins."""

    def begin_step(self, step: int) -> None: ...

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


class DenseAttention:
    """torch's own attention, which every setting is compared with."""

    def begin_step(self, step: int) -> None:
        """Does nothing: dense attention does not depend on the step."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Output [B, H, L, D] of q, k, v [B, H, L, D]."""
        return F.scaled_dot_product_attention(q, k, v)


class Cache(Protocol):
    """Answers some of a run's model calls itself."""

    def call(self, x: torch.Tensor, sigma: float, compute: Callable[[], torch.Tensor]) -> torch.Tensor: ...


VelocityOf = Callable[[torch.Tensor, float, Attention], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Latents [steps, B, 16, T, H, W] after every step, float32 on the device, and the seconds of every step."""

    latents: torch.Tensor
    seconds: list[float]


def simple_schedule(steps: int, blocks: int, shift: float = SHIFT) -> Schedule:
    """ComfyUI's `simple` scheduler over its table of 1000 noise levels."""
    stride = 1000 / steps
    times = torch.tensor([1000 - int(step * stride) for step in range(steps)]) / 1000
    return Schedule([float(shifted(time, shift)) for time in times], shift, blocks)


class DemoModel:
    """Diffusion model and decoder on a device; with `dtype` bfloat16 or float16, matrix products and attention use it.

    guidance: scale of classifier-free guidance, with prompts and empty prompts as one batch of twice the clips; None
    uses the scale the model was made for, 1 means no guidance.

    Raises:
        MissingModelError: the folder does not contain a complete model.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        weights: Path | ModelFolder = WEIGHTS,
        guidance: float | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.facts = weights if isinstance(weights, ModelFolder) else read_folder(weights)
        self.guidance = self.facts.guidance if guidance is None else guidance
        self.network = load_transformer(self.facts.dit).to(device).eval()
        self.decoder = load_autoencoder(self.facts.vae).to(device).eval()

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.network.blocks)

    def velocity_of(self, clips: Sequence[Clip], video: Video, cache: Cache | None = None) -> VelocityOf:
        """A function that returns these clips' velocity, float32, for noisy latents [B, 16, T, H, W], their noise level
        and an attention function whose `begin_step` has been called. cache: asked for every model call."""
        context = self.facts.world.conditioning([clip.scene for clip in clips]).to(self.device)
        table = rotary_table(video.grid, self.device)

        @torch.inference_mode()
        def velocity(x: torch.Tensor, sigma: float, attention: Attention) -> torch.Tensor:
            timestep = torch.full((len(clips),), sigma * 1000, device=self.device)

            def network(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
                def compute() -> torch.Tensor:
                    return self.network(x, timestep, context, table, attention)

                return compute() if cache is None else cache.call(x, sigma, compute)

            with self.precision():
                return guided(network, x, timestep, context, self.guidance).float()

        return velocity

    @torch.inference_mode()
    def sample(
        self,
        clips: Sequence[Clip],
        video: Video,
        schedule: Schedule,
        attention: Attention,
        cache: Cache | None = None,
    ) -> Sampled:
        """Sample all clips as one batch."""
        noise = [
            torch.randn(1, *video.latent, generator=torch.Generator().manual_seed(clip.seed)).to(self.device)
            for clip in clips
        ]
        x = torch.cat(noise) * schedule.sigmas[0]
        velocity = self.velocity_of(clips, video, cache)
        latents, seconds = [], []
        for step, (now, following) in enumerate(itertools.pairwise([*schedule.sigmas, 0.0])):
            began = self.clock()
            attention.begin_step(step)
            x = x + (following - now) * velocity(x, now, attention)
            seconds.append(self.clock() - began)
            latents.append(x)
        return Sampled(torch.stack(latents), seconds)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Videos uint8 [B, 3, F, H, W] on the device, from latents [B, 16, T, H, W]."""
        at_once = _DECODED_AT_ONCE[0 if self.device.type == "cuda" else 1]
        videos = []
        for part in latents.split(at_once):
            pixels = self.decoder.decode(to_vae_space(part)).clamp(-1, 1)
            videos.append(((pixels + 1) * 127.5).round().byte())
        return torch.cat(videos)

    def precision(self) -> contextlib.AbstractContextManager:
        """Context for every call of the network: 16-bit matrix products, or no change in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def clock(self) -> float:
        """Seconds, after the GPU's work is done; on a CPU, CPU seconds per thread, which other load hardly affects."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

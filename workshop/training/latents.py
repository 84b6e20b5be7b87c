"""The demo model's latent space: principal components of space-time cells of procedural clips.

A cell has 8x8 pixels, 3 colours and 4 frames (a clip's first frame is a cell of its own and counts four times), as in
the Wan 2.1 autoencoder. Only used in training; the trained decoder and encoder replace it. Channel means and standard
deviations are those of the Wan 2.1 release (https://github.com/Wan-Video/Wan2.1, wan/modules/vae.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clips import CLIP_FRAMES
from .worlds import WORLDS, World

CHANNELS = 16
CELL = 8
CELL_FRAMES = 4
CELL_SIZE = 3 * CELL_FRAMES * CELL * CELL

VAE_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
VAE_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


def _channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)


def to_vae_space(latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (what the diffusion model sees) to the autoencoder's, both [B, 16, T, H, W]."""
    return latents * _channel(VAE_STD, latents) + _channel(VAE_MEAN, latents)


def from_vae_space(latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents to normalised ones, both [B, 16, T, H, W]."""
    return (latents - _channel(VAE_MEAN, latents)) / _channel(VAE_STD, latents)


def _cells(clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split [B, 3, 1 + 4n, H, W] into first-frame cells [B, h, w, 192] and cells [B, n, h, w, 768]."""
    batch, _, frames, height, width = clip.shape
    h, w, groups = height // CELL, width // CELL, (frames - 1) // CELL_FRAMES
    first = clip[:, :, 0].view(batch, 3, h, CELL, w, CELL).permute(0, 2, 4, 1, 3, 5).reshape(batch, h, w, -1)
    rest = clip[:, :, 1:].reshape(batch, 3, groups, CELL_FRAMES, h, CELL, w, CELL)
    return first, rest.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, groups, h, w, CELL_SIZE)


@dataclass
class LatentBasis:
    """Sixteen principal directions.

    mean: float32 [768]. weight: float32 [768, 16], columns scaled so that channel i has the standard deviation
    (lambda_i / lambda_1) ** 0.25 times a common factor, root mean square 1 over all channels.
    """

    mean: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device | str) -> LatentBasis:
        return LatentBasis(self.mean.to(device), self.weight.to(device))

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """Normalised latents, float32 [B, 16, 1 + n, H/8, W/8], of clips [B, 3, 1 + 4n, H, W] in -1..1.

        Raises ValueError if the clip does not divide into cells.
        """
        if (clip.shape[2] - 1) % CELL_FRAMES or clip.shape[3] % CELL or clip.shape[4] % CELL:
            raise ValueError(f"clip of shape {tuple(clip.shape)}: needs 1 + 4n frames and sides divisible by {CELL}")
        first, rest = _cells(clip)
        by_frame = self.weight.view(3, CELL_FRAMES, CELL * CELL, CHANNELS)
        first_weight = by_frame.sum(1).reshape(-1, CHANNELS)
        shift = self.mean @ self.weight
        with torch.autocast(clip.device.type, enabled=False):
            low_first = first @ first_weight.to(clip.dtype)
            low_rest = rest @ self.weight.to(clip.dtype)
        latents = torch.cat([low_first.unsqueeze(1), low_rest], 1).float() - shift
        return latents.permute(0, 4, 1, 2, 3).contiguous()


def fit_basis(
    device: torch.device | str, seed: int = 7, clips: int = 192, side: int = 128, world: World = WORLDS["shapes"]
) -> LatentBasis:
    """Fit the basis on random crops of clips at two scales (512 and 256 pixels per frame).

    The sign of each direction is fixed (its largest entry is positive). CPU and CUDA draw different clips from the same
    seed, so a basis fitted on one does not match weights trained on the other.
    """
    generator = torch.Generator(device).manual_seed(seed)
    total = torch.zeros(CELL_SIZE, CELL_SIZE, device=device, dtype=torch.float64)
    mean = torch.zeros(CELL_SIZE, device=device, dtype=torch.float64)
    count, chunk = 0, 8
    for number in range(0, clips, chunk):
        parameters = world.sample(world.draw(chunk, generator), generator)
        pixel = 1 / 512 if (number // chunk) % 2 else 1 / 256
        origin = torch.rand(chunk, 2, generator=generator, device=device) * (1 - side * pixel)
        clip = world.render(parameters, CLIP_FRAMES, side, side, pixel=pixel, origin=origin)
        first, rest = _cells(clip)
        still = first.view(-1, 3, 1, CELL * CELL).expand(-1, 3, CELL_FRAMES, -1).reshape(-1, CELL_SIZE)
        cells = torch.cat([still, rest.reshape(-1, CELL_SIZE)])
        total += (cells.mT @ cells).double()
        mean += cells.sum(0).double()
        count += cells.shape[0]
    mean /= count
    values, vectors = torch.linalg.eigh(total / count - torch.outer(mean, mean))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    deviation = (values / values[0]) ** 0.25
    deviation = deviation / deviation.square().mean().sqrt()
    weight = vectors * (deviation / values.sqrt())
    return LatentBasis(mean.float(), weight.float())

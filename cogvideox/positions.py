"""Position tables of CogVideoX, made by diffusers' own functions: rotary (5B, 1.5) and sin-cos (2B).

ComfyUI's 1.0 tables differ from those used in training. In training the grid of a video was fitted into the grid of the
training size, centred and with its aspect kept; positions cover that region (diffusers' CogVideoX pipelines).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .variant import Variant

Grid = tuple[int, int, int]
"""Tokens in time, height and width."""


def rotary_table(
    grid: Grid, base: tuple[int, int], head_size: int = 64, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary positions of 1.0 models, each float32 [T*H*W, head_size].

    Args:
        grid: the video's; base: height and width of the training grid.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    cosines, sines = get_3d_rotary_pos_embed(
        head_size, fitted_region((height, width), base), (height, width), frames, grid_type="linspace"
    )
    return cosines.to(device), sines.to(device)


def fitted_region(size: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top-left and bottom-right corner of `size` (height, width) fitted into `base`, centred, aspect kept."""
    (height, width), (base_height, base_width) = size, base
    if height / width > base_height / base_width:
        fitted = base_height, round(base_height / height * width)
    else:
        fitted = round(base_width / width * height), base_width
    top, left = (round((whole - part) / 2) for whole, part in zip(base, fitted, strict=True))
    return (top, left), (top + fitted[0], left + fitted[1])


def sincos_table(grid: Grid, size: int, spatial_scale: float, temporal_scale: float) -> torch.Tensor:
    """Sin-cos positions to add to the video tokens: float32 [T*H*W, size], size divisible by 16."""
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    frames, height, width = grid
    table = get_3d_sincos_pos_embed(size, (width, height), frames, spatial_scale, temporal_scale, output_type="pt")
    return table.flatten(0, 1)


def rotary_embedder(variant: Variant, patch_size: int, head_size: int):
    """A replacement for the native `_get_rotary_emb(h, w, t, device)` that remembers the table of the last size."""
    base = variant.sample_height // patch_size, variant.sample_width // patch_size

    @functools.lru_cache(maxsize=1)
    def table(h: int, w: int, t: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_table((t, h, w), base, head_size, device)

    return table


def positioned_patch_embed(native: type[torch.nn.Module], variant: Variant) -> type[torch.nn.Module]:
    """A subclass of the native patch embedding that adds the right positions to the video tokens.

    A class, not a function, so that nothing is tied to one model: ComfyUI gives clones of a model other modules.
    """

    @functools.lru_cache(maxsize=1)
    def sincos(grid: Grid, size: int) -> torch.Tensor:
        return sincos_table(grid, size, variant.spatial_scale, variant.temporal_scale)

    base: Any = native  # known only at run time

    class PositionedPatchEmbed(base):
        """Tokens of text [B, L, C] and latents [B, T, C, H, W], positions added: [B, L + T*h*w, size]."""

        def forward(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
            embeds = super().forward(text_embeds, image_embeds)
            frames, _, height, width = image_embeds.shape[1:]
            grid = frames // (self.patch_size_t or 1), height // self.patch_size, width // self.patch_size
            text = text_embeds.shape[1]
            if variant.learned_positions and (frames - 1) * 4 + 1 == variant.sample_frames:
                # Text has trained positions too; if ComfyUI repeats a prompt to make it longer, they repeat with it.
                most = self.max_text_seq_length
                rows = [torch.arange(text) % most, torch.arange(most, self.pos_embedding.shape[1])]
                return embeds + self.pos_embedding[:, torch.cat(rows)].to(embeds.device, embeds.dtype)
            table = sincos(grid, self.dim).to(embeds.device, embeds.dtype)
            return torch.cat([embeds[:, :text], embeds[:, text:] + table], 1)

    return PositionedPatchEmbed

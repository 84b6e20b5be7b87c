"""Where the video tokens lie in the sequence that a model's self-attention sees.

Derived from what enters the diffusion model, and its patch size; nothing is read from attention calls. A reader gets
the model and the arguments of one of its calls; it returns the layout, and the lengths of other sequences, which
cross-attention calls may have and which must not be taken for self-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..kernels.order import TokenLayout

CallReader = Callable[..., tuple[TokenLayout, tuple[int, ...]]]


def read_wan_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """Wan: x [B, C, T, H, W], context [B, L, C], then clip_fea [B, L, C] and time_dim_concat [B, C, T, H, W]."""
    clip = args[0] if args else kwargs.get("clip_fea")
    time_concat = args[1] if len(args) > 1 else kwargs.get("time_dim_concat")
    frames = 0 if time_concat is None else time_concat.shape[2]
    text = context.shape[1]
    contexts = (text,) if clip is None else (text, clip.shape[-2], text + clip.shape[-2])
    return wan_layout(x.shape, network.patch_size, frames), contexts


def read_cogvideox_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """CogVideoX: x [B, C, T, H, W], context [B, L, C]; one joint attention a block, no cross-attention."""
    patch = (network.patch_size_t or 1, network.patch_size, network.patch_size)
    return cogvideox_layout(x.shape, patch, context.shape[1]), ()


def wan_layout(latent_shape: Sequence[int], patch_size: Sequence[int], concatenated_frames: int = 0) -> TokenLayout:
    """Layout of Wan T2V and I2V: the grid alone, latents padded up to whole patches.

    Args:
        latent_shape: [B, C, T, H, W] of the latent; concatenated_frames: latent frames appended in time.
    """
    return TokenLayout(_grid([latent_shape[2] + concatenated_frames, *latent_shape[3:]], patch_size))


def cogvideox_layout(latent_shape: Sequence[int], patch_size: Sequence[int], text_tokens: int) -> TokenLayout:
    """Layout of CogVideoX: the text, 226 tokens or a multiple where ComfyUI repeats a prompt, then the grid."""
    return TokenLayout(_grid(latent_shape[2:], patch_size), before=text_tokens)


def _grid(sizes: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    return tuple(-(-size // patch) for size, patch in zip(sizes, patch_size, strict=True))

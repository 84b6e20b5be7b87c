"""Where the video tokens lie in the sequence that a model's self-attention sees.

Derived from the latent that enters the diffusion model and its patch size; nothing is read from attention calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kernels.order import TokenLayout


def wan_layout(latent_shape: Sequence[int], patch_size: Sequence[int], concatenated_frames: int = 0) -> TokenLayout:
    """Layout of Wan T2V and I2V: the grid alone, latents padded up to whole patches.

    Args:
        latent_shape: [B, C, T, H, W] of the latent; concatenated_frames: latent frames appended in time.
    """
    sizes = [latent_shape[2] + concatenated_frames, latent_shape[3], latent_shape[4]]
    return TokenLayout(tuple(-(-size // patch) for size, patch in zip(sizes, patch_size, strict=True)))

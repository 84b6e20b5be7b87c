"""What is known of one call of a model: where its video tokens lie, and which of its attention calls are over them.

It is derived from the input of the diffusion model and its patch size; nothing is read from attention calls. The
readers are in `families/`, one file a family; here is what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..kernels.order import TokenLayout


class ModelCall(NamedTuple):
    """What a reader finds out about a call of a model.

    Attributes:
        layout: where the video tokens are in the sequence that self-attention sees.
        context_tokens: lengths of other sequences: cross-attention and smaller self-attention may have those, and must
            not be taken for the video's self-attention.
    """

    layout: TokenLayout
    context_tokens: tuple[int, ...] = ()


CallReader = Callable[..., ModelCall]
"""reader(network, x, context, conds): x is the latent [B, C, T, H, W], context [B, L, C]; conds are the other inputs of
the forward, by ComfyUI's names."""


def grid_of(sizes: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    """The grid (time, height, width) of a latent of these sizes; a patch that is cut off counts, as it is padded."""
    time, height, width = (-(-size // patch) for size, patch in zip(sizes, patch_size, strict=True))
    return time, height, width


def count(sizes: Sequence[int]) -> int:
    """Number of tokens of a grid (time, height, width)."""
    return sizes[0] * sizes[1] * sizes[2]

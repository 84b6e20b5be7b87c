"""What is known of one call of a model: where its video tokens lie, and which of its attention calls are over them.

It is derived from the input of the diffusion model and its patch size; nothing is read from attention calls. The
readers are in `families/`, one file a family; here is what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..kernels.order import TokenLayout
from ..sampling.position import NO_BLOCKS


class ModelCall(NamedTuple):
    """What a reader finds out about a call of a model.

    Attributes:
        layout: where the video tokens are in the sequence that self-attention sees.
        context_tokens: lengths of other sequences: cross-attention and smaller self-attention may have those, and must
            not be taken for the video's self-attention.
        width: heads times head size of the video's self-attention, if other attention of the model can be as long; None
            if that cannot happen.
        first_blocks: number of the first block of each kind of block that counts from 0 again, by ComfyUI's name of the
            kind (`block_type`).
    """

    layout: TokenLayout
    context_tokens: tuple[int, ...] = ()
    width: int | None = None
    first_blocks: Mapping[str, int] = NO_BLOCKS


UNREADABLE = (
    "PSA cannot read the inputs of this model call, so it does not know where the video is; bypass the node that "
    "changes them, or report this with the log of ComfyUI started with --verbose DEBUG"
)
"""Why a call stays dense whose reader fails."""

CallReader = Callable[..., ModelCall | str]
"""reader(network, x, context, conds): x is the latent [B, C, T, H, W], context [B, L, C]; conds are the other inputs of
the forward, by ComfyUI's names. Returns the reason if the whole call stays dense."""


def grid_of(sizes: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    """The grid (time, height, width) of a latent of these sizes; a patch that is cut off counts, as it is padded."""
    time, height, width = (-(-size // patch) for size, patch in zip(sizes, patch_size, strict=True))
    return time, height, width


def count(sizes: Sequence[int]) -> int:
    """Number of tokens of a grid (time, height, width)."""
    return sizes[0] * sizes[1] * sizes[2]

"""Where the tokens lie in diffusers' transformers, which preset `auto` takes for them, and what is read from a call.

Checked on diffusers 0.42.1 by tests/for_diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..kernels.order import TokenLayout


@dataclasses.dataclass(frozen=True)
class TransformerFamily:
    """A transformer class of diffusers.

    Attributes:
        preset: name of the preset that `auto` takes, from the transformer.
        blocks: its transformer blocks, each with its self-attention as `attn1`.
        read_call: layout and timestep of a call, from the transformer and the call's arguments.
    """

    preset: Callable[[Any], str]
    blocks: Callable[[Any], Sequence[Any]]
    read_call: Callable[[Any, Sequence[Any], Mapping[str, Any]], tuple[TokenLayout, torch.Tensor]]


def _read_wan(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[TokenLayout, torch.Tensor]:
    """forward(hidden_states [B, C, T, H, W], timestep, encoder_hidden_states, ...)."""
    latent, timestep = (_argument(args, kwargs, n, name) for n, name in enumerate(("hidden_states", "timestep")))
    sizes = zip(latent.shape[2:], transformer.config.patch_size, strict=True)
    return TokenLayout(tuple(size // patch for size, patch in sizes)), timestep


def _read_cogvideox(
    transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[TokenLayout, torch.Tensor]:
    """forward(hidden_states [B, T, C, H, W], encoder_hidden_states [B, L, C], timestep, ...); text first."""
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    latent, text, timestep = (_argument(args, kwargs, n, name) for n, name in enumerate(names))
    frames, _, height, width = latent.shape[1:]
    patch = transformer.config.patch_size
    grid = (frames // (transformer.config.patch_size_t or 1), height // patch, width // patch)
    return TokenLayout(grid, before=text.shape[1]), timestep


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs[name]


MODELS = {
    "WanTransformer3DModel": TransformerFamily(lambda _: "module-default", lambda t: t.blocks, _read_wan),
    "CogVideoXTransformer3DModel": TransformerFamily(
        lambda t: "cogvideox-5b" if t.config.patch_size_t is None else "cogvideox1.5-5b",
        lambda t: t.transformer_blocks,
        _read_cogvideox,
    ),
}
"""By class name, so that diffusers is not imported to ask. Other Wan classes (VACE, Animate) are not supported."""

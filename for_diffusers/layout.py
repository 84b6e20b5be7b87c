"""Where the tokens lie in diffusers' transformers, which preset `auto` takes for them, and what is read from a call.

Checked on diffusers 0.42.1 by tests/for_diffusers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..choices.settings import AUTO_PRESETS
from ..kernels.order import TokenLayout
from .coordinates import layout_of

_MASK = "encoder_attention_mask"
_SIZES = ("num_frames", "height", "width")


@dataclasses.dataclass(frozen=True)
class TransformerFamily:
    """A transformer class of diffusers.

    Attributes:
        preset: name of the preset that `auto` takes, from the transformer.
        attentions: its modules of self-attention over the video, in the order of the blocks' numbers.
        read_call: layout and timestep of a call, from the transformer and the call's arguments; or the reason why the
            call stays dense.
        padded: whether self-attention has a mask that hides padding at the end of its sequence, and nothing else. The
            layout ends where the padding begins.
        refusal: why a transformer stays dense that PSA cannot serve, from the transformer; None for all others.
    """

    preset: Callable[[Any], str]
    attentions: Callable[[Any], Sequence[Any]]
    read_call: Callable[[Any, Sequence[Any], Mapping[str, Any]], tuple[TokenLayout, torch.Tensor] | str]
    padded: bool = False
    refusal: Callable[[Any], str | None] = lambda _: None


def _read_wan(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[TokenLayout, torch.Tensor]:
    """forward(hidden_states [B, C, T, H, W], timestep, encoder_hidden_states, ...)."""
    latent, timestep = (_argument(args, kwargs, n, name) for n, name in enumerate(("hidden_states", "timestep")))
    return TokenLayout(_grid(latent.shape[2:], transformer.config.patch_size)), timestep


def _read_vace(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[TokenLayout, torch.Tensor]:
    """As Wan, with control_hidden_states [B, 96, T, H, W]. Reference images are the first frames; of their control, all
    is blank but the image itself (the first 16 channels)."""
    layout, timestep = _read_wan(transformer, args, kwargs)
    control = _argument(args, kwargs, 4, "control_hidden_states")
    blank = (control[:, 16:, : layout.grid[0] - 1] == 0).all(dim=(0, 1, 3, 4))
    return _leading(layout.grid, int(blank.to(torch.int32).cumprod(0).sum())), timestep


def _read_animate(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[TokenLayout, torch.Tensor]:
    """As Wan; the first frame is the reference."""
    layout, timestep = _read_wan(transformer, args, kwargs)
    return _leading(layout.grid, 1), timestep


def _read_ltx(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[TokenLayout, torch.Tensor]:
    """forward(hidden_states [B, L, C], encoder_hidden_states, timestep, encoder_attention_mask, num_frames, height,
    width, rope_interpolation_scale, video_coords, ...). Conditions that are not the first frame come before the
    grid."""
    return _packed(args, kwargs, 4, 8, others_first=True), _argument(args, kwargs, 2, "timestep")


def _read_ltx2(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[TokenLayout, torch.Tensor]:
    """forward(hidden_states [B, L, C], audio_hidden_states, encoder_hidden_states, audio_encoder_hidden_states,
    timestep, ..., num_frames, height, width, fps, audio_num_frames, video_coords, ...). Conditions come after the
    grid."""
    return _packed(args, kwargs, 10, 15, others_first=False), _argument(args, kwargs, 4, "timestep")


def _packed(
    args: Sequence[Any], kwargs: Mapping[str, Any], sizes: int, coordinates: int, *, others_first: bool
) -> TokenLayout:
    """The layout of hidden_states [B, L, C] whose call names the sizes of the grid, or the tokens' coordinates.

    Pipelines that give coordinates leave the sizes out, or give sizes of 1. sizes, coordinates: the place of the first
    size and of the coordinates among the arguments. others_first: whether other tokens come before the grid.
    """
    grid: list[Any] = [args[sizes + n] if len(args) > sizes + n else kwargs.get(name) for n, name in enumerate(_SIZES)]
    if None in grid or math.prod(grid) == 1:
        return layout_of(_argument(args, kwargs, coordinates, "video_coords"))
    others = _argument(args, kwargs, 0, "hidden_states").shape[1] - math.prod(grid)
    if others < 0:
        raise ValueError("fewer tokens than the grid has")
    time, height, width = grid
    return TokenLayout((time, height, width), *((others, 0) if others_first else (0, others)))


def _read_kandinsky(
    transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[TokenLayout, torch.Tensor]:
    """forward(hidden_states [B, T, H, W, C], encoder_hidden_states, timestep, ...)."""
    latent, timestep = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 2, "timestep")
    return TokenLayout(_grid(latent.shape[1:4], transformer.config.patch_size)), timestep


def _own_sparse_attention(transformer: Any) -> str | None:
    kind = transformer.config.attention_type
    if kind == "regular":
        return None
    return (
        f"this Kandinsky 5 has sparse attention of its own (attention_type {kind}), which goes on as it is; to use "
        f"PSA, load a model with regular attention, such as those for 5 seconds"
    )


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


def _read_hunyuan_15(
    transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[TokenLayout, torch.Tensor] | str:
    """forward(hidden_states [B, C, T, H, W], timestep, encoder_hidden_states, encoder_attention_mask [B, L],
    timestep_r, encoder_hidden_states_2, encoder_attention_mask_2 [B, L], image_embeds [B, L, C], ...). After the grid
    come the start image, unless it is blank, the glyphs and the text, and then the padding of all three."""
    latent, timestep = (_argument(args, kwargs, n, name) for n, name in enumerate(("hidden_states", "timestep")))
    masks = (_argument(args, kwargs, 3, _MASK), _argument(args, kwargs, 6, f"{_MASK}_2"))
    image = _argument(args, kwargs, 7, "image_embeds")
    after = sum(mask.bool().sum(1) for mask in masks) + (0 if (image == 0).all() else image.shape[1])
    lengths = set(after.tolist())
    if len(lengths) > 1:
        return "the prompts in one call of the model have different lengths; call it once for each prompt"
    config = transformer.config
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return TokenLayout(_grid(latent.shape[2:], patch), after=lengths.pop()), timestep


def _grid(sizes: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    time, height, width = (size // patch for size, patch in zip(sizes, patch_size, strict=True))
    return time, height, width


def _leading(grid: tuple[int, int, int], frames: int) -> TokenLayout:
    """A grid whose first `frames` are references."""
    return TokenLayout((grid[0] - frames, *grid[1:]), before=frames * grid[1] * grid[2])


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs[name]


def _attn1(*stacks: str) -> Callable[[Any], Sequence[Any]]:
    return lambda transformer: [block.attn1 for stack in stacks for block in getattr(transformer, stack)]


def _default(_: Any) -> str:
    return AUTO_PRESETS[0]


MODELS = {
    "WanTransformer3DModel": TransformerFamily(_default, _attn1("blocks"), _read_wan),
    "WanVACETransformer3DModel": TransformerFamily(_default, _attn1("blocks", "vace_blocks"), _read_vace),
    "WanAnimateTransformer3DModel": TransformerFamily(_default, _attn1("blocks"), _read_animate),
    "LTXVideoTransformer3DModel": TransformerFamily(_default, _attn1("transformer_blocks"), _read_ltx),
    "LTX2VideoTransformer3DModel": TransformerFamily(_default, _attn1("transformer_blocks"), _read_ltx2),
    "Kandinsky5Transformer3DModel": TransformerFamily(
        _default,
        lambda t: [block.self_attention for block in t.visual_transformer_blocks],
        _read_kandinsky,
        refusal=_own_sparse_attention,
    ),
    "HunyuanVideo15Transformer3DModel": TransformerFamily(
        _default, lambda t: [block.attn for block in t.transformer_blocks], _read_hunyuan_15, padded=True
    ),
    "CogVideoXTransformer3DModel": TransformerFamily(
        lambda t: "cogvideox-5b" if t.config.patch_size_t is None else "cogvideox1.5-5b",
        _attn1("transformer_blocks"),
        _read_cogvideox,
    ),
}
"""By class name, so that diffusers is not imported to ask."""


def family_of(module: Any) -> str | None:
    """The name in `MODELS` of a module's class or of the nearest class that it is derived from; None if there is none.

    Libraries derive classes of their own from a model's, to share its weights between GPUs for example.
    """
    return next((one.__name__ for one in type(module).__mro__ if one.__name__ in MODELS), None)


def transformer_in(module: Any) -> Any:
    """The transformer that a module is or holds, as the modules of torch.compile, PEFT and several GPUs hold one; None
    if there is none."""
    modules = module.modules() if isinstance(module, torch.nn.Module) else ()
    return next((one for one in modules if family_of(one) is not None), None)

"""diffusers' names of layers that are one in ComfyUI: HunyuanVideo's queries, keys and values. Names only; no tensors.

Such a layer has a part for each of diffusers' names, one below the other, each with as many rows as the block is wide;
the last one has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Stack = tuple[str, str, str, Mapping[str, Sequence[str]]]
"""Where a stack of blocks is in ComfyUI, where in diffusers, a layer with as many rows as a block is wide (columns may
be packed), and a layer's names in it: ComfyUI's -> diffusers'."""

_TO_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_HUNYUAN_VIDEO: Sequence[Stack] = (
    (
        "double_blocks",
        "transformer_blocks",
        "img_attn.proj",
        {
            "img_attn.qkv": _TO_QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    (
        "single_blocks",
        "single_transformer_blocks",
        "linear2",
        {"linear1": (*_TO_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
    ),
    (
        "txt_in.individual_token_refiner.blocks",
        "context_embedder.token_refiner.refiner_blocks",
        "self_attn.proj",
        {
            "self_attn.qkv": _TO_QKV,
            "self_attn.proj": ("attn.to_out.0",),
            "mlp.0": ("ff.net.0.proj",),
            "mlp.2": ("ff.net.2",),
            "adaLN_modulation.1": ("norm_out.linear",),
        },
    ),
)
_STACKS = {"hunyuan_video": _HUNYUAN_VIDEO}
"""By ComfyUI's `image_model`."""


def fused_names(family: str, weights: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Any]]:
    """diffusers' bare names, each with the weight that it means: its key, or its key and a range of rows within it.

    Args:
        weights: the sizes of the model's weights by ComfyUI's bare names, with `.weight`.
    """
    for place, theirs, as_wide, layers in _STACKS.get(family, ()):
        for name, size in weights.items():
            number, _, layer = name.removesuffix(".weight").removeprefix(f"{place}.").partition(".")
            if not name.startswith(f"{place}.") or layer not in layers or not name.endswith(".weight"):
                continue
            key, parts = f"diffusion_model.{name}", layers[layer]
            rows = weights[f"{place}.{number}.{as_wide}.weight"][0]
            for index, part in enumerate(parts):
                length = rows if index < len(parts) - 1 else size[0] - index * rows
                target = key if len(parts) == 1 else (key, (0, index * rows, length))
                yield f"{theirs}.{number}.{part}", target

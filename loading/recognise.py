"""What a model file is, from the names and sizes of its tensors: the kind of model, and the loader that takes it.

For messages about files that went to the wrong loader. ComfyUI knows diffusion models by its own names. What it does
not know (other kinds of files, diffusers' names) is recognised by a few names that every file of the kind has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .safetensors_header import Header

_DIFFUSION = "Load Diffusion Model"
_LORA_PART = re.compile(
    r"\.(lora_[AB]|lora_(up|down|mid|magnitude_vector)|lora\.(up|down)|hada_\w+|lokr_\w+|oft_\w+|dora_scale|alpha"
    r"|diff|diff_b|set_weight|reshape_weight)(\.|$)|_lora\.(up|down)\."
)
# What a file is, its loader, and parts of names. From every group one part must be in some name; names start with a dot
# here. The first row that fits counts: files with several models come before the models.
_BY_NAME: tuple[tuple[str, str, tuple[tuple[str, ...], ...]], ...] = (
    (
        "a whole checkpoint (model, VAE and text encoder in one file)",
        "Load Checkpoint",
        (
            (".model.diffusion_model.",),
            (".first_stage_model.", ".cond_stage_model.", ".conditioner.", ".vae.", ".text_encoders."),
        ),
    ),
    ("a CogVideoX VAE", "Load VAE", ((".encoder.down_blocks.0.resnets.0.conv1.conv.",), (".decoder.up_blocks.",))),
    ("a VAE", "Load VAE", ((".encoder.",), (".decoder.conv_in.", ".decoder.conv1.", ".decoder.head.", ".decoder.up"))),
    ("a VAE", "Load VAE", ((".decoder.conv_in.", ".decoder.conv1.", ".first_stage_model."),)),
    ("a ControlNet", "Load ControlNet Model", ((".control_model.", ".controlnet_", ".input_hint_block."),)),
    ("a CLIP vision model", "Load CLIP Vision", ((".vision_model.encoder.", ".visual.transformer."),)),
    (
        "a text encoder",
        "Load CLIP",
        (
            (
                ".text_model.encoder.", ".SelfAttention.q.", ".embed_tokens.", ".token_embedding.", ".shared.weight",
                ".self_attn.q_proj.", ".transformer.resblocks.", ".attention.self.query.",
            ),
        ),
    ),
    ("an upscaler", "Load Upscale Model", ((".RDB1.", ".rdb1.", ".body.0.", ".conv_first."),)),
    (
        "CogVideoX as its authors' own code saves it (SAT)",
        "",
        ((".mixins.patch_embed.", ".mixins.final_layer.", ".mixins.adaln_layer."),),
    ),
    ("an LTX-Video model", _DIFFUSION, ((".patchify_proj.", ".adaln_single."), (".transformer_blocks.",))),
    ("an LTX-Video model", _DIFFUSION, ((".scale_shift_table",), (".time_embed.emb.",), (".transformer_blocks.",))),
    ("a Wan model", _DIFFUSION, ((".head.modulation", ".condition_embedder.", ".time_projection."),)),
    ("a HunyuanVideo model", _DIFFUSION, ((".individual_token_refiner.", ".token_refiner."),)),
    ("a Mochi model", _DIFFUSION, ((".t5_y_embedder.",),)),
    ("a Qwen-Image model", _DIFFUSION, ((".txt_norm.",), (".transformer_blocks.",))),
    ("a Flux model", _DIFFUSION, ((".double_blocks.", ".single_transformer_blocks."),)),
    ("a Stable Diffusion 3 model", _DIFFUSION, ((".joint_blocks.", ".attn.add_q_proj."),)),
    ("a Stable Diffusion model", _DIFFUSION, ((".input_blocks.", ".down_blocks."), (".output_blocks.", ".up_blocks."))),
)  # fmt: skip
# ComfyUI's short names of models, where they are not words.
_NAMES = {
    "ltxv": "LTX-Video", "ltxav": "LTX-2", "wan2.1": "Wan", "hunyuan_video": "HunyuanVideo", "flux": "Flux",
    "flux2": "Flux.2", "qwen_image": "Qwen-Image", "mochi_preview": "Mochi", "lumina2": "Lumina 2",
    "hidream": "HiDream",
}  # fmt: skip
_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Kind:
    """What a file is, with its article ('a Wan model'), and the name of the node that loads it, '' if none does."""

    name: str
    loader: str


def recognise(header: Header) -> Kind | None:
    """What a safetensors file holds, or None if we cannot tell."""
    names = [f".{name}" for name in header.tensors]
    if 2 * sum(_LORA_PART.search(name) is not None for name in names) > len(names):
        return Kind("a LoRA", "PSA LoRA Loader")
    for kind, loader, groups in _BY_NAME:
        if all(any(part in name for name in names for part in group) for group in groups):
            return Kind(kind, loader)
    model = core_config(header.tensors, header.metadata).get("image_model")
    return Kind(f"{_NAMES.get(model, model)} (as ComfyUI calls it)", _DIFFUSION) if isinstance(model, str) else None


def core_config(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> dict[str, object]:
    """What ComfyUI works out about a diffusion model from names and sizes alone; {} if it finds nothing."""
    from comfy import model_detection

    state = {
        name: torch.empty(shape, dtype=_TORCH_TYPES.get(kind, torch.uint8), device="meta")
        for name, (kind, shape) in tensors.items()
    }
    try:
        prefix = model_detection.unet_prefix_from_state_dict(state)
        prefix = prefix if any(name.startswith(prefix) for name in state) else ""
        return model_detection.detect_unet_config(state, prefix, metadata=dict(metadata or {})) or {}
    except Exception:  # sizes that no model has, or half a model: ComfyUI reads entries that are not there
        return {}


def describe(header: Header, otherwise: str) -> tuple[str, str]:
    """A clause about a file that is not the wanted one, and what to do: 'this one is a LoRA', 'load it with ...'."""
    kind = recognise(header)
    if kind is None:
        return f"this one has {examples(header.tensors)}", otherwise
    return f"this one is {kind.name}", f"load it with {kind.loader}" if kind.loader else otherwise


def examples(names: Iterable[str]) -> str:
    """The first three of some names."""
    return ", ".join(sorted(names)[:3])

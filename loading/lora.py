"""LoRAs on a ComfyUI MODEL, whatever tool wrote them: diffusers/PEFT, kohya, lightx2v and native names.

ComfyUI reads the weights and patches the model; this file tells it the names, and the scale where a file has it in its
metadata instead of in tensors (diffusers does). A LoRA of which nothing matches is an error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, require_model
from .names import TABLES, to_diffusers
from .tensor_file import FileError, read_tensors

NODE = "PSA LoRA Loader"
_DOTTED_PREFIXES = ("", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
_DOWN = re.compile(r"\.(lora_A|lora_down|lora\.down)(\.weight)?$")
# Weights of four bits, packed: their shape is not the layer's.
_PACKED = (torch.uint8, torch.int8)
_ADAPTER_NAME = re.compile(r"\.lora_(A|B)\.(?!weight$|bias$)\w+\.weight$")

log = logging.getLogger("ComfyUI-PSA")


def apply_lora(model: Any, name: str, strength: float) -> tuple[Any, str]:
    """A clone of a ComfyUI MODEL with the LoRA `name` of ComfyUI's loras folders, and a sentence on what matched.

    Raises:
        InputError: no such file, it is incomplete or not safetensors, nothing in it matches the model, or its sizes are
            those of another model.
    """
    import folder_paths

    require_model(model, NODE)
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        do = "press R to read the menu again, then choose from it"
        raise InputError("lora_name", name, "a file that the menu lists", NODE, do=do)
    try:
        tensors, metadata = read_tensors(Path(path))
        tensors = with_alphas(tensors, lora_config(Path(path), metadata))
    except FileError as error:
        do = "mend or download it again, or choose another LoRA"
        raise InputError("lora_name", name, f"a file that can be used; {error}", NODE, do=do) from error
    patched, summary = patch_with_lora(model, tensors, name, strength)
    log.info("PSA: %s", summary)
    return patched, summary


def patch_with_lora(
    model: Any, tensors: Mapping[str, torch.Tensor], name: str, strength: float = 1.0
) -> tuple[Any, str]:
    """A clone of `model` patched with the LoRA's tensors, stacked on what is there; `name` is for messages.

    Raises:
        InputError: as `apply_lora`.
    """
    import comfy.lora
    import comfy.lora_convert

    tensors = comfy.lora_convert.convert_lora(dict(tensors))
    aliases = module_aliases(model)
    patches = comfy.lora.load_lora(tensors, aliases, log_missing=False)
    unmatched = [key for key in tensors if not _belongs(key, aliases)]
    if not patches:
        kind = _kind(model)
        allowed = f"a LoRA for this model ({kind}); no key of it fits, such as {_examples(tensors)}"
        raise InputError("lora_name", name, allowed, NODE, do=f"choose a LoRA that was made for {kind}")
    _refuse_other_sizes(model, patches, name)
    patched = model.clone()
    applied = patched.add_patches(patches, strength)
    summary = f"LoRA {name}: {len(applied)} weights of the model patched, strength {strength:g}"
    if unmatched:
        summary += f"; {len(unmatched)} of {len(tensors)} keys fit nothing, such as {_examples(unmatched)}"
        log.warning("PSA: %s", summary)
    return patched, summary


def module_aliases(model: Any) -> dict[str, str]:
    """Every name by which a LoRA file may call a module -> the model's weight that it means."""
    import comfy.lora

    aliases = comfy.lora.model_lora_keys_unet(model.model, {})
    table = TABLES.get(_image_model(model), ())
    begin, end = "diffusion_model.", ".weight"
    for key in model.model.state_dict():
        if not (key.startswith(begin) and key.endswith(end)):
            continue
        native = key[len(begin) : -len(end)]
        for name in {native, to_diffusers(native, table)}:
            aliases.update((prefix + name, key) for prefix in _DOTTED_PREFIXES)
            aliases.update((prefix + name.replace(".", "_"), key) for prefix in _FLAT_PREFIXES)
    return aliases


def lora_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoRA's settings as PEFT names them (r, lora_alpha, alpha_pattern, use_rslora), or nothing.

    diffusers puts them into the metadata, PEFT into `adapter_config.json` beside the file.

    Raises:
        FileError: they are there and cannot be read.
    """
    text = metadata.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    if text is None:
        return {}
    try:
        found = json.loads(text)
        return {key.removeprefix("transformer."): value for key, value in found.items()}
    except (ValueError, AttributeError) as error:
        raise FileError(path, f"its LoRA metadata cannot be read: {error}") from error


def with_alphas(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors, plain names for named adapters, with the config's alpha as a tensor wherever a module has none.

    A module's scale is alpha / rank (with `use_rslora` alpha / sqrt(rank)), and 1 where nothing says alpha. The rank is
    that of the tensors.
    """
    found = {_ADAPTER_NAME.sub(r".lora_\1.weight", key): tensor for key, tensor in tensors.items()}
    if config.get("lora_alpha") is None:
        return found
    for key in list(found):
        if not _DOWN.search(key):
            continue
        module, rank = _DOWN.sub("", key), found[key].shape[0]
        alpha = _pattern_value(module, config.get("alpha_pattern"), config["lora_alpha"])
        found.setdefault(f"{module}.alpha", torch.tensor(alpha * (rank**0.5 if config.get("use_rslora") else 1.0)))
    return found


def _pattern_value(module: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """PEFT's alpha_pattern: the value of the first entry with which the module's name ends, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.search(rf"(^|\.)({pattern})$", module):
            return float(value)
    return float(default)


def _belongs(key: str, aliases: Mapping[str, str]) -> bool:
    """Whether a key is some parameter of a module that the model has."""
    while "." in key:
        key = key.rpartition(".")[0]
        if key in aliases:
            return True
    return False


def _refuse_other_sizes(model: Any, patches: Mapping[Any, Any], name: str) -> None:
    """ComfyUI would log an error for each weight of another size and sample without the LoRA."""
    weights = model.model.state_dict()
    for target, patch in patches.items():
        if getattr(patch, "name", None) != "lora" or not isinstance(target, str) or target not in weights:
            continue
        weight = weights[target]
        up, down, _, middle, _, reshape = patch.weights
        if middle is not None or reshape is not None or weight.dtype in _PACKED:
            continue
        made_for, wanted = (up.shape[0], math.prod(down.shape[1:])), (weight.shape[0], math.prod(weight.shape[1:]))
        if made_for != wanted:
            place = target.removeprefix("diffusion_model.")
            allowed = f"a LoRA for this model ({_kind(model)}), which has {wanted[0]}x{wanted[1]} at {place}"
            do = f"choose a LoRA that was made for this size of {_kind(model)}"
            raise InputError("lora_name", f"{name}, made for {made_for[0]}x{made_for[1]}", allowed, NODE, do=do)


def _image_model(model: Any) -> str:
    return getattr(getattr(model.model, "model_config", None), "unet_config", {}).get("image_model", "")


def _kind(model: Any) -> str:
    return _image_model(model) or type(model.model).__name__


def _examples(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)[:3])

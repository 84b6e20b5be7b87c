"""The weights of a CogVideoX checkpoint by ComfyUI's names and sizes, compared with the model that ComfyUI will build.

It only reads headers. ComfyUI itself would leave missing weights as they are (noise), and would stop in the middle of
loading at a weight of the wrong size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .files import FileError
from .names import COGVIDEOX, to_native
from .recognise import core_config, examples
from .safetensors_header import Header

_FIRST = "blocks.0.norm1.linear.weight"
_BESIDE = "patch_embed.text_proj.weight"
# Extra tensors of ComfyUI's quantised weights, and the names of bitsandbytes' own, which ComfyUI cannot use.
_QUANTISED = re.compile(r"scale|quant|absmax")
_WEIGHT_SCALE = re.compile(r"\.(?:weight_scale|scale_weight)\w*$")
_FORMATS = "_quantization_metadata"
_BITSANDBYTES = re.compile(r"\.(absmax|quant_map|nested_\w+|quant_state\.\w+)$")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class NotCogVideoX(ValueError):
    """The names in a file are not those of a CogVideoX transformer."""


def native_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a file -> ComfyUI's name, for the transformer's tensors; a prefix that all of them share is cut off.

    Raises:
        NotCogVideoX: there is no CogVideoX transformer among them.
    """
    renamed = {name: to_native(name, COGVIDEOX) for name in names}
    natives = set(renamed.values())
    prefixes = [name.removesuffix(_FIRST) for name in natives if f".{name}".endswith(f".{_FIRST}")]
    prefixes = [prefix for prefix in prefixes if prefix + _BESIDE in natives]
    if not prefixes:
        raise NotCogVideoX
    prefix = min(prefixes, key=len)
    return {name: native.removeprefix(prefix) for name, native in renamed.items() if native.startswith(prefix)}


def check_sizes(path: Path, header: Header, names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """ComfyUI's config of the model, once all its weights are there in the right size, and names that it does not have.

    Raises:
        FileError: a weight is missing, has another size, or is not floating point.
    """
    given = {native: header.tensors[name] for name, native in names.items()}
    config = core_config(given)
    wanted = _sizes(config)
    if wanted is None:
        raise FileError(path, "its weights have sizes that no CogVideoX model has")
    packed = [name for name in given if _BITSANDBYTES.search(name)]
    if packed:
        advice = "take the bf16 file, and weight_dtype fp8_e4m3fn to save memory"
        raise FileError(path, "it is compressed by bitsandbytes, which ComfyUI cannot use", advice)
    weights = [name for name in wanted if name.endswith((".weight", ".bias"))]
    missing = [name for name in weights if name not in given]
    if missing:
        reason = f"{len(missing)} of {len(weights)} weights are missing, for example {examples(missing)}"
        raise FileError(path, reason)
    quantised = {name.rpartition(".")[0] for name in given if name not in wanted and _QUANTISED.search(name)}
    for name in sorted(set(given) & set(wanted)):
        kind, shape = given[name]
        if name.rpartition(".")[0] in quantised:
            continue
        if kind not in _FLOATS:
            raise FileError(path, f"{name} holds numbers of type {kind}, where a model has floating-point numbers")
        if shape != wanted[name]:
            sizes = f"{_size(shape)}, where this model has {_size(wanted[name])}"
            raise FileError(path, f"{name} is {sizes}; it belongs to another model, or the file is damaged")
    return config, [name for name in given if name not in wanted and not _QUANTISED.search(name)]


def unused_scales(names: Iterable[str], loaded: Iterable[str]) -> list[str]:
    """Scales of 8-bit weights in a file, by ComfyUI's names, whose layers have none in the model that ComfyUI made.

    Scales count only with a mark that says what they are, and it may be missing, or name the layers otherwise.
    """
    scaled = {name.rpartition(".")[0] for name in loaded if _WEIGHT_SCALE.search(name)}
    found = sorted(name for name in names if _WEIGHT_SCALE.search(name))
    return [name for name in found if f"diffusion_model.{name.rpartition('.')[0]}" not in scaled]


def with_native_layers(metadata: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata, in which the formats of quantised layers go by ComfyUI's names as well.

    Args:
        names: name in the file -> ComfyUI's name.
    """
    try:
        formats = json.loads(metadata.get(_FORMATS, "{}"))
        layers = dict(formats["layers"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return dict(metadata)
    native = {name.rpartition(".")[0]: known.rpartition(".")[0] for name, known in names.items()}
    formats["layers"] = {native.get(layer, layer): form for layer, form in layers.items()}
    return {**metadata, _FORMATS: json.dumps(formats)}


def _sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Name -> size of every weight of the model that ComfyUI builds from a config; None if it cannot."""
    import comfy.ops
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

    if config.get("image_model") != "cogvideox" or not config.get("num_attention_heads"):
        return None
    try:
        with torch.device("meta"):
            model = CogVideoXTransformer3DModel(
                **config, dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init
            )
    except Exception:  # sizes that cannot make a layer
        return None
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"

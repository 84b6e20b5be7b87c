"""Which weight of the model a key of a LoRA file means, whatever tool named it. Names only; no tensors.

A key is a wrapper, a module of the model and an ending: `pipe.dit.` + `blocks.0.self_attn.q` + `lora_A.default.weight`.
Tools agree on the modules (ComfyUI's names or diffusers') and on nothing else. So we look for the module: the longest
stretch of the key that names one, with dots or, as kohya writes it, underscores. The part before it must be the name of
the whole network: the same in the whole file, and without an index into a list. Otherwise an image model's
`down_blocks.0.attentions.0.transformer_blocks.0...` would be taken for one of Wan's blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .fused_names import fused_names
from .names import TABLES, to_diffusers

Target = Any
"""A weight as ComfyUI's patches name it: its key, or its key and a range within it."""

# What torch adds anywhere in a name when it compiles or shards a module.
_TORCH = re.compile(r"(?:^|(?<=[._]))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]")
# The whole network in a name with underscores: the method, one word, and `model` any number of times, of which kind or
# for which expert.
_FLAT_WRAPPER = re.compile(
    r"(?:(?:lora|lycoris|oft)_+(?:[a-z]+(?:_?2)?_+)?)?(?:(?:(?:base|diffusion|(?:high|low)_noise)_)?model_+)*"
)
# The whole network in ComfyUI's own names.
_CORE_WRAPPER = re.compile(r"^(?:(?:diffusion_model|transformer|unet)\.|lora_(?:unet|transformer)_|lycoris_)")
_SECOND = re.compile(r"(?:^|[._])(?:[a-z_]*[a-z]_?2|low(?:_noise)?(?:_model)?)[._]")
# An ending: the form, the name that PEFT gave the adapter, and the kind of parameter.
_ENDING = re.compile(r"([^.]+)(?:\.(?!(?:weight|bias)$)([^.]+))?(?:\.(weight|bias))?")
_LOW_RANK = {"lora_A": "lora_down", "lora_B": "lora_up", "lora_down": "lora_down", "lora_up": "lora_up"}
_LOW_RANK |= {"lora_mid": "lora_mid"}
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Key:
    """A key of the file, taken apart. `module` is spelled as in the file, with its dots; `part` is the ending as
    ComfyUI's loader knows it."""

    wrapper: str
    module: str
    target: Target
    adapter: str
    part: str

    @property
    def second_expert(self) -> bool:
        """Whether the wrapper names the second of two networks: the low-noise expert of Wan 2.2."""
        return bool(_SECOND.search(self.wrapper))


@dataclass(frozen=True)
class Reading:
    """The keys of a file that belong together, and those set aside, with the reason."""

    keys: dict[str, Key]
    unknown: list[str]
    second_expert: list[str]
    other_adapters: list[str]

    @property
    def wrapper(self) -> str:
        return next((key.wrapper for key in self.keys.values()), "")


def module_names(model: Any) -> dict[str, Target]:
    """Every bare name of a module or parameter of a ComfyUI MODEL, native or diffusers' -> the weight it means.

    If we have no table of names for the model, ComfyUI's own names are added, without their wrappers.
    """
    family = image_model(model)
    table = TABLES.get(family, ())
    names: dict[str, Target] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for key, weight in model.model.state_dict().items():
        if key.startswith("diffusion_model."):
            native = key.removeprefix("diffusion_model.").removesuffix(".weight")
            names[native] = key
            names.setdefault(to_diffusers(native, table), key)
            sizes[key.removeprefix("diffusion_model.")] = tuple(weight.shape)
    names |= dict(fused_names(family, sizes))
    if family not in TABLES:
        import comfy.lora

        known = comfy.lora.model_lora_keys_unet(model.model, {})
        names = {_CORE_WRAPPER.sub("", name): target for name, target in known.items()} | names
    return names


def read_keys(keys: Iterable[str], names: Mapping[str, Target]) -> Reading:
    """Take a file's keys apart and keep those of one network and one adapter, the ones with the most keys."""
    flat = _flat(names)
    found = {key: _take_apart(key, names, flat) for key in keys}
    known = {key: parts for key, parts in found.items() if parts is not None}
    unknown = [key for key in found if key not in known]
    # In a tie the first expert's keys are kept, and the shorter wrapper.
    counts = Counter(parts.wrapper for parts in known.values())
    second = {parts.wrapper: parts.second_expert for parts in known.values()}
    wrapper = min(counts, key=lambda name: (-counts[name], second[name], len(name), name), default="")
    adapters = Counter(parts.adapter for parts in known.values() if parts.wrapper == wrapper and parts.adapter)
    adapter = min(adapters, key=lambda name: (-adapters[name], name), default="")
    kept: dict[str, Key] = {}
    second_expert: list[str] = []
    other_adapters: list[str] = []
    for key, parts in known.items():
        if parts.wrapper != wrapper:
            (second_expert if second[parts.wrapper] else unknown).append(key)
        elif parts.adapter not in ("", adapter):
            other_adapters.append(key)
        else:
            kept[key] = parts
    return Reading(kept, unknown, second_expert, other_adapters)


def image_model(model: Any) -> str:
    """ComfyUI's name of the model's family, or nothing."""
    return getattr(getattr(model.model, "model_config", None), "unet_config", {}).get("image_model", "")


def _flat(names: Mapping[str, Target]) -> dict[str, Target]:
    """The names with underscores; a name that could mean two weights is left out."""
    flat: dict[str, Target] = {}
    twice = set()
    for name, target in names.items():
        spelled = name.replace(".", "_")
        if flat.setdefault(spelled, target) != target:
            twice.add(spelled)
    return {name: target for name, target in flat.items() if name not in twice}


def _take_apart(key: str, names: Mapping[str, Target], flat: Mapping[str, Target]) -> Key | None:
    plain = re.sub(r"_lora\.(up|down)\.weight$", r".lora_\1.weight", _TORCH.sub("", key))
    parts = plain.split(".")
    found: list[tuple[str, str, Target, str]] = []
    for begin in range(len(parts)):
        for end in range(len(parts), begin, -1):
            name = ".".join(parts[begin:end])
            if name in names:
                wrapper = "".join(f"{part}." for part in parts[:begin])
                found.append((wrapper, name, names[name], ".".join(parts[end:])))
                break
    words = parts[0].split("_")
    for begin in range(len(words)):
        name = "_".join(words[begin:])
        if name in flat:
            wrapper = "".join(f"{word}_" for word in words[:begin])
            found.append((wrapper, name, flat[name], ".".join(parts[1:])))
            break
    if not found:
        return None
    wrapper, name, target, ending = max(found, key=lambda candidate: len(candidate[1]))
    if not _is_network(wrapper):
        return None
    return Key(wrapper, name, target, *_part(ending))


def _is_network(wrapper: str) -> bool:
    if wrapper.endswith("_"):
        return _FLAT_WRAPPER.fullmatch(wrapper) is not None
    return not any(part.isdigit() for part in wrapper.split("."))


def _part(ending: str) -> tuple[str, str]:
    """The adapter's name and the ending as ComfyUI has it: 'lora_A.mine.weight' -> 'mine', 'lora_down.weight'."""
    ending = re.sub(r"^lora(?:_linear_layer)?\.(up|down)(?![^.])", r"lora_\1", ending)
    match = _ENDING.fullmatch(ending)
    if match is None:
        return "", ending
    form, adapter, kind = match.groups()
    if form in _LOW_RANK:
        return adapter or "", f"{_LOW_RANK[form]}.{kind or 'weight'}"
    if form == MAGNITUDE:
        return adapter or "", MAGNITUDE
    return adapter or "", f"{form}.{kind}" if kind else form

"""LoRAs on a ComfyUI MODEL, whatever tool wrote them: PEFT, diffusers, kohya, lightx2v, LyCORIS and native names.

Every tensor of a file is either applied with the right size or named in the summary; otherwise the file is refused.
ComfyUI reads the weights and patches the model. The `lora_*.py` files know what the names mean, and find out what
ComfyUI will do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..choices.errors import InputError, require_model
from .lora_folders import list_loras
from .lora_forms import Misfit, Size, changes_nothing, key_of, make_patches, weight_sizes
from .lora_kinds import looks_like, twin_of
from .lora_names import Reading, Target, image_model, module_names, read_keys
from .lora_settings import lora_config, with_alphas
from .menu import menu_name
from .recognise import recognise
from .safetensors_header import Header
from .tensor_file import FileError, read_tensors

NODE = "PSA LoRA Loader"
STRENGTH = 100.0
"""The largest strength, positive or negative, as in ComfyUI's own loader."""

log = logging.getLogger("ComfyUI-PSA")


def apply_lora(model: Any, name: str, strength: float) -> tuple[Any, str]:
    """A clone of a ComfyUI MODEL with the LoRA `name` from ComfyUI's loras folders, and a sentence on what matched.

    Raises:
        InputError: no such file, it is incomplete or not safetensors, nothing in it matches the model, it has another
            model's sizes, or a number is not finite.
    """
    require_model(model, NODE)
    _check_strength(strength)
    path = _path(name)
    try:
        tensors, metadata = read_tensors(path)
        config = lora_config(path, metadata)
        keys = read_keys(tensors, module_names(model)).keys if config.get("alpha_pattern") else {}
        scaled = with_alphas(tensors, config, lambda key: keys[key].module if key in keys else key, path)
    except FileError as error:
        raise InputError("lora_name", name, f"a file that can be used; {error}", NODE, do=error.do) from error
    return patch_with_lora(model, scaled, name, strength, tensors)


def patch_with_lora(
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    name: str,
    strength: float = 1.0,
    in_file: Collection[str] | None = None,
) -> tuple[Any, str]:
    """A clone of `model` patched with the LoRA's tensors, on top of earlier patches; `name` is for messages.

    Args:
        in_file: the file's own keys, to report on, if alphas were added to them.

    Raises:
        InputError: as `apply_lora`.
    """
    _check_strength(strength)
    _check_numbers(tensors, name)
    reading = read_keys(tensors, module_names(model))
    sizes = weight_sizes(model)
    fit = _fit(reading, tensors, sizes)
    own = set(tensors if in_file is None else in_file)
    _refuse(model, tensors, own, reading, fit, name)
    patched = model.clone()
    if strength != 0:
        for layer in fit.layers:
            patched.add_patches(layer, strength)
    unchanged = changes_nothing((patch for layer in fit.layers for patch in layer.items()), sizes)
    summary, complete = _summary(reading, fit, own, name, strength, unchanged)
    log.log(logging.INFO if complete else logging.WARNING, "PSA: %s", summary)
    return patched, summary


@dataclass
class _Fit:
    """The patches, in layers with one patch per weight, and the keys that have no effect."""

    layers: list[dict[Target, Any]] = field(default_factory=list)
    misfits: list[tuple[Misfit, list[str]]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def add(self, target: Target, patch: Any) -> None:
        free = next((layer for layer in self.layers if target not in layer), None)
        if free is None:
            self.layers.append(free := {})
        free[target] = patch


def _fit(reading: Reading, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, Size | None]) -> _Fit:
    fit = _Fit()
    weights: dict[Target, dict[str, str]] = {}
    for key, parts in reading.keys.items():
        if weights.setdefault(parts.target, {}).setdefault(parts.part, key) != key:
            fit.twice.append(key)
    for target, keys in weights.items():
        made = make_patches(target, {part: tensors[key] for part, key in keys.items()}, sizes)
        for place, patch in made.patches:
            fit.add(place, patch)
        told = set(made.used)
        for misfit in made.misfits:
            fit.misfits.append((misfit, [keys[part] for part in misfit.parts if part in keys]))
            told |= misfit.parts.keys()
        fit.unused += [key for part, key in keys.items() if part not in told]
    return fit


def _refuse(
    model: Any, tensors: Mapping[str, torch.Tensor], in_file: set[str], reading: Reading, fit: _Fit, name: str
) -> None:
    """Refuse a file that its names or sizes show to be made for another model."""
    family = image_model(model)
    kind = family or type(model.model).__name__
    allowed, do = f"a LoRA for this model ({kind})", f"choose a LoRA that was made for {kind}"
    unknown, known = in_file.intersection(reading.unknown), in_file.intersection(reading.keys)
    # The keys that do not fit are the telling ones.
    likeness = looks_like(unknown, family)
    strangers = likeness is not None and 2 * len(unknown) > len(in_file)
    other = next((misfit for misfit, _ in fit.misfits if misfit.multiplied or not fit.layers), None)
    if other is not None and not strangers:
        made_for = _made_for(other)
        # A message shows 80 letters; keep these at the end.
        shown = name if len(name) <= 50 else f"...{name[-47:]}"
        given = f"{shown}, made for {made_for}" if made_for else name
        place = f"{allowed}, which has {_times(other.size)} at {other.target.removeprefix('diffusion_model.')}"
        parts = "" if made_for else f"; of {_parts(other.parts)} that cannot be made"
        like = f"; it looks like one for {likeness}" if likeness else ""
        do = f"choose a LoRA that was made for this size of {kind}"
        raise InputError("lora_name", given, place + parts + like, NODE, do=do)
    if strangers or not fit.layers:
        fits = "none of its keys can be used here," if known else "none of its keys fits,"
        fits = f"only {len(known)} of {len(in_file)} keys fit, the others do not," if fit.layers else fits
        file = recognise(Header({key: ("", tuple(tensor.shape)) for key, tensor in tensors.items()}, {}))
        if file is not None and file.loader != NODE:
            like, do = f"; it is {file.name}", f"load it with {file.loader}" if file.loader else do
        else:
            like = f"; it looks like one for {likeness}" if likeness else ""
        raise InputError(
            "lora_name", name, f"{allowed}; {fits} for example {_examples(unknown or in_file)}{like}", NODE, do=do
        )
    twin = twin_of((key_of(target) for layer in fit.layers for target in layer), family)
    if twin is not None:
        raise InputError(
            "lora_name", name, f"{allowed}; this one is for the blocks that {twin} has, which are fewer", NODE, do=do
        )


def _summary(
    reading: Reading, fit: _Fit, in_file: set[str], name: str, strength: float, unchanged: bool
) -> tuple[str, bool]:
    """One line on what was done and what was left out, and whether all is well. unchanged: whether the patches leave
    every weight as it is."""
    total = len(in_file)
    count = len({key_of(target) for layer in fit.layers for target in layer})
    done = f"{count} weights of the model patched, strength {strength:g}"
    if strength == 0:
        done = f"{count} weights fit; strength 0 leaves the model as it is"
    lines = [f"LoRA {name}: {done}"]
    whole = sum(isinstance(patch, tuple) and patch[0] == "set" for layer in fit.layers for patch in layer.values())
    if whole and strength not in (0, 1):
        lines[0] += f" ({whole} of them replaced as a whole, whatever the strength)"

    if unchanged:
        lines.append(
            "but what it adds to them is zero everywhere, so nothing changes; choose a LoRA that has been trained"
        )

    def tell(keys: list[str], what: str) -> None:
        keys = [key for key in keys if key in in_file]
        if keys:
            lines.append(f"{len(keys)} of {total} keys {what}, for example {_examples(keys)}")

    tell(reading.unknown, "match nothing in the model")
    stray = [key for _, keys in fit.misfits for key in keys]
    if stray:
        first = fit.misfits[0][0]
        place = first.target.removeprefix("diffusion_model.")
        lines.append(
            f"{len(stray)} of {total} keys were left out for their size, for example {_examples(stray)} "
            f"({_parts(first.parts)}; the model has {_times(first.size)} at {place})"
        )
    tell(fit.unused, "belong to weights of the model but were left out: ComfyUI cannot use them there")
    tell(fit.twice, "were left out because the file has the same part of the weight under another name")
    tell(reading.other_adapters, "were left out because they belong to another adapter in the file; save it on its own")
    tell(reading.second_expert, "are for the low-noise expert and were left out; save them as a separate file")
    complete = len(lines) == 1
    if any(key.second_expert for key in reading.keys.values()):
        lines.append(
            f"by its names ({reading.wrapper}) it is for the low-noise expert of Wan 2.2: wire it to that model"
        )
    return "; ".join(lines), complete


def _path(name: str) -> Path:
    """The path of the file that the menu, or a workflow from another system, calls `name`."""
    import folder_paths

    path = folder_paths.get_full_path("loras", menu_name(str(name), list_loras()) or str(name))
    if path is None:
        do = "press R to read the menu again, then choose from it"
        raise InputError("lora_name", name, "a file that the menu lists", NODE, do=do)
    return Path(path)


def _check_strength(strength: float) -> None:
    if not (isinstance(strength, int | float) and math.isfinite(strength) and abs(strength) <= STRENGTH):
        allowed = f"a number from {-STRENGTH:g} to {STRENGTH:g}"
        raise InputError("strength", strength, allowed, NODE, do="set strength to 1 or to another number of these")


def _check_numbers(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse a file with numbers that are not finite: one NaN makes the whole picture black."""
    broken = [key for key, tensor in tensors.items() if not _finite(tensor)]
    if broken:
        allowed = (
            f"a LoRA of finite numbers; {len(broken)} of its {len(tensors)} tensors hold NaN or infinity, for example "
            f"{_examples(broken)}"
        )
        raise InputError("lora_name", name, allowed, NODE, do="download it again, or choose another LoRA")
    for key, tensor in tensors.items():
        if key.rpartition(".")[2] == "alpha" and tensor.numel() != 1:
            allowed = f"a LoRA with one number as {key}; this one has {tensor.numel()}"
            raise InputError("lora_name", name, allowed, NODE, do="download it again, or choose another LoRA")


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _made_for(misfit: Misfit) -> str | None:
    """The size of the weight that a plain LoRA was made for, or of a difference or whole weight; None for others."""
    parts, size = misfit.parts, misfit.size
    up, down = parts.get("lora_up.weight"), parts.get("lora_down.weight")
    if up and down and len(up) > 1 and len(down) > 1 and math.prod(up[1:]) == down[0]:
        made_for = (up[0], math.prod(down[1:]))
        return _times(made_for) if made_for != (size[0], math.prod(size[1:])) else None
    return _times(next(iter(parts.values()))) if len(parts) == 1 and not (up or down) else None


def _parts(parts: Mapping[str, Size]) -> str:
    return ", ".join(f"{part} {_times(size)}" for part, size in parts.items())


def _times(size: Size) -> str:
    return "x".join(str(length) for length in size) or "one number"


def _examples(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)[:3])

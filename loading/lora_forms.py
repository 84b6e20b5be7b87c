"""From the tensors of one weight in a LoRA file to ComfyUI's patches; we find out at once what each of them will do.

ComfyUI knows the forms (LoRA, LoHa, LoKr, GLoRA, OFT, BOFT, differences, whole weights, DoRA, ...). It skips what does
not fit, with a log line in the middle of sampling. So we run its own code here on tensors that have sizes but no
numbers (torch's meta device). The tensors that the resulting weight depends on are used; the others are not. This file
knows no form itself, except two of PEFT's that ComfyUI does not know.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .lora_names import MAGNITUDE, Target

Size = tuple[int, ...]
_NAME = "weight"
# Packed four-bit weights: their shape is not the layer's.
_PACKED = (torch.uint8, torch.int8)
# One number per row or column: in another layout they would broadcast over a square weight without an error.
_PER_ROW = ("dora_scale", "rescale")


@dataclass(frozen=True)
class Misfit:
    """Tensors that do not fit the weight `target`, which has `size`. If `multiplied`, they were made for another model;
    a difference or a whole weight may just be a stray one."""

    target: str
    size: Size
    parts: dict[str, Size]
    multiplied: bool


@dataclass
class Patches:
    """The result for the tensors of one weight: patches in the order in which they act, and the parts left over."""

    patches: list[tuple[Target, Any]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    misfits: list[Misfit] = field(default_factory=list)


def weight_sizes(model: Any) -> dict[str, Size | None]:
    """The sizes of a ComfyUI MODEL's weights that can be patched, as its layers have them; None if the size cannot be
    known.

    ComfyUI only patches weights of modules that contain no modules: never `modulation` of Wan's blocks.
    """
    modules = dict(model.model.named_modules())
    inner = {name for name, module in modules.items() if _has_inner(module)}
    sizes: dict[str, Size | None] = {}
    for key, weight in model.model.state_dict().items():
        name = key.rpartition(".")[0]
        if name in inner:
            continue
        sizes[key] = tuple(weight.shape)
        if weight.dtype in _PACKED:
            layer = modules.get(name)
            features: tuple[Any, Any] = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
            sizes[key] = features if None not in features and key.endswith(".weight") else None
    return sizes


def _has_inner(module: torch.nn.Module) -> bool:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return any(name not in own for name, _ in module.named_parameters())


def make_patches(target: Target, parts: Mapping[str, torch.Tensor], sizes: Mapping[str, Size | None]) -> Patches:
    """ComfyUI's patches of one weight.

    Args:
        target: the weight. parts: its tensors by ending, as ComfyUI's loader names them. sizes: of all weights.
    """
    result = Patches()
    given, left = _with_bias(parts)
    while left:
        try:
            made, tried = _load(target, left), _load(target, {part: _sized(part, left[part]) for part in left})
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            result.misfits.append(_misfit(target, sizes, left, multiplied=True))
            return result
        spent: set[str] = set()
        for place, (patch, inputs) in tried.items():
            spent |= inputs.keys()
            if key_of(place) not in sizes:
                continue
            adapter = not isinstance(patch, tuple)
            reached = _reached(place, patch, inputs, sizes[key_of(place)])
            if not reached:
                misfit = {part: left[part] for part in inputs}
                result.misfits.append(_misfit(place, sizes, misfit, multiplied=adapter))
                continue
            result.patches.append((place, made[place][0]))
            result.used |= {given.get(part, part) for part in reached}
            # To ComfyUI these are numbers, not tensors: they act through the adapter.
            result.used |= {part for part in ("alpha", "reshape_weight") if adapter and part in parts}
        if not spent:
            break
        left = {part: tensor for part, tensor in left.items() if part not in spent}
    return result


def changes_nothing(patches: Iterable[tuple[Target, Any]], sizes: Mapping[str, Size | None]) -> bool:
    """Whether no weight changes by its patch: an adapter that was never trained multiplies by zero.

    Found out by ComfyUI's own code, on weights that are ones, from the smallest on until one changes. Large weights
    would take minutes, so patches of one form that are zero in the same places are tried once.
    """
    import comfy.lora

    places = [(sizes.get(key_of(place)), place, patch) for place, patch in patches]
    if any(size is None for size, *_ in places):
        return False
    tried = set()
    for size, place, patch in sorted(places, key=lambda one: math.prod(one[0] or ())):
        zeros = (type(patch), *_zeros(patch))
        if True in zeros and zeros in tried:
            continue
        weight = torch.ones(size or (), dtype=torch.float64)  # so that small changes are not rounded away
        offset = None if isinstance(place, str) else place[1]
        with torch.no_grad(), _quiet():
            found = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, None)], weight.clone(), key_of(place))
        if not torch.equal(found, weight):
            return False
        tried.add(zeros)
    return True


def _zeros(part: Any) -> Iterator[bool | str | None]:
    """Which tensors and numbers of a patch are zero, in order; words and what is missing as they are."""
    part = getattr(part, "weights", part)
    if isinstance(part, list | tuple):
        for inner in part:
            yield from _zeros(inner)
    elif isinstance(part, torch.Tensor):
        yield not part.any()
    else:
        yield part if part is None or isinstance(part, str) else part == 0


def _with_bias(parts: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """PEFT's bias of the second matrix, as a difference to the layer's bias, scaled like the product."""
    left, down = dict(parts), parts.get("lora_down.weight")
    if "lora_up.bias" not in parts or "diff_b" in parts or MAGNITUDE in parts or down is None or not down.shape[:1]:
        return {}, left
    alpha = parts.get("alpha")
    scale = 1.0 if alpha is None else alpha.item() / max(1, down.shape[0])
    left["diff_b"] = left.pop("lora_up.bias").float() * scale
    return {"diff_b": "lora_up.bias"}, left


def _load(target: Target, parts: Mapping[str, torch.Tensor]) -> dict[Target, tuple[Any, dict[str, torch.Tensor]]]:
    """What ComfyUI makes of the parts: place -> its patch, and the parts that it used for it."""
    import comfy.lora

    tensors = {f"{_NAME}.{part}": tensor for part, tensor in parts.items()}
    made = comfy.lora.load_lora(tensors, {_NAME: target}, log_missing=False)
    found = {}
    for place, patch in made.items():
        plain = getattr(patch, "name", None) == "lora" and all(value is None for value in patch.weights[3:])
        if MAGNITUDE in parts and plain:
            from .peft_dora import PeftDora

            patch = PeftDora(patch.loaded_keys, (*patch.weights[:3], parts[MAGNITUDE]))
        inside = {id(tensor) for tensor in _tensors(patch[1] if isinstance(patch, tuple) else patch.weights)}
        found[place] = (patch, {part: tensor for part, tensor in parts.items() if id(tensor) in inside})
    return found


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def _sized(part: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same size without numbers. If ComfyUI reads a number from it, one that is always allowed."""
    if part == "alpha":
        return torch.zeros(())
    if part == "reshape_weight":
        return tensor
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, device="meta", requires_grad=True)


def _reached(place: Target, patch: Any, inputs: Mapping[str, torch.Tensor], size: Size | None) -> set[str]:
    """The inputs that the patched weight depends on; none if the patch does not fit, or is empty, as of rank 0."""
    import comfy.lora

    if any(not tensor.numel() for tensor in inputs.values()):
        return set()
    if size is None:
        return set(inputs)
    offset = None if isinstance(place, str) else place[1]
    inner = size if offset is None else (*size[: offset[0]], offset[2], *size[offset[0] + 1 :])
    wrong_rows = any(not _per_row(inputs[part].shape, inner) for part in _PER_ROW if part in inputs)
    wrong_whole = isinstance(patch, tuple) and any(tuple(tensor.shape) != inner for tensor in inputs.values())
    if wrong_rows or wrong_whole:
        return set()
    with torch.inference_mode(False), torch.enable_grad(), _quiet(), _SameLayout(inner):
        weight = torch.empty(size, device="meta")
        try:
            found = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, None)], weight, key_of(place))
        except Exception:  # anything that would otherwise end sampling later
            return set()
    if tuple(found.shape) != size:
        return set()
    leaves = _leaves(found)
    return {part for part, tensor in inputs.items() if id(tensor) in leaves}


def _per_row(shape: Size, size: Size) -> bool:
    ones = [1] * (len(size) - 1)
    return list(shape) == [size[0], *ones] or (len(size) > 1 and list(shape) == [1, size[1], *ones[1:]])


def _leaves(tensor: torch.Tensor) -> set[int]:
    """The ids of the tensors that would get a gradient from autograd."""
    leaves, seen, todo = set(), set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return leaves


class _SameLayout(TorchFunctionMode):
    """Lets a product take the weight's shape only if both have the same rows: 32x128 is not 64x64."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else ()
        if func is torch.Tensor.reshape and tuple(wanted) == self.size:
            shape = tuple(args[0].shape)
            if shape != self.size and not (len(shape) == 2 and shape[0] == self.size[0]):
                raise ValueError(f"{shape} is no layout of {self.size}")
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ComfyUI logs about a trial in this thread out of the user's log: we report it ourselves."""
    here = threading.get_ident()

    def other_thread(record: logging.LogRecord) -> bool:
        return record.thread != here

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(other_thread)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(other_thread)


def _misfit(
    place: Target, sizes: Mapping[str, Size | None], parts: Mapping[str, torch.Tensor], *, multiplied: bool
) -> Misfit:
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items() if part != "alpha"}
    return Misfit(key_of(place), sizes.get(key_of(place)) or (), shapes, multiplied)


def key_of(place: Target) -> str:
    """The key of the weight that a patch is for, whole or in part."""
    return place if isinstance(place, str) else place[0]

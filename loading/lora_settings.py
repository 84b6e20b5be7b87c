"""A LoRA's settings besides its tensors, as PEFT names them: the scale if a file has no alpha tensors."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..kernels.refusal import shown
from .files import FileError, parse_object, printable, read_object

# The matrix whose first size is the rank, of LoRA, LoHa and LoKr.
_DOWN = re.compile(
    r"[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|hada_w1_b|lokr_w1_b|lokr_w2_b)"
    r"(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"
)
_DO = "choose another LoRA"
_LONGEST_PATTERN = 1000
_SECONDS = 4.0
"""How long all patterns of a file may take; patterns for 400 modules take a tenth of a second."""


def lora_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoRA's settings as PEFT names them (r, lora_alpha, alpha_pattern, use_rslora), or nothing.

    diffusers puts them into the metadata, PEFT into `adapter_config.json` next to the file.

    Raises:
        FileError: they are there but cannot be read, or are not what PEFT writes.
    """
    text = metadata.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if text is not None:
        try:
            found = parse_object(path, text)
        except FileError as error:
            raise FileError(path, f"its LoRA metadata {error.reason.removeprefix('it ')}", _DO) from error
    elif path.name == "adapter_model.safetensors" and beside.is_file():
        found = read_object(beside)
    else:
        return {}
    found = _of_the_network(found)
    patterns = found.get("alpha_pattern") or {}
    named = {"lora_alpha": found.get("lora_alpha"), "alpha": found.get("alpha")}
    if not isinstance(patterns, dict):
        raise FileError(path, "its LoRA metadata cannot be used: alpha_pattern must hold names and numbers", _DO)
    for name, value in {**named, **patterns}.items():
        if value is not None and not _is_number(value):
            reason = f"its LoRA metadata cannot be used: {printable(name[:60])} is {shown(value)}, not a number"
            raise FileError(path, reason, _DO)
    return found


def _of_the_network(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the pipeline part before their names ('transformer.r'); a text encoder's are left out."""
    found: dict[str, Any] = {}
    for key in sorted(settings, key=lambda key: (key.count("."), key)):
        part, _, name = key.rpartition(".")
        if "encoder" not in part:
            found.setdefault(name, settings[key])
    return found


def with_alphas(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    bare_name: Callable[[str], str] | None = None,
    file: Path | str = "the LoRA",
) -> dict[str, torch.Tensor]:
    """The tensors, with the config's alpha as a tensor for every module that has none.

    A module's scale is alpha / rank (with `use_rslora` alpha / sqrt(rank)), and 1 if no alpha is given. The rank is
    that of the tensors.

    Args:
        bare_name: a key of the file -> its module as PEFT knew it, without any prefix; patterns may be anchored
            there. file: for messages.

    Raises:
        FileError: a pattern is invalid or takes too long.
    """
    found = dict(tensors)
    default = config.get("lora_alpha", config.get("alpha"))
    if default is None:
        return found
    patterns = _Patterns(config.get("alpha_pattern") or {}, file)
    for key, tensor in tensors.items():
        if not _DOWN.search(key) or not tensor.ndim:
            continue
        module, rank = _DOWN.sub("", key), tensor.shape[0]
        if f"{module}.alpha" in found:
            continue
        alpha = patterns.value(module if bare_name is None else bare_name(key), float(default))
        found[f"{module}.alpha"] = torch.tensor(alpha * (rank**0.5 if config.get("use_rslora") else 1.0))
    return found


class _Patterns:
    """PEFT's alpha_pattern: regular expressions that match a module's name, or its end after a dot; the first counts.

    They come from a stranger's file. Python's own `re` cannot be stopped; the package `regex` can.
    """

    def __init__(self, values: Mapping[str, float], file: Path | str) -> None:
        try:
            import regex
        except ImportError as error:
            raise FileError(file, "its alpha_pattern needs the package regex", "pip install regex") from error
        self._file = file
        self._end = time.monotonic() + _SECONDS
        self._values: list[tuple[str, Any, float]] = []
        for pattern, value in values.items():
            self._seconds_left(pattern)
            try:
                if len(pattern) > _LONGEST_PATTERN:
                    raise ValueError("no module has such a name")
                self._values.append((pattern, regex.compile(rf"(.*\.)?({pattern})$"), float(value)))
            except (regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
                raise FileError(file, f"its alpha_pattern {shown(pattern)} is not a pattern", _DO) from error

    def value(self, module: str, default: float) -> float:
        for pattern, compiled, value in self._values:
            try:
                if compiled.match(module, timeout=self._seconds_left(pattern)):
                    return value
            except TimeoutError:
                raise self._too_long(pattern) from None
        return default

    def _seconds_left(self, pattern: str) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise self._too_long(pattern)
        return left

    def _too_long(self, pattern: str) -> FileError:
        return FileError(self._file, f"its alpha_pattern {shown(pattern)} takes too long to match", _DO)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)

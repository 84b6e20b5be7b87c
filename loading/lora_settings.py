"""A LoRA's settings beside its tensors, as PEFT names them: the scale where a file has no alpha tensors."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .tensor_file import FileError

# The matrix whose first size is the rank, of LoRA, LoHa and LoKr.
_DOWN = re.compile(
    r"[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|hada_w1_b|lokr_w1_b|lokr_w2_b)"
    r"(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"
)
_SECONDS = 4.0
"""How long all patterns of a file may take; those of 400 modules take a tenth of a second."""


def lora_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoRA's settings as PEFT names them (r, lora_alpha, alpha_pattern, use_rslora), or nothing.

    diffusers puts them into the metadata, PEFT into `adapter_config.json` beside the file.

    Raises:
        FileError: they are there and cannot be read, or hold something else than PEFT writes.
    """
    text = metadata.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    try:
        if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
            text = beside.read_text(encoding="utf-8-sig")
        if text is None:
            return {}
        found = json.loads(text)
        found = {key.removeprefix("transformer."): value for key, value in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise FileError(path, f"its LoRA metadata cannot be read: {reason}") from error
    patterns = found.get("alpha_pattern") or {}
    named = {"lora_alpha": found.get("lora_alpha"), "alpha": found.get("alpha")}
    if not isinstance(patterns, dict):
        raise FileError(path, "its LoRA metadata cannot be read: alpha_pattern must hold names and numbers")
    for name, value in {**named, **patterns}.items():
        if value is not None and not _is_number(value):
            raise FileError(path, f"its LoRA metadata cannot be used: {name[:60]} is {str(value)[:60]}, not a number")
    return found


def with_alphas(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    bare_name: Callable[[str], str] | None = None,
    file: Path | str = "the LoRA",
) -> dict[str, torch.Tensor]:
    """The tensors, with the config's alpha as a tensor wherever a module has none.

    A module's scale is alpha / rank (with `use_rslora` alpha / sqrt(rank)), and 1 where nothing says alpha. The rank is
    that of the tensors.

    Args:
        bare_name: a key of the file -> its module as PEFT knew it, without what stands before it; patterns may be
            anchored there. file: for messages.

    Raises:
        FileError: a pattern that is none, or takes too long.
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

    They come from a stranger's file, and Python's own expressions cannot be stopped: the package `regex` can.
    """

    def __init__(self, values: Mapping[str, float], file: Path | str) -> None:
        import regex

        self._file = file
        self._end = time.monotonic() + _SECONDS
        self._values: list[tuple[str, Any, float]] = []
        for pattern, value in values.items():
            try:
                self._values.append((pattern, regex.compile(rf"(.*\.)?({pattern})$"), float(value)))
            except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                raise FileError(file, f"its alpha_pattern {pattern[:60]!r} is not a pattern") from error

    def value(self, module: str, default: float) -> float:
        for pattern, compiled, value in self._values:
            try:
                if compiled.match(module, timeout=max(0.001, self._end - time.monotonic())):
                    return value
            except TimeoutError as error:
                raise FileError(
                    self._file, f"its alpha_pattern {pattern[:60]!r} takes too long to match; do not trust this file"
                ) from error
        return default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)

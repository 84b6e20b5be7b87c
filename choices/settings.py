"""The inputs of PSA Patch with their defaults, and the settings made from them. No model is touched here."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from ..kernels.backends import BACKENDS
from ..kernels.config import BLOCK_SIZES, SPARSITY, ConfigError, PyramidConfig
from ..kernels.falling import check_falling
from ..kernels.semantic import SEMANTIC_ORDERS
from .correction import AUTO, CORRECTIONS, Correction
from .errors import InputError
from .presets import Preset
from .user_presets import find_preset

AUTO_PRESETS = ("module-default", "cogvideox-5b", "cogvideox1.5-5b")
"""What `auto` can stand for (`family.py`); the first is the preset of Wan."""
ANY_SPARSITY = 0.95
"""A sparsity that all levels can reach, to check the other inputs if the slider is 0."""
FROM_PRESET = "preset"
MOST_SPARSITY = 0.97
MOST_REUSE_STEPS = 100
_FIELD = {"shares": "pyramid"}
"""Field of the configuration -> input of the node, if they differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchInputs:
    """The inputs of PSA Patch, as its widgets show them. This is the one home of the node's and `apply_psa`'s defaults.

    Attributes:
        preset: a name that `user_presets.find_preset` understands, or `auto`; psa_pyramid: the levels of a connected
            PSA Pyramid, used instead of the preset.
        The others are named like the node's inputs; the tooltips there explain them.
    """

    sparsity: float = SPARSITY
    preset: str = AUTO
    start_percent: float = 0.25
    end_percent: float = 1.0
    mode: str = FROM_PRESET
    pyramid: str = ""
    tail: str = FROM_PRESET
    order: str = FROM_PRESET
    importance: str = FROM_PRESET
    block_q: str = FROM_PRESET
    block_kv: str = FROM_PRESET
    dense_blocks: str = ""
    min_tokens: int = 10240
    backend: str = BACKENDS[0]
    verbose: bool = False
    precision: str = PyramidConfig.precision
    reuse_steps: int = 1
    psa_pyramid: Preset | None = None
    falling: float = 0.0
    correction: str = AUTO

    def changes(self) -> dict[str, Any]:
        """The fields of the configuration that the inputs set; the others come from the preset.

        Raises:
            InputError: a block size or `pyramid` cannot be read.
        """
        changed = {name: getattr(self, name) for name in _OWN if getattr(self, name) != getattr(PatchInputs, name)}
        for name in {"block_q", "block_kv"} & changed.keys():
            changed[name] = _block_size(name, changed[name])
        if "tail" in changed:
            changed["tail"] = changed["tail"] == "on"
        if "pyramid" in changed:
            text = changed.pop("pyramid")
            changed |= {"shares": parse_pyramid(text)} if text.strip() else {}
        return changed


_OWN = ("mode", "pyramid", "tail", "order", "importance", "block_q", "block_kv", "precision")
"""Inputs that set a field of the configuration, unless they keep their default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchSettings:
    """Settings of one patched model, made by `make_settings`.

    Attributes:
        config: levels and everything else about the attention; preset: the name it came from.
        start_percent, end_percent: part of the schedule in which PSA is active, as ComfyUI counts percent.
        dense_steps: how many steps stay dense at the start of the schedule, instead of start_percent; None for percent.
        dense_blocks: indices of transformer blocks that stay dense.
        min_tokens: shorter sequences stay dense.
        backend: auto, triton or torch; verbose: log every step.
        reuse_steps: levels are chosen in every so-many-th step and kept in between; 1 chooses them in every step.
        falling: how far the density falls over the sparse steps, see `kernels/falling.py`; 0 keeps it constant.
        correction: how sparse calls get back what they lose, see `kernels/delta.py`; None for not at all.
    """

    config: PyramidConfig
    preset: str
    start_percent: float
    end_percent: float
    dense_steps: int | None
    dense_blocks: frozenset[int]
    min_tokens: int
    backend: str
    verbose: bool
    reuse_steps: int
    falling: float
    correction: Correction | None = None

    def __str__(self) -> str:
        """The settings in words, as one user would tell another."""
        config = self.config
        target = "levels as written" if config.sparsity is None else f"sparsity {config.sparsity:g}"
        begin = f"{self.start_percent:.0%}" if self.dense_steps is None else f"step {self.dense_steps + 1}"
        shape = [
            f"{config.mode} " + ", ".join(f"{factor}: {share:g}" for factor, share in config.shares.items()),
            f"{config.order} order",
            f"{config.importance} importance",
            f"blocks of {config.block_q} and {config.block_kv}",
            *(["tail"] if config.tail else []),
            *([f"density falling by {self.falling:g}"] if self.falling else []),
            *([f"correction {self.correction.size}"] if self.correction is not None else []),
        ]
        part = f"from {begin} to {self.end_percent:.0%} of the schedule"
        return f"{target} {part}; preset {self.preset} ({', '.join(shape)})"


def make_settings(*, auto: str = AUTO_PRESETS[0], blocks: int | None = None, **inputs: Any) -> PatchSettings:
    """Settings from the inputs of the node, each of them checked.

    Args:
        auto: the preset that `auto` means for this model; blocks: the model's block count, if known.
        inputs: those of `PatchInputs`.

    Raises:
        InputError: an input is wrong or the combination is impossible.
    """
    asked = PatchInputs(**inputs)
    check_window(asked.start_percent, asked.end_percent)
    if asked.backend not in BACKENDS:
        raise InputError.of_choice("backend", asked.backend, BACKENDS)
    if asked.correction not in CORRECTIONS:
        raise InputError.of_choice("correction", asked.correction, CORRECTIONS)
    check_one_pyramid(asked.preset, asked.psa_pyramid is not None)
    shape, config = make_config(asked, auto)
    return PatchSettings(
        config=config,
        preset=shape.name,
        start_percent=asked.start_percent,
        end_percent=asked.end_percent,
        dense_steps=shape.dense_steps,
        dense_blocks=parse_blocks(asked.dense_blocks, blocks),
        min_tokens=asked.min_tokens,
        backend=asked.backend,
        verbose=asked.verbose,
        reuse_steps=asked.reuse_steps,
        falling=asked.falling,
        correction=shape.correction_of_size(asked.correction),
    )


def make_config(asked: PatchInputs, auto: str) -> tuple[Preset, PyramidConfig]:
    """The preset (or connected PSA Pyramid), and its configuration with the changes from the inputs.

    Raises:
        InputError: the combination is impossible.
    """
    shape = asked.psa_pyramid
    if shape is None:
        shape = find_preset(auto if asked.preset == AUTO else asked.preset)
    changes = asked.changes()
    if asked.psa_pyramid is not None:
        _refuse_beside_pyramid(changes)
    try:
        config = shape.config(asked.sparsity, **changes)
        check_falling(asked.falling, config)
        check_reuse(asked.reuse_steps, config)
    except ConfigError as error:
        field = _FIELD.get(error.field, error.field)
        raise InputError(field, error.given, error.allowed, do=error.do) from error
    return shape, config


def check_reuse(reuse_steps: int, config: PyramidConfig) -> None:
    """Raise ConfigError if levels cannot be kept for that many steps."""
    if not 1 <= reuse_steps <= MOST_REUSE_STEPS:
        raise ConfigError("reuse_steps", reuse_steps, f"1 to {MOST_REUSE_STEPS}", "set reuse_steps to 1")
    if reuse_steps > 1 and config.order in SEMANTIC_ORDERS:
        allowed = f"1 with the order {config.order}, whose blocks change every step"
        raise ConfigError("reuse_steps", reuse_steps, allowed, "set reuse_steps to 1 or take another order")


def _judges(*names: str) -> Callable[[Callable], Callable]:
    """Names the inputs that a rule of the node checks (`nodes/base.py`), if there are too many to write out."""

    def mark(rule: Callable) -> Callable:
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        rule.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return rule

    return mark


def check_window(start_percent: float, end_percent: float) -> None:
    """Raise InputError unless PSA begins before it ends."""
    if not start_percent < end_percent:
        allowed = f"less than end_percent, which is {end_percent}"
        raise InputError("start_percent", start_percent, allowed, do="lower start_percent or raise end_percent")


def check_preset(preset: str) -> None:
    """Raise InputError if no preset has that name, in the menu or not, or if its file is wrong."""
    if preset != AUTO:
        find_preset(preset)


def check_one_pyramid(preset: str, psa_pyramid_given: bool, node: str = "PSA Patch") -> None:
    """Raise InputError if a preset is chosen and a PSA Pyramid connected: only one of them can be used."""
    if psa_pyramid_given and preset != AUTO:
        allowed = f"{AUTO} while PSA Pyramid is connected, which takes the preset's place"
        raise InputError("preset", preset, allowed, node, do="set preset to auto or unplug PSA Pyramid")


@_judges("psa_pyramid_given", *_OWN)
def check_place(psa_pyramid_given: bool, **own: Any) -> None:
    """Raise InputError for inputs that are set here although the connected PSA Pyramid has its own."""
    if psa_pyramid_given:
        _refuse_beside_pyramid(PatchInputs(**own).changes())


def _refuse_beside_pyramid(changes: dict[str, object]) -> None:
    for field, value in changes.items():
        field = _FIELD.get(field, field)
        kept = getattr(PatchInputs, field) or "empty"
        allowed = f"{kept} while PSA Pyramid is connected, which has its own"
        raise InputError(field, value, allowed, do=f"set {field} to {kept} here, or unplug PSA Pyramid")


@_judges("sparsity", "preset", "psa_pyramid", *_OWN, "falling", "reuse_steps")
def check_shape(**inputs: Any) -> None:
    """Raise InputError for impossible levels; with preset `auto` only if they are impossible for every model."""
    asked = PatchInputs(**inputs)
    asked = dataclasses.replace(asked, sparsity=asked.sparsity or ANY_SPARSITY)
    errors: list[InputError] = []
    for auto in AUTO_PRESETS if asked.preset == AUTO else ("",):
        try:
            make_config(asked, auto)
            return
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _block_size(field: str, value: Any) -> int:
    if str(value) not in map(str, BLOCK_SIZES):
        raise InputError.of_choice(field, value, (FROM_PRESET, *BLOCK_SIZES))
    return int(value)


def check_blocks(dense_blocks: str) -> None:
    """Raise InputError if the text cannot name blocks; how many a model has is not known here."""
    parse_blocks(dense_blocks)


def parse_pyramid(text: str) -> dict[int, float]:
    """'1: 0.10, 2: 0.05, 8: 0.20' -> {1: 0.10, 2: 0.05, 8: 0.20}: pooling factor and its share."""
    shares: dict[int, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,3})\s*:\s*([0-9]*\.?[0-9]+)\s*", part)
        if match is None or int(match[1]) in shares:
            allowed = "each pooling factor once, with its share: '1: 0.10, 2: 0.05, 8: 0.20'"
            raise InputError("pyramid", text, allowed, do="write it like this, or leave pyramid empty")
        shares[int(match[1])] = float(match[2])
    return shares


def parse_blocks(text: str, blocks: int | None = None) -> frozenset[int]:
    """'0, 1, 38-39' -> {0, 1, 38, 39}. `blocks` is the number of transformer blocks, if known."""
    allowed = "block numbers and ranges such as '0, 1, 38-39'" + (f", from 0 to {blocks - 1}" if blocks else "")
    do = "write it like this, or leave dense_blocks empty"
    indices: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([0-9]{1,4})(?:\s*-\s*([0-9]{1,4}))?", part)
        if match is None:
            raise InputError("dense_blocks", text, allowed, do=do)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (blocks is not None and last >= blocks):
            raise InputError("dense_blocks", text, allowed, do=do)
        indices.update(range(first, last + 1))
    return frozenset(indices)

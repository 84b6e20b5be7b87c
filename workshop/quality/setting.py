"""One setting to measure, and how it becomes what PSA Patch would build for a given amount of compute.

Compute is the attention FLOPs of a whole run as a share of the dense run's, warm-up steps and dense blocks included
(the estimate of importance is not counted; its time is). Two settings are compared at equal compute only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ...choices.settings import PatchInputs, PatchSettings, make_settings, parse_blocks
from ...patching.family import find_family
from ...sampling.run import is_active

NODE_DEFAULTS = {name: getattr(PatchInputs, name) for name in ("sparsity", "preset", "start_percent", "end_percent")}
NODE_DEFAULTS |= {"min_tokens": 0}
"""Inputs of PSA Patch that a setting may leave out; `min_tokens` is 0, for the demo's videos are short."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured under one name.

    Attributes:
        name: unique in a list; group: the table it belongs to.
        node: inputs of PSA Patch.
        config: fields of `PyramidConfig` that the node does not offer.
        prototype: what no node offers yet, see `attention.py`.
        compute: the run's share of the dense attention FLOPs, met by the sparsity; None runs the node as it is.
        match: name of a setting before this one whose measured compute is taken.
        average: runs of one name here are also averaged as videos (what remains of their error is bias).
        sheet: shown on the contact sheet.
    """

    name: str
    group: str
    node: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prototype: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compute: float | None = None
    match: str | None = None
    average: str | None = None
    sheet: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a run: `sigmas` of its model calls, first to last, and the number of transformer blocks."""

    sigmas: Sequence[float]
    shift: float
    blocks: int

    def percent_to_sigma(self, percent: float) -> float:
        """As ComfyUI's flow models count schedule time."""
        if percent <= 0 or percent >= 1:
            return 1.0 if percent <= 0 else 0.0
        return shifted(1 - percent, self.shift)

    def active(self, start_percent: float, end_percent: float) -> list[bool]:
        """Which steps lie in PSA's part of the schedule."""
        start, end = self.percent_to_sigma(start_percent), self.percent_to_sigma(end_percent)
        return [is_active(sigma, start, end) for sigma in self.sigmas]


def shifted(time: float, shift: float) -> float:
    """Noise level of schedule time 0..1."""
    return shift * time / (1 + (shift - 1) * time)


def resolve(setting: Setting, schedule: Schedule, backend: str, compute: float | None) -> PatchSettings:
    """The settings that PSA Patch would build, with the sparsity at which the run's compute is `compute`.

    Raises:
        ValueError: the dense part alone costs more, or an input is wrong (ConfigError, InputError).
    """
    inputs = NODE_DEFAULTS | {"backend": backend} | dict(setting.node)
    if inputs["preset"] == "auto":
        inputs["preset"] = _wan_family(schedule.blocks).preset
    if compute is not None:
        dense = dense_share(inputs, schedule, setting.prototype)
        if compute <= dense:
            raise ValueError(f"compute {compute:.3f}: the dense part alone is {dense:.3f}")
        inputs["sparsity"] = 1 - (compute - dense) / (1 - dense)
    settings = make_settings(**inputs, blocks=schedule.blocks)
    return dataclasses.replace(settings, config=dataclasses.replace(settings.config, **setting.config))


def dense_share(inputs: Mapping[str, Any], schedule: Schedule, prototype: Mapping[str, Any]) -> float:
    """Share of the run's attention calls that are dense, for inputs of the node: warm-up, dense blocks, dense steps."""
    active = schedule.active(inputs["start_percent"], inputs["end_percent"])
    dense_blocks = parse_blocks(inputs.get("dense_blocks", ""), schedule.blocks)
    dense_steps = prototype.get("dense_steps", ())
    sparse = sum(on and step not in dense_steps for step, on in enumerate(active))
    return 1 - sparse * (schedule.blocks - len(dense_blocks)) / (len(active) * schedule.blocks)


def _wan_family(blocks: int) -> Any:
    """What the patch finds out about a Wan text-to-video model; here from its description alone."""
    config = {"image_model": "wan2.1", "model_type": "t2v", "dim": 256}
    network = SimpleNamespace(blocks=range(blocks))
    model = SimpleNamespace(model_config=SimpleNamespace(unet_config=config))
    return find_family(SimpleNamespace(model=model, get_model_object=lambda _: network))

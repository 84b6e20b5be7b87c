"""A setting to measure, and what PSA Patch would build from it for a given amount of compute.

Compute is the attention FLOPs of a whole run as a share of the dense run's, including warm-up steps and dense blocks.
Estimating importance is not counted, but is part of the times. Settings are compared only at equal compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ...choices.correction import OFF
from ...choices.settings import PatchInputs, PatchSettings, make_settings, parse_blocks
from ...kernels.falling import renews
from ...patching.family import find_family
from ...sampling.run import is_active

NODE_DEFAULTS = {name: getattr(PatchInputs, name) for name in ("sparsity", "preset", "start_percent", "end_percent")}
NODE_DEFAULTS |= {"min_tokens": 0}
"""PSA Patch inputs that a setting may leave out; `min_tokens` is 0 because the demo's videos are short."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured under one name.

    Attributes:
        name: unique in a list; group: the table it belongs to.
        node: inputs of PSA Patch.
        config: fields of `PyramidConfig`, correction: fields of `Correction` that the node does not offer.
        prototype: features that no node offers yet, see `attention.py`.
        compute: target share of the dense attention FLOPs, reached by adjusting the sparsity; None leaves it unchanged.
        match: name of an earlier setting whose measured compute to use as the target.
        average: videos of settings with the same name here are also averaged (the error that remains is bias).
        sheet: whether to show it on the contact sheet.
    """

    name: str
    group: str
    node: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    correction: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prototype: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compute: float | None = None
    match: str | None = None
    average: str | None = None
    sheet: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a run: the `sigmas` of its model calls in order, and the number of transformer blocks."""

    sigmas: Sequence[float]
    shift: float
    blocks: int

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at a share of the schedule, as in ComfyUI's flow models."""
        if percent <= 0 or percent >= 1:
            return 1.0 if percent <= 0 else 0.0
        return shifted(1 - percent, self.shift)

    def active(self, start_percent: float, end_percent: float) -> list[bool]:
        """For each step, whether it is in PSA's part of the schedule."""
        start, end = self.percent_to_sigma(start_percent), self.percent_to_sigma(end_percent)
        return [is_active(sigma, start, end) for sigma in self.sigmas]


def shifted(time: float, shift: float) -> float:
    """Noise level at schedule time 0..1."""
    return shift * time / (1 + (shift - 1) * time)


def resolve(setting: Setting, schedule: Schedule, backend: str, compute: float | None) -> PatchSettings:
    """The settings that PSA Patch would build, with the sparsity that makes the run's compute `compute`.

    Raises:
        ValueError: the dense part alone takes more, or an input is wrong (ConfigError, InputError).
    """
    inputs = NODE_DEFAULTS | {"backend": backend} | dict(setting.node)
    if setting.prototype:
        inputs["correction"] = OFF
    if inputs["preset"] == "auto":
        inputs["preset"] = _wan_family(schedule.blocks).preset
    settings = make_settings(**inputs, blocks=schedule.blocks)
    correction = settings.correction
    if correction is not None:
        correction = dataclasses.replace(correction, **setting.correction)
    if compute is not None:
        sparse_steps = sum(schedule.active(inputs["start_percent"], inputs["end_percent"]))
        decided, renew = correction, None if correction is None else 0
        for _ in range(2):  # how often losses are renewed depends on the sparsity, which depends on that a little
            density = density_for(compute, inputs, schedule, setting.prototype, renew)
            settings = make_settings(**inputs | {"sparsity": 1 - density}, blocks=schedule.blocks)
            if correction is not None:
                choice = correction.decided(settings.config, settings.falling, sparse_steps)
                decided, renew = dataclasses.replace(correction, **dataclasses.asdict(choice)), choice.renew
        correction = decided
    config = dataclasses.replace(settings.config, **setting.config)
    return dataclasses.replace(settings, config=config, correction=correction)


def density_for(
    compute: float,
    inputs: Mapping[str, Any],
    schedule: Schedule,
    prototype: Mapping[str, Any],
    renew: int | None,
) -> float:
    """Density of the sparse steps, 1 minus the slider, at which a run's compute is `compute`.

    A correction costs one more sparse call in the step that measures it, one more dense step if PSA begins with the
    first step, and its renewals: one block in `renew`, 0 for none; None if there is no correction.

    Raises:
        ValueError: the dense part alone costs more.
    """
    dense = dense_share(inputs, schedule, prototype)
    steps, blocks = len(schedule.sigmas), schedule.blocks
    call = 1 / (steps * blocks)
    sparse = round((1 - dense) / call)  # calls
    here = blocks - len(parse_blocks(inputs.get("dense_blocks", ""), blocks))
    measured, whole, turns = sparse, 0, []
    if renew is not None and sparse:
        if schedule.active(inputs["start_percent"], inputs["end_percent"])[0] and sparse > 2 * here:
            whole, measured = here, sparse - here  # the first sparse step becomes a dense one
        turns = [
            (step, block)
            for step in range(1 + whole // here, sparse // here + 1)
            for block in range(blocks)
            if renews(step, block, renew)
        ]
        whole += len(turns)
        measured += here - sum(step == sparse // here for step, _ in turns)
    left = (compute - dense) / call - whole
    if left <= 0:
        raise ValueError(f"compute {compute:.3f}: the dense part alone is {dense + whole * call:.3f}")
    return left / measured + len(turns) / max(1, sparse - whole + len(turns))


def dense_share(inputs: Mapping[str, Any], schedule: Schedule, prototype: Mapping[str, Any]) -> float:
    """Share of the run's attention calls that are dense for these node inputs: warm-up, dense blocks, dense steps."""
    active = schedule.active(inputs["start_percent"], inputs["end_percent"])
    dense_blocks = parse_blocks(inputs.get("dense_blocks", ""), schedule.blocks)
    dense_steps = prototype.get("dense_steps", ())
    sparse = sum(on and step not in dense_steps for step, on in enumerate(active))
    return 1 - sparse * (schedule.blocks - len(dense_blocks)) / (len(active) * schedule.blocks)


def _wan_family(blocks: int) -> Any:
    """The family that the patch would detect for a Wan text-to-video model, from its description alone."""
    config = {"image_model": "wan2.1", "model_type": "t2v", "dim": 256}
    network = SimpleNamespace(blocks=range(blocks))
    model = SimpleNamespace(model_config=SimpleNamespace(unet_config=config))
    return find_family(SimpleNamespace(model=model, get_model_object=lambda _: network))

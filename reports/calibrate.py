"""Calibration: from one short run, the sparsity that meets a target error or a target speed-up on this machine.

The run itself is dense. In a few of its steps the model is called again with PSA on the same latent, at several
sparsities. The error is the relative distance of the model's output from the dense one; the time is that of the whole
model call.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..choices.correction import OFF
from ..choices.errors import InputError, require_model
from ..choices.presets import Preset
from ..choices.settings import AUTO, AUTO_PRESETS, PatchSettings, check_one_pyramid, make_settings
from ..choices.user_presets import find_preset, write_preset
from ..kernels.config import ConfigError
from ..kernels.levels import can_meet
from ..patching import core
from ..patching.family import find_family
from ..patching.override import RUN_KEY, PSAOverride
from ..patching.patch import remove_patch
from ..patching.support import Support
from ..sampling.findings import find
from ..sampling.run import Run, is_active, log
from ..sampling.schedule import Schedule

NODE = "PSA Calibrate"
KEY = "psa_calibrate"
GOALS = ("error", "speed-up")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
MEASURED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Point:
    """What one sparsity gave: relative error of the model's output, and seconds of a model call."""

    sparsity: float
    error: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result. `sparsity` is the proposal, `reached` whether it meets the target, `note` a sentence about it."""

    goal: str
    target: float
    sparsity: float
    reached: bool
    note: str
    dense_seconds: float
    points: tuple[Point, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return dataclasses.asdict(self)


class Measuring:
    """A wrapper around the network's forward that calls it again with PSA; it passes on the dense output."""

    def __init__(self, settings: list[PatchSettings], family: Support, pixels: tuple[int, int] | None = None) -> None:
        self.settings, self.family, self.pixels = settings, family, pixels
        self.schedule: Schedule | None = None
        self._ahead: list[int] = []
        self._measured: set[int] = set()
        self.sigmas = (math.inf, 0.0)
        self.errors: dict[float, list[float]] = defaultdict(list)
        self.seconds: dict[float, list[float]] = defaultdict(list)
        self.dense_seconds: list[float] = []
        self._place: tuple[Any, ...] = ()

    def before_call(self, network: Any, x: Any, context: Any, options: dict[str, Any], conds: dict[str, Any]) -> None:
        """Called before the wrapper, at a point where every input of the model has a name."""
        call = self.family.read(network, x, context, conds)
        if isinstance(call, str):
            raise _stays_dense([call])
        self._place = call

    def __call__(self, executor: Any, x: Any, timestep: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        options = core.options_of(args, kwargs)
        sigma = core.current_sigma(options)
        if self.schedule is None:
            self.schedule = Schedule((core.schedule(options) or [sigma, 0.0])[:-1], self._is_active)
            self._ahead = self._choose(self.schedule.sparse_steps)
        step = self.schedule.move(sigma).step
        if self._ahead and step >= self._ahead[0]:  # a cache may have answered the step itself
            self._ahead = [later for later in self._ahead if later > step]
            self._measured.add(step)

        def call() -> torch.Tensor:
            return executor(x, timestep, context, *args, **kwargs)

        if step not in self._measured:
            return call()
        if not self.dense_seconds:
            call()  # the first call of a shape loads and compiles
        video = _video_of(x)
        dense, seconds = _timed(call, video.device)
        self.dense_seconds.append(seconds)
        for settings in self._possible(self._place[0].video):
            sparsity = settings.config.sparsity
            assert sparsity is not None  # each of these settings was made for one
            run = Run(settings, *self.sigmas, pictured_block=-1, latent_size=tuple(video.shape[2:]), pixels=self.pixels)
            if self.family.assumed:
                run.record.assume()
            run.begin_model_call(sigma, *self._place, latent_size=tuple(video.shape[2:]))
            options[RUN_KEY] = run
            try:
                if sparsity not in self.errors:
                    call()
                output, seconds = _timed(call, video.device)
            finally:
                options.pop(RUN_KEY, None)
            reasons = run.record.fallbacks or _unseen(run)
            if reasons:  # the rest of the run would only waste time
                raise _stays_dense(reasons)
            expected = _video_of(dense).float()
            error = (_video_of(output).float() - expected).norm() / expected.norm().clamp_min(1e-12)
            self.errors[sparsity].append(float(error))
            self.seconds[sparsity].append(seconds)
        return dense

    def _is_active(self, sigma: float) -> bool:
        return is_active(sigma, *self.sigmas)

    def _choose(self, active: list[int]) -> list[int]:
        """The steps to measure: the first, middle and last step in which PSA would be active."""
        places = (round(part * (len(active) - 1) / (MEASURED_STEPS - 1)) for part in range(MEASURED_STEPS))
        return sorted({active[place] for place in places}) if active else []

    def _possible(self, tokens: int) -> list[PatchSettings]:
        """The settings that a video of so many tokens can have; if it can have none, the first, to say why."""
        possible = [one for one in self.settings if can_meet(-(-tokens // one.config.block_kv), one.config)]
        return possible or self.settings[:1]

    def points(self) -> tuple[Point, ...]:
        """Mean error and shortest time for every sparsity, in order."""
        return tuple(
            Point(sparsity, sum(errors) / len(errors), min(self.seconds[sparsity]))
            for sparsity, errors in sorted(self.errors.items())
        )


def calibrate(
    model: Any,
    sample: Callable[[Any], object],
    *,
    goal: str,
    target: float,
    preset: str,
    start_percent: float,
    min_tokens: int,
    save_as: str = "",
    psa_pyramid: Preset | None = None,
) -> Calibration:
    """Measure, propose, and store the proposal as a user preset if `save_as` names one.

    Args:
        model: ComfyUI's ModelPatcher; a PSA patch on it is ignored.
        sample: runs a sampler with the model it is given; its result is not used.

    Raises:
        InputError: an input is wrong, or PSA does not support the model or this size, so nothing could be measured.
    """
    require_model(model, NODE)
    family = find_family(model, preset)
    if isinstance(family, str):
        do = "connect a model that docs/compatibility.md lists"
        raise InputError("model", f"a model that PSA does not support ({family})", "one that it does", NODE, do=do)
    if core.is_on_several_gpus(model):
        do = "put MultiGPU CFG Split after the model that goes here"
        raise InputError("model", "a model on several GPUs", "one on a single GPU", NODE, do=do)
    check_one_pyramid(preset, psa_pyramid is not None, NODE)
    if not math.isfinite(target) or target <= 0:
        do = "set target to 0.15 for error or 2.0 for speed-up, or to a number of your own"
        raise InputError("target", target, "a number above 0", NODE, do=do)
    shape = check_shape(family.preset if preset == AUTO else preset, psa_pyramid)
    candidates = [
        make_settings(
            sparsity=sparsity,
            preset=preset,
            auto=family.preset,
            start_percent=start_percent,
            end_percent=1.0,
            min_tokens=min_tokens,
            psa_pyramid=psa_pyramid,
            # A single step shows what sparsity loses; a correction only makes up for it in the steps that follow.
            correction=OFF,
        )
        for sparsity in SPARSITIES
        if _reachable(shape, sparsity)
    ]
    measuring = _measure(model, candidates, family, start_percent, sample)
    points = measuring.points()
    if not points:
        raise _nothing_measured(measuring, start_percent)
    _refuse_not_finite(points)
    found = propose(points, min(measuring.dense_seconds), goal, target)
    log.info("PSA: calibrated: sparsity %.2f; %s", found.sparsity, found.note)
    if save_as.strip():
        about = f"Calibrated for {goal} {target:g}: sparsity {found.sparsity:.2f}"
        proposed = dataclasses.replace(shape, about=about, sparsity=found.sparsity)
        write_preset(save_as, proposed, made=f"{NODE}: {found.note}", node=NODE)
    return found


def _video_of(latents: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The video, if the model samples sound with it."""
    return latents[0] if isinstance(latents, list) else latents


def _unseen(run: Run) -> list[str]:
    """Why no self-attention of a model call that has ended came to PSA; nothing if some did."""
    run.end()
    return [] if run.record.steps[0].densities else find(run.record)


def _stays_dense(reasons: Iterable[str]) -> InputError:
    why = "; ".join(reasons).rstrip(". ")
    do = f"this is why: {why}. Change that, or connect a longer or larger latent, and run again"
    return InputError("latent_image", "a video that PSA leaves dense", "one that PSA makes sparse", NODE, do=do)


def _nothing_measured(measuring: Measuring, start_percent: float) -> InputError:
    if measuring.schedule is not None and not measuring.schedule.sparse_steps:
        do = "lower start_percent or take more steps"
        allowed = "a value that leaves at least one step to measure"
        return InputError("start_percent", start_percent, allowed, NODE, do=do)
    given = "a model of which no step to measure was computed: a cache answered, or a node calls it without its options"
    do = "bypass that node (EasyCache, TeaCache and others) while you calibrate"
    return InputError("model", given, "one that computes its steps", NODE, do=do)


def _refuse_not_finite(points: tuple[Point, ...]) -> None:
    """Raise InputError if an output was not finite: such an error is neither above nor below any target."""
    bad = [f"{point.sparsity:.2f}" for point in points if not math.isfinite(point.error)]
    if not bad:
        return
    where = "every sparsity or dense already" if len(bad) == len(points) else f"sparsity {', '.join(bad)}"
    do = "load it in bf16, or check model, LoRA and latent in a run without PSA; nothing was proposed or saved"
    raise InputError("model", f"a model whose output is NaN at {where}", "one whose output is finite", NODE, do=do)


def check_shape(preset: str, psa_pyramid: Preset | None = None) -> Preset:
    """The preset or the connected pyramid; raises InputError if there is none, or no sparsity to calibrate."""
    name = AUTO_PRESETS[0] if preset == AUTO else preset
    shape = find_preset(name, node=NODE) if psa_pyramid is None else psa_pyramid
    if not shape.is_scaled:
        do = "set preset to auto, or turn as_written off and take another mode than threshold in PSA Pyramid"
        allowed = "levels that meet a sparsity: not threshold, not as written"
        field = "preset" if psa_pyramid is None else "psa_pyramid"
        raise InputError(field, shape.name, allowed, NODE, do=do)
    return shape


def propose(points: tuple[Point, ...], dense_seconds: float, goal: str, target: float) -> Calibration:
    """The highest sparsity within a target error, or the lowest that reaches a target speed-up, between the points.

    Args:
        points: sorted by sparsity.
    """

    def value(point: Point) -> float:
        return point.error if goal == "error" else dense_seconds / point.seconds

    values = [value(point) for point in points]
    unit = "relative error" if goal == "error" else "times the dense speed"
    below = [i for i, found in enumerate(values) if found <= target]
    if goal == "error":
        inside = next((i for i, found in enumerate(values) if found > target), len(values)) - 1
        reached = inside >= 0
        sparsity = points[0].sparsity if not reached else _between(points, values, inside, target, math.floor)
    else:
        first = next((i for i, found in enumerate(values) if found >= target), None)
        reached = first is not None
        sparsity = points[-1].sparsity if first is None else _between(points, values, first - 1, target, math.ceil)
    at_end = values[0] if goal == "error" else values[-1]
    if reached:
        note = f"meets {target:g} {unit}"
    else:
        note = f"{target:g} {unit} is out of reach here: sparsity {sparsity:.2f} gives {at_end:.3g}"
    if goal == "error" and len(below) == len(values):
        note += f"; even {points[-1].sparsity:.2f}, the most that was tried, stays within it"
    return Calibration(goal, target, sparsity, reached, note, dense_seconds, points)


def _between(points: tuple[Point, ...], values: list[float], left: int, target: float, to_whole: Callable) -> float:
    """The sparsity at which the line after point `left` passes the target, rounded to 0.01 on the safe side."""
    if left < 0:
        return points[0].sparsity
    if left + 1 >= len(points):
        return points[-1].sparsity
    (low, high), (start, end) = points[left : left + 2], values[left : left + 2]
    part = 0.0 if end == start else min(1.0, max(0.0, (target - start) / (end - start)))
    # The small slack keeps a hundredth that rounding has shifted slightly.
    slack = 1e-9 if to_whole is math.floor else -1e-9
    return to_whole((low.sparsity + part * (high.sparsity - low.sparsity)) * 100 + slack) / 100


def _measure(
    model: Any, settings: list[PatchSettings], family: Support, start_percent: float, sample: Callable[[Any], object]
) -> Measuring:
    clone = remove_patch(model)
    core.set_override(clone, PSAOverride(core.get_override(clone)))
    measuring = Measuring(settings, family, core.pixels_per_latent(clone))
    sampling = clone.get_model_object("model_sampling")
    measuring.sigmas = (float(sampling.percent_to_sigma(start_percent)), float(sampling.percent_to_sigma(1.0)))
    core.add_wrappers(clone, KEY, before_call=measuring.before_call)
    core.wrap_forward(clone, KEY, measuring)
    sample(clone)
    return measuring


def _reachable(shape: Preset, sparsity: float) -> bool:
    try:
        shape.config(sparsity)
    except ConfigError:
        return False
    return True


def _timed(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """The result of a call, and how many seconds it took on its device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def sampler(
    latent: dict[str, Any], positive: Any, negative: Any, *, seed: int, steps: int, cfg: float
) -> Callable[[Any], object]:
    """The sampling that `calibrate` uses: euler on the simple schedule, as in the node KSampler."""

    def sample(model: Any) -> object:
        import comfy.sample
        import comfy.utils

        image = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
        progress = comfy.utils.ProgressBar(steps)
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", positive, negative, image, seed=seed, disable_pbar=True,
            callback=lambda step, _x0, _x, total: progress.update_absolute(step + 1, total),
        )  # fmt: skip

    return sample

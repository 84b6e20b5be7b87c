"""What a patched model does while it samples: a run is made when sampling starts, told about every model call, and
dropped at the end, however sampling ends. Everything here can be sent to another process; a run cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..choices.settings import PatchSettings
from ..sampling.figures import make_report, median_seconds, summary
from ..sampling.findings import find
from ..sampling.maps import RunMaps
from ..sampling.run import Run, log
from . import core
from .operator import model_call
from .override import RUN_KEY, PSAOverride
from .support import Support

Listener = Callable[[dict[str, Any]], None]

_SCHEDULE_BEGINS = 0.005
"""Share of the schedule (0..1): a run that starts earlier than this counts as starting at the beginning."""


@dataclasses.dataclass
class PatchHandle:
    """Attached to the patched model and shared by its clones: the settings, and the report of the last run."""

    note: str
    settings: PatchSettings | None = None
    report: dict[str, Any] | None = None
    maps: RunMaps | None = None
    node: str | None = None


@dataclasses.dataclass
class SamplingWrapper:
    """The wrapper around a sampling run. patch: of the override that acts in it, see `PSAOverride`."""

    patch: str
    settings: PatchSettings
    blocks: int
    handle: PatchHandle
    on_step: Listener | None = None
    on_end: Listener | None = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample with a new run in the options; its report is kept even after an error."""
        guider, sigmas = executor.class_obj, core.run_sigmas(args, kwargs)
        if len(sigmas) < 2:  # half of a schedule that was split at its end: there is no step
            return executor(*args, **kwargs)
        run = Run(
            self.settings,
            _sigma_start(self.settings, guider, sigmas),
            core.percent_to_sigma(guider, self.settings.end_percent),
            pictured_block=self.blocks // 2,
            on_step=self.on_step,
            blocks=self.blocks,
            latent_size=core.latent_size(args, kwargs),
            pixels=core.pixels_per_latent(guider.model_patcher),
            prompts=core.prompt_count(guider, args, kwargs),
            patch=self.patch,
        )
        options = core.run_options(guider)
        options[RUN_KEY] = run
        options[core.PREFERRED_KEY] = core.preferred_attention(core.network_of(guider.model_patcher))
        completed = False
        try:
            output = executor(*args, **kwargs)
            completed = True
            return output
        finally:
            options.pop(RUN_KEY, None)
            options.pop(core.PREFERRED_KEY, None)
            self._close(run, completed)

    def _close(self, run: Run, completed: bool) -> None:
        """End a run and keep its report. This waits for the device, where an earlier error may come up. A run that went
        well must not fail because of its report, and a run that failed must fail with its own error."""
        handle = self.handle
        try:
            run.end(completed)
            if completed:
                run.record.note(find(run.record))
            handle.report = make_report(run)
            if completed and handle.report["steps"]:
                log.info("PSA: %s", summary(handle.report))
            handle.maps = None if run.record.maps is None else run.record.maps.to_host()
            if self.on_end is not None:
                self.on_end(figures(run, handle.report, completed))
        except Exception:
            handle.report = handle.maps = None
            log.warning("PSA: the figures of this run were lost; the result itself is not affected")
            log.debug("PSA: why the figures were lost", exc_info=True)


@dataclasses.dataclass(frozen=True)
class CallListener:
    """Tells the run which step a model call belongs to, and where its tokens are."""

    support: Support
    override: PSAOverride

    def __call__(
        self, network: Any, x: Any, context: Any, options: dict[str, Any], conds: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """See `core.add_wrappers`. The call runs in a context in which compiled graphs find the override."""
        self._begin(network, x, context, options, conds)
        return model_call(self.override.attend, options)

    def _begin(self, network: Any, x: Any, context: Any, options: dict[str, Any], conds: dict[str, Any]) -> None:
        run: Run | None = options.get(RUN_KEY)
        strengths = options.pop(core.STRENGTHS_KEY, ())
        if run is None:
            return
        run = options[RUN_KEY] = run.of_worker(core.worker_of(options))
        if not run.record.steps:
            run.plan(core.schedule(options), x.device, core.replaced_forwards(network))
            run.record.look_for_weights(network)
            if self.support.assumed:
                run.record.assume()
        call = self.support.read(network, x, context, conds)
        run.begin_model_call(
            core.current_sigma(options),
            *((None, ()) if isinstance(call, str) else call),
            latent_size=tuple(x.shape[2:]) if x.ndim == 5 else (),
            foreign=not isinstance(options.get(core.OVERRIDE_KEY), PSAOverride),
            rows=core.prompts_of(options, x.shape[0]),
        )
        run.begin_prompts(tuple(options.get("uuids", ())), strengths)
        if isinstance(call, str):
            run.whole_call_dense(call)


def figures(run: Run, report: dict[str, Any], completed: bool) -> dict[str, Any]:
    """What a display needs of a finished run: number of steps by kind (see `record.KINDS`), mean sparsity of the sparse
    calls, share of the whole run's attention that was saved, seconds (median by kind of step, and totals), whether that
    pays (see `pays.py`), what stayed dense and why (reason -> calls), why everything stayed dense if it did, and
    sentences about the run."""
    return {
        "run": run.record.began,
        "completed": completed,
        "steps": run.record.planned_steps,
        "kinds": dict(Counter(step.kind for step in run.record.steps)),
        "sparsity": report["mean_sparsity"],
        "saved": report["saved"],
        "seconds": median_seconds(report),
        "pays": report["pays"],
        "time": report["time"],
        "dense": report["dense"] if completed else None,
        "reasons": dict(run.record.fallbacks),
        "notes": run.record.notes,
    }


def _sigma_start(settings: PatchSettings, guider: Any, sigmas: list[float]) -> float:
    """The noise level at which PSA begins. A preset with a number of dense steps counts them from the beginning of the
    schedule. So there are none in the second of two samplers that share a schedule, or when reworking a given video."""
    if settings.dense_steps is None:
        return core.percent_to_sigma(guider, settings.start_percent)
    if sigmas[0] < core.percent_to_sigma(guider, _SCHEDULE_BEGINS):
        return sigmas[0]
    return sigmas[min(settings.dense_steps, len(sigmas) - 1)]

"""The state of a patched transformer: its current calls and runs, one of each per thread, and their totals."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..choices.settings import PatchSettings
from ..kernels.backends import BackendError, in_autocast
from ..kernels.broken import KernelError
from ..kernels.config import ConfigError
from ..kernels.order import TokenLayout
from ..sampling.correction import Memory
from ..sampling.figures import make_report
from ..sampling.kept import Kept
from ..sampling.record import Record
from ..sampling.run import Run
from ..sampling.self_attention import Host, attend, decline_reason, learn, own_words
from . import memory, operator
from .attention_backends import unseen_note, unseen_reason
from .attention_call import AttentionCall, read_attention
from .layout import MODELS, transformer_in
from .loras import lora_strengths
from .parallel import Parallel, SharedBudget, dense_reason, find_parallel
from .schedule import Schedule, Steps

log = logging.getLogger("ComfyUI-PSA")

UNREADABLE = (
    "PSA does not know the arguments that the transformer is called with; call it with those of diffusers' pipelines"
)
NO_STEPS = (
    "no scheduler is known, so PSA cannot tell which step this is; call the transformer through its pipeline, or call "
    "apply_psa on the transformer itself, with warm_up=0"
)
UNREACHED = (
    "no self-attention of the model reached PSA: a cache answers it, or something has replaced its forward since "
    "apply_psa; if you use no cache, call apply_psa again"
)
BYPASSED = (
    "the transformer is called without what was around it at apply_psa, so PSA sees no steps; call apply_psa again"
)


_MOST_CALLS = 64
"""Most calls that one run may have at a timestep; a loop that stays at one timestep must not pile up figures."""


@dataclasses.dataclass
class Call:
    """One forward of the transformer.

    Attributes:
        run: the sampling run that it belongs to.
        reason: why the whole call stays dense, None if PSA can take it.
        with_graph: whether autograd was on when it began.
        parallel: how it is shared with other processes, if it is.
        attentions: how many self-attention modules have run.
        budget: what the current one shares with other processes, if it does.
    """

    run: Run
    reason: str | None = None
    with_graph: bool = False
    parallel: Parallel | None = None
    attentions: int = 0
    budget: SharedBudget | None = None

    def end_budget(self) -> None:
        """Every attention call ends with it, whatever was done: other processes wait for their sums."""
        if self.budget is not None:
            self.budget.finish()


@dataclasses.dataclass(frozen=True)
class Totals:
    """Totals over the calls of all runs.

    Attributes:
        counted: number of calls in `sums`: the sparse ones, and dense ones in which a loss was renewed.
        sums: work as a share of dense calls, and pairs without a finite score, summed on the device; None if there were
            no such calls.
    """

    sparse: int = 0
    dense: int = 0
    fallbacks: Counter[str] = dataclasses.field(default_factory=Counter)
    counted: int = 0
    sums: torch.Tensor | None = None

    def plus(self, record: Record) -> Totals:
        """These totals with one more run added."""
        densities = [density for step in record.steps for _, density in step.work]
        sparse = self.sparse + sum(len(step.densities) for step in record.steps)
        dense = self.dense + sum(step.dense_calls for step in record.steps)
        sums = self.sums
        if densities:
            pairs = [pairs for step in record.steps for pairs in step.unranked]
            density = torch.stack(densities).float().sum()
            found = torch.stack([density, torch.stack(pairs).sum().to(density) if pairs else density.new_zeros(())])
            sums = found if sums is None else sums + found.to(sums.device)
        return Totals(sparse, dense, self.fallbacks + record.fallbacks, self.counted + len(densities), sums)


class TransformerState:
    """Decides for every attention call of one transformer whether it is sparse, and counts the decisions."""

    def __init__(self, family: str, settings: PatchSettings, schedule: Schedule | None, off: bool) -> None:
        """family: a name in `layout.MODELS`. schedule: None if steps are not told apart. off: every call stays dense,
        and no reason is given. `others` are the other transformers of the pipeline, which take turns with this one."""
        self.family, self.settings, self.schedule, self.off = family, settings, schedule, off
        self.others: list[TransformerState] = []
        self._told: set[str] = set()
        self._refusals: dict[Hashable, str] = {}
        self._ended = Totals()
        # By thread: two pipelines may run one transformer at the same time.
        self._calls: dict[int, Call] = {}
        self._runs: dict[int, tuple[Run, Steps | None]] = {}
        self._latest: Run | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # A copy continues counting from here, with its own runs.
        return self.__dict__ | {"_ended": self.totals(), "_calls": {}, "_runs": {}, "_latest": None, "_lock": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def totals(self) -> Totals:
        """Totals over all calls so far."""
        with self._lock:
            return functools.reduce(Totals.plus, (run.record for run, _ in self._runs.values()), self._ended)

    @property
    def sparse_calls(self) -> int:
        """Number of self-attention calls that PSA has computed."""
        return self.totals().sparse

    def report(self) -> dict[str, Any] | None:
        """The figures of the latest run, see `sampling/figures.py`; None before the first. Reads from the device."""
        run = self._latest
        if run is None:
            return None
        run.record.end_step()
        return make_report(run) | {"notes": unseen_note(run.record)}

    def begin_call(self, outermost: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Called before a forward of what the pipeline calls. Reads once from the device if steps are told apart."""
        transformer = transformer_in(outermost)
        layout, timestep, steps, reason, parallel = None, None, None, None, None
        if not self.off:
            try:
                found = MODELS[self.family].read_call(transformer, args, kwargs)
            except Exception:  # the transformer itself says what it needs
                log.debug("PSA: a call that cannot be read", exc_info=True)
                found = UNREADABLE
            if isinstance(found, str):
                reason = found
            else:
                layout, timestep = found
                steps = None if self.schedule is None else self.schedule.find(timestep)
                if steps is None and self.schedule is not None and (self.schedule.warm_up or self.settings.falling):
                    reason = NO_STEPS
                reason = MODELS[self.family].refusal(transformer) or dense_reason(transformer) or reason
                parallel = find_parallel(transformer, MODELS[self.family].attentions(transformer), layout)
        blocks = len(MODELS[self.family].attentions(transformer))
        run = self._run(steps, layout, getattr(timestep, "device", torch.device("cpu")), blocks)
        run.begin_model_call(0.0 if steps is None else steps.now, layout, ())
        if run.losses.on:
            run.begin_prompts((run.position.forward,), lora_strengths(transformer))
        if run.position.in_last_step:
            run.kept.last_step()
            run.losses.last = True
        if reason is not None:
            run.record.tell(reason)
        self._calls[threading.get_ident()] = Call(run, reason, torch.is_grad_enabled(), parallel)
        operator.current.set(self)

    def _run(self, steps: Steps | None, layout: TokenLayout | None, device: torch.device, blocks: int) -> Run:
        """The run of this thread that a call belongs to.

        Nothing tells us that a new run begins. So we begin one when the scheduler has made a new list of timesteps,
        when the timestep rises, and at every call if no steps are known.
        """
        thread = threading.get_ident()
        with self._lock:
            run, before = self._runs.get(thread, (None, None))
            goes_on = steps is not None and before is not None and steps.go_on_from(before)
            if run is None or not goes_on or run.position.forward + 1 >= _MOST_CALLS:
                kept = Kept(self.settings.reuse_steps, self._refusals) if run is None else run.kept
                others = {other.ident for other in threading.enumerate()} - {thread}
                self._end_runs(lambda ident: ident not in others)
                if layout is not None:
                    kept.only_orders_of(layout.grid)
                for other in self.others:
                    other.rest(thread)
                run = self._latest = self._begin_run(steps, kept, device, blocks)
                self._watch(run, steps)
            self._runs[thread] = run, steps
            return run

    def _watch(self, run: Run, steps: Steps | None) -> None:
        """A pipeline that is stopped between two steps tells nobody. When its call is gone, and its run is still the
        latest of its thread, what is held for more steps is given back."""

        def give_back() -> None:
            # Without the lock: garbage may be collected while this thread has it.
            if any(current is run for current, _ in list(self._runs.values())):
                run.release()

        bar = None if steps is None else steps.bar()
        if bar is not None:
            with contextlib.suppress(TypeError):  # a bar of another kind may not be watched
                weakref.finalize(bar, give_back).atexit = False

    def _begin_run(self, steps: Steps | None, kept: Kept, device: torch.device, blocks: int) -> Run:
        start = float("inf")  # the whole run is sparse
        if self.off or (steps is not None and steps.dense >= len(steps.timesteps)):
            start = -1.0  # the whole run is dense
        elif steps is not None:
            start = steps.timesteps[steps.dense]
        run = Run(self.settings, start, -1.0, pictured_block=-1, blocks=blocks, kept=kept, told=self._told)
        run.plan(None if steps is None else [*steps.timesteps, 0.0], device)
        return run

    def _end_runs(self, over: Callable[[int], bool]) -> None:
        """Count and drop the runs of threads for which `over` is true."""
        for thread in [thread for thread in self._runs if over(thread)]:
            run, _ = self._runs.pop(thread)
            self._ended = self._ended.plus(run.record)
            run.release()

    def rest(self, thread: int) -> None:
        """Another transformer takes over in this thread: give back what is held for calls to come."""
        run, _ = self._runs.get(thread, (None, None))
        if run is not None:
            run.release()

    def tell(self, reason: str) -> None:
        """Log why calls will stay dense, once; runs do not repeat it."""
        if not self.off:
            Record(told=self._told).tell(reason)

    def forget(self) -> None:
        """PSA is taken off: keep only the totals."""
        with self._lock:
            self._end_runs(lambda _: True)
            self._calls.clear()

    def end_call(self, outermost: torch.nn.Module, _: Any, output: Any) -> None:
        """Called after a forward; `output` is None if it failed."""
        transformer = transformer_in(outermost)
        operator.current.set(None)
        call = self._calls.pop(threading.get_ident(), None)
        if call is None:
            return
        if output is not None and not call.attentions and not self.off:
            self._stays_dense(call, UNREACHED, len(MODELS[self.family].attentions(transformer)))
        if len(call.run.record.steps) == 1:
            call.run.record.look_for_weights(transformer)
        call.run.record.model_call_ended()
        if output is None:
            call.run.release()

    def current_call(self) -> Call | None:
        """The call of the transformer that this thread is in."""
        return self._calls.get(threading.get_ident())

    def end_attention(self, call: Call, attention: torch.nn.Module, seen: bool) -> None:
        """Called after a self-attention module. seen: whether it called `attend` meanwhile, or skipped attention."""
        call.attentions += 1
        if not seen and not self.off:
            self._stays_dense(call, call.reason or unseen_reason(attention))

    def attend(self, call: Call, block: int, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """PSA on query [B, H, L, D], with the arguments of scaled_dot_product_attention.

        None if the call stays dense, which is counted; each reason is logged once.
        """
        run = call.run
        run.begin_self_attention(block)
        call.budget = None
        if call.parallel is not None and run.config.mode == "budget":
            call.budget = SharedBudget(call.parallel, run.config, query.shape[0], query.device)
        if not run.position.active:
            self._stays_dense(call, None)
            return None
        seen = self._seen(run, query, *args, **kwargs)
        found: torch.Tensor | str | None = _decline_reason(call, seen)
        if found is None and not run.learns:
            found = attend(run, seen.query, seen.key, seen.value, scale=seen.scale, **_given(call, seen.query))
        if found is None or isinstance(found, str):
            self._stays_dense(call, found)
            return None
        call.end_budget()
        padding = query.shape[2] - found.shape[2]
        return F.pad(found, (0, 0, 0, padding)) if padding else found

    def learn(self, call: Call, dense: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Called with the output of each call that stayed dense: measure what PSA would have lost, if it is time to."""
        run = call.run
        if run.learns:
            seen = self._seen(run, *args, **kwargs)
            if _decline_reason(call, seen) is None:
                (dense,) = in_autocast(dense[..., : seen.query.shape[2], :])
                learn(run, seen.query, seen.key, seen.value, dense, scale=seen.scale, **_given(call, seen.query))
        call.end_budget()

    def _seen(self, run: Run, *args: Any, **kwargs: Any) -> AttentionCall:
        """The call without the padding at its end, if that is all that its mask hides. What is computed for the padding
        itself is never used."""
        seen, layout = read_attention(*args, **kwargs), run.position.layout
        hides_padding = seen.masked and layout is not None and MODELS[self.family].padded
        return seen.without_padding(run.position.known_layout.length) if hides_padding else seen

    def _stays_dense(self, call: Call, reason: str | None, calls: int = 1) -> None:
        """Count calls that stay dense, and log the reason once. In the warm-up, a reason means no step is sparse."""
        record = call.run.record
        if reason is not None and call.run.position.active:
            record.fell_back(reason, calls)
            return
        record.dense_call(calls)
        if reason is not None:
            record.tell(reason)


def _decline_reason(call: Call, seen: AttentionCall) -> str | None:
    """Why a call of an active step stays dense; None if PSA can take it."""
    if call.reason is not None:
        return call.reason
    own = seen.decline_reason(call.run.position.known_layout.length, call.with_graph)
    return own or decline_reason(call.run, seen.query, seen.key, seen.value)


def _given(call: Call, query: torch.Tensor) -> dict[str, Any]:
    """What PSA must know of an attention call besides its tensors.

    Its prompts are what each batch entry is computed for: the forwards of a step come in the same order in every step.
    A cache that leaves out one of the prompts changes the size of the batch.
    """
    batch = query.shape[0]
    return {
        "prompts": [(call.run.position.forward, batch, entry) for entry in range(batch)],
        "host": DIFFUSERS,
        "shared": None if call.budget is None else call.budget.heads,
    }


def _failure(run: Run, error: Exception, then: str) -> str:
    known = isinstance(error, BackendError | ConfigError | KernelError)
    words = str(error) if known else f"PSA failed: {own_words(error) or 'no reason was given'}"
    return f"{words} ({then})"


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError)


MEMORY = Memory(memory.free_for_run, memory.free_on_host, memory.pin, memory.unpin)
DIFFUSERS = Host(_is_out_of_memory, torch.cuda.empty_cache, _failure, MEMORY, "until apply_psa is called again")

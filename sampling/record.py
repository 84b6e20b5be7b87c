"""What was measured in a run, step by step. What a GPU computed stays on it until the step or the run has ended."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ..kernels.attention import AttentionResult
from ..kernels.backends import is_tuned
from ..kernels.config import PyramidConfig
from ..kernels.density import coverage_of, level_shares
from ..kernels.order import TokenLayout, TokenOrder
from ..kernels.semantic import SEMANTIC_ORDERS
from .clock import Clock
from .maps import RunMaps, block_map, centre
from .position import Position

log = logging.getLogger("ComfyUI-PSA")

SPARSE, DENSE, SKIPPED, UNSEEN, INTERRUPTED = KINDS = ("sparse", "dense", "skipped", "unseen", "interrupted")
"""What happened in a step: some calls were sparse; all calls that came stayed dense; none came, because a cache
answered; its attention was computed, but bypassed PSA; the run was stopped during it."""

Grid = tuple[int, int, int]


@dataclasses.dataclass
class Step:
    """Figures of one sampler step.

    Attributes:
        ended: when its last model call returned; 0 if that is never reported.
        active: whether it is in PSA's part of the schedule.
        foreign: whether another attention override was in front of PSA's. other_calls: whether there was attention
            other than self-attention, which shows that the model ran. blocks: those whose self-attention reached PSA.
        densities: (block index, scalar tensor) of every sparse call; grids: the grid of each of these calls;
            level_ends: for each of them, the share of the key blocks up to the end of each level, finest first,
            [n_levels].
        corrected: how many of the sparse calls got back what an earlier step had lost. learned: (block
            index, scalar tensor) of the calls that were made beside dense ones, to measure what they lose.
        unranked: for sparse calls that chose levels, how many pairs of blocks had a score that is not finite.
        attention: seconds of its sparse attention calls, None if the device has no clock for them.
        kind: one of `KINDS` once it has ended.
    """

    index: int
    sigma: float
    started: float
    ended: float = 0.0
    active: bool = False
    foreign: bool = False
    seconds: float = 0.0
    attention: float | None = None
    dense_calls: int = 0
    other_calls: bool = False
    blocks: set[int] = dataclasses.field(default_factory=set)
    densities: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)
    grids: list[Grid] = dataclasses.field(default_factory=list)
    level_ends: list[torch.Tensor] = dataclasses.field(default_factory=list)
    unranked: list[torch.Tensor] = dataclasses.field(default_factory=list)
    corrected: int = 0
    learned: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)
    kind: str = ""

    @property
    def work(self) -> list[tuple[int, torch.Tensor]]:
        """(block index, work as a share of a dense call) of calls in a step with sparse ones: of these, and the dense
        ones in which losses were renewed."""
        renewed = [(block, 1 + density) for block, density in self.learned] if self.densities else []
        return [*self.densities, *renewed]

    @property
    def reached(self) -> bool:
        """Whether any self-attention of the step reached PSA."""
        return bool(self.densities or self.dense_calls)

    def take_in(self, other: Step) -> None:
        """Add what another worker measured in the same step."""
        self.seconds = max(self.seconds, other.seconds)
        self.attention = max((s for s in (self.attention, other.attention) if s is not None), default=None)
        self.dense_calls += other.dense_calls
        self.other_calls |= other.other_calls
        self.blocks |= other.blocks
        self.densities += other.densities
        self.grids += other.grids
        self.level_ends += other.level_ends
        self.unranked += other.unranked
        self.corrected += other.corrected
        self.learned += other.learned
        self.kind = min(self.kind, other.kind, key=KINDS.index)

    def to_host(self) -> None:
        """Move its figures to the host."""
        self.densities = [(block, density.cpu()) for block, density in self.densities]
        self.level_ends = [ends.cpu() for ends in self.level_ends]
        self.unranked = [count.cpu() for count in self.unranked]
        self.learned = [(block, density.cpu()) for block, density in self.learned]


@dataclasses.dataclass
class LevelMap:
    """The pooling factors of one call, for its first batch entry and head: the picture in the report."""

    step: int
    block: int
    layout: TokenLayout
    factors: torch.Tensor
    order: TokenOrder


class Record:
    """Figures of one run: collected while it runs, read once it has ended (`figures.py`, `findings.py`).

    Attributes:
        began: when, in seconds since the epoch. blocks: number of the model's transformer blocks, if known.
        blocks_are_named: whether the model says which block an attention call belongs to.
        replaced: parts of the model whose forward another node has replaced. layouts: of all model calls; assumed:
            whether they are an assumption.
        backend, levels, dtype, device: of the sparse calls. tuned: whether their kernel was tuned for the GPU.
        level_map, maps: pictures, if any were requested.
        fallbacks: why calls of active steps stayed dense, and how many. notes: sentences about the run as a whole.
    """

    def __init__(
        self,
        pictured_block: int = -1,
        on_step: Callable[[dict], None] | None = None,
        *,
        blocks: int | None = None,
        verbose: bool = False,
        told: set[str] | None = None,
    ) -> None:
        """pictured_block: the block whose first head is pictured, -1 for no pictures. on_step: gets the figures of
        every finished step; without it nothing is read from the device before the run has ended. told: reasons that
        were logged already; may be shared with other records."""
        self.began = time.time()
        self.blocks = blocks
        self.blocks_are_named = True
        self.replaced: list[str] = []
        self.planned_steps: int | None = None
        self.backend: str | None = None
        self.levels: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.tuned = True
        self._weights: set[str] = set()
        self.layouts: list[TokenLayout] = []
        self.level_map: LevelMap | None = None
        self.maps: RunMaps | None = None
        self.steps: list[Step] = []
        self.fallbacks: Counter[str] = Counter()
        self.notes: list[str] = []
        self.assumed = False
        self._pictured_block, self._on_step, self._verbose = pictured_block, on_step, verbose
        self._told = set() if told is None else told
        self._clock = Clock()

    def for_worker(self) -> Record:
        """A record for another worker of the same run: no pictures, no display; fallbacks are counted together."""
        other = Record(blocks=self.blocks, verbose=self._verbose, told=self._told)
        other.fallbacks = self.fallbacks
        return other

    def plan(self, steps: int | None, device: torch.device, replaced: Sequence[str] = ()) -> None:
        """Called before the first model call: number of steps, device, and which parts of the model were replaced."""
        self.planned_steps, self.replaced = steps, list(replaced)
        self._clock = Clock(device)

    def look_for_weights(self, network: torch.nn.Module) -> None:
        """Note on which devices the weights of the model are, during or right after a model call."""
        self._weights |= {weight.device.type for weight in network.parameters()}

    @property
    def offloaded(self) -> bool:
        """Whether weights wait on another device than the one that attends, to be moved when they are needed."""
        return self.device is not None and bool(self._weights - {self.device.type})

    def begin_steps(self, steps: Sequence[tuple[int, float]], position: Position) -> None:
        """Steps begin, as (index, noise level); all but the last one had no model call."""
        for index, sigma in steps:
            self._end_step()
            self.steps.append(Step(index, sigma, time.perf_counter(), active=position.is_active(sigma)))

    def assume(self) -> None:
        """The layouts are an assumption, which another length of the sequence shows to be wrong."""
        self.assumed = True

    def model_call(self, layout: TokenLayout | None, foreign: bool = False) -> None:
        """A model call begins; foreign: whether another attention override is in front of PSA's."""
        if layout is not None and layout not in self.layouts:
            self.layouts.append(layout)
        self.steps[-1].foreign |= foreign

    def self_attention(self, position: Position) -> None:
        """A self-attention call begins."""
        self.blocks_are_named = position.named
        if self.steps:
            self.steps[-1].blocks.add(position.block)
        if position.active:
            self._clock.start()

    def fell_back(self, reason: str, calls: int = 1) -> None:
        """Count calls that stay dense although their step is active; each reason is logged once."""
        self.tell(reason)
        self.fallbacks[reason] += calls
        self.dense_call(calls)

    def whole_call_dense(self, position: Position, reason: str) -> None:
        """Count all blocks of a model call, in which no attention can be sparse."""
        blocks = range(self.blocks or 1)
        self.steps[-1].blocks.update(blocks)
        if position.active:
            self.fell_back(reason, len(blocks))
        else:
            self.dense_call(len(blocks))

    def tell(self, reason: str) -> None:
        """Log why calls stay dense, once."""
        self.tell_once(reason, "staying dense: ")

    def tell_once(self, reason: str | None, what: str = "") -> None:
        """Log a reason, once."""
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            log.warning("PSA: %s%s", what, reason)

    def dense_call(self, calls: int = 1) -> None:
        """Count self-attention calls that ran dense."""
        if self.steps:
            self.steps[-1].dense_calls += calls

    def other_call(self) -> None:
        """Note an attention call that is not self-attention: it shows that the model runs."""
        if self.steps:
            self.steps[-1].other_calls = True

    def learned_call(self, position: Position, densities: list[torch.Tensor]) -> None:
        """A dense call has measured what PSA would lose, by calls of these densities."""
        if self.steps and densities:
            self.steps[-1].learned.append((position.block, _mean(densities)))

    def sparse_call(
        self, position: Position, config: PyramidConfig, results: Sequence[AttentionResult], corrected: bool = False
    ) -> None:
        """Record a sparse call, made in one piece or several: its density (which stays on the device) and, for one
        block, the map of levels."""
        self._clock.stop()
        result = results[0]
        self.backend, self.levels = result.backend, result.lists.levels
        if self.dtype is None:
            self.dtype, self.device = result.output.dtype, result.output.device
            self.tuned = is_tuned(result.backend, result.output, config)
        step, block, layout = self.steps[-1], position.block, position.known_layout
        self.density(block, _mean([one.density for one in results]))
        step.grids.append(layout.grid)
        step.corrected += corrected
        step.unranked += [count for one in results if (count := one.unranked) is not None]
        step.level_ends.append(_mean([one.lists.mean_ends for one in results]))
        if self._pictured_block < 0:
            return
        pictured = self.level_map
        if block == self._pictured_block and (pictured is None or layout.video >= pictured.layout.video):
            factors = result.lists.of_head(0, 0).factors()
            self.level_map = LevelMap(step.index, block, layout, factors, result.key_order.of_head(0, 0))
        if position.in_last_sparse_step:
            self._map(position, config, result)

    def density(self, block: int, density: torch.Tensor) -> None:
        """Record the density, a scalar tensor, of a call of `block`."""
        self.steps[-1].densities.append((block, density))

    def _map(self, position: Position, config: PyramidConfig, result: AttentionResult) -> None:
        """Keep a map of where this block's heads look; a picture must never end a run."""
        layout, block = position.known_layout, position.block
        orders = result.query_order, result.key_order
        try:
            if self.maps is None or layout.video > self.maps.tokens:
                shared = None if config.order in SEMANTIC_ORDERS else result.key_order.inverse
                step, spot = self.steps[-1].index, centre(layout.grid)
                self.maps = RunMaps(step, layout.grid, config.block_kv, spot, shared, whole=position.whole)
            if layout.grid == self.maps.grid and block not in self.maps.blocks:
                self.maps.blocks[block] = block_map(result.lists, *orders, self.maps.spot, layout.grid, config.block_q)
        except RuntimeError:  # out of memory
            log.debug("PSA: no map of block %d", block, exc_info=True)

    def model_call_ended(self) -> None:
        """The model call has returned."""
        self.steps[-1].ended = time.perf_counter()

    def note(self, sentences: Sequence[str]) -> None:
        """Log and keep sentences about the run as a whole."""
        for sentence in sentences:
            log.warning("PSA: %s", sentence)
        self.notes += sentences

    def end_step(self) -> None:
        """Close the current step if its last model call has returned, so that its figures can be read."""
        if self.steps and self.steps[-1].ended:
            self._end_step(until=self.steps[-1].ended)

    def end(self, position: Position, completed: bool = True) -> None:
        """Close the last step. completed: False after an error or an interrupt, which stopped the last step."""
        self._end_step(completed)
        if completed:
            self.begin_steps(position.steps_left(), position)
            self._end_step()
        self._clock = Clock()

    def take_in(self, other: Record) -> None:
        """Add what another worker measured on another device, step by step; all figures then move to the host."""
        self.backend, self.levels = self.backend or other.backend, self.levels or other.levels
        self.dtype, self.device = self.dtype or other.dtype, self.device or other.device
        self.tuned &= other.tuned
        self._weights |= other._weights
        self.layouts += [layout for layout in other.layouts if layout not in self.layouts]
        self.notes += [note for note in other.notes if note not in self.notes]
        steps = {step.index: step for step in self.steps}
        for step in other.steps:
            if step.index in steps:
                steps[step.index].take_in(step)
            else:
                self.steps.append(step)
        self.steps.sort(key=lambda step: step.started)
        for step in self.steps:
            step.to_host()

    def _end_step(self, done: bool = True, until: float | None = None) -> None:
        if not self.steps or self.steps[-1].kind:
            return
        step = self.steps[-1]
        step.seconds = (until or time.perf_counter()) - step.started
        step.attention = self._clock.take()
        step.kind = self._kind(step) if done else INTERRUPTED
        if done and self._on_step is not None:
            self._on_step(self._figures(step))
        if self._verbose:
            calls = f"{len(step.densities)} sparse and {step.dense_calls} dense self-attention calls"
            log.info("PSA: step %d, sigma %.4f, %.2f s, %s: %s", step.index, step.sigma, step.seconds, step.kind, calls)

    def _kind(self, step: Step) -> str:
        if step.reached:
            return SPARSE if step.densities else DENSE
        # If calls came in other steps, attention does reach PSA, so a step without any was not computed.
        came = any(other.reached and other.foreign >= step.foreign for other in self.steps)
        return SKIPPED if came and not step.other_calls else UNSEEN

    def _figures(self, step: Step) -> dict:
        """What the page shows of a step. Reads once from the device, which the step's end has waited for anyway."""
        sparsity, coverage, shares = None, None, None
        if step.densities:
            ends = torch.stack(step.level_ends).mean(0)
            density = torch.stack([density for _, density in step.work]).mean().reshape(1).to(ends)
            *until, mean = torch.cat([ends, density]).tolist()
            shares = level_shares(self.levels, until)
            sparsity, coverage = 1 - mean, coverage_of(shares)
        return {
            "run": self.began,
            "step": step.index,
            "steps": self.planned_steps,
            "kind": step.kind,
            "seconds": step.seconds,
            "sparsity": sparsity,
            "coverage": coverage,
            "shares": shares,
            "reasons": dict(self.fallbacks),
        }


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)

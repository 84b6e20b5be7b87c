"""One sampling run: the step it is in, the grid, the token orders it made, and what was measured.

Born when sampling starts, dropped when it ends, also after an error or an interrupt. What remains is the report, plain
numbers on the host. Densities stay on the device until the end, so that measuring waits for nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable

import torch

from ..kernels.attention import AttentionResult
from ..kernels.falling import config_at, place_among
from ..kernels.levels import BlockLists
from ..kernels.order import TokenLayout, TokenOrder, make_order
from ..kernels.semantic import SEMANTIC_ORDERS, Centroids
from .clock import Clock
from .maps import RunMaps, block_map, centre
from .settings import PatchSettings

log = logging.getLogger("ComfyUI-PSA")


@dataclasses.dataclass
class Step:
    """Figures of one sampler step.

    Attributes:
        densities: (block index, scalar tensor) of every sparse call; level_ends: beside them, the share of the key
            blocks up to the end of each level, finest first, [n_levels].
        attention: seconds of its sparse attention calls, None where the device has no clock for them.
    """

    index: int
    sigma: float
    started: float
    seconds: float = 0.0
    attention: float | None = None
    dense_calls: int = 0
    densities: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)
    level_ends: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class LevelMap:
    """The pooling factors of one call, of its first batch entry and head: the picture in the report."""

    step: int
    block: int
    factors: torch.Tensor
    order: TokenOrder


def is_active(sigma: float, sigma_start: float, sigma_end: float) -> bool:
    """Whether a model call at noise level `sigma` lies in PSA's part of the schedule.

    A step at the start itself is inside, and one at the end outside. The sampler's noise levels are rounded to float32,
    the bounds are not: without slack 16 steps at a shift of 12 would have 5 dense ones at a start of 0.25.
    """
    slack = 1 + 1e-6
    return sigma_end * slack < sigma <= sigma_start * slack


class Run:
    """State of one run.

    `active` says whether the current model call lies in PSA's part of the schedule, `config` the pyramid at its step;
    `failure` why the rest of the run is dense; `parts` in how many groups of heads a call is computed, more than one
    where memory is short; `centroids` where k-means goes on in the next step, per call of a step, in orders that follow
    the data.

    `on_step` gets the figures of every step when it has ended, see `_figures`; without it nothing is read from the
    device before the run has ended.
    """

    def __init__(
        self,
        settings: PatchSettings,
        sigma_start: float,
        sigma_end: float,
        pictured_block: int,
        on_step: Callable[[dict], None] | None = None,
    ) -> None:
        self.settings = settings
        self.on_step = on_step
        self.began = time.time()
        self.sigma_start = sigma_start
        self.sigma_end = sigma_end
        self.pictured_block = pictured_block
        self.config = settings.config
        self.layout: TokenLayout | None = None
        self.context_tokens: tuple[int, ...] = ()
        self.active = False
        self.block = -1
        self.failure: str | None = None
        self.parts = 1
        self.backend: str | None = None
        self.level_map: LevelMap | None = None
        self.maps: RunMaps | None = None
        self.levels: tuple[int, ...] = ()
        self.steps: list[Step] = []
        self.planned_steps: int | None = None
        self.last_sparse_step: int | None = None
        self._sparse_sigmas: list[float] = []
        self.fallbacks: Counter[str] = Counter()
        self._clock = Clock()
        self.centroids: dict[Hashable, Centroids | None] = {}
        self._orders: dict[tuple, TokenOrder] = {}
        self._kept_lists: dict[Hashable, tuple[int, BlockLists]] = {}
        self._calls = 0
        self._parts: dict[Hashable, Run] = {}
        self._lock = threading.Lock()

    def part(self, worker: Hashable) -> Run:
        """The run as a worker sees it: the first one gets the run itself, every other one a run of its own beside it.

        ComfyUI computes the prompts of a step on several GPUs at once, each in a thread of its own. Place in the model,
        orders and failures are a worker's own; what was measured comes together at the end.
        """
        with self._lock:
            if worker not in self._parts:
                self._parts[worker] = self._beside() if self._parts else self
            return self._parts[worker]

    def _beside(self) -> Run:
        run = Run(self.settings, self.sigma_start, self.sigma_end, pictured_block=-1)
        run.fallbacks = self.fallbacks
        return run

    def plan(self, schedule: torch.Tensor | None, device: torch.device) -> None:
        """Called before the first model call, with the sampler's sigmas [steps + 1], where they are known."""
        self._clock = Clock(device)
        if schedule is None or len(schedule) < 2:
            return
        sigmas = schedule.tolist()[:-1]
        self.planned_steps = len(sigmas)
        sparse = [i for i, sigma in enumerate(sigmas) if is_active(sigma, self.sigma_start, self.sigma_end)]
        self.last_sparse_step = sparse[-1] if sparse else None
        self._sparse_sigmas = [sigmas[i] for i in sparse]

    def begin_model_call(self, sigma: float, step: int, layout: TokenLayout, context_tokens: tuple[int, ...]) -> None:
        """Called once per forward of the diffusion model, before its first attention call."""
        self.layout, self.context_tokens = layout, context_tokens
        self.active = is_active(sigma, self.sigma_start, self.sigma_end)
        self.config = config_at(self.settings.config, self.settings.falling, place_among(self._sparse_sigmas, sigma))
        self._calls = 0
        if not self.steps or self.steps[-1].index != step:
            self._end_step()
            self.steps.append(Step(step, sigma, time.perf_counter()))

    def begin_self_attention(self, block: int | None) -> None:
        """Called at every self-attention call. Models that do not say their block have one call a block, in order."""
        self.block = self._calls if block is None else block
        self._calls += 1
        if self.active:
            self._clock.start()

    def order(self, device: torch.device) -> TokenOrder | None:
        """The token order of the current grid on `device`, made once per run; None for one that follows the data."""
        config = self.settings.config
        if config.order in SEMANTIC_ORDERS:
            return None
        key = (self.layout.grid, device)
        if key not in self._orders:
            self._orders[key] = make_order(config.order, self.layout.grid, config.tile, device)
        return self._orders[key]

    def kept_lists(self, place: Hashable) -> BlockLists | None:
        """The levels that an earlier step chose for this call, while they are kept."""
        step, lists = self._kept_lists.get(place, (-1, None))
        return lists if lists is not None and self.steps[-1].index - step < self.settings.reuse_steps else None

    def keep_lists(self, place: Hashable, lists: BlockLists) -> None:
        """Keep the levels that this step has chosen; as many bytes as four per pair of blocks and head."""
        if self.settings.reuse_steps > 1:
            self._kept_lists[place] = (self.steps[-1].index, lists)

    def fell_back(self, reason: str) -> None:
        """Count a call that stays dense although its step is sparse; each reason is logged once per run."""
        if not self.fallbacks[reason]:
            log.warning("PSA: staying dense: %s", reason)
        self.fallbacks[reason] += 1
        self.dense_call()

    def dense_call(self) -> None:
        """Count a self-attention call that ran dense."""
        if self.steps:
            self.steps[-1].dense_calls += 1

    def sparse_call(self, block: int, result: AttentionResult) -> None:
        """Record a sparse call: its density (it stays on the device) and, for one block, the map of levels."""
        self._clock.stop()
        self.backend = result.backend
        step = self.steps[-1]
        step.densities.append((block, result.density))
        self.levels = result.lists.levels
        step.level_ends.append(result.lists.ends.float().mean((0, 1, 2)) / result.lists.blocks.shape[-1])
        if block == self.pictured_block:
            factors = result.lists.of_head(0, 0).factors()
            self.level_map = LevelMap(step.index, block, factors, result.key_order.of_head(0, 0))
        if step.index == self.last_sparse_step and (self.maps is None or block not in self.maps.blocks):
            self._map(block, result)

    def _map(self, block: int, result: AttentionResult) -> None:
        """Keep where this block's heads look; a picture must never end a run."""
        grid, config = self.layout.grid, self.settings.config
        orders = result.query_order, result.key_order
        try:
            if self.maps is None:
                shared = None if config.order in SEMANTIC_ORDERS else result.key_order.inverse
                self.maps = RunMaps(self.steps[-1].index, grid, config.block_kv, centre(grid), shared)
            if grid == self.maps.grid:
                self.maps.blocks[block] = block_map(result.lists, *orders, self.maps.spot, grid, config.block_q)
        except RuntimeError:  # out of memory
            log.debug("PSA: no map of block %d", block, exc_info=True)

    def end(self) -> None:
        """Close the last step; what was measured can now be read (`report.py`)."""
        self._end_step()
        self._clock = Clock()
        for part in self._parts.values():
            if part is not self:
                part.end()
                self._take_in(part)

    def _take_in(self, part: Run) -> None:
        """Add what another worker measured, step by step, on another device: from here on all is on the host."""
        self.backend, self.levels = self.backend or part.backend, self.levels or part.levels
        steps = {step.index: step for step in self.steps}
        for other in part.steps:
            step = steps.get(other.index)
            if step is None:
                self.steps.append(other)
                continue
            step.seconds = max(step.seconds, other.seconds)
            step.attention = max((s for s in (step.attention, other.attention) if s is not None), default=None)
            step.dense_calls += other.dense_calls
            step.densities += other.densities
            step.level_ends += other.level_ends
        self.steps.sort(key=lambda step: step.started)
        for step in self.steps:
            step.densities = [(block, density.cpu()) for block, density in step.densities]
            step.level_ends = [ends.cpu() for ends in step.level_ends]

    def _end_step(self) -> None:
        if not self.steps:
            return
        step = self.steps[-1]
        step.seconds = time.perf_counter() - step.started
        step.attention = self._clock.take()
        if self.on_step is not None:
            self.on_step(self._figures(step))
        if self.settings.verbose:
            kind = f"{len(step.densities)} sparse and {step.dense_calls} dense self-attention calls"
            log.info("PSA: step %d, sigma %.4f, %.2f s: %s", step.index, step.sigma, step.seconds, kind)

    def _figures(self, step: Step) -> dict:
        """What the page shows of a step; one read from the device, which the step's end has waited for anyway."""
        sparsity, coverage, shares = None, None, None
        if step.densities:
            ends = torch.stack(step.level_ends).mean(0)
            density = torch.stack([density for _, density in step.densities]).mean().reshape(1).to(ends)
            *ends, density = torch.cat([ends, density]).tolist()
            sparsity, coverage = 1 - density, ends[-1]
            shares = {
                f: end - start for f, (start, end) in zip(self.levels, itertools.pairwise([0, *ends]), strict=True)
            }
        return {
            "run": self.began,
            "step": step.index,
            "steps": self.planned_steps,
            "seconds": step.seconds,
            "sparsity": sparsity,
            "coverage": coverage,
            "shares": shares,
            "reasons": dict(self.fallbacks),
        }

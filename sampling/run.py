"""One sampling run: the step it is in, the grid, the token orders it made, and what was measured.

Born when sampling starts, dropped when it ends, also after an error or an interrupt. What remains is the report, plain
numbers on the host. Densities stay on the device until the end, so that measuring waits for nothing.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable

import torch

from ..choices.settings import PatchSettings
from ..kernels.attention import AttentionResult
from ..kernels.falling import config_at
from ..kernels.order import TokenLayout, TokenOrder, make_order
from ..kernels.semantic import SEMANTIC_ORDERS
from .clock import Clock
from .kept import Kept
from .maps import RunMaps, block_map, centre
from .record import DENSE, INTERRUPTED, SKIPPED, SPARSE, UNSEEN, LevelMap, Step
from .schedule import Place, Schedule

log = logging.getLogger("ComfyUI-PSA")


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
    where memory is short; `kept` what a call leaves for the same call of a later step; `notes` what the run as a whole
    shows (`findings.py`).

    `on_step` gets the figures of every step when it has ended, see `_figures`; without it nothing is read from the
    device before the run has ended.

    Args:
        blocks: number of the model's transformer blocks, where it is known.
        latent_size: (time, height, width) of the latent that is sampled, where it is known; a call on less of it is one
            on a part of the video.
        pixels: frames and pixels that stand for one of the latent, for messages in the user's sizes.
    """

    def __init__(
        self,
        settings: PatchSettings,
        sigma_start: float,
        sigma_end: float,
        pictured_block: int,
        on_step: Callable[[dict], None] | None = None,
        *,
        blocks: int | None = None,
        latent_size: tuple[int, ...] = (),
        pixels: tuple[int, int] | None = None,
    ) -> None:
        self.settings = settings
        self.on_step = on_step
        self.began = time.time()
        self.sigma_start = sigma_start
        self.sigma_end = sigma_end
        self.pictured_block = pictured_block
        self.blocks = blocks
        self.latent_size = latent_size
        self.pixels = pixels
        self.config = settings.config
        self.layout: TokenLayout | None = None
        self.context_tokens: tuple[int, ...] = ()
        self.active = False
        self.call_size: tuple[int, ...] = ()
        self.block = -1
        self.blocks_are_named = True
        self.replaced: list[str] = []
        self.failure: str | None = None
        self.out_of_reach: dict[tuple[TokenLayout, float | None], str] = {}
        self.parts = 1
        self.backend: str | None = None
        self.level_map: LevelMap | None = None
        self.maps: RunMaps | None = None
        self.levels: tuple[int, ...] = ()
        self.layouts: list[TokenLayout] = []
        self.steps: list[Step] = []
        self.planned_steps: int | None = None
        self.fallbacks: Counter[str] = Counter()
        self.notes: list[str] = []
        self.kept = Kept(settings.reuse_steps)
        self._clock = Clock()
        self._schedule = Schedule(None, self._is_active)
        self._place = Place(-1, False)
        self._orders: dict[tuple, TokenOrder] = {}
        self._calls = 0
        self._parts: dict[Hashable, Run] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        """A run does not travel: where options are sent to another process in the middle of one, it arrives as None,
        and the calls there are dense."""
        return _no_run, ()

    def __deepcopy__(self, memo: dict) -> Run:
        """Whoever copies the options of a run goes on in the same run."""
        return self

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
        run = Run(
            self.settings,
            self.sigma_start,
            self.sigma_end,
            pictured_block=-1,
            latent_size=self.latent_size,
            pixels=self.pixels,
        )
        run.fallbacks = self.fallbacks
        return run

    def plan(self, sigmas: list[float] | None, device: torch.device) -> None:
        """Called before the first model call, with the sampler's noise levels (steps + 1), where they are known."""
        self._clock = Clock(device)
        if sigmas is not None and len(sigmas) > 1:
            self._schedule = Schedule(sigmas[:-1], self._is_active)
            self.planned_steps = len(sigmas) - 1

    def _is_active(self, sigma: float) -> bool:
        return is_active(sigma, self.sigma_start, self.sigma_end)

    def begin_model_call(
        self,
        sigma: float,
        layout: TokenLayout,
        context_tokens: tuple[int, ...],
        *,
        latent_size: tuple[int, ...] = (),
        foreign: bool = False,
    ) -> None:
        """Called once per forward of the diffusion model, before its first attention call.

        Args:
            latent_size: (time, height, width) of the latent of this call, where it is known.
            foreign: whether another attention override is in front of PSA's.
        """
        self.layout, self.context_tokens = layout, context_tokens
        self.call_size = latent_size
        if layout not in self.layouts:
            self.layouts.append(layout)
        self.active = self._is_active(sigma)
        place = self._schedule.move(sigma)
        self.config = config_at(self.settings.config, self.settings.falling, place.share)
        self._calls = 0
        if not self.steps or self.steps[-1].index != place.step:
            self._end_step()
            if self._place.on_level and place.on_level:
                self._skip(range(self._place.step + 1, place.step))
            self._begin_step(place.step, sigma)
        self._place = place
        self.steps[-1].foreign |= foreign

    @property
    def whole(self) -> bool:
        """Whether the current model call is on the whole video, not on an area or window of it."""
        return not any(size < whole for size, whole in zip(self.call_size, self.latent_size, strict=False))

    @property
    def size(self) -> str:
        """The size of the current model call, as the user knows it where that can be said."""
        if self.pixels is None or not self.call_size:
            return "x".join(map(str, self.layout.grid)) + " of them in time, height, width"
        (time, height, width), (frames, pixels) = self.call_size, self.pixels
        return f"{(time - 1) * frames + 1} frames of {width * pixels}x{height * pixels}"

    def _begin_step(self, index: int, sigma: float) -> None:
        self.steps.append(Step(index, sigma, time.perf_counter(), self._is_active(sigma)))
        self.kept.next_step()

    def _skip(self, steps: range) -> None:
        """Steps of the schedule in which no model call came: a cache answered them."""
        for index in steps:
            self._begin_step(index, self._schedule.levels[index])
            self._end_step()

    def begin_self_attention(self, block: int | None) -> None:
        """Called at every self-attention call. Models that do not say their block have one call a block, in order."""
        self.blocks_are_named = block is not None
        self.block = self._calls if block is None else block
        self._calls += 1
        if self.steps:
            self.steps[-1].blocks.add(self.block)
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

    def other_call(self) -> None:
        """Note an attention call that is no self-attention: the model does run."""
        if self.steps:
            self.steps[-1].other_calls = True

    def sparse_call(self, block: int, result: AttentionResult) -> None:
        """Record a sparse call: its density (it stays on the device) and, for one block, the map of levels."""
        self._clock.stop()
        self.backend = result.backend
        step = self.steps[-1]
        step.densities.append((block, result.density))
        step.grids.append(self.layout.grid)
        if result.unranked is not None:
            step.unranked.append(result.unranked)
        self.levels = result.lists.levels
        step.level_ends.append(result.lists.ends.float().mean((0, 1, 2)) / result.lists.blocks.shape[-1])
        if block == self.pictured_block and self._is_largest(self.level_map and self.level_map.layout):
            factors = result.lists.of_head(0, 0).factors()
            self.level_map = LevelMap(step.index, block, self.layout, factors, result.key_order.of_head(0, 0))
        if self.pictured_block >= 0 and self._schedule.sparse_steps[-1:] == [step.index]:
            self._map(block, result)

    def _is_largest(self, other: TokenLayout | None) -> bool:
        """Whether the current part of the video is no smaller than the one that is pictured so far."""
        return other is None or self.layout.video >= other.video

    def _map(self, block: int, result: AttentionResult) -> None:
        """Keep where this block's heads look; a picture must never end a run."""
        grid, config = self.layout.grid, self.settings.config
        orders = result.query_order, result.key_order
        try:
            if self.maps is None or self.layout.video > self.maps.tokens:
                shared = None if config.order in SEMANTIC_ORDERS else result.key_order.inverse
                step = self.steps[-1].index
                self.maps = RunMaps(step, grid, config.block_kv, centre(grid), shared, whole=self.whole)
            if grid == self.maps.grid and block not in self.maps.blocks:
                self.maps.blocks[block] = block_map(result.lists, *orders, self.maps.spot, grid, config.block_q)
        except RuntimeError:  # out of memory
            log.debug("PSA: no map of block %d", block, exc_info=True)

    def end(self, completed: bool = True) -> None:
        """Close the last step; what was measured can now be read (`report.py`).

        Args:
            completed: False after an error or an interrupt, which broke off the last step.
        """
        self._end_step(completed)
        if completed and self._place.on_level:
            self._skip(range(self._place.step + 1, len(self._schedule.levels)))
        self._clock = Clock()
        self.kept.clear()
        for part in self._parts.values():
            if part is not self:
                part.end(completed)
                self._take_in(part)

    def _take_in(self, part: Run) -> None:
        """Add what another worker measured, step by step, on another device: from here on all is on the host."""
        self.backend, self.levels = self.backend or part.backend, self.levels or part.levels
        self.layouts += [layout for layout in part.layouts if layout not in self.layouts]
        steps = {step.index: step for step in self.steps}
        for other in part.steps:
            if other.index in steps:
                steps[other.index].take_in(other)
            else:
                self.steps.append(other)
        self.steps.sort(key=lambda step: step.started)
        for step in self.steps:
            step.to_host()

    def _end_step(self, done: bool = True) -> None:
        if not self.steps or self.steps[-1].kind:
            return
        step = self.steps[-1]
        step.seconds = time.perf_counter() - step.started
        step.attention = self._clock.take()
        step.kind = self._kind(step) if done else INTERRUPTED
        if done and self.on_step is not None:
            self.on_step(self._figures(step))
        if self.settings.verbose:
            calls = f"{len(step.densities)} sparse and {step.dense_calls} dense self-attention calls"
            log.info("PSA: step %d, sigma %.4f, %.2f s, %s: %s", step.index, step.sigma, step.seconds, step.kind, calls)

    def _kind(self, step: Step) -> str:
        if step.reached:
            return SPARSE if step.densities else DENSE
        # Where calls came in other steps, the way to PSA is open, and a step without any was not computed.
        came = any(other.reached and other.foreign >= step.foreign for other in self.steps)
        return SKIPPED if came and not step.other_calls else UNSEEN

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
            "kind": step.kind,
            "seconds": step.seconds,
            "sparsity": sparsity,
            "coverage": coverage,
            "shares": shares,
            "reasons": dict(self.fallbacks),
        }


def _no_run() -> None:
    return None

"""One sampling run: the step it is in, the grid, the token orders it made, and what was measured.

Born when sampling starts, dropped when it ends, also after an error or an interrupt. What remains is the report, plain
numbers on the host. Densities stay on the device until the end, so that measuring waits for nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter

import torch

from ..kernels.attention import AttentionResult
from ..kernels.order import TokenLayout, TokenOrder, make_order
from .settings import PatchSettings

log = logging.getLogger("ComfyUI-PSA")

_ROUNDING = 1e-5


@dataclasses.dataclass
class Step:
    """Figures of one sampler step; `densities` holds (block index, scalar tensor) of every sparse call."""

    index: int
    sigma: float
    started: float
    seconds: float = 0.0
    dense_calls: int = 0
    densities: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)


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
    """State of one run. `active` says whether the current model call lies in PSA's part of the schedule; `failure` why
    the rest of the run is dense; `parts` in how many groups of heads a call is computed, more than one where memory is
    short."""

    def __init__(self, settings: PatchSettings, sigma_start: float, sigma_end: float, pictured_block: int) -> None:
        self.settings = settings
        self.sigma_start = sigma_start
        self.sigma_end = sigma_end
        self.pictured_block = pictured_block
        self.layout: TokenLayout | None = None
        self.context_tokens: tuple[int, ...] = ()
        self.active = False
        self.block = -1
        self.failure: str | None = None
        self.parts = 1
        self.backend: str | None = None
        self.level_map: LevelMap | None = None
        self.steps: list[Step] = []
        self.fallbacks: Counter[str] = Counter()
        self._orders: dict[tuple, TokenOrder] = {}
        self._calls = 0

    def begin_model_call(self, sigma: float, step: int, layout: TokenLayout, context_tokens: tuple[int, ...]) -> None:
        """Called once per forward of the diffusion model, before its first attention call."""
        self.layout, self.context_tokens = layout, context_tokens
        self.active = is_active(sigma, self.sigma_start, self.sigma_end)
        self._calls = 0
        if not self.steps or self.steps[-1].index != step:
            self._end_step()
            self.steps.append(Step(step, sigma, time.perf_counter()))

    def begin_self_attention(self, block: int | None) -> None:
        """Called at every self-attention call. Models that do not say their block have one call a block, in order."""
        self.block = self._calls if block is None else block
        self._calls += 1

    def order(self, device: torch.device) -> TokenOrder:
        """The token order of the current grid on `device`, made once per run."""
        config = self.settings.config
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

    def sparse_call(self, block: int, result: AttentionResult) -> None:
        """Record a sparse call: its density (it stays on the device) and, for one block, the map of levels."""
        self.backend = result.backend
        step = self.steps[-1]
        step.densities.append((block, result.density))
        if block == self.pictured_block:
            factors = result.lists.of_head(0, 0).factors()
            self.level_map = LevelMap(step.index, block, factors, self.order(factors.device))

    def end(self) -> None:
        """Close the last step; what was measured can now be read (`report.py`)."""
        self._end_step()

    def _end_step(self) -> None:
        if not self.steps:
            return
        step = self.steps[-1]
        step.seconds = time.perf_counter() - step.started
        if self.settings.verbose:
            kind = f"{len(step.densities)} sparse and {step.dense_calls} dense self-attention calls"
            log.info("PSA: step %d, sigma %.4f, %.2f s: %s", step.index, step.sigma, step.seconds, kind)

"""The self-attention of one measured run: the pack's own override, given step and block as ComfyUI's wrappers would.

Features that no node offers yet are tried here, as the `prototype` of a setting:
    fresh: a new random sample in every call (by step and block); the override uses the same one in all calls
    ramp: [first, last] density of the sparse steps, as multiples of their mean, interpolated linearly
    layers: {block: multiple of the mean density}
    dense_steps: steps that stay dense in addition to the warm-up
    reuse: n, choose levels at every n-th sparse step and keep them in between
    rank: how blocks are ranked, see `ranking.py`
    sol: tau, use ComfyUI's own sparse attention instead of ours, with `extra`, `tail` and `package` of `sol_attn.py`
    static: `radial` or `random`, a mask that does not depend on the data
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...choices.settings import PatchSettings
from ...for_diffusers.state import DIFFUSERS
from ...kernels.attention import pyramid_sparse_attention
from ...kernels.config import PyramidConfig
from ...kernels.falling import config_at, place_among
from ...kernels.levels import BlockLists
from ...kernels.order import TokenLayout, TokenOrder, make_order
from ...patching.override import RUN_KEY, PSAOverride
from ...sampling.run import Run
from .injected import static_lists
from .ranking import ranked_lists
from .setting import Schedule
from .sol_attn import sol_attention


@dataclasses.dataclass(frozen=True)
class Calls:
    """How many attention calls of each kind a run made, as shares of the calls of a dense run; `learning` ones are made
    beside dense ones, to measure what sparse ones lose."""

    dense: float
    sparse: float = 0.0
    learning: float = 0.0


class SparseAttention:
    """Attention function of `WanTransformer` for one run. Call `begin_step` before every step; read densities after."""

    def __init__(
        self,
        settings: PatchSettings,
        schedule: Schedule,
        grid: tuple[int, int, int],
        prototype: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.schedule, self.prototype = settings, schedule, dict(prototype or {})
        self.layout = TokenLayout(grid)
        start, end = (schedule.percent_to_sigma(p) for p in (settings.start_percent, settings.end_percent))
        self.run = Run(settings, start, end, pictured_block=-1, blocks=schedule.blocks)
        self.run.plan([*map(float, schedule.sigmas), 0.0], torch.device("cpu"))
        self._override = PSAOverride(None, DIFFUSERS)  # there is no ComfyUI here to ask about memory
        self._active = [
            step
            for step, on in enumerate(schedule.active(settings.start_percent, settings.end_percent))
            if on and step not in self.prototype.get("dense_steps", ())
        ]
        self._config = settings.config
        self._step = self._block = 0
        self._lists: dict[int, BlockLists] = {}

    def begin_step(self, step: int) -> None:
        """To be called before every model call."""
        self._step, self._block = step, 0
        self.run.begin_model_call(float(self.schedule.sigmas[step]), self.layout, ())
        sigmas = [self.schedule.sigmas[sparse] for sparse in self._active]
        place = place_among(sigmas, self.schedule.sigmas[step])
        self._config = config_at(self.settings.config, self.settings.falling, place)
        if self.prototype:
            self.run.decide(self._config, step in self._active)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Output [B, H, L, D] of q, k, v [B, H, L, D]."""
        block = self._block
        self._block += 1
        if self.run.position.active and block not in self.settings.dense_blocks:
            if "reuse" in self.prototype:
                return self._reused(q, k, v, block)
            if "static" in self.prototype:
                return self._static(q, k, v, block)
            if "sol" in self.prototype:
                order, more = self.run.order(q.device), {**self.prototype}
                output, density = sol_attention(*(order.apply(x) for x in (q, k, v)), float(more.pop("sol")), **more)
                self.run.record.density(block, density)
                return order.undo(output)
            if "rank" in self.prototype:
                order = self.run.order(q.device)
                lists = ranked_lists(order.apply(q), order.apply(k), self._config, self.prototype["rank"])
                return self._with_lists(q, k, v, block, order, lists)
            if self.prototype:
                self.run.decide(self._config_for(block), True)
        options = {RUN_KEY: self.run}
        return self._override(
            _dense, q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )

    def step_densities(self) -> list[float]:
        """Mean density of each step over its attention calls, dense ones counting as 1.

        Raises:
            RuntimeError: a call fell back to dense attention.
        """
        self.run.end()
        unwanted = [reason for reason in self.run.record.fallbacks if "listed in dense_blocks" not in reason]
        if unwanted:
            raise RuntimeError("; ".join(unwanted))
        means = []
        for step in self.run.record.steps:
            measured = [density for _, density in [*step.densities, *step.learned]]
            total = sum(map(float, measured)) + step.dense_calls
            means.append(total / (len(step.densities) + step.dense_calls))
        return means

    def calls(self) -> Calls:
        """What the run computed. To be read after `step_densities`."""
        steps = self.run.record.steps
        # In the last step a loss is not measured any more, which is recorded as a density of 0.
        learning = sum(float(density) > 0 for step in steps for _, density in step.learned)
        dense, sparse = sum(step.dense_calls for step in steps), sum(len(step.densities) for step in steps)
        return Calls(*(count / (dense + sparse) for count in (dense, sparse, learning)))

    def layer_densities(self) -> dict[int, float]:
        """Mean density of each block over its sparse calls."""
        calls = [(block, float(density)) for step in self.run.record.steps for block, density in step.densities]
        blocks = sorted({block for block, _ in calls})
        return {block: _mean([density for b, density in calls if b == block]) for block in blocks}

    def _config_for(self, block: int) -> PyramidConfig:
        """The configuration of this call, with any changes that the prototype makes per step or block."""
        config, changes = self._config, {}
        if self.prototype.get("fresh"):
            changes["seed"] = config.seed + 7919 * (self._step + 1) + block
        factor = 1.0
        if "ramp" in self.prototype:
            first, last = self.prototype["ramp"]
            place = self._active.index(self._step) / max(1, len(self._active) - 1)
            factor *= (first + (last - first) * place) * 2 / (first + last)
        if "layers" in self.prototype:
            multiples = [float(self.prototype["layers"].get(str(b), 1.0)) for b in range(self.schedule.blocks)]
            factor *= multiples[block] / _mean(multiples)
        if factor != 1.0:
            changes["sparsity"] = 1 - (1 - config.sparsity) * factor
        return dataclasses.replace(config, **changes) if changes else config

    def _reused(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> torch.Tensor:
        choose_now = self._active.index(self._step) % int(self.prototype["reuse"]) == 0
        kept = None if choose_now else self._lists[block]
        return self._with_lists(q, k, v, block, self.run.order(q.device), kept)

    def _static(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> torch.Tensor:
        config = self._config
        lists = next(iter(self._lists.values()), None)  # the same for all blocks
        if lists is None:
            kind = self.prototype["static"]
            lists = static_lists(kind, self.layout.grid, config, 1 - config.sparsity, q.shape[:2], q.device)
        order = make_order("raster", self.layout.grid, device=q.device)
        return self._with_lists(q, k, v, block, order, lists)

    def _with_lists(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: int,
        order: TokenOrder,
        lists: BlockLists | None,
    ) -> torch.Tensor:
        """Attention with the given levels; with None it chooses levels. Either way they are kept for the block."""
        result = pyramid_sparse_attention(
            q, k, v, self._config, layout=self.layout, order=order, backend=self.settings.backend, lists=lists
        )
        self._lists[block] = result.lists
        self.run.record.density(block, result.density)
        return result.output


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

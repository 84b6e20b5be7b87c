"""Ways to correct that the product does not have, measured beside its own at the same counted compute.

`Corrected` is the product's correction written again, in little code: the last dense step learns, levels are kept, and
in sparse steps some blocks are dense and learn again. Each try below changes one thing of it. What a try computes
besides, whether dense or sparse, is taken from the density of its sparse calls. Times would say nothing: the tries are
written in plain torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...choices.settings import PatchSettings
from ...kernels.attention import AttentionResult, pyramid_sparse_attention
from ...kernels.delta import GAMMA, Delta, measure_delta
from ...kernels.density import block_tokens, pair_cost
from ...kernels.falling import renewal, renews
from ...kernels.levels import BlockLists, group_by_level
from ...kernels.order import TokenLayout, make_order
from ...kernels.pyramid import Pyramid, build_pyramid, pool
from .attention import SparseAttention
from .corrections import COMPUTES
from .demo_model import Attention
from .setting import Schedule, Setting

Place = tuple[int, int]
"""Row of the batch and block: where a call is known again in later steps."""


class Corrected:
    """Attention of one run with the product's correction. Begins with at least one dense step.

    gamma: as in `Correction`; renew: one block in so many is dense in a sparse step, None for the product's choice.
    """

    def __init__(
        self,
        settings: PatchSettings,
        schedule: Schedule,
        grid: tuple[int, int, int],
        gamma: float = GAMMA,
        renew: int | None = None,
    ) -> None:
        self.settings, self.grid, self.blocks = settings, grid, schedule.blocks
        self.active = schedule.active(settings.start_percent, settings.end_percent)
        self.first, self.steps = self.active.index(True), len(self.active)
        self.gamma, self.renew = gamma, renew or 0
        if self.first < self.least_dense_steps:
            raise ValueError(f"{self.first} dense steps are too few to learn from; raise start_percent")
        if renew is None:
            self.renew = renewal(dataclasses.replace(settings.config, sparsity=1 - self._density()))
        self.config = dataclasses.replace(settings.config, sparsity=1 - self._density())
        self.step = self._block = 0
        self.lists: dict[Place, BlockLists] = {}
        self.deltas: dict[Place, Delta] = {}
        self._costs: dict[int, list[float | torch.Tensor]] = defaultdict(list)
        self._rows = 1

    least_dense_steps = 1

    def cost(self, step: int) -> tuple[float, float]:
        """Dense and sparse calls in a step, for one row of the batch."""
        if not self.active[step]:
            return self.blocks, self.blocks if step == self.first - 1 else 0
        turns = len(self.turns(step))
        return turns, self.blocks - (turns if step == self.steps - 1 else 0)

    def _density(self) -> float:
        """Density of the sparse calls at which the run costs what the settings say without any correction."""
        costs = [self.cost(step) for step in range(self.steps)]
        whole = sum(dense for (dense, _), active in zip(costs, self.active, strict=True) if active)
        budget = (1 - self.settings.config.sparsity) * sum(self.active) * self.blocks
        return (budget - whole) / sum(sparse for _, sparse in costs)

    def turns(self, step: int) -> list[int]:
        """The blocks whose turn it is to be dense in a sparse step."""
        return [block for block in range(self.blocks) if renews(step - self.first + 1, block, self.renew)]

    def renewed(self, row: int) -> list[int]:
        """The blocks that are dense in this sparse step."""
        return self.turns(self.step)

    def begin_step(self, step: int) -> None:
        """To be called before every model call."""
        self.step, self._block = step, 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Output [B, H, L, D] of q, k, v [B, H, L, D]."""
        block, self._rows = self._block, len(q)
        self._block += 1
        rows = [x.split(1) for x in (q, k, v)]
        return torch.cat([self._call((row, block), *one) for row, one in enumerate(zip(*rows, strict=True))])

    def _call(self, place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        active = self.active[self.step]
        if active and place[1] not in self.renewed(place[0]):
            return self.corrected(place, q, k, v)
        dense = F.scaled_dot_product_attention(q, k, v)
        self.count(1.0)
        if self.step < self.steps - 1 and (active or self.step >= self.first - self.least_dense_steps):
            self.learn(place, q, k, v, dense)
        return dense

    def learn(
        self, place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: torch.Tensor
    ) -> AttentionResult:
        """Choose levels and measure what they lose."""
        result = self.sparse(q, k, v)
        self.lists[place] = result.lists
        self.deltas[place] = measure_delta(dense, result.output, result.query_order, gamma=self.gamma)
        return result

    def corrected(self, place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The output of a sparse call."""
        return self.sparse(q, k, v, self.lists[place], self.deltas[place]).output

    def sparse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lists: BlockLists | None = None,
        delta: Delta | None = None,
        *,
        counted: bool = True,
    ) -> AttentionResult:
        """A sparse call of one row."""
        result = pyramid_sparse_attention(
            q, k, v, self.config, layout=TokenLayout(self.grid), order=make_order(self.config.order, self.grid,
            self.config.tile, q.device), backend=self.settings.backend, lists=lists, delta=delta,
        )  # fmt: skip
        if counted:
            self.count(result.density)
        return result

    def count(self, share: float | torch.Tensor) -> None:
        """Something with this share of a dense call's work was computed for one row."""
        self._costs[self.step].append(share)

    def step_densities(self) -> list[float]:
        """The work of each step as a share of a dense step's."""
        return [sum(map(float, self._costs[step])) / (self.blocks * self._rows) for step in range(self.steps)]


class ByMass(Corrected):
    """Merges by log-sum-exp: what was lost is kept as a part of the softmax with its own mass, instead of added.

    keep: `mass`, the lost part keeps the sum of exponentials it had, so that its share changes when the seen part's sum
    does; or `share`, it keeps its share. No pooled row outweighs its tokens, so the lost mass is never negative.
    """

    def __init__(self, *given: Any, keep: str = "mass", **options: Any) -> None:
        super().__init__(*given, **options)
        self.keep = keep
        self.lost: dict[Place, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def learn(self, place, q, k, v, dense):
        """Keep what is lost times its share, that share, and the logarithm of the whole sum."""
        result = self.sparse(q, k, v)
        self.lists[place] = result.lists
        ordered = [result.query_order.apply(x) for x in (q, k, v)]
        seen, log_seen = self._seen(*ordered, result.lists)
        whole = dataclasses.replace(self.config, shares={1: 1.0}, mode="topk", sparsity=0.0)
        pyramid = build_pyramid(*ordered[1:], (1,), whole.block_kv)
        ones = torch.ones(result.lists.shape, dtype=torch.int16, device=q.device)
        everything, log_all = with_mass(ordered[0], pyramid, ones, whole.block_q)
        share = (1 - (log_seen - log_all).exp()).clamp(0, 1 - 1e-6)[..., None]
        self.lost[place] = everything - (1 - share) * seen, share, log_all[..., None]
        return result

    def corrected(self, place, q, k, v):
        """The seen part and the kept one as one softmax."""
        result = self.sparse(q, k, v, self.lists[place])
        seen, log_seen = self._seen(*(result.query_order.apply(x) for x in (q, k, v)), self.lists[place])
        lost, share, log_all = self.lost[place]
        if self.keep == "share":
            merged = (1 - share) * seen + lost
        else:
            growth = (log_all - log_seen[..., None]).exp()
            merged = (seen + growth * lost) / (1 + growth * share)
        return result.query_order.undo(seen + self.gamma * (merged - seen)).to(q.dtype)

    def _seen(self, q, k, v, lists):
        pyramid = build_pyramid(k, v, self.config.stored_factors, self.config.block_kv)
        return with_mass(q, pyramid, lists.factors(), self.config.block_q)


@torch.autocast("cuda", enabled=False)
def with_mass(
    q: torch.Tensor, pyramid: Pyramid, factors: torch.Tensor, block_q: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_reference` of one row, a head at a time: output and the logarithm of the sum of exponentials, float32
    [1, H, L, D] and [1, H, L]."""
    blocks = torch.arange(q.shape[2], device=q.device) // block_q
    outputs, sums = [], []
    for head in range(q.shape[1]):
        logits, values = [], []
        for factor, keys in pyramid.keys.items():
            rows = keys.shape[2]
            level = q[0, head].float() @ keys[0, head].float().T * q.shape[-1] ** -0.5
            level += pyramid.tokens(factor).float().log()[:rows]
            chosen = (factors[0, head] == factor).repeat_interleave(pyramid.block_kv // factor, -1)[:, :rows]
            logits.append(level.masked_fill_(~chosen[blocks], -math.inf))
            values.append(pyramid.values[factor][0, head].float())
        every = torch.cat(logits, -1)
        sums.append(every.logsumexp(-1))
        outputs.append((every - sums[-1][:, None]).exp_() @ torch.cat(values))
    return torch.stack(outputs)[None], torch.stack(sums)[None]


class ByHead(Corrected):
    """A gamma for every head, from what it lost in two steps that learn, with the levels of the first.

    by: `fit`, least squares, or `correlation`. with_age: to the power of the steps since the head's loss was measured.
    """

    least_dense_steps = 2

    def __init__(self, *given: Any, by: str = "fit", with_age: bool = False, **options: Any) -> None:
        super().__init__(*given, gamma=1.0, **options)
        self.by, self.with_age = by, with_age
        self.gammas: dict[Place, torch.Tensor] = {}
        self.learned: dict[Place, int] = {}

    def cost(self, step: int) -> tuple[float, float]:
        """One more sparse call per block than the product."""
        return (self.blocks, self.blocks) if step == self.first - 2 else super().cost(step)

    def learn(self, place, q, k, v, dense):
        """In the second step that learns, compare with the first."""
        self.learned[place] = self.step
        if self.step != self.first - 1:
            return super().learn(place, q, k, v, dense)
        result = self.sparse(q, k, v, self.lists[place])
        old = self.deltas[place].rows(q.shape[2])
        self.deltas[place] = measure_delta(dense, result.output, result.query_order, gamma=1.0)
        new = self.deltas[place].rows(q.shape[2])
        norms = old.norm(dim=(2, 3)), new.norm(dim=(2, 3))
        scale = norms[0] * (norms[0] if self.by == "fit" else norms[1])
        self.gammas[place] = ((new * old).sum((2, 3)) / scale.clamp_min(1e-12)).clamp(0, 1)
        return result

    def corrected(self, place, q, k, v):
        """With the loss of each head times its own gamma."""
        delta, gamma = self.deltas[place], self.gammas[place]
        if self.with_age:
            gamma = gamma ** (self.step - self.learned[place])
        delta = dataclasses.replace(delta, scales=delta.scales * gamma[..., None])
        return self.sparse(q, k, v, self.lists[place], delta).output


class ByDrift(Corrected):
    """Renews the blocks that drifted most instead of taking turns; as many in every step as would have their turn.

    by: `inputs`, by how much the means of queries and keys have changed since the block learned; or `losses`, by how
    fast its loss changed between the last two times it learned, times the steps since. A block that has learned once
    only comes first.
    """

    def __init__(self, *given: Any, by: str = "inputs", **options: Any) -> None:
        super().__init__(*given, **options)
        self.by = by
        self.means: dict[Place, torch.Tensor] = {}
        self.learned: dict[Place, int] = {}
        self.rate: dict[Place, float] = {}
        self.drift: dict[Place, float] = {}
        self._chosen: dict[int, list[int]] = {}

    def begin_step(self, step: int) -> None:
        """Choose the blocks from what earlier steps measured."""
        super().begin_step(step)
        self._chosen.clear()

    def renewed(self, row: int) -> list[int]:
        """The blocks that are dense in this sparse step, in this row."""
        if row not in self._chosen:
            turns = self.turns(self.step)

            def most(block: int) -> tuple[float, int, bool]:
                place = row, block
                age = self.step - self.learned[place]
                drift = self.drift.get(place, 0.0) if self.by == "inputs" else self.rate.get(place, math.inf) * age
                return drift, age, block in turns

            self._chosen[row] = sorted(range(self.blocks), key=most, reverse=True)[: len(turns)]
        return self._chosen[row]

    def learn(self, place, q, k, v, dense):
        """Keep also what the drift is measured from."""
        old, learned = self.deltas.get(place), self.learned.get(place)
        result = super().learn(place, q, k, v, dense)
        if self.by == "inputs":
            self.means[place], self.drift[place] = self._means(q, k), 0.0
        elif old is not None:
            change = (self.deltas[place].rows(q.shape[2]) - old.rows(q.shape[2])).norm() / dense.float().norm()
            self.rate[place] = float(change) / (self.step - learned)
        self.learned[place] = self.step
        return result

    def corrected(self, place, q, k, v):
        """Measure the drift besides."""
        if self.by == "inputs":
            self.drift[place] = float((self._means(q, k) - self.means[place]).norm() / self.means[place].norm())
        return super().corrected(place, q, k, v)

    def _means(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        order = make_order(self.config.order, self.grid, self.config.tile, q.device)
        return torch.cat([pool(order.apply(x).float(), 64, 64) for x in (q, k)], -1)


class ByRows(Corrected):
    """Chooses levels in every n-th sparse step, and renews the rows of query blocks whose levels changed most.

    every: n; share: of the rows of every head that take the new levels. They are dense and measure their loss again;
    the other rows keep levels and loss.
    """

    def __init__(self, *given: Any, every: int, share: float, **options: Any) -> None:
        self.every, self.share = every, share
        super().__init__(*given, renew=0, **options)

    def cost(self, step: int) -> tuple[float, float]:
        """A share of every block is dense in some steps, and every call is sparse besides."""
        dense, sparse = super().cost(step)
        return dense + (self.blocks * self._remade / self._all if self._chooses(step) else 0), sparse

    @property
    def _all(self) -> int:
        return -(-math.prod(self.grid) // self.settings.config.block_q)

    @property
    def _remade(self) -> int:
        return round(self.share * self._all)

    def _chooses(self, step: int) -> bool:
        return self.active[step] and (step - self.first + 1) % self.every == 0

    def corrected(self, place, q, k, v):
        """Rows that are remade come from dense attention."""
        lists, delta = self.lists[place], self.deltas[place]
        if not self._chooses(self.step):
            return super().corrected(place, q, k, v)
        # Two whole calls stand for one over the mixed levels, which is what is counted.
        kept = self.sparse(q, k, v, lists, delta, counted=False)
        new = self.sparse(q, k, v, counted=False)
        order, length = kept.query_order, q.shape[2]
        old_factors, new_factors = lists.factors(), new.lists.factors()
        changed = (pair_cost(new_factors) - pair_cost(old_factors)).abs().sum(-1)
        chosen = changed.topk(self._remade, -1).indices  # [1, H, rows]
        taken = torch.zeros_like(changed, dtype=torch.bool).scatter_(-1, chosen, True)
        factors = torch.where(taken[..., None], new_factors, old_factors)
        key_tokens = block_tokens(length, self.config.block_kv, q.device)
        self.lists[place] = group_by_level(factors, self.config.stored_factors, key_tokens)
        self.count(self.lists[place].mean_density)
        self.count(self._remade / self._all)
        steps = torch.arange(self.config.block_q, device=q.device)
        tokens = (chosen[..., None] * self.config.block_q + steps).flatten(-2).clamp_max(length - 1)
        rows = tokens[..., None].expand(*tokens.shape, q.shape[-1])
        dense = F.scaled_dot_product_attention(order.apply(q).gather(2, rows), k, v)
        lost = self.gamma * (dense.float() - order.apply(new.output).gather(2, rows).float())
        losses = order.undo(delta.rows(length).scatter(2, rows, lost))
        self.deltas[place] = measure_delta(losses, torch.zeros_like(losses), order, gamma=1.0)
        return order.undo(order.apply(kept.output).scatter(2, rows, dense))


TRIES: dict[str, type[Corrected]] = {
    "by hand": Corrected,
    "by mass": ByMass,
    "by head": ByHead,
    "by drift": ByDrift,
    "by rows": ByRows,
}


def attention_of(
    settings: PatchSettings, schedule: Schedule, grid: tuple[int, int, int], prototype: Mapping[str, Any]
) -> Attention:
    """The attention of one run: a try if the prototype names one, otherwise the pack's own."""
    if "try" not in prototype:
        return SparseAttention(settings, schedule, grid, prototype)
    options = {name: value for name, value in prototype.items() if name != "try"}
    return TRIES[prototype["try"]](settings, schedule, grid, **options)


def tries() -> list[Setting]:
    """Our default, the same written again, and every try, at the same computes."""
    lean, middle, half, _ = COMPUTES
    found: list[Setting] = []

    def ask(name: str, kind: str, *computes: float, **options: Any) -> None:
        found.extend(
            Setting(f"{name} @ {compute:.3f}", "tries", prototype={"try": kind} | options, compute=compute)
            for compute in computes
        )

    for compute in COMPUTES[:3]:
        found.append(Setting(f"default @ {compute:.3f}", "tries", {"correction": "full"}, compute=compute))
    ask("by hand", "by hand", middle)
    for keep in ("mass", "share"):
        ask(f"log-sum-exp, {keep} kept", "by mass", lean, middle, half, keep=keep)
    ask("log-sum-exp, mass kept, gamma 1", "by mass", middle, keep="mass", gamma=1.0)
    for by in ("fit", "correlation"):
        ask(f"gamma by head, {by}", "by head", lean, middle, half, by=by)
    ask("gamma by head, fit, with age", "by head", lean, middle, half, by="fit", with_age=True)
    for by in ("inputs", "losses"):
        ask(f"renewal by drift of {by}", "by drift", middle, half, by=by)
    for every, share in ((1, 0.125), (2, 0.25), (4, 0.5)):
        ask(f"rows renewed, {share:g} every {every}", "by rows", middle, half, every=every, share=share)
    ask("rows renewed, 0.0625 every 1", "by rows", lean, middle, every=1, share=0.0625)
    ask("rows renewed, 1 every 5", "by rows", half, every=5, share=1.0)
    return found

"""Ways to correct that the product does not have, measured beside its own at the same counted compute.

Each changes one thing of `Corrected`. What it computes besides, whether dense or sparse, is taken from the density of
its sparse calls. Times would say nothing: the tries are written in plain torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...choices.settings import PatchSettings
from ...kernels.delta import measure_delta
from ...kernels.density import block_tokens, pair_cost
from ...kernels.levels import group_by_level
from ...kernels.order import make_order
from ...kernels.pyramid import Pyramid, build_pyramid, pool
from .attention import SparseAttention
from .corrected import Corrected, Place
from .corrections import COMPUTES
from .setting import Schedule, Setting


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
        result = self.sparse(q, k, v, counts_as="learning")
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
        result = self.sparse(q, k, v, self.lists[place], counts_as="learning")
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
        kept = self.sparse(q, k, v, lists, delta, counts_as="")
        new = self.sparse(q, k, v, counts_as="")
        order, length = kept.query_order, q.shape[2]
        old_factors, new_factors = lists.factors(), new.lists.factors()
        changed = (pair_cost(new_factors) - pair_cost(old_factors)).abs().sum(-1)
        chosen = changed.topk(self._remade, -1).indices  # [1, H, rows]
        taken = torch.zeros_like(changed, dtype=torch.bool).scatter_(-1, chosen, True)
        factors = torch.where(taken[..., None], new_factors, old_factors)
        key_tokens = block_tokens(length, self.config.block_kv, q.device)
        self.lists[place] = group_by_level(factors, self.config.stored_factors, key_tokens)
        self.count("sparse", self.lists[place].mean_density)
        self.count("dense", self._remade / self._all, self._remade / self._all)
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
) -> SparseAttention | Corrected:
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

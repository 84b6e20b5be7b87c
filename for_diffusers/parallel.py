"""One video on several GPUs by diffusers' context parallel: what PSA has to know, to refuse and to exchange.

With Ulysses, every process has some of the tokens. Around the attention of a block, processes exchange them for all
tokens of some of the heads, so PSA computes a call as always. Only budget mode looks at all heads together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.config import PyramidConfig
from ..kernels.levels import SharedHeads, no_counts
from ..kernels.order import TokenLayout
from ..kernels.refusal import refusal
from .cogvideox import SharedProcessor

UNEVEN = "enable parallelism with ulysses_anything=True, which allows unequal parts"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How processes share the attention of a transformer by Ulysses.

    Attributes:
        group: the processes of torch.distributed that share the heads.
        rank: this one's number in it. ranks: how many there are. heads: of the transformer.
    """

    group: Any
    rank: int
    ranks: int
    heads: int


def dense_reason(transformer: Any) -> str | None:
    """Why PSA leaves a transformer dense that several processes share; None if it does not."""
    config = _config_of(transformer)
    if config is None or config.ring_degree < 2:
        return None
    return (
        "ring attention shows each call only a part of the keys, and PSA needs all of them; enable parallelism with "
        "ulysses_degree instead of ring_degree"
    )


def find_parallel(transformer: Any, attentions: Sequence[Any], layout: TokenLayout) -> Parallel | None:
    """How processes share a transformer in a call on these tokens; None if they do not, or by ring attention.

    Args:
        attentions: its self-attention modules.

    Raises:
        ValueError: diffusers cannot share this call, or would compute it wrongly; the error says what to choose.
    """
    config = _config_of(transformer)
    if config is None or config.ring_degree > 1:
        return None
    ranks, heads = config.ulysses_degree, transformer.config.num_attention_heads
    check_heads(heads, ranks, config.ulysses_anything)
    alone = {type(one.processor).__name__ for one in attentions if not hasattr(one.processor, "_parallel_config")}
    if alone:
        allowed = "one that shares its attention; this one would see only a part of the video"
        do = "keep diffusers' own, and call enable_ulysses after anything that changes it"
        raise _error("attention processor", ", ".join(sorted(alone)), allowed, do)
    whole_text = any(isinstance(one.processor, SharedProcessor) for one in attentions)
    tokens = layout.video if whole_text else layout.length
    if tokens % ranks and not config.ulysses_anything:
        allowed = f"a number that divides the {tokens} video tokens"
        raise _error("ulysses_degree", ranks, allowed, f"{UNEVEN}, or sample another length or size")
    mesh = config._ulysses_mesh
    return Parallel(mesh.get_group(), mesh.get_local_rank(), ranks, heads)


def check_heads(heads: int, ranks: int, uneven: bool) -> None:
    """Raise ValueError if so many processes cannot share so many heads. uneven: whether some may have more of them."""
    each = -(-heads // ranks)
    enough = each * (ranks - 1) < heads  # so that no process is without a head
    if heads % ranks and not (uneven and enough):
        degrees = ", ".join(str(number) for number in range(2, heads + 1) if heads % number == 0)
        also = f", or {UNEVEN}" if enough else ""
        allowed = f"a number that divides the {heads} heads of the model"
        raise _error("ulysses_degree", ranks, allowed, f"choose one of {degrees}{also}")


def _config_of(transformer: Any) -> Any:
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def _error(field: str, given: object, allowed: str, do: str) -> ValueError:
    return ValueError(f"enable_parallelism, {refusal(field, given, allowed)}; {do}")


class SharedBudget:
    """The sums that a budget needs for one attention call, one for each batch entry, in order.

    A process may stay dense, keep the levels of an earlier step or run out of memory where the others do not. Then it
    adds nothing, but it still takes part in every sum: the others would wait for it forever.
    """

    def __init__(self, parallel: Parallel, config: PyramidConfig, entries: int, device: torch.device) -> None:
        self._group, self._entries = parallel.group, entries
        self._nothing = no_counts(config, device)
        self._sums: list[torch.Tensor] = []
        each = -(-parallel.heads // parallel.ranks)
        self.heads = SharedHeads(parallel.rank * each, parallel.heads, self._add)

    def _add(self, entry: int, counts: torch.Tensor) -> torch.Tensor:
        """The counts of a batch entry, summed over all processes. Asked again, it returns the same."""
        while len(self._sums) <= entry:
            total = (counts if len(self._sums) == entry else self._nothing).clone()
            torch.distributed.all_reduce(total, group=self._group)
            self._sums.append(total)
        return self._sums[entry]

    def finish(self) -> None:
        """Take part in the sums that nobody here has asked for."""
        self._add(self._entries - 1, self._nothing)

"""What was measured in one sampler step; numbers that a GPU computed stay there until the step or the run has ended."""

from __future__ import annotations

import dataclasses

import torch

from ..kernels.order import TokenLayout, TokenOrder

SPARSE, DENSE, SKIPPED, UNSEEN, INTERRUPTED = KINDS = ("sparse", "dense", "skipped", "unseen", "interrupted")
"""What became of a step: some calls were sparse; all that came stayed dense; none came, because a cache answered; its
attention was computed, but went past PSA; the run was broken off in it."""

Grid = tuple[int, int, int]


@dataclasses.dataclass
class Step:
    """Figures of one sampler step.

    Attributes:
        active: whether it lies in PSA's part of the schedule.
        foreign: whether another attention override was in front of PSA's. other_calls: whether attention other than
            self-attention came, which shows that the model ran. blocks: those whose self-attention came.
        densities: (block index, scalar tensor) of every sparse call; grids: beside them, the grid of the call;
            level_ends: beside them, the share of the key blocks up to the end of each level, finest first, [n_levels].
        unranked: of the sparse calls that chose levels, how many pairs of blocks had a score that is not finite.
        attention: seconds of its sparse attention calls, None where the device has no clock for them.
        kind: one of `KINDS` when it has ended.
    """

    index: int
    sigma: float
    started: float
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
    kind: str = ""

    @property
    def reached(self) -> bool:
        """Whether any self-attention of the step came to PSA."""
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
        self.kind = min(self.kind, other.kind, key=KINDS.index)

    def to_host(self) -> None:
        """Move its figures to the host."""
        self.densities = [(block, density.cpu()) for block, density in self.densities]
        self.level_ends = [ends.cpu() for ends in self.level_ends]
        self.unranked = [count.cpu() for count in self.unranked]


@dataclasses.dataclass
class LevelMap:
    """The pooling factors of one call, of its first batch entry and head: the picture in the report."""

    step: int
    block: int
    layout: TokenLayout
    factors: torch.Tensor
    order: TokenOrder

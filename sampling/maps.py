"""Which parts of the video were seen at which resolution, per block and head: what PSA Report draws over the frames.

Taken in only one step of a run, the last sparse one, so it costs next to nothing; kept as one number per key block.
"""

from __future__ import annotations

import dataclasses

import torch

from ..kernels.density import pair_cost
from ..kernels.levels import BlockLists
from ..kernels.order import TokenOrder


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """Figures of one transformer block's call, for the first batch entry.

    Attributes:
        seen: share of its resolution (0..1) at which each key block is seen, mean over the query blocks: [H, n_k].
        spot: pooling factor at which the query block at one spot sees each key block, 0 for not at all: [H, n_k].
        inverse: place of every token in the order of each head's keys, int32 [H, L]; None if all heads share one.
    """

    seen: torch.Tensor
    spot: torch.Tensor
    inverse: torch.Tensor | None = None


@dataclasses.dataclass
class RunMaps:
    """The maps of one step.

    `blocks` is by index of the transformer block, `spot` is a token (time, height, width), and `whole` says whether the
    grid covers the whole video, not just an area or window of it.
    """

    step: int
    grid: tuple[int, int, int]
    block_kv: int
    spot: tuple[int, int, int]
    inverse: torch.Tensor | None
    blocks: dict[int, BlockMap] = dataclasses.field(default_factory=dict)
    whole: bool = True

    @property
    def tokens(self) -> int:
        """Number of tokens of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def to_host(self) -> RunMaps:
        """A copy with its tensors on the host."""
        blocks = {
            index: BlockMap(item.seen.cpu(), item.spot.cpu(), _to_host(item.inverse))
            for index, item in self.blocks.items()
        }
        return dataclasses.replace(self, inverse=_to_host(self.inverse), blocks=blocks)

    def over_video(self, per_block: torch.Tensor, inverse: torch.Tensor | None = None) -> torch.Tensor:
        """Values of the key blocks [n_k] over the video: [T, H, W]. inverse: the one of the head, if heads differ."""
        values = per_block.repeat_interleave(self.block_kv)[: self.tokens]
        inverse = self.inverse if inverse is None else inverse
        return (values if inverse is None else values[inverse.long()]).view(self.grid)

    def head(self, block: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`BlockMap.seen` and `BlockMap.spot` of one head over the video, each [T, H, W]."""
        found = self.blocks[block]
        inverse = None if found.inverse is None else found.inverse[head]
        return self.over_video(found.seen[head], inverse), self.over_video(found.spot[head], inverse)


def centre(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The token in the middle of the video."""
    time, height, width = grid
    return time // 2, height // 2, width // 2


def block_map(
    lists: BlockLists,
    query_order: TokenOrder,
    key_order: TokenOrder,
    spot: tuple[int, int, int],
    grid: tuple[int, int, int],
    block_q: int,
) -> BlockMap:
    """The map of one call, made head by head so that it needs little memory."""
    token = (spot[0] * grid[1] + spot[1]) * grid[2] + spot[2]
    seen, at_spot = [], []
    for head in range(lists.blocks.shape[1]):
        factors = lists.of_head(0, head).factors()
        seen.append(pair_cost(factors).mean(0))
        inverse = query_order.of_head(0, head).inverse
        if inverse is None:
            at_spot.append(factors[token // block_q])
        else:
            row = inverse[token : token + 1] // block_q  # stays on the device, so nothing has to wait
            at_spot.append(factors.index_select(0, row)[0])
    places = key_order.inverse
    differ = places[0, : len(seen)].to(torch.int32) if places is not None and places.ndim > 1 else None
    return BlockMap(torch.stack(seen), torch.stack(at_spot), differ)


def _to_host(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.cpu()

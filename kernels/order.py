"""Token orders: how the tokens of a video grid are lined up before they are cut into blocks.

A block is ranked and pooled as one, so it should be a compact cell of space and time. Orders are permutations of the
raster order (time, height, width). Here they are the same for all heads; the orders that follow the data are in
`semantic.py`. The space-filling curve for any grid is the generalised Hilbert curve (J. Cerveny, "gilbert", 2018),
evaluated here for all boxes of one generation at once.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from .refusal import refusal


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where the video tokens lie in a sequence: `before` other tokens, then the grid, then `after` others.

    The others (text, references) are not reordered or pooled: every query sees them at full resolution.
    """

    grid: tuple[int, int, int]
    before: int = 0
    after: int = 0

    @functools.cached_property
    def video(self) -> int:
        """Number of video tokens."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @functools.cached_property
    def length(self) -> int:
        """Number of tokens of the whole sequence."""
        return self.before + self.video + self.after


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """A permutation and its inverse, int64: ordered[i] = raster[index[i]], raster[j] = ordered[inverse[j]].

    Both are [L], or [B, H, L] if every head has its own order, or None for the raster order, which moves nothing.
    """

    index: torch.Tensor | None
    inverse: torch.Tensor | None

    @classmethod
    def of(cls, index: torch.Tensor) -> TokenOrder:
        """The order with this index."""
        places = torch.arange(index.shape[-1], device=index.device).expand_as(index)
        return cls(index, torch.empty_like(index).scatter_(-1, index, places))

    @property
    def length(self) -> int | None:
        """How many tokens it orders; None for the raster order, which fits any number."""
        return None if self.index is None else self.index.shape[-1]

    def __getitem__(self, part: tuple) -> TokenOrder:
        """The order of a part of the batch and the heads."""
        if self.index is None or self.inverse is None or self.index.ndim == 1:
            return self
        return TokenOrder(self.index[part], self.inverse[part])

    def of_head(self, batch: int, head: int) -> TokenOrder:
        """The order of one head, with a one-dimensional index."""
        return self[batch, head]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Put x [B, H, L, D] from raster order into this order."""
        return x if self.index is None else _rows(x, self.index)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """Put x [B, H, L, D] from this order back into raster order."""
        return x if self.inverse is None else _rows(x, self.inverse)

    def take(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The rows [B, H, N, D] that would be at `places` [N] of the ordered x."""
        return _rows(x, places if self.index is None else self.index[..., places])


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, H, L, D] by an index [N] or [B, H, N]."""
    if index.ndim == 1:
        return x.index_select(2, index)
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def make_order(
    name: str, grid: tuple[int, int, int], tile: tuple[int, int, int] = (1, 8, 8), device: torch.device | str = "cpu"
) -> TokenOrder:
    """The order `name` (raster, curve, tiles) of a grid (time, height, width) as index tensors on `device`.

    Raises:
        ValueError: no such order.
    """
    if name == "raster":
        return TokenOrder(None, None)
    if name not in ("curve", "tiles"):
        raise ValueError(refusal("order", name, "raster, curve, tiles"))
    index = curve_index(grid) if name == "curve" else tiles_index(grid, tuple(tile))
    return TokenOrder.of(index.clone().to(device))  # never hand out the cached tensor itself


def raster_index(grid: tuple[int, int, int]) -> torch.Tensor:
    """The identity: int64 [T*H*W]."""
    return torch.arange(grid[0] * grid[1] * grid[2])


@functools.lru_cache(maxsize=16)
def tiles_index(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> torch.Tensor:
    """3-D tiles in raster order, raster order inside each tile: int64 [T*H*W].

    Every axis is cut into equal parts no larger than the tile, so that no sliver is left at the edge.
    """
    axes = []
    for size, part in zip(grid, tile, strict=True):
        parts = -(-size // part)
        axes.append(np.arange(size) * parts // size)
    t, h, w = np.meshgrid(*axes, indexing="ij")
    key = (t * (h.max() + 1) + h) * (w.max() + 1) + w
    return torch.from_numpy(np.argsort(key.ravel(), kind="stable"))


@functools.lru_cache(maxsize=16)
def curve_index(grid: tuple[int, int, int]) -> torch.Tensor:
    """Generalised Hilbert curve through any grid: int64 [T*H*W]. Neighbours on the curve are neighbours in the grid.

    A box is a corner and three edge vectors (a, b, c): the curve enters at the corner and leaves at the far end of a.
    It is split into two to five boxes whose curves join up, until one cell is left. The longest side goes first, so
    the first `a` is the longest axis.
    """
    size = np.array(grid[::-1])  # x, y, z = width, height, time
    axes = np.argsort(-size, kind="stable")
    boxes = np.zeros((1, 4, 3), dtype=np.int32)  # rows: corner, a, b, c
    for row, axis in enumerate(axes, start=1):
        boxes[0, row, axis] = size[axis]
    while True:
        sides = np.abs(boxes[:, 1:]).sum(2)
        if (sides == 1).all():
            break
        boxes = _split(boxes, sides)
    x, y, z = boxes[:, 0].T.astype(np.int64)
    return torch.from_numpy((z * grid[1] + y) * grid[2] + x)


def _split(boxes: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Split every box that has more than one cell; its children replace it, in the order of the curve."""
    w, h, d = sides.T
    many = (sides > 1).sum(1)
    # A row of cells is halved along its length, a long box along a; a flat box is split in its own plane.
    along_a = (w > 1) & ((many == 1) | ((2 * w > 3 * h) & (2 * w > 3 * d)))
    along_b = (h > 1) & (many == 1)
    along_c = (d > 1) & (many == 1)
    rest = (many > 1) & ~along_a
    flat_b = rest & (3 * h > 4 * d)
    flat_c = rest & ~flat_b & (3 * d > 4 * h)
    cube = rest & ~flat_b & ~flat_c

    children = np.zeros((len(boxes), 5, 4, 3), dtype=boxes.dtype)
    children[many == 0, 0] = boxes[many == 0]
    for mask, split in (
        (along_a, _halve_a),
        (along_b, _halve_b),
        (along_c, _halve_c),
        (flat_b, _split_in_ab),
        (flat_c, _split_in_ac),
        (cube, _split_in_abc),
    ):
        if mask.any():
            corner, a, b, c = boxes[mask].transpose(1, 0, 2)
            for i, child in enumerate(split(corner, a, b, c, np.sign(a), np.sign(b), np.sign(c))):
                children[mask, i] = np.stack(child, 1)
    # A half of length zero (from a side of one cell) makes an empty child.
    present = (np.abs(children[:, :, 1:]).sum(3) > 0).all(2)
    return children[present]


def _half(vector: np.ndarray) -> np.ndarray:
    """Half of each vector, made even if the vector is longer than two: even boxes join without jumps."""
    side = np.abs(vector).sum(1, keepdims=True)
    half = side // 2
    return np.sign(vector) * (half + ((half % 2 == 1) & (side > 2)))


# Each returns the children of one box as (corner, a, b, c), in the order of the curve; ua, ub, uc are unit vectors.


def _halve_a(corner, a, b, c, ua, ub, uc):
    half = _half(a)
    return (corner, half, b, c), (corner + half, a - half, b, c)


def _halve_b(corner, a, b, c, ua, ub, uc):
    half = _half(b)
    return (corner, a, half, c), (corner + half, a, b - half, c)


def _halve_c(corner, a, b, c, ua, ub, uc):
    half = _half(c)
    return (corner, a, b, half), (corner + half, a, b, c - half)


def _split_in_ab(corner, a, b, c, ua, ub, uc):
    ha, hb = _half(a), _half(b)
    return (corner, hb, c, ha), (corner + hb, a, b - hb, c), (corner + a - ua + hb - ub, -hb, c, ha - a)


def _split_in_ac(corner, a, b, c, ua, ub, uc):
    ha, hc = _half(a), _half(c)
    return (corner, hc, ha, b), (corner + hc, a, b, c - hc), (corner + a - ua + hc - uc, -hc, ha - a, b)


def _split_in_abc(corner, a, b, c, ua, ub, uc):
    ha, hb, hc = _half(a), _half(b), _half(c)
    return (
        (corner, hb, hc, ha),
        (corner + hb, c, ha, b - hb),
        (corner + hb - ub + c - uc, a, -hb, hc - c),
        (corner + a - ua + hb + c - uc, -c, ha - a, b - hb),
        (corner + a - ua + hb - ub, -hb, hc, ha - a),
    )

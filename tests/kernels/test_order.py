"""Token orders: permutations that can be undone, and a curve whose neighbours are neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_psa.kernels import TokenLayout, make_order
from comfyui_psa.kernels.order import curve_index, raster_index, tiles_index

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 13), st.integers(1, 13))
TILES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))


def cells(index, grid):
    """Coordinates (t, h, w) in the order of `index`: [L, 3]."""
    return torch.stack([index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]], 1)


@settings(max_examples=25, deadline=None)
@given(grid=GRIDS, tile=TILES, name=st.sampled_from(["raster", "curve", "tiles"]))
def test_an_order_is_a_permutation_that_can_be_undone(grid, tile, name):
    order = make_order(name, grid, tile)
    length = grid[0] * grid[1] * grid[2]
    x = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1).expand(2, 3, length, 2)
    moved = order.apply(x)
    assert torch.equal(order.undo(moved), x)
    assert torch.equal(moved[0, 0, :, 0].sort().values, x[0, 0, :, 0])
    if name != "raster":
        assert order.index.dtype == order.inverse.dtype == torch.int64
        assert torch.equal(moved[0, 0, :, 0].long(), order.index)


@settings(max_examples=25, deadline=None)
@given(grid=GRIDS)
def test_consecutive_tokens_of_the_curve_are_close(grid):
    place = cells(curve_index(grid), grid)
    steps = (place[1:] - place[:-1]).abs().sum(1)
    if len(steps):
        assert steps.min() >= 1
        assert steps.max() <= 3
        # Steps of more than one cell are the exception, where a side is odd.
        assert (steps > 1).sum() <= max(2, len(steps) // 10)


@pytest.mark.parametrize("grid", [(4, 8, 8), (2, 16, 16), (8, 8, 8), (21, 30, 52), (18, 45, 80)])
def test_the_curve_of_video_grids(grid):
    index = curve_index(grid)
    place = cells(index, grid)
    steps = (place[1:] - place[:-1]).abs().sum(1)
    assert torch.equal(index.sort().values, torch.arange(grid[0] * grid[1] * grid[2]))
    assert steps.max() <= 2
    assert place[0].tolist() == [0, 0, 0]


def test_blocks_of_the_curve_are_more_compact_than_rows():
    grid = (8, 32, 32)

    def spread(index):
        blocks = cells(index, grid).double().view(-1, 64, 3)
        return (blocks - blocks.mean(1, keepdim=True)).square().sum(2).mean()

    assert spread(curve_index(grid)) < 0.1 * spread(raster_index(grid))


@settings(max_examples=25, deadline=None)
@given(grid=GRIDS, tile=TILES)
def test_every_tile_is_one_run_no_larger_than_asked(grid, tile):
    """Walking the order, each stretch is a full box of at most the tile's sides, and the boxes fill the grid."""
    place = cells(tiles_index(grid, tile), grid).tolist()
    counts = [-(-size // part) for size, part in zip(grid, tile, strict=True)]
    boxes = {}
    for position, cell in enumerate(place):
        box = tuple(c * n // size for c, n, size in zip(cell, counts, grid, strict=True))
        boxes.setdefault(box, []).append((position, cell))
    assert len(boxes) == counts[0] * counts[1] * counts[2]
    for members in boxes.values():
        positions = [position for position, _ in members]
        assert positions == list(range(positions[0], positions[0] + len(positions)))
        for axis in range(3):
            along = [cell[axis] for _, cell in members]
            assert max(along) - min(along) + 1 <= tile[axis]


def test_tiles_that_divide_the_grid():
    index = tiles_index((1, 4, 4), (1, 2, 2))
    assert index.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_raster_moves_nothing():
    x = torch.randn(1, 1, 24, 2)
    order = make_order("raster", (2, 3, 4))
    assert order.apply(x) is x
    assert order.undo(x) is x
    assert raster_index((2, 3, 4)).tolist() == list(range(24))


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="hilbert"):
        make_order("hilbert", (2, 3, 4))


def test_layout_counts():
    layout = TokenLayout((2, 3, 4), before=5, after=6)
    assert (layout.video, layout.length) == (24, 35)

"""The grid of a video whose call names no sizes, found in the coordinates of its tokens, which the call has instead."""

from __future__ import annotations

import itertools

import torch

from ..kernels.order import TokenLayout


def layout_of(coordinates: torch.Tensor) -> TokenLayout:
    """The layout of a sequence that holds a video, and perhaps tokens of images or other videos around it.

    The video is the longest series of frames of one size, each later than the one before.

    Args:
        coordinates: of every token in time, height and width, [B, 3, L] or, with begin and end of each, [B, 3, L, 2].
            Read from the device.

    Raises:
        ValueError: there is no such series.
    """
    time, height, width = (coordinates[0, :, :, 0] if coordinates.ndim == 4 else coordinates[0]).cpu()
    place = torch.stack([height, width])
    steps = torch.stack([time, height, width]).diff()
    in_frame = (steps[0] == 0) & ((steps[1] > 0) | ((steps[1] == 0) & (steps[2] > 0)))
    begins = [0, *((~in_frame).nonzero().flatten() + 1).tolist(), len(time)]
    frames = list(itertools.pairwise(begins))
    best, first = range(0), 0
    for index, (start, end) in enumerate(frames):
        if index > first:
            before = slice(*frames[index - 1])
            goes_on = bool(time[start] > time[before.start]) and torch.equal(place[:, before], place[:, start:end])
            first = first if goes_on else index
        if end - frames[first][0] > len(best):
            best = range(frames[first][0], end)
    size = next(end - start for start, end in frames if start == best.start)
    rows = height[best.start : best.start + size]
    columns = int((rows == rows[0]).to(torch.int32).cumprod(0).sum())
    if size % columns or not torch.equal(rows, rows[::columns].repeat_interleave(columns)):
        raise ValueError("the coordinates are those of no grid")
    return TokenLayout((len(best) // size, size // columns, columns), best.start, len(time) - best.stop)

"""The picture of PSA Calibrate: error and speed against sparsity, with the proposal marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from .paint import GRID, INK, QUIET, Sheet, font, nice_step

_ERROR, _SPEED, _CHOSEN = (255, 157, 118), (127, 178, 255), (253, 231, 37)


def draw_calibration(found: dict[str, Any]) -> Image.Image:
    """Two charts side by side from the dictionary of `reports/calibrate.py`."""
    sheet = Sheet(1000, 520)
    sheet.text(f"PSA Calibrate: sparsity {found['sparsity']:.2f}", 24)
    sheet.text(found["note"][:1].upper() + found["note"][1:] + ".", 15)
    sheet.y += 10
    sparsities = [point["sparsity"] for point in found["points"]]
    errors = [point["error"] for point in found["points"]]
    speeds = [found["dense_seconds"] / point["seconds"] for point in found["points"]]
    targets = {found["goal"]: found["target"]}
    top = sheet.y
    for column, (title, values, colour, goal) in enumerate(
        (
            ("Relative error of the model's output", errors, _ERROR, "error"),
            ("Speed of a model call, dense = 1", speeds, _SPEED, "speed-up"),
        )
    ):
        box = (sheet.margin + 44 + column * 490, top + 30, sheet.margin + 440 + column * 490, top + 330)
        sheet.draw.text((box[0] - 40, top), title, INK, font(16))
        _chart(sheet, box, sparsities, values, colour, targets.get(goal), found["sparsity"])
    sheet.y = top + 370
    entries = [
        (_CHOSEN, f"proposed sparsity {found['sparsity']:.2f}"),
        (QUIET, f"target: {found['goal']} {found['target']:g}"),
    ]
    sheet.legend(entries, sheet.margin, sheet.y)
    sheet.y += 20
    return sheet.cropped()


def _chart(
    sheet: Sheet,
    box: tuple[int, int, int, int],
    x: Sequence[float],
    y: Sequence[float],
    colour: tuple,
    target: float | None,
    chosen: float,
) -> None:
    left, top, right, bottom = box
    most = max([*y, target or 0.0]) * 1.1 or 1.0
    low, high = x[0], max(x[-1], x[0] + 1e-9)

    def place(sparsity: float, value: float) -> tuple[float, float]:
        return left + (right - left) * (sparsity - low) / (high - low), bottom - (bottom - top) * value / most

    letters, tick = font(12), nice_step(most)
    for i in range(int(most / tick) + 1):
        line = place(low, i * tick)[1]
        sheet.draw.line((left, line, right, line), GRID)
        sheet.draw.text((left - 6, line), f"{i * tick:g}", QUIET, letters, anchor="rm")
    for sparsity in x:
        sheet.draw.text((place(sparsity, 0)[0], bottom + 4), f"{sparsity:g}", QUIET, letters, anchor="ma")
    sheet.draw.text(((left + right) // 2, bottom + 20), "sparsity", QUIET, letters, anchor="ma")
    if target is not None:
        line = place(low, target)[1]
        sheet.draw.line((left, line, right, line), QUIET, 2)
    mark = place(min(max(chosen, low), high), 0)[0]
    sheet.draw.line((mark, top, mark, bottom), _CHOSEN, 2)
    points = [place(*pair) for pair in zip(x, y, strict=True)]
    sheet.draw.line(points, colour, 3)
    for px, py in points:
        sheet.draw.ellipse((px - 4, py - 4, px + 4, py + 4), fill=colour)

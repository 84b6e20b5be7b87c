"""The picture of PSA Report: where the time went, how sparse every step and layer was, and where the model looked.

All numbers come from `sampling/figures.py` and `sampling/maps.py`; only positions on the sheet are computed here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..sampling.correction import gigabytes
from ..sampling.pays import how_it_pays
from .paint import (
    DENSE,
    GRID,
    INK,
    PAPER,
    QUIET,
    Sheet,
    font,
    heat,
    level_colour,
    level_name,
    level_picture,
    nice_step,
    over_frame,
)

WIDTH = 1200
_OTHER = {
    "skipped": "skipped by a cache",
    "unseen": "computed by another node's attention",
    "interrupted": "interrupted",
}
"""What the headline says about steps that were neither sparse nor dense."""
_MOST_HEIGHT = 4000
_MOST_FALLBACKS = 8
_ATTENTION, _REST = (127, 178, 255), (70, 104, 158)


def draw_report(
    report: dict[str, Any],
    *,
    seen: np.ndarray | None = None,
    spot: np.ndarray | None = None,
    spot_at: tuple[int, int, int] | None = None,
    frames: np.ndarray | None = None,
    where: str = "",
) -> Image.Image:
    """Draw one run.

    Args:
        report: from `make_report`, or {"note": why there is none}.
        seen: share of its resolution at which each token is seen, [T, H, W]; spot: pooling factor at which the token
            `spot_at` sees the others, [T, H, W]. Both for the layer and head that `where` names.
        frames: uint8 [F, h, w, 3], the background to draw on; grey if missing.
    """
    sheet = Sheet(WIDTH, _MOST_HEIGHT)
    sheet.text("PSA Report", 26)
    if not report.get("steps"):
        sheet.text(f"Nothing to show: {report.get('note') or 'no step has run'}.", 17)
        return sheet.cropped()
    sheet.text(headline(report), 17)
    if report.get("pays") is not None:
        sheet.text(f"Measured in this run: {how_it_pays(report['pays'])}.", 14)
    sheet.text(_settings(report), 14, QUIET)
    sheet.y += 14
    top = sheet.y
    _sparsity_map(sheet, report, sheet.margin, top, WIDTH // 2 - 2 * sheet.margin)
    left_end = sheet.y
    sheet.y = top
    _seconds(sheet, report, WIDTH // 2 + sheet.margin, top, WIDTH // 2 - 2 * sheet.margin)
    sheet.y = max(left_end, sheet.y) + 14
    _levels(sheet, report)
    _time(sheet, report)
    _parts(sheet, report)
    _correction(sheet, report)
    _fallbacks(sheet, report)
    if seen is not None and spot is not None and spot_at is not None:
        _video_maps(sheet, seen, spot, spot_at, frames, where)
    return sheet.cropped()


def headline(report: dict[str, Any]) -> str:
    """The run in one sentence."""
    steps = report["steps"]
    sparse = [step for step in steps if step["sparsity"] is not None]
    counts = {kind: sum(step["kind"] == kind for step in steps) for kind in _OTHER}
    others = [f"{counts[kind]} {words}" for kind, words in _OTHER.items() if counts[kind]]
    if not sparse and not others:
        return f"All {len(steps)} steps stayed dense."
    if not sparse:
        dense = len(steps) - sum(counts.values())
        return f"No step was sparse: {', '.join([*([f'{dense} stayed dense'] if dense else []), *others])}."
    text = f"{len(sparse)} of {len(steps)} steps were sparse and saved {100 * report['mean_sparsity']:.1f} % of their "
    return "; ".join([f"{text}attention work", *others]) + "."


def _settings(report: dict[str, Any]) -> str:
    target = report["target_sparsity"]
    grids = ["x".join(map(str, part["grid"])) for part in report["grids"]]
    grid = ", ".join(grids[:4]) + (f" and {len(grids) - 4} more" if len(grids) > 4 else "")
    parts = [
        f"preset {report['preset']}",
        f"mode {report['mode']}",
        "levels as written" if target is None else f"sparsity asked for {target:.2f}",
        f"backend {report['backend'] or '-'}",
        f"{grid} tokens (time, height, width)",
    ]
    return ", ".join(parts)


def _sparsity_map(sheet: Sheet, report: dict[str, Any], x: int, y: int, width: int) -> None:
    """A grid with steps to the right and layers downward; a grey cell was dense."""
    steps = report["steps"]
    layers = sorted(int(layer) for layer in report["layers"]) or [0]
    sheet.y = y
    sheet.text("Sparsity of every step and layer", 16, x=x)
    left = x + 44
    cell_w = max(2, (width - 44) // len(steps))
    cell_h = max(4, min(18, 300 // len(layers)))
    top = sheet.y + 4
    for column, step in enumerate(steps):
        for row, layer in enumerate(layers):
            value = step["layers"].get(str(layer))
            blank = GRID if step["kind"] in _OTHER else DENSE
            colour = blank if value is None else tuple(int(c) for c in heat(value))
            box = (left + column * cell_w, top + row * cell_h)
            sheet.draw.rectangle((*box, box[0] + cell_w - 2, box[1] + cell_h - 2), fill=colour)
    letters = font(12)
    for row in {0, len(layers) - 1}:
        sheet.draw.text((left - 8, top + row * cell_h + cell_h // 2), str(layers[row]), QUIET, letters, anchor="rm")
    bottom = top + len(layers) * cell_h
    for column in sorted({0, len(steps) // 2, len(steps) - 1}):
        place = (left + column * cell_w + cell_w // 2, bottom + 3)
        sheet.draw.text(place, str(steps[column]["index"] + 1), QUIET, letters, anchor="ma")
    sheet.draw.text((x, bottom + 3), "layer", QUIET, letters)
    sheet.draw.text((left + len(steps) * cell_w + 6, bottom + 3), "step", QUIET, letters)
    _scale(sheet, left, bottom + 26)
    sheet.y = bottom + 56


def _scale(sheet: Sheet, x: int, y: int) -> None:
    ramp = np.broadcast_to(heat(np.linspace(0, 1, 160))[None], (10, 160, 3))
    sheet.image.paste(Image.fromarray(np.ascontiguousarray(ramp)), (x, y))
    letters = font(12)
    sheet.draw.text((x, y + 12), "0", QUIET, letters)
    sheet.draw.text((x + 160, y + 12), "1 = all saved", QUIET, letters, anchor="ma")
    sheet.legend([(DENSE, "dense"), (GRID, "neither")], x + 250, y - 2, 12)


def _seconds(sheet: Sheet, report: dict[str, Any], x: int, y: int, width: int) -> None:
    """Seconds of every step as bars, with PSA's attention separate from the rest."""
    steps = report["steps"]
    sheet.y = y
    sheet.text("Seconds of every step", 16, x=x)
    top, height, left = sheet.y + 8, 190, x + 44
    # The first step may include loading the model. Its bar is cut at the top so that it does not flatten the others.
    shown = [step["seconds"] for step in steps[1 if len(steps) > 2 else 0 :]]
    most = max(shown) * 1.1 or 1.0
    letters = font(12)
    tick = nice_step(most)
    for i in range(1, int(most / tick) + 1):
        line = top + height - round(height * i * tick / most)
        sheet.draw.line((left, line, x + width, line), GRID)
        sheet.draw.text((left - 6, line), f"{i * tick:g}", QUIET, letters, anchor="rm")
    bar = max(2, (width - 44) // len(steps))
    for column, step in enumerate(steps):
        whole = min(height, round(height * step["seconds"] / most))
        attention = min(whole, round(height * (step["attention_seconds"] or 0.0) / most))
        box = (left + column * bar, left + column * bar + bar - 2)
        bottom = top + height
        if whole:
            sheet.draw.rectangle((box[0], bottom - whole, box[1], bottom), fill=_bar(step["kind"]))
        if attention:
            sheet.draw.rectangle((box[0], bottom - attention, box[1], bottom), fill=_ATTENTION)
        if column in (0, len(steps) // 2, len(steps) - 1):
            sheet.draw.text(((box[0] + box[1]) // 2, bottom + 3), str(step["index"] + 1), QUIET, letters, anchor="ma")
    entries = [(DENSE, "dense step"), (_REST, "sparse step"), (_ATTENTION, "PSA's attention in it")]
    sheet.legend(entries, left, top + height + 24, 12)
    sheet.y = top + height + 50


def _bar(kind: str) -> tuple[int, int, int]:
    return GRID if kind in _OTHER else _REST if kind == "sparse" else DENSE


def _levels(sheet: Sheet, report: dict[str, Any]) -> None:
    if not report["shares"]:
        return
    shares = {int(factor): share for factor, share in report["shares"].items() if share > 0}
    shares[0] = max(0.0, 1 - report["coverage"])
    sheet.text(f"What each part of the video saw: {100 * report['coverage']:.0f} % of the video", 16)
    box = (sheet.margin, sheet.y + 4, WIDTH - sheet.margin, sheet.y + 24)
    sheet.stack(box, [(level_colour(factor), share) for factor, share in shares.items()])
    entries = [
        (level_colour(f), f"{100 * share:.1f} % {'seen ' if f == 1 else ''}{level_name(f)}")
        for f, share in shares.items()
    ]
    sheet.legend(entries, sheet.margin, sheet.y + 32)
    sheet.y += 66


def _time(sheet: Sheet, report: dict[str, Any]) -> None:
    time = report["time"]
    attention = time["sparse_attention"]
    rest = time["sparse_steps"] - (attention or 0.0)
    parts = [(DENSE, time["dense_steps"], "dense steps"), (_REST, rest, "sparse steps")]
    other = time["other_steps"]
    if attention is not None:
        parts[1] = (_REST, rest, "rest of the sparse steps")
        parts.append((_ATTENTION, attention, "PSA's attention"))
    if other >= 0.05:
        parts.append((GRID, other, "other steps"))
    total = sum(seconds for _, seconds, _ in parts)
    sheet.text(f"Where the time went: {total:.1f} s", 16)
    box = (sheet.margin, sheet.y + 4, WIDTH - sheet.margin, sheet.y + 24)
    sheet.stack(box, [(colour, seconds) for colour, seconds, _ in parts])
    sheet.legend([(colour, f"{seconds:.1f} s {word}") for colour, seconds, word in parts], sheet.margin, sheet.y + 32)
    sheet.y += 66


def _parts(sheet: Sheet, report: dict[str, Any]) -> None:
    """If parts or windows of the video were computed separately: how sparse each size of them was."""
    for part in report["grids"] if len(report["grids"]) > 1 else ():
        grid = "x".join(map(str, part["grid"]))
        sparsity = "dense" if part["sparsity"] is None else f"sparsity {part['sparsity']:.3f}"
        sheet.text(f"Part of {grid} tokens: {sparsity}, {part['sparse_calls']} sparse calls", 14, QUIET)


def _correction(sheet: Sheet, report: dict[str, Any]) -> None:
    correction = report.get("correction")
    if correction is None:
        return
    if correction["corrected_calls"]:
        calls = sum(step["sparse_calls"] for step in report["steps"])
        text = f"Correction: {correction['size']}, {gigabytes(correction['bytes'])} in {correction['where']}; "
        sheet.text(f"{text}{correction['corrected_calls']} of {calls} sparse calls", 14, QUIET)
    if correction["reason"]:
        sheet.text(f"Correction: {correction['reason']}.", 14)


def _fallbacks(sheet: Sheet, report: dict[str, Any]) -> None:
    for note in report["notes"]:
        sheet.text(f"Note: {note}.", 14)
    if not report["fallbacks"] and not report["notes"]:
        none = "Fallbacks: none; every attention call of the sparse steps was sparse."
        dense = report.get("dense")
        sheet.text(none if dense is None else f"Nothing was sparse: {dense}.", 14, QUIET)
    shown, rest = report["fallbacks"][:_MOST_FALLBACKS], report["fallbacks"][_MOST_FALLBACKS:]
    for entry in shown:
        sheet.text(f"{entry['calls']} calls stayed dense: {entry['reason']}", 14)
    if rest:
        calls = sum(entry["calls"] for entry in rest)
        sheet.text(f"{calls} more calls stayed dense for {len(rest)} other reasons, which are in the JSON.", 14)
    sheet.y += 12


def _video_maps(
    sheet: Sheet,
    seen: np.ndarray,
    spot: np.ndarray,
    spot_at: tuple[int, int, int],
    frames: np.ndarray | None,
    where: str,
) -> None:
    time, height, width = seen.shape
    columns = min(5, time)
    picked = sorted({round(i * (time - 1) / max(1, columns - 1)) for i in range(columns)} | {spot_at[0]})[:columns]
    gap = 8
    side = (WIDTH - 2 * sheet.margin - gap * (columns - 1)) // columns
    tall = max(24, round(side * (frames.shape[1] / frames.shape[2] if frames is not None else height / width)))
    tall = min(tall, 420)

    sheet.text(f"What one spot sees ({where}): the white square and the level at which it sees the rest", 16)
    table = level_picture(spot)
    top = sheet.y + 4
    for column, step in enumerate(picked):
        picture = over_frame(frames, table[step], step, time, side, tall)
        if step == spot_at[0]:
            x, y = (spot_at[2] + 0.5) * side / width, (spot_at[1] + 0.5) * tall / height
            draw = ImageDraw.Draw(picture)
            draw.rectangle((x - 7, y - 7, x + 7, y + 7), outline=PAPER, width=4)
            draw.rectangle((x - 6, y - 6, x + 6, y + 6), outline=(255, 255, 255), width=2)
        sheet.image.paste(picture, (sheet.margin + column * (side + gap), top))
    order = sorted(np.unique(spot).tolist(), key=lambda factor: factor or 1000)
    sheet.legend([(level_colour(factor), level_name(factor)) for factor in order], sheet.margin, top + tall + 8)
    sheet.y = top + tall + 36

    sheet.text("How well each place is seen by all: mean share of its resolution", 16)
    low, high = float(seen.min()), float(seen.max())
    shown = heat((seen - low) / ((high - low) or 1.0))
    top = sheet.y + 4
    for column, step in enumerate(picked):
        picture = over_frame(frames, shown[step], step, time, side, tall)
        sheet.image.paste(picture, (sheet.margin + column * (side + gap), top))
        place = (sheet.margin + column * (side + gap) + side // 2, top + tall + 4)
        sheet.draw.text(place, f"latent frame {step + 1} of {time}", QUIET, font(12), anchor="ma")
    y = top + tall + 26
    ramp = np.ascontiguousarray(np.broadcast_to(heat(np.linspace(0, 1, 160))[None], (10, 160, 3)))
    sheet.image.paste(Image.fromarray(ramp), (sheet.margin, y))
    sheet.draw.text((sheet.margin + 170, y - 3), f"{100 * low:.0f} % to {100 * high:.0f} %", INK, font(13))
    sheet.y = y + 14

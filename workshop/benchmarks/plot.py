"""Plots of the results: relative error against time for every shape, and time against length."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path


def draw(folder: Path) -> int:
    """Draw `error-<shape>.png` and `length.png` from `folder`'s `attention-gpu.csv`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from comfyui_psa.workshop.table import read_rows

    by_shape: dict[str, list[dict]] = defaultdict(list)
    path = folder / "attention-gpu.csv"
    for row in read_rows(path):
        by_shape[row["shape"]].append(row)
    lengths = {int(name.split("-")[1]): rows for name, rows in by_shape.items() if name.startswith("length-")}
    for shape, rows in by_shape.items():
        if shape.startswith("length-"):
            continue
        figure, axes = plt.subplots(figsize=(7, 5))
        for method, precision in sorted({(row["method"], row["precision"]) for row in rows}):
            points = sorted(
                (float(row["ms"]), float(row["rel_l1"]))
                for row in rows
                if (row["method"], row["precision"]) == (method, precision) and float(row["rel_l1"] or 0)
            )
            if points:
                (dots,) = axes.plot(*zip(*points, strict=True), "o", label=f"{method}, {precision}")
                axes.plot(*zip(*_pareto_front(points), strict=True), "-", color=dots.get_color(), alpha=0.5)
        axes.axvline(float(rows[0]["dense_ms"]), color="grey", linestyle=":", label="dense, cuDNN")
        axes.set(xlabel="ms per call", ylabel="relative L1 error", yscale="log", xscale="log")
        axes.set_title(f"{shape}, {rows[0]['gpu']}, {rows[0]['date']}")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / f"error-{shape}.png", dpi=110)
        plt.close(figure)
        print(f"written to {folder / f'error-{shape}.png'}")
    if lengths:
        figure, axes = plt.subplots(figsize=(7, 5))
        for method, setting in dict.fromkeys((r["method"], r["setting"]) for rows in lengths.values() for r in rows):
            points = [
                (n, float(row["ms"]))
                for n, rows in sorted(lengths.items())
                for row in rows
                if (row["method"], row["setting"]) == (method, setting)
            ]
            axes.plot(*zip(*points, strict=True), "o-", label=f"{method}, {setting}")
        axes.set(xlabel="tokens", ylabel="ms per call, 4 heads of 128", xscale="log", yscale="log")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / "length.png", dpi=110)
        plt.close(figure)
        print(f"written to {folder / 'length.png'}")
    return 0


def _pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (time, error), sorted by time, whose error is smaller than that of every faster point."""
    front: list[tuple[float, float]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front

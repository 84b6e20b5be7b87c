"""The settings that decide how the correction is used by default, and what was tried besides."""

from __future__ import annotations

from typing import Any

from .setting import Setting

COMPUTES = (0.3625, 0.4375, 0.5, 2 / 3)
"""A quarter of the steps dense and the others at sparsity 0.85, 0.75 and 2/3, or with half of the work."""


def corrections() -> list[Setting]:
    """Our default with and without its correction at each compute, then what else the correction might be."""
    found: list[Setting] = []

    def ask(name: str, *computes: float, node: dict[str, Any] | None = None, **correction: Any) -> None:
        inputs = {"correction": "full"} | (node or {})
        found.extend(
            Setting(f"{name} @ {compute:.3f}", "correction", inputs, correction=correction, compute=compute)
            for compute in computes or COMPUTES
        )

    ask("uncorrected", node={"correction": "off"})
    ask("default")
    ask("eighth", node={"correction": "eighth"})
    lean, middle, half, most = COMPUTES
    for renew in (0, 4, 6, 8):
        ask(f"renew {renew}", *(COMPUTES if renew in (0, 8) else COMPUTES[2:]), renew=renew)
    for renew in (0, 8):
        ask(f"eighth, renew {renew}", half, most, node={"correction": "eighth"}, renew=renew)
    for size in ("half", "quarter"):
        ask(size, lean, middle, node={"correction": size})
    for gamma in (0.7, 0.8, 0.95, 1.0):
        ask(f"renew 0, gamma {gamma}", lean, middle, gamma=gamma, renew=0)
    for gamma in (0.9, 0.95):
        ask(f"renew 8, gamma {gamma}", middle, half, gamma=gamma, renew=8)
    ask("renew 0, levels chosen in every step", keep_levels=False, renew=0)
    ask("renew 0, levels kept", keep_levels=True, renew=0)
    ask("renew 8, levels chosen in every step", middle, half, most, keep_levels=False, renew=8)
    for start in (0.10, 0.15, 0.20):
        ask(f"from {start:.2f}", 0.30, lean, middle, half, node={"start_percent": start})
    for falling in (0.3, 0.6):
        ask(f"falling {falling}", lean, middle, node={"falling": falling})
    ask("128/32", lean, middle, half, node={"block_kv": "32"})
    ask("levels in full and an eighth", lean, middle, half, node={"pyramid": "1: 0.12, 8: 0.25"})
    ask("sampled importance", lean, middle, node={"importance": "sampled"})
    return found

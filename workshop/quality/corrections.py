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
    for renew in (0, 4, 6, 8, 12):
        ask(f"renew {renew}", renew=renew)
    for renew in (0, 4):
        ask(f"eighth, renew {renew}", *COMPUTES[1:], node={"correction": "eighth"}, renew=renew)
    for size in ("half", "quarter"):
        ask(size, *COMPUTES[:2], node={"correction": size})
    for renew in (0, 8):
        for gamma in (0.7, 0.8, 0.9, 0.95, 1.0):
            ask(f"renew {renew}, gamma {gamma}", *COMPUTES[:3], gamma=gamma, renew=renew)
        ask(f"renew {renew}, levels chosen in every step", keep_levels=False, renew=renew)
        ask(f"renew {renew}, levels kept", keep_levels=True, renew=renew)
    for start in (0.10, 0.15, 0.20):
        ask(f"from {start:.2f}", 0.30, *COMPUTES[:3], node={"start_percent": start})
        ask(f"from {start:.2f}, renew 8", *COMPUTES[:3], node={"start_percent": start}, renew=8)
    for falling in (0.3, 0.6):
        ask(f"falling {falling}, levels chosen", *COMPUTES[:3], node={"falling": falling}, keep_levels=False, renew=0)
    ask("128/32", *COMPUTES[:3], node={"block_kv": "32"})
    ask("levels in full and an eighth", *COMPUTES[:3], node={"pyramid": "1: 0.12, 8: 0.25"})
    ask("sampled importance", *COMPUTES[:2], node={"importance": "sampled"})
    return found

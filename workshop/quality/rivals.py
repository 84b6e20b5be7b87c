"""What else a user may pay less with, measured like our settings: fewer dense steps, a cache of whole model calls, and
other sparse attention. `seconds.py` turns what they computed into time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .corrections import COMPUTES
from .setting import Schedule, Setting


class EasyCache:
    """Answers some model calls from the call before, by the rule of EasyCache (X. Zhou et al., arXiv 2507.02860) with
    the values of ComfyUI's node of that name.

    A model call turns its input into an output. How much the output changes per change of the input hardly differs from
    one call to the next, so the change of the output can be foretold from that of the input. While the foretold changes
    add up to less than `threshold` of the output, the output is the input plus what the last computed call added to it.
    Changes are means of absolute values over every eighth row and column, and each clip decides for itself.
    """

    def __init__(
        self, schedule: Schedule, clips: int, threshold: float, start: float = 0.15, end: float = 0.95
    ) -> None:
        self.clips, self.threshold = clips, threshold
        self.start, self.end = schedule.percent_to_sigma(start), schedule.percent_to_sigma(end)
        self.computed: list[float] = []
        """The share of the clips that computed each call."""
        self._added: torch.Tensor | None = None
        self._input = self._output = self._size = self._rate = self._changed = None

    def call(self, x: torch.Tensor, sigma: float, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The output of a model call on x [rows, ...], whose first rows are the clips with their prompts.

        It is computed for all clips; those that reuse the call before ignore it.
        """
        output = compute().float()
        if sigma <= self.end:
            self.computed.append(1.0)
            return output
        reused = torch.zeros(self.clips, dtype=torch.bool, device=x.device)
        coarse_x, coarse_output = (y[: self.clips, ..., ::8, ::8].float() for y in (x, output))
        if sigma <= self.start:
            input_change = None if self._input is None else _size(coarse_x - self._input)
            if self._rate is not None:
                self._changed = self._changed + self._rate * input_change / self._size
                reused = self._changed < self.threshold
                self._changed = torch.where(reused, self._changed, 0.0)
            if input_change is not None:
                rate = _size(coarse_output - self._output) / input_change
                self._rate = rate if self._rate is None else torch.where(reused, self._rate, rate)
            kept = (self._input, self._output, self._size)
            new = (coarse_x, coarse_output, _size(output[: self.clips]))
            self._input, self._output, self._size = (
                after if before is None else torch.where(_like(reused, after), before, after)
                for before, after in zip(kept, new, strict=True)
            )
            if self._changed is None:
                self._changed = torch.zeros(self.clips, device=x.device)
        every = _like(reused.repeat(len(x) // self.clips), x)
        if self._added is not None:
            output = torch.where(every, x + self._added, output)
        self._added = output - x
        self.computed.append(1 - float(reused.float().mean()))
        return output


def _size(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).abs().mean(1)


def _like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return rows.view(-1, *[1] * (x.ndim - 1))


SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of the steps of a dense run."""
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3)
TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)
EXTRA = 256


def rivals() -> list[Setting]:
    """Our default, the same without correction, and the rivals over the range of costs that they have."""
    found: list[Setting] = []
    for name, node in (("default", {"correction": "full"}), ("uncorrected", {"correction": "off"})):
        found += [Setting(f"{name} @ {compute:.3f}", "rivals", node, compute=compute) for compute in COMPUTES]
    found += [Setting(f"{share:.0%} of the steps", "rivals", prototype={"steps": share}) for share in SHARES]
    found += [Setting(f"EasyCache, {value}", "rivals", prototype={"easycache": value}) for value in THRESHOLDS]

    def sol(name: str, tau: float, order: str = "raster", **more: Any) -> None:
        # ComfyUI's node leaves the tokens where they are.
        found.append(Setting(f"{name}, tau {tau}", "rivals", {"order": order}, prototype={"sol": tau, **more}))

    for tau in TAUS:
        sol("Sol-Attn", tau)
    for tau in TAUS:
        sol(f"Sol-Attn with {EXTRA} extra tokens", tau, extra=EXTRA)
    # Why it is where it is: its order, its mean rows, and the one logit of a mean row for all queries of a block.
    for tau in (0.5, 1.0):
        sol("Sol-Attn, curve", tau, order="curve")
        sol("Sol-Attn, tiles", tau, order="tiles")
        sol("Sol-Attn, a logit per query", tau, tail="row")
        sol("Sol-Attn, no mean rows", tau, tail="none")
        sol("Sol-Attn, curve, no mean rows", tau, order="curve", tail="none")
    return found

"""What a user may choose about the correction (`kernels/delta.py`)."""

from __future__ import annotations

import dataclasses

from ..kernels.delta import GAMMA, GROUPS
from ..kernels.semantic import SEMANTIC_ORDERS

AUTO, OFF = "auto", "off"
CORRECTIONS = (AUTO, *GROUPS, OFF)
"""What the input `correction` may be: how much memory a correction gets, as a share of one row per token."""


LEAST_STEPS_TO_KEEP = 6
"""With few steps the levels change too much from one to the next (`docs/quality.md`)."""


@dataclasses.dataclass(frozen=True)
class Correction:
    """How a run corrects its sparse calls.

    Attributes:
        size: one of `GROUPS`, or auto for the finest that fits the memory.
        gamma: share of what was lost that is given back.
        keep_levels: True keeps the levels that the loss was measured with, False chooses levels in every step, None
            decides by the number of steps.
        renew: in every sparse step one block in so many is dense and measures its loss again; 0 for none, None decides
            by the density (`kernels/falling.py`).
    """

    size: str = AUTO
    gamma: float = GAMMA
    keep_levels: bool | None = None
    renew: int | None = None

    def keeps_levels(self, sparse_steps: int | None) -> bool:
        """Whether a run with so many sparse steps, None if that is not known, keeps its levels."""
        if self.keep_levels is not None:
            return self.keep_levels
        return sparse_steps is None or sparse_steps >= LEAST_STEPS_TO_KEEP


OURS = Correction()
"""How our own presets correct, and the user's own levels."""


def reason_against(order: str) -> str | None:
    """Why calls in this token order cannot be corrected, as a sentence; None if they can."""
    if order in SEMANTIC_ORDERS:
        return f"no correction with the order {order}, whose blocks change in every step; set order to curve"
    return None

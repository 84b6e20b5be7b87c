"""What a user may choose about the correction (`kernels/delta.py`)."""

from __future__ import annotations

import dataclasses

from ..kernels.config import PyramidConfig
from ..kernels.delta import GAMMA, GROUPS
from ..kernels.semantic import SEMANTIC_ORDERS

AUTO, OFF = "auto", "off"
CORRECTIONS = (AUTO, *GROUPS, OFF)
"""What the input `correction` may be: how much memory a correction gets, as a share of one row per token."""


LEAST_DENSITY_TO_RENEW, USUAL_RENEWAL = 0.2, 8
"""Renewing one block in 8 costs an eighth of a dense step: of little work it takes too much, and it costs more than a
sparsity below an eighth saves."""
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
            by the density.
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

    def renewal(self, config: PyramidConfig) -> int:
        """One block in how many renews its loss in a step at this setting, 0 for none."""
        if self.renew is not None:
            return self.renew
        # Not 1 - sparsity < least: rounding makes 1 - 0.8 less than 0.2.
        if config.sparsity is None or config.sparsity > 1 - LEAST_DENSITY_TO_RENEW:
            return 0
        return USUAL_RENEWAL if config.sparsity >= 1 / USUAL_RENEWAL else 0


def renews(step: int, block: int, renew: int) -> bool:
    """Whether a block renews its loss in a sparse step, counted from 1: blocks take turns, one in `renew`."""
    return renew > 0 and (step + block) % renew == 0


def with_renewals(config: PyramidConfig, share: float) -> PyramidConfig:
    """The setting of the sparse calls at which all steps together cost what `config` alone would cost.

    share: of the calls that are dense to renew a loss. They cost 1, and the sparse calls beside them as much as others.
    """
    if not share or config.sparsity is None:
        return config
    # The other calls keep at least half of their work.
    return dataclasses.replace(config, sparsity=config.sparsity + min(share, (1 - config.sparsity) / 2))


OURS = Correction()
"""How our own presets correct, and the user's own levels."""


def reason_against(config: PyramidConfig) -> str | None:
    """Why calls with this setting cannot be corrected, as a sentence; None if they can."""
    if config.order in SEMANTIC_ORDERS:
        return f"no correction with the order {config.order}, whose blocks change in every step; set order to curve"
    return None

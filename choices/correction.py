"""What a user may choose about the correction (`kernels/delta.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from ..kernels.config import PyramidConfig
from ..kernels.delta import GROUPS
from ..kernels.semantic import SEMANTIC_ORDERS

AUTO, OFF = "auto", "off"
CORRECTIONS = (AUTO, *GROUPS, OFF)
"""What the input `correction` may be: how much memory a correction gets, as a share of one row per token."""
FEW_STEPS = 9
"""With fewer sparse steps than this, attention changes too much from one to the next to keep anything for long: levels
are chosen in every step, and less of the loss is given back."""
RENEWALS = ((4, 0.5, 13), (8, 0.2, 13))
"""One block in how many is renewed, and what that takes: a density, for a renewal costs a dense call, and a number of
sparse steps, in which losses grow old enough. All of these limits are measured (`docs/quality.md`)."""
COARSE_RENEWALS = ((4, 0.5, 13), (8, 0.2, 25))
"""The same for an eighth of the memory, where a new loss is worth less."""
GAMMA_OF_FEW_STEPS, GAMMA_WITHOUT_RENEWAL, GAMMA_WITH_RENEWAL = 0.8, 0.9, 1.0
"""The older a loss, the less of it is still true. Renewed ones are given back in full."""


@dataclasses.dataclass(frozen=True)
class Correction:
    """How a run corrects its sparse calls. None leaves a choice to the run's steps and density, see `decided`.

    Attributes:
        size: one of `GROUPS`, or auto for the finest that fits the memory.
        gamma: share of what was lost that is given back.
        keep_levels: whether sparse calls use the levels that the loss was measured with, or choose them in every step.
        renew: in every sparse step one block in so many is dense and measures its loss again; 0 for none.
    """

    size: str = AUTO
    gamma: float | None = None
    keep_levels: bool | None = None
    renew: int | None = None

    def decided(
        self,
        config: PyramidConfig,
        falling: float,
        sparse_steps: int | None,
        can_renew: Callable[[int], bool] = lambda renew: True,
    ) -> DecidedCorrection:
        """The same for a run with so many sparse steps; None if that is not known, which counts as many.

        With a density that falls, levels and losses are those of one step only.

        Args:
            can_renew: whether the other calls can do without the work that it takes to renew one block in so many.
        """
        few = sparse_steps is not None and sparse_steps < FEW_STEPS
        renew = self.renew
        if renew is None:
            renewals = COARSE_RENEWALS if self.size == "eighth" else RENEWALS
            paying = _paying_renewals(renewals, config, sparse_steps)
            renew = next((renew for renew in paying if can_renew(renew)), 0)
        if falling:
            renew = 0
        keep_levels = not falling and (not few if self.keep_levels is None else self.keep_levels)
        gamma = self.gamma
        if gamma is None:
            gamma = GAMMA_WITH_RENEWAL if renew else GAMMA_OF_FEW_STEPS if few else GAMMA_WITHOUT_RENEWAL
        return DecidedCorrection(gamma, keep_levels, renew)


@dataclasses.dataclass(frozen=True)
class DecidedCorrection:
    """A `Correction` in one run; see there."""

    gamma: float
    keep_levels: bool
    renew: int


def _paying_renewals(
    renewals: Sequence[tuple[int, float, int]], config: PyramidConfig, sparse_steps: int | None
) -> Iterator[int]:
    """Those of `renewals` that save more than they cost: one block in how many."""
    for renew, density, steps in renewals:
        # Not 1 - sparsity >= density: rounding makes 1 - 0.8 less than 0.2.
        pays = config.sparsity is not None and 1 / renew <= config.sparsity <= 1 - density
        if pays and (sparse_steps is None or sparse_steps >= steps):
            yield renew


OURS = Correction()
"""How our own presets correct, and the user's own levels."""


def reason_against(order: str) -> str | None:
    """Why calls in this token order cannot be corrected, as a sentence; None if they can."""
    if order in SEMANTIC_ORDERS:
        return f"no correction with the order {order}, whose blocks change in every step; set order to curve"
    return None

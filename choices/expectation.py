"""What a setting means before any data is seen: the figures that the nodes show while a slider moves.

Nothing is measured here, and the page computes nothing: it gets these figures from `picture.py`. Costs are those of
`density.py`: a pair of blocks at pooling factor f costs 1/f.
"""

from __future__ import annotations

import dataclasses

from ..kernels.config import PyramidConfig
from ..kernels.density import coverage_of, density_of, level_shares
from ..kernels.levels import topk_ends

# Key blocks of the assumed sequence. With that many, rounding to whole blocks changes no digit that is shown.
BLOCKS = 4096

# Time of the attention call over dense cuDNN attention = fixed + per_work * density, fitted to the rows of `auto` in
# workshop/results/attention-gpu.csv (H100, 0.85 to 0.95): the slowest and the fastest of its six shapes.
SLOWEST = (0.1008, 0.900)  # CogVideoX-5B, 17,550 tokens
FASTEST = (0.0470, 0.927)  # Wan 1.3B at 720p, 64,800 tokens
# Costs that those rows do not have, from the same table at 0.85: (slowest, fastest), added to `fixed`.
SAMPLED_EXTRA = (0.087, 0.072)
MASS_EXTRA = (0.159, 0.024)


@dataclasses.dataclass(frozen=True)
class Expectation:
    """The figures of one setting; None where they follow the data.

    Attributes:
        shares: pooling factor -> share of the block pairs, 0 for those not seen at all. Adds up to 1.
        sparsity: share of the work that is saved; coverage: share of the pairs that are seen at any level.
        speedup: of the attention call against dense, (least, most) as measured on an H100. The page only shows it on
            an H100, since it says nothing about other GPUs.
    """

    shares: dict[int, float] | None
    sparsity: float | None
    coverage: float | None
    speedup: tuple[float, float] | None


def expect(config: PyramidConfig) -> Expectation:
    """The figures of a setting on a long sequence. A similarity cap refines blocks, so sparsity is an upper bound."""
    if config.mode != "topk":
        sparsity = config.sparsity
        coverage = 1.0 if config.tail else None
        return Expectation(None, sparsity, coverage, None if sparsity is None else speedup(config, 1 - sparsity))
    ends = (*topk_ends(BLOCKS, config), BLOCKS)
    shares = level_shares((*config.factors, config.dropped_factor), [end / BLOCKS for end in ends])
    density = density_of(shares)
    return Expectation(shares, 1 - density, coverage_of(shares), speedup(config, density))


def speedup(config: PyramidConfig, density: float) -> tuple[float, float]:
    """Dense time divided by PSA's time for one attention call at `density`, (least, most) over the measured shapes."""
    times = []
    for i, (fixed, per_work) in enumerate((SLOWEST, FASTEST)):
        extra = SAMPLED_EXTRA[i] if config.importance == "sampled" else 0.0
        extra += MASS_EXTRA[i] if config.mode != "topk" else 0.0
        times.append(fixed + extra + per_work * density)
    return 1 / times[0], 1 / times[1]

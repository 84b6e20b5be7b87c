"""Densities that differ from step to step while the work of a whole run stays what the slider says.

A density may fall over the sparse steps: more work in the first ones, less in the last, same total. The first sparse
steps still decide where things are, and later steps cannot bring back what they lose. On the demo model the same work
is worth more there (`docs/quality.md`). Calls that are dense to renew what others get back (`delta.py`) leave less for
the others. This file knows no sampler: a step is a number from 0 to 1, or counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .config import ConfigError, PyramidConfig

MOST_FALLING = 0.8


def config_at(config: PyramidConfig, falling: float, place: float) -> PyramidConfig:
    """The setting at `place`, which runs from 0 for the first sparse step to 1 for the last.

    Its density is that of `config` times 1 + falling at 0 and times 1 - falling at 1, with a straight line between.
    Over evenly spaced steps the mean is the density of `config`.

    Raises:
        ConfigError: that density is out of reach.
    """
    if not falling:
        return config
    assert config.sparsity is not None  # `check_falling` has refused every other setting
    density = (1 - config.sparsity) * (1 + falling * (1 - 2 * place))
    return dataclasses.replace(config, sparsity=1 - density)


def check_falling(falling: float, config: PyramidConfig) -> None:
    """Raise ConfigError if the density of this setting cannot fall that far."""
    if not 0 <= falling <= MOST_FALLING:
        raise ConfigError("falling", falling, f"0 to {MOST_FALLING}", f"set falling to {MOST_FALLING} or less")
    if falling and config.sparsity is None:
        allowed = "0 where sparsity follows the data or the levels are used as written"
        raise ConfigError("falling", falling, allowed, "set falling to 0")
    for place in (0, 1):
        try:
            config_at(config, falling, place)
        except ConfigError as error:
            allowed = f"less: one step would need a sparsity of {error.given:.3f}, which may be {error.allowed}"
            raise ConfigError("falling", falling, allowed, "lower falling") from error


def renews(step: int, block: int, renew: int) -> bool:
    """Whether a block is dense in a sparse step, counted from 1: blocks take turns, one in `renew`."""
    return renew > 0 and (step + block) % renew == 0


def with_renewals(config: PyramidConfig, share: float) -> PyramidConfig:
    """The setting of the sparse calls at which all steps together cost what `config` alone would cost.

    share: of the calls that are dense to renew a loss. They cost 1, and the sparse calls beside them as much as others.
    """
    if not share or config.sparsity is None:
        return config
    # The other calls keep at least half of their work.
    return dataclasses.replace(config, sparsity=config.sparsity + min(share, (1 - config.sparsity) / 2))


def place_among(sigmas: Sequence[float], sigma: float) -> float:
    """Where noise level `sigma` lies among those of the sparse steps, first to last: 0 to 1, or the middle if fewer
    than two are known."""
    if len(sigmas) < 2:
        return 0.5
    before = sum(other > sigma * (1 + 1e-6) for other in sigmas)
    return min(1.0, before / (len(sigmas) - 1))

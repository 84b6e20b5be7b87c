"""A density that falls over the sparse steps of a run: more in the first of them, less in the last, the same in all.

The first sparse steps still settle where things are, and what they lose the later ones cannot bring back; on the demo
model the same work is worth more there (`docs/quality.md`). Knows no sampler: a step is a place between 0 and 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .config import ConfigError, PyramidConfig

MOST_FALLING = 0.8


def config_at(config: PyramidConfig, falling: float, place: float) -> PyramidConfig:
    """The pyramid at `place`, from 0 for the first sparse step to 1 for the last.

    Its density is that of `config` times 1 + falling at 0, times 1 - falling at 1, and a line between, whose mean over
    steps evenly apart is the density of `config`.

    Raises:
        ConfigError: that density is out of reach.
    """
    if not falling:
        return config
    density = (1 - config.sparsity) * (1 + falling * (1 - 2 * place))
    return dataclasses.replace(config, sparsity=1 - density)


def check_falling(falling: float, config: PyramidConfig) -> None:
    """Raise ConfigError where the density of this pyramid cannot fall so far."""
    if not 0 <= falling <= MOST_FALLING:
        raise ConfigError("falling", falling, f"0 to {MOST_FALLING}", f"set falling to {MOST_FALLING} or less")
    if falling and config.sparsity is None:
        allowed = "0 where sparsity follows the data or the levels are taken as written"
        raise ConfigError("falling", falling, allowed, "set falling to 0")
    for place in (0, 1):
        try:
            config_at(config, falling, place)
        except ConfigError as error:
            allowed = f"less, for a step would have a sparsity of {error.given:.3f}, which may be {error.allowed}"
            raise ConfigError("falling", falling, allowed, "lower falling") from error


def place_among(sigmas: Sequence[float], sigma: float) -> float:
    """Where noise level `sigma` lies among those of the sparse steps, first to last: 0 to 1, and in the middle where
    fewer than two are known."""
    if len(sigmas) < 2:
        return 0.5
    before = sum(other > sigma * (1 + 1e-6) for other in sigmas)
    return min(1.0, before / (len(sigmas) - 1))

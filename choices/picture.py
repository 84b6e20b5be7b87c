"""What the page draws for a setting before it runs, as plain data: computed from the inputs that a node shows, by the
same functions that the node itself runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..kernels.config import PyramidConfig
from .expectation import expect
from .levels import check_pyramid
from .presets import Preset
from .settings import AUTO_PRESETS, PatchInputs, make_config
from .user_presets import usable_presets

_NAMES = {field.name for field in dataclasses.fields(PatchInputs)}


def pyramid_of(shown: Mapping[str, Any]) -> Preset:
    """The levels of a PSA Pyramid that shows these inputs; raises InputError if they are impossible."""
    return check_pyramid(**{name: value for name, value in shown.items() if name != "save_as"})


def patch_figures(shown: Mapping[str, Any], pyramid: Preset | None = None, auto: str = "") -> dict[str, Any] | None:
    """Figures of a PSA Patch; None if its sparsity is 0 and nothing is sparse.

    Args:
        shown: its inputs by name; pyramid: the levels of a connected PSA Pyramid. auto: the preset that `auto` was in
            an earlier run; "" takes the one that most models get.

    Raises:
        InputError: the combination is impossible.
    """
    if not shown["sparsity"]:
        return None
    given = {name: value for name, value in shown.items() if name in _NAMES and value is not None}
    _, config = make_config(PatchInputs(**given | {"psa_pyramid": pyramid}), auto or AUTO_PRESETS[0])
    return figures(config)


def pyramid_figures(shown: Mapping[str, Any], sparsity: float | None = None) -> dict[str, Any]:
    """Figures of a PSA Pyramid, scaled to the `sparsity` of the PSA Patch that it feeds, if that is above 0.

    Raises:
        InputError: the combination is impossible.
    """
    pyramid = pyramid_of(shown)
    if not sparsity or not pyramid.is_scaled:
        return figures(pyramid.unscaled())
    _, config = make_config(PatchInputs(sparsity=sparsity, psa_pyramid=pyramid), "")
    return figures(config)


def figures(config: PyramidConfig) -> dict[str, Any]:
    """The figures of `expect`, and what else a picture needs.

    Returns:
        sparsity, coverage, speedup: as in `Expectation`. shares: pooling factor -> share of the block pairs, or, with
        `of_mass`, of the attention mass, since the pairs then follow the data; factor 0 is not seen at all.
        target: the sparsity that the levels are scaled to, None if used as written. tail: factor of the tail's rows,
        None without a tail. capped: whether similarity caps refine some blocks.
    """
    found = expect(config)
    shares = found.shares
    if shares is None:
        shares = dict(config.shares)
        rest = config.dropped_factor
        shares[rest] = shares.get(rest, 0.0) + max(0.0, 1 - sum(config.shares.values()))
    return {
        "sparsity": found.sparsity,
        "coverage": found.coverage,
        "speedup": found.speedup,
        "shares": {str(factor): share for factor, share in shares.items()},
        "of_mass": found.shares is None,
        "target": config.sparsity,
        "tail": config.block_kv if config.tail else None,
        "capped": bool(config.similarity_cap),
    }


def suggested_sparsities() -> dict[str, float]:
    """Preset name -> the sparsity that it was made for, for presets that have one."""
    return {name: preset.sparsity for name, preset in usable_presets().items() if preset.sparsity is not None}

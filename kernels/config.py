"""What a user may choose about PSA: one immutable, validated object.

It knows nothing about tensors or ComfyUI. The names follow the paper (arXiv 2512.04025, sections 3.2-3.4). A level is
named after its pooling factor: 1 is full resolution; 2, 4 and 8 are mean-pooled; 0 means dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from .refusal import refusal

MODES = ("budget", "topk", "threshold")
ORDERS = ("raster", "curve", "tiles", "semantic", "hybrid")
IMPORTANCES = ("pooled", "means", "sampled")
REDUCTIONS = ("max", "mean")
PRECISIONS = ("auto", "bf16", "int8")
BLOCK_SIZES = (32, 64, 128)
SPARSITY = 0.85
"""What is saved where nobody says otherwise."""

# How much rounding error we forgive in sums of shares and in sparsities.
_TOLERANCE = 1e-6

_KINDS = (
    ("shares", Mapping, "shares by pooling factor, {1: 0.10, 8: 0.20}"),
    ("similarity_cap", Mapping, "similarities by pooling factor, {2: 0.70, 8: 0.60}"),
    ("tile", Sequence, "three whole numbers: time, height, width"),
    ("clusters", Sequence, "two whole numbers: for queries and for keys"),
    ("cluster_iterations", Sequence, "two whole numbers: for the first step and for later ones"),
    ("sample_share", Real, "a number, more than 0, at most 1"),
    ("sparsity", Real | None, "a number, or None"),
    ("tail", Integral, "True or False"),
    ("seed", Integral, "a whole number"),
)
"""What the fields without a list of choices may be at all: field, type, the same in words."""


class ConfigError(ValueError):
    """An impossible setting. `field` names it, the message says what was given and what is allowed, `do` what to do."""

    def __init__(self, field: str, given: object, allowed: str, do: str | None = None) -> None:
        self.field = field
        self.given = given
        self.allowed = allowed
        self.do = do or f"change {field}"
        super().__init__(refusal(field, given, allowed))


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How blocks are ranked; the fields are those of `PyramidConfig`."""

    importance: str
    sample_share: float
    reduction: str
    block_q: int
    block_kv: int
    seed: int


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """One setting of Pyramid Sparse Attention.

    Attributes:
        shares: pooling factor -> share. In `topk` mode it is a share of the key blocks, in `threshold` and `budget`
            mode a share of the attention mass. Blocks are taken from the most important down, finest level first.
            Any subset of the powers of two up to `block_kv`, in any order; stored sorted by factor.
        mode: `topk` gives every query block the same number of blocks per level; `threshold` cuts each row where its
            cumulative importance passes the cumulative shares (paper's default; density follows the data);
            `budget` is `threshold` with all cuts scaled by one factor so that the mean density meets `sparsity`.
        sparsity: target FLOP-equivalent sparsity, tail included (see `density.py`), from 0 to below 1. None takes the
            shares as written. Must be None in `threshold` mode and must be given in `budget` mode.
        tail: True keeps one row, the mean of the whole block, for every block that would be dropped (not in the paper).
        block_q, block_kv: tokens per query block and per key block.
        order: token order in which the blocks are cut, see `order.py` and, for `semantic` and `hybrid`, `semantic.py`.
        tile: tokens (time, height, width) of one tile of the `tiles` order.
        clusters: largest number of clusters of queries and of keys, for the orders that follow the data.
        cluster_iterations: k-means iterations in the first step and in every later one.
        importance: `sampled` ranks blocks by a random sample of their tokens (paper), `pooled` by the means of 8
            neighbouring tokens, `means` by one mean query and one mean key per block (cheapest and least accurate).
        sample_share: share of a block's tokens that `sampled` importance draws.
        reduction: how `sampled` and `pooled` importance reduce the token pairs of a block pair.
        similarity_cap: pooling factor -> mean cosine similarity that the neighbours in a key block need before the
            block may be pooled that far (paper 3.3); empty for no cap.
        precision: `bf16` keeps queries and keys in the type they come in (bfloat16 or float16), `int8` rounds them to
            eight bits with one scale per block; `auto` is `bf16`, which was just as fast where we measured.
        seed: seed of the random sample of `sampled` importance.

    Raises:
        ConfigError: names the field, what was given and what is allowed.
    """

    shares: Mapping[int, float] = dataclasses.field(default_factory=lambda: {1: 0.4, 2: 0.1, 4: 0.1, 8: 0.2})
    mode: str = "budget"
    sparsity: float | None = SPARSITY
    tail: bool = True
    block_q: int = 128
    block_kv: int = 64
    order: str = "raster"
    tile: tuple[int, int, int] = (1, 8, 8)
    clusters: tuple[int, int] = (200, 1000)
    cluster_iterations: tuple[int, int] = (50, 2)
    importance: str = "pooled"
    sample_share: float = 0.25
    reduction: str = "max"
    similarity_cap: Mapping[int, float] = dataclasses.field(default_factory=dict)
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in (
            ("mode", MODES),
            ("order", ORDERS),
            ("importance", IMPORTANCES),
            ("reduction", REDUCTIONS),
            ("precision", PRECISIONS),
            ("block_q", BLOCK_SIZES),
            ("block_kv", BLOCK_SIZES),
        ):
            if getattr(self, field) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise ConfigError(field, getattr(self, field), f"one of {choices}", f"set {field} to one of them")
        for field, kind, form in _KINDS:
            if not isinstance(getattr(self, field), kind):
                raise ConfigError(field, getattr(self, field), form, "pass it in this form")
        object.__setattr__(self, "shares", self._validated_shares())
        object.__setattr__(self, "similarity_cap", self._validated_cap())
        if not 0 < self.sample_share <= 1:
            raise ConfigError("sample_share", self.sample_share, "more than 0, at most 1", "set it to 0.25")
        if not _are_counts(self.tile, 3):
            numbers = "three whole numbers of at least 1: time, height, width"
            raise ConfigError("tile", self.tile, numbers, "set it to (1, 8, 8)")
        for field in ("clusters", "cluster_iterations"):
            given = getattr(self, field)
            if not _are_counts(given, 2):
                raise ConfigError(field, given, "two whole numbers of at least 1", "raise them")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError("seed", self.seed, "a whole number of at most 64 bits", "set it to 0")
        self._validate_sparsity()

    def _validated_shares(self) -> dict[int, float]:
        factors = [2**h for h in range(int(math.log2(self.block_kv)) + 1)]
        for factor, share in self.shares.items():
            if factor not in factors:
                allowed = f"pooling factors {factors} with block_kv {self.block_kv}"
                raise ConfigError("shares", factor, allowed, "take one of these factors")
            if not isinstance(share, Real) or not 0 <= share <= 1:
                allowed = "a share between 0 and 1 for every pooling factor"
                raise ConfigError("shares", {factor: share}, allowed, "change this share")
        # A level without a share does not count: leaving it out must not change the others.
        shares = {int(factor): float(self.shares[factor]) for factor in sorted(self.shares) if self.shares[factor] > 0}
        if not shares:
            allowed = "at least one pooling factor with a share above 0"
            raise ConfigError("shares", dict(self.shares), allowed, "raise a share")
        if sum(shares.values()) > 1 + _TOLERANCE:
            raise ConfigError("shares", dict(self.shares), "shares that add up to at most 1", "lower a share")
        return shares

    def _validated_cap(self) -> dict[int, float]:
        for factor, similarity in self.similarity_cap.items():
            if factor not in (2, 4, 8, 16, 32, 64, 128) or factor > self.block_kv:
                allowed = f"pooling factors 2 to {self.block_kv}"
                raise ConfigError("similarity_cap", factor, allowed, "take one of these factors")
            if not isinstance(similarity, Real) or not -1 <= similarity <= 1:
                allowed = "a cosine similarity between -1 and 1"
                raise ConfigError("similarity_cap", {factor: similarity}, allowed, "change it")
        return {int(factor): float(self.similarity_cap[factor]) for factor in sorted(self.similarity_cap)}

    def _validate_sparsity(self) -> None:
        if self.mode == "threshold":
            if self.sparsity is not None:
                allowed = "None in threshold mode, where sparsity follows the data"
                raise ConfigError("sparsity", self.sparsity, allowed, "leave it out or take another mode")
            return
        if self.sparsity is None:
            if self.mode == "budget":
                raise ConfigError("sparsity", None, "a number in budget mode, which meets it", "set a sparsity")
            return
        least, most = self.reachable_sparsity
        if not (least - _TOLERANCE <= self.sparsity <= most + _TOLERANCE and self.sparsity < 1):
            raise ConfigError(
                "sparsity",
                self.sparsity,
                f"{least:.3f} to {most:.3f} with finest pooling factor {self.factors[0]}, block_kv {self.block_kv} "
                f"and tail {'on' if self.tail else 'off'}",
                "set sparsity within it, or change the levels",
            )

    @functools.cached_property
    def ranking(self) -> Ranking:
        """The part of the setting that says how blocks are ranked."""
        return Ranking(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Ranking)})

    @functools.cached_property
    def factors(self) -> tuple[int, ...]:
        """Pooling factors of the levels that are chosen by importance, finest first."""
        return tuple(self.shares)

    @property
    def dropped_factor(self) -> int:
        """The factor of a block that no level takes: `block_kv` (the tail row) or 0 (dropped)."""
        return self.block_kv if self.tail else 0

    @functools.cached_property
    def stored_factors(self) -> tuple[int, ...]:
        """Every pooling factor whose rows attention may read, finest first: levels, tail, and what the cap can give."""
        factors = set(self.factors)
        if self.tail:
            factors.add(self.block_kv)
        if self.similarity_cap:
            factors.add(1)
            factors.update(f for f in self.similarity_cap if f < max(self.factors))
        return tuple(sorted(factors))

    @functools.cached_property
    def bounds(self) -> tuple[float, ...]:
        """Cumulative shares, finest level first: the `tau_h` of the paper in threshold mode."""
        total, bounds = 0.0, []
        for share in self.shares.values():
            total += share
            bounds.append(min(1.0, total))
        return tuple(bounds)

    @property
    def reachable_sparsity(self) -> tuple[float, float]:
        """Least and greatest sparsity that scaling the shares can reach, for a long sequence."""
        return 1 - 1 / self.factors[0], 1 - (1 / self.block_kv if self.tail else 0.0)


def _are_counts(given: Sequence[object], length: int) -> bool:
    """Whether it is so many whole numbers of at least 1."""
    return len(given) == length and all(isinstance(n, Integral) and int(n) >= 1 for n in given)

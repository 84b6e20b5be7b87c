"""Density, sparsity and coverage against the oracle's sums."""

import pytest
import torch

from comfyui_psa.kernels.density import (
    block_tokens,
    coverage,
    coverage_of,
    density,
    density_of,
    level_shares,
    pair_cost,
    sparsity,
)
from comfyui_psa.kernels.levels import group_by_level


def test_pair_cost():
    cost = pair_cost(torch.tensor([0, 1, 2, 4, 8, 128], dtype=torch.int16))
    assert cost.tolist() == [0, 1, 0.5, 0.25, 0.125, 1 / 128]


@pytest.mark.parametrize(("length", "expected"), [(1, [1]), (63, [63]), (64, [64]), (65, [64, 1]), (191, [64, 64, 63])])
def test_block_tokens(length, expected):
    assert block_tokens(length, 64).tolist() == expected


def test_density_against_the_oracle(oracle, random_factors):
    factors = random_factors((2, 3, 5, 7), (0, 1, 2, 4, 8, 64))
    rows = factors.flatten(0, 2).tolist()
    tokens = [64] * 6 + [5]
    assert density(factors).item() == pytest.approx(oracle.density(rows), abs=1e-6)
    weighted = density(factors, torch.tensor(tokens))
    assert weighted.item() == pytest.approx(oracle.density(rows, tokens), abs=1e-6)
    assert sparsity(factors).item() == pytest.approx(1 - oracle.density(rows), abs=1e-6)
    seen = sum(f > 0 for row in rows for f in row) / (len(rows) * 7)
    assert coverage(factors).item() == pytest.approx(seen, abs=1e-6)


@pytest.mark.parametrize(("factor", "expected"), [(0, 0.0), (1, 1.0), (8, 0.125)])
def test_one_level_everywhere(factor, expected):
    factors = torch.full((1, 1, 3, 4), factor, dtype=torch.int16)
    assert density(factors, torch.tensor([64, 64, 64, 9])).item() == pytest.approx(expected)


def test_published_topk_shares_cost_what_the_paper_says():
    """PSA-3 of the paper's ablation: 15/10/20 at the factors 1, 2, 4 is a density of 0.25."""
    factors = torch.tensor([1] * 15 + [2] * 10 + [4] * 20 + [0] * 55, dtype=torch.int16)
    assert density(factors).item() == pytest.approx(0.25)


@pytest.mark.parametrize("drawn", [(0, 1, 2, 4, 8), (1, 2, 8), (0, 2)])
def test_shares_from_the_ends_of_levels_against_the_oracle(oracle, random_factors, drawn):
    """A level without pairs, 1 or 4 here, ends where the level before it ends."""
    factors, levels = random_factors((1, 3, 5, 7), drawn), (1, 2, 4, 8)
    lists = group_by_level(factors, levels)
    shares = level_shares(levels, (lists.ends.double().mean((0, 1, 2)) / 7).tolist())
    rows = factors.flatten(0, 2).tolist()
    counts = [sum(f == level for row in rows for f in row) / (len(rows) * 7) for level in levels]
    assert list(shares) == [*levels]
    assert list(shares.values()) == pytest.approx(counts)
    assert density_of(shares) == pytest.approx(oracle.density(rows))
    assert coverage_of(shares) == pytest.approx(sum(counts))


def test_blocks_that_no_level_takes_lie_at_the_tail_or_are_not_seen():
    assert level_shares((1, 8, 8), (0.25, 0.5, 1.0)) == {1: 0.25, 8: 0.75}
    shares = level_shares((1, 8, 0), (0.25, 0.5, 1.0))
    assert shares == {1: 0.25, 8: 0.25, 0: 0.5}
    assert (density_of(shares), coverage_of(shares)) == (0.25 + 0.25 / 8, 0.5)

"""The figures before a run equal those of the levels that a run would choose, and the speed-ups that were measured."""

import csv
from pathlib import Path

import pytest
import torch

from comfyui_psa.choices.expectation import BLOCKS, expect
from comfyui_psa.kernels import density
from comfyui_psa.kernels.config import PyramidConfig
from comfyui_psa.kernels.levels import choose_levels

RESULTS = Path(__file__).resolve().parents[2] / "workshop" / "results" / "attention-gpu.csv"


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("shares", [{1: 0.1, 2: 0.05, 8: 0.2}, {1: 0.02, 4: 0.5}, {1: 1.0}])
def test_expected_figures_are_those_of_the_levels(shares, sparsity, tail):
    config = PyramidConfig(shares=shares, mode="topk", sparsity=sparsity, tail=tail)
    expected = expect(config)
    scores = torch.rand(1, 1, 2, BLOCKS, generator=torch.Generator().manual_seed(0))
    factors = choose_levels(scores, config)
    assert expected.sparsity == pytest.approx(float(density.sparsity(factors)), abs=1e-5)
    assert expected.coverage == pytest.approx(float(density.coverage(factors)), abs=1e-5)
    assert sum(expected.shares.values()) == pytest.approx(1)
    for factor, share in expected.shares.items():
        assert share == pytest.approx(float((factors == factor).float().mean()), abs=1e-6)


def test_what_follows_the_data_is_not_promised():
    budget = expect(PyramidConfig(mode="budget", sparsity=0.8, tail=False))
    assert (budget.shares, budget.sparsity, budget.coverage) == (None, 0.8, None)
    threshold = expect(PyramidConfig(mode="threshold", sparsity=None, tail=False))
    assert (threshold.sparsity, threshold.speedup) == (None, None)


def test_the_range_of_the_speedup_holds_what_was_measured():
    """Every row of the default at a model's shape is in the range within a tenth, the error of a straight line."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["shape"].startswith(("wan", "cogvideox"))
            and row["precision"] == "bfloat16"
            and row["setting"].endswith("curve, pooled, no tail")
            and "topk" in row["setting"]
        ]
    assert len(rows) == 18
    for row in rows:
        config = PyramidConfig({1: 0.1, 2: 0.05, 8: 0.2}, mode="topk", sparsity=1 - float(row["density"]), tail=False)
        least, most = expect(config).speedup
        assert least / 1.1 <= float(row["speedup"]) <= most * 1.1, row

"""The configuration: what it refuses, and which field it names; what it derives."""

import dataclasses
import math

import pytest

from comfyui_psa.kernels import ConfigError, PyramidConfig


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("mode", {"mode": "quantile"}),
        ("mode", {"mode": None}),
        ("order", {"order": "hilbert"}),
        ("importance", {"importance": "antidiagonal"}),
        ("reduction", {"reduction": "median"}),
        ("block_q", {"block_q": 48}),
        ("block_q", {"block_q": 256}),
        ("block_kv", {"block_kv": 16}),
        ("shares", {"shares": {}}),
        ("shares", {"shares": {3: 0.5}}),
        ("shares", {"shares": {0: 0.5}}),
        ("shares", {"shares": {128: 0.5}, "block_kv": 64}),
        ("shares", {"shares": {1: -0.1}}),
        ("shares", {"shares": {1: 1.1}}),
        ("shares", {"shares": {1: math.nan}}),
        ("shares", {"shares": {1: 0.7, 2: 0.4}}),
        ("shares", {"shares": {1: 0.0, 2: 0.0}}),
        ("similarity_cap", {"similarity_cap": {1: 0.5}}),
        ("similarity_cap", {"similarity_cap": {3: 0.5}}),
        ("similarity_cap", {"similarity_cap": {64: 0.5}, "block_kv": 32}),
        ("similarity_cap", {"similarity_cap": {2: 1.5}}),
        ("similarity_cap", {"similarity_cap": {2: math.nan}}),
        ("sample_share", {"sample_share": 0.0}),
        ("sample_share", {"sample_share": 1.5}),
        ("sample_share", {"sample_share": math.nan}),
        ("tile", {"tile": (8, 8)}),
        ("tile", {"tile": (0, 8, 8)}),
        ("tile", {"tile": (1, 2.5, 8)}),
        ("sparsity", {"sparsity": None}),
        ("sparsity", {"sparsity": -0.1}),
        ("sparsity", {"sparsity": 1.0}),
        ("sparsity", {"sparsity": math.nan}),
        ("sparsity", {"sparsity": 0.99, "block_kv": 64}),
        ("sparsity", {"sparsity": 0.4, "shares": {2: 0.5}}),
        ("sparsity", {"sparsity": 0.85, "mode": "threshold"}),
        ("sparsity", {"sparsity": 1.0, "tail": False}),
    ],
)
def test_a_bad_value_is_refused_with_its_field(field, settings):
    with pytest.raises(ConfigError) as caught:
        PyramidConfig(**settings)
    assert caught.value.field == field
    assert field in str(caught.value)
    assert caught.value.allowed


def test_the_default_is_valid_and_frozen():
    config = PyramidConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "topk"


def test_the_order_of_the_shares_does_not_matter():
    forward = PyramidConfig(shares={1: 0.4, 2: 0.1, 8: 0.2})
    backward = PyramidConfig(shares={8: 0.2, 2: 0.1, 1: 0.4})
    assert forward == backward
    assert forward.factors == (1, 2, 8)
    assert forward.bounds == pytest.approx((0.4, 0.5, 0.7))


def test_a_level_without_share_is_no_level():
    assert PyramidConfig(shares={1: 0.4, 2: 0.1, 4: 0.0, 8: 0.2}) == PyramidConfig(shares={1: 0.4, 2: 0.1, 8: 0.2})


def test_stored_factors_hold_levels_tail_and_results_of_the_cap():
    assert PyramidConfig(shares={1: 0.5, 4: 0.2}, tail=False).stored_factors == (1, 4)
    assert PyramidConfig(shares={1: 0.5, 4: 0.2}, tail=True, block_kv=32).stored_factors == (1, 4, 32)
    capped = PyramidConfig(shares={4: 0.5}, tail=False, similarity_cap={2: 0.7, 8: 0.5}, sparsity=0.9)
    assert capped.stored_factors == (1, 2, 4)


def test_dropped_factor_and_reachable_sparsity():
    assert PyramidConfig(tail=False).dropped_factor == 0
    assert PyramidConfig(tail=True, block_kv=32).dropped_factor == 32
    assert PyramidConfig(shares={2: 0.5}, block_kv=64).reachable_sparsity == pytest.approx((0.5, 1 - 1 / 64))

"""Pooling and the pyramid against the oracle, with lengths around the block size and poisoned surroundings."""

import pytest
import torch

from comfyui_psa.kernels.pyramid import build_pyramid, pool, row_tokens

LENGTHS = {32: (1, 31, 32, 33, 63, 64, 95, 96), 64: (1, 5, 63, 64, 65, 127, 128), 128: (1, 127, 128, 129, 255)}
CASES = [(block, length) for block, lengths in LENGTHS.items() for length in lengths]


def expected_rows(oracle, x, factor, block):
    """Pooled rows of one head with zeros for padding, and tokens per row."""
    rows, counts = [], []
    for pooled in oracle.pooled_rows(x, factor, block):
        padding = block // factor - len(pooled)
        rows += [mean for mean, _ in pooled] + [torch.zeros(x.shape[1], dtype=torch.float64)] * padding
        counts += [count for _, count in pooled] + [0] * padding
    return torch.stack(rows), counts


@pytest.mark.parametrize(("block", "length"), CASES)
def test_pool_against_the_oracle(oracle, random_tensor, poisoned, block, length):
    x = random_tensor(2, 2, length, 5, seed=length)
    factor = 1
    while factor <= block:
        rows = pool(poisoned(x), factor, block)
        expected, counts = expected_rows(oracle, x[1, 0], factor, block)
        assert rows.shape == (2, 2, len(expected), 5)
        torch.testing.assert_close(rows[1, 0].double(), expected, atol=2e-6, rtol=0)
        assert row_tokens(length, factor, block, "cpu").tolist() == counts
        assert sum(counts) == length
        factor *= 2


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)],
)
def test_pool_keeps_the_dtype_and_sums_in_at_least_float32(oracle, random_tensor, dtype, tolerance):
    x = random_tensor(1, 1, 100, 8, dtype=dtype)
    rows = pool(x, 8, 32)
    assert rows.dtype == dtype
    expected, _ = expected_rows(oracle, x[0, 0], 8, 32)
    torch.testing.assert_close(rows[0, 0].double(), expected, atol=tolerance, rtol=tolerance)


def test_large_half_precision_values_do_not_overflow_in_the_mean():
    x = torch.full((1, 1, 100, 4), 60000.0, dtype=torch.float16)
    assert torch.equal(pool(x, 32, 32)[:, :, :3], x[:, :, :3])
    assert pool(x, 32, 32)[0, 0, 3].tolist() == [60000.0] * 4


@pytest.mark.parametrize("factors", [(1,), (8,), (2, 8), (1, 2, 4, 8, 64), (4, 64)])
@pytest.mark.parametrize("length", [1, 64, 100, 129])
def test_build_pyramid(oracle, random_tensor, poisoned, factors, length):
    k, v = random_tensor(2, 3, length, 6, seed=1), random_tensor(2, 3, length, 6, seed=2)
    pyramid = build_pyramid(poisoned(k), poisoned(v), factors, 64)
    assert tuple(pyramid.keys) == tuple(pyramid.values) == factors
    assert (pyramid.length, pyramid.block_kv, pyramid.blocks) == (length, 64, -(-length // 64))
    for factor in factors:
        for level, x in ((pyramid.keys, k), (pyramid.values, v)):
            expected, counts = expected_rows(oracle, x[1, 2], factor, 64)
            rows = level[factor][1, 2].double()
            torch.testing.assert_close(rows, expected[: len(rows)], atol=2e-6, rtol=0)
            assert len(rows) == (length if factor == 1 else len(expected))
            assert pyramid.tokens(factor).tolist() == counts
            assert pyramid.tokens(factor).dtype == torch.int32


def test_level_one_is_not_copied(random_tensor):
    k = random_tensor(1, 1, 70, 4)
    pyramid = build_pyramid(k, k, (1, 4), 32)
    assert pyramid.keys[1].data_ptr() == k.data_ptr()


def test_pooling_never_crosses_a_block():
    """Two levels of pairs are one level of fours; the border of a block is never inside a group."""
    x = torch.arange(96.0).view(1, 1, 96, 1)
    once = pool(pool(x, 2, 32), 2, 16)
    assert torch.equal(once, pool(x, 4, 32))
    assert pool(x, 32, 32).flatten().tolist() == [15.5, 47.5, 79.5]

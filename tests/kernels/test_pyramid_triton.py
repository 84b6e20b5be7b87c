"""The pooling kernel against its plain torch references: order, tails, every factor, int8."""

import pytest
import torch

from comfyui_psa.kernels.importance import pooled
from comfyui_psa.kernels.int8 import dequantise_keys, mean_key, quantise_keys
from comfyui_psa.kernels.order import TokenOrder, make_order
from comfyui_psa.kernels.pyramid import build_pyramid

RASTER = TokenOrder(None, None)
CASES = [
    (32, 1, 8, (1, 2, 4, 8, 32)),
    (32, 33, 8, (1, 8)),
    (64, 127, 16, (1, 2, 8, 64)),
    (64, 64, 5, (2, 16, 64)),
    (64, 200, 64, (1,)),
    (128, 255, 16, (1, 2, 4, 8, 16, 32, 64, 128)),
    (128, 300, 48, (8, 128)),
]


@pytest.fixture
def orders(triton_device):
    """A raster order and a random permutation of `length` tokens."""

    def make(length):
        index = torch.randperm(length, generator=torch.Generator().manual_seed(length)).to(triton_device)
        return RASTER, TokenOrder(index, index.argsort())

    return make


def check_same_pyramid(got, expected, tolerance):
    assert tuple(got.keys) == tuple(expected.keys)
    for ours, theirs in ((got.keys, expected.keys), (got.values, expected.values)):
        for factor in ours:
            assert ours[factor].dtype == theirs[factor].dtype
            torch.testing.assert_close(ours[factor].float(), theirs[factor].float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pyramid(triton_device, half_types, random_tensor, poisoned, orders, case):
    from comfyui_psa.kernels.gpu.pyramid import build_pyramid_triton

    block, length, dim, factors = case
    for dtype in (torch.float32, *half_types):
        k, v = (random_tensor(2, 2, length, dim, seed=s).to(triton_device, dtype) for s in (1, 2))
        for order in orders(length):
            got = build_pyramid_triton(poisoned(k), poisoned(v), factors, block, order)
            expected = build_pyramid(order.apply(k), order.apply(v), factors, block)
            check_same_pyramid(got, expected, {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype])
            assert (got.block_kv, got.length) == (block, length)
            assert (got.keys.get(1) is None) == (1 not in factors)


def test_level_one_is_not_copied_in_raster_order(triton_device, random_tensor):
    from comfyui_psa.kernels.gpu.pyramid import build_pyramid_triton

    k = random_tensor(1, 1, 70, 16).to(triton_device)
    assert build_pyramid_triton(k, k, (1, 8), 32, RASTER).keys[1].data_ptr() == k.data_ptr()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_keys(triton_device, random_tensor, poisoned, orders, case):
    from comfyui_psa.kernels.gpu.pyramid import build_pyramid_triton

    block, length, dim, factors = case
    shift = 3 * random_tensor(2, 2, 1, dim, seed=7)
    k = (random_tensor(2, 2, length, dim, seed=1) + shift).to(triton_device)
    v = random_tensor(2, 2, length, dim, seed=2).to(triton_device)
    for order in orders(length):
        got = build_pyramid_triton(poisoned(k), v, factors, block, order, int8=True)
        torch.testing.assert_close(got.mean, mean_key(k))
        exact = build_pyramid(order.apply(k), order.apply(v), factors, block)
        expected = quantise_keys(exact, got.mean)
        for factor in factors:
            there = (exact.tokens(factor) > 0)[: got.keys[factor].shape[2]]
            restored = dequantise_keys(got).keys[factor] + got.mean
            error = (restored - exact.keys[factor])[:, :, there].abs().amax((2, 3))
            if factor > 1:
                torch.testing.assert_close(got.keys[factor], expected.keys[factor], atol=4e-6, rtol=4e-6)
                assert (error < 1e-5).all()
                continue
            assert torch.equal(got.scales, expected.scales)
            assert torch.equal(got.keys[1], expected.keys[1])
            assert got.keys[1].dtype == torch.int8
            assert (error <= 0.51 * got.scales.amax(-1)).all()


def test_pool(triton_device, random_tensor, orders):
    from comfyui_psa.kernels.gpu.pyramid import pool_triton

    x = random_tensor(1, 3, 200, 16).to(triton_device)
    for order in orders(200):
        for factors in ((2,), (64,), (8, 32)):
            for factor, got in zip(factors, pool_triton(x, factors, 64, order), strict=True):
                expected = pooled(order.apply(x), 64, factor).rows
                torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)


def test_the_orders_of_grids(triton_device, random_tensor):
    from comfyui_psa.kernels.gpu.pyramid import build_pyramid_triton

    k, v = (random_tensor(1, 1, 3 * 8 * 9, 16, seed=s).to(triton_device) for s in (1, 2))
    for name in ("raster", "curve", "tiles"):
        order = make_order(name, (3, 8, 9), (2, 4, 4), triton_device)
        got = build_pyramid_triton(k, v, (1, 8), 32, order)
        check_same_pyramid(got, build_pyramid(order.apply(k), order.apply(v), (1, 8), 32), 2e-6)

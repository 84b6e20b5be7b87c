"""Queries in eight bits in Triton, against `int8.quantise`, in the interpreter or on a GPU."""

import pytest
import torch

from comfyui_psa.kernels.int8 import dequantise, quantise
from comfyui_psa.kernels.order import TokenOrder, make_order


@pytest.mark.parametrize("order_name", ["raster", "curve"])
@pytest.mark.parametrize(("dim", "block"), [(128, 128), (64, 32), (48, 128)])
def test_as_the_reference_in_block_order(triton_device, half_types, random_tensor, poisoned, dim, block, order_name):
    from comfyui_psa.kernels.gpu.int8 import quantise_queries_triton

    order = make_order(order_name, (3, 8, 9), device=triton_device)
    for dtype in half_types:
        q = poisoned(random_tensor(2, 3, 216, dim).to(triton_device, dtype))
        rows, scales = quantise_queries_triton(q, block, order)
        expected_rows, expected_scales = quantise(order.apply(q), block)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(rows, expected_rows)


def test_what_is_not_finite_becomes_zero_and_sets_no_scale(triton_device, random_tensor):
    from comfyui_psa.kernels.gpu.int8 import quantise_queries_triton

    q = random_tensor(1, 1, 40, 64).to(triton_device, torch.float16)
    expected = dequantise(*quantise(q.index_fill(2, torch.tensor([3], device=q.device), 0), 32), 32)
    for bad in (torch.nan, torch.inf, -torch.inf):
        q[0, 0, 3] = bad
        got = dequantise(*quantise_queries_triton(q, 32, TokenOrder(None, None)), 32)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        assert torch.isfinite(got).all()

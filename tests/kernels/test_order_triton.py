"""Moving tokens into an order and back in Triton, against `TokenOrder`, in the interpreter or on a GPU."""

import pytest
import torch

from comfyui_psa.kernels.order import TokenOrder, make_order


@pytest.mark.parametrize("dim", [5, 64, 80])
def test_apply_and_undo(triton_device, random_tensor, poisoned, dim):
    from comfyui_psa.kernels.gpu.order import apply_order_triton, undo_order_triton

    order = make_order("curve", (3, 8, 9), device=triton_device)
    for dtype in (torch.float32, torch.float16):
        x = poisoned(random_tensor(2, 3, 216, dim).to(triton_device, dtype))
        ordered = apply_order_triton(x, order)
        assert torch.equal(ordered, order.apply(x))
        out = torch.full((2, 216, 3, dim), torch.nan, dtype=dtype, device=triton_device).transpose(1, 2)
        undo_order_triton(ordered, order, out)
        assert torch.equal(out, x)


def test_raster_order_moves_nothing(triton_device, random_tensor):
    from comfyui_psa.kernels.gpu.order import apply_order_triton

    x = random_tensor(1, 1, 30, 16).to(triton_device)
    assert apply_order_triton(x, TokenOrder(None, None)) is x

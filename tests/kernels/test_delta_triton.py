"""The attention kernel with a correction and with packed lists, in the interpreter or on a GPU."""

import dataclasses

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.delta import Delta, measure_delta
from comfyui_psa.kernels.levels import group_by_level
from comfyui_psa.kernels.order import TokenOrder
from comfyui_psa.kernels.pyramid import build_pyramid


def every_code(device):
    """All numbers that float8_e4m3 has, in rows of 16, with a scale for each row."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8)
    scales = torch.tensor([2.0**-20, 1e-3, 0.25, 1.0], dtype=torch.float32).repeat(4)
    return Delta(codes.view(1, 1, 16, 16).to(device).view(torch.float8_e4m3fn), scales.view(1, 1, 16).to(device), 1)


def test_the_kernel_reads_every_number_of_eight_bits(triton_device):
    """Over values of zero the output is the delta itself, bit for bit as torch converts it."""
    from comfyui_psa.kernels.gpu.attend import attend_triton

    dtype = torch.float32 if triton_device == "cpu" else torch.float16
    q = torch.ones(1, 1, 16, 16, dtype=dtype, device=triton_device)
    pyramid = build_pyramid(q, torch.zeros_like(q), (1,), 32)
    lists = group_by_level(torch.ones(1, 1, 1, 1, dtype=torch.int16, device=triton_device), (1,))
    out = torch.full_like(q, torch.nan)
    delta = every_code(triton_device)
    attend_triton(q, pyramid, lists, 32, 0.25, None, None, out, delta=delta)
    assert torch.equal(out, delta.rows(16).to(dtype))


@pytest.mark.parametrize(
    ("order", "dim", "group", "batch"),
    [("raster", 16, 1, 2), ("raster", 72, 8, 1), ("curve", 64, 2, 1), ("curve", 16, 8, 2), ("curve", 72, 4, 1)],
)
def test_a_corrected_call_is_that_of_the_torch_backend(triton_device, random_tensor, order, dim, group, batch):
    layout = TokenLayout((3, 8, 9), before=5)
    dtype, tolerance = (torch.float32, 2e-5) if triton_device == "cpu" else (torch.float16, 4e-3)
    q, k, v = (random_tensor(batch, 2, layout.length, dim, seed=s).to(triton_device, dtype) for s in (1, 2, 3))
    config = PyramidConfig(mode="topk", sparsity=0.8, block_q=32, block_kv=32, order=order)
    first = pyramid_sparse_attention(q, k, v, config, layout=layout, backend="torch")
    video = first.output[:, :, layout.before :]
    other = random_tensor(*video.shape, seed=4).to(video)
    delta = measure_delta(other, video, first.query_order, group)
    # Twice: over the lists as they were chosen, and as they are kept.
    for lists in (first.lists, first.lists.packed()):
        expected, got = (
            pyramid_sparse_attention(q, k, v, config, layout=layout, backend=backend, lists=lists, delta=delta).output
            for backend in ("torch", "triton")
        )
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert (expected - first.output)[:, :, layout.before :].abs().max() > 0.5
    assert torch.equal(expected[:, :, : layout.before], first.output[:, :, : layout.before])


def test_a_block_that_is_computed_again_is_corrected_once(triton_device, random_tensor):
    """One key far above the others overflows the fixed reference, so the careful launch writes that block."""
    from comfyui_psa.kernels.gpu.attend import attend_triton

    dtype, tolerance = (torch.float32, 1e-4) if triton_device == "cpu" else (torch.float16, 4e-3)
    q, k, v = (random_tensor(1, 1, 128, 16, seed=s).to(triton_device, dtype) for s in (1, 2, 3))
    k[:, :, 100] *= 300
    pyramid = build_pyramid(k, v, (1,), 32)
    lists = group_by_level(torch.ones(1, 1, 4, 4, dtype=torch.int16, device=triton_device), (1,))
    plain, corrected = (torch.full_like(q, torch.nan) for _ in range(2))
    delta = measure_delta(random_tensor(1, 1, 128, 16, seed=9).to(q), torch.zeros_like(q), TokenOrder(None, None), 4)
    attend_triton(q, pyramid, lists, 32, 0.25, None, None, plain)
    attend_triton(q, pyramid, lists, 32, 0.25, None, None, corrected, delta=delta)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(plain, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(corrected.float() - plain.float(), delta.rows(128), atol=2 * tolerance, rtol=tolerance)


def test_packed_lists_of_rows_that_differ_in_length(triton_device, random_tensor, random_factors):
    from comfyui_psa.kernels.gpu.attend import attend_triton

    dtype = torch.float32 if triton_device == "cpu" else torch.float16
    q, k, v = (random_tensor(2, 2, length, 16, seed=length).to(triton_device, dtype) for length in (130, 300, 300))
    factors = random_factors((2, 2, 5, 10), (0, 0, 0, 1, 4), seed=3).to(triton_device)
    factors[..., 0] = 1
    lists = group_by_level(factors, (1, 4))
    lists = dataclasses.replace(lists, unranked=torch.ones_like(lists.ends[..., 0]), best=lists.ends[..., 0] * 0)
    packed = lists.packed()
    assert packed.blocks.shape[-1] == int((factors > 0).sum(-1).max()) < 10
    assert packed.blocks.dtype == torch.int16
    assert packed.unranked is None
    assert packed.shape == lists.shape
    assert torch.equal(packed.factors(), factors)
    outputs = []
    everything, part = (slice(None), slice(None)), (slice(1, None), slice(None, 1))
    for some, which in ((lists, everything), (packed, everything), (packed[part], part)):
        pyramid = build_pyramid(k[which], v[which], (1, 4), 32)
        out = torch.full_like(q[which], torch.nan)
        attend_triton(q[which], pyramid, some, 32, 0.25, None, None, out)
        outputs.append(out)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0][1:, :1], outputs[2])

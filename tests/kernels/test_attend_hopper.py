"""The Gluon kernel for compute capability 9.0 against `attend_reference`; it runs on such a GPU only."""

import dataclasses

import pytest
import torch

from comfyui_psa.kernels.attend import attend_reference
from comfyui_psa.kernels.int8 import dequantise, dequantise_keys, mean_key, quantise, quantise_keys
from comfyui_psa.kernels.levels import group_by_level
from comfyui_psa.kernels.order import TokenOrder
from comfyui_psa.kernels.pyramid import build_pyramid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9.0",
    ),
]
# length_q, length_k, head size, block_kv, choices of the map, extra tokens
CASES = [
    (128, 64, 128, 64, (1,), 0),
    (128, 640, 128, 64, (1,), 0),
    (300, 1000, 128, 64, (0, 1), 0),
    (300, 1000, 128, 64, (8,), 0),
    (300, 1000, 128, 64, (2,), 0),
    (300, 1000, 128, 64, (64,), 0),
    (1000, 3001, 128, 64, (0, 1, 2, 4, 8, 64), 0),
    (1000, 3001, 64, 64, (0, 1, 2, 8, 64), 0),
    (1000, 3001, 128, 128, (0, 1, 8, 16, 128), 0),
    (1000, 3001, 64, 128, (1, 2, 128), 226),
    (1000, 3001, 128, 32, (0, 1, 2, 4, 32), 0),
    (257, 4096, 128, 64, (0, 0, 0, 1, 8, 64), 226),
    (257, 4097, 96, 64, (0, 1, 8, 64), 5),
    (1, 63, 128, 64, (1, 8), 0),
]


@pytest.mark.parametrize("int8", [False, True], ids=["16 bit", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(random_tensor, random_factors, case, dtype, int8):
    from comfyui_psa.kernels import attend_hopper

    length_q, length_k, dim, block_kv, choices, extra = case
    q, k, v, more_k, more_v = (
        random_tensor(2, 2, n, dim, seed=seed).to("cuda", dtype)
        for seed, n in enumerate((length_q, length_k, length_k, extra, extra))
    )
    q = 2 * q
    n_q, n_k = -(-length_q // 128), -(-length_k // block_kv)
    factors = random_factors((2, 2, n_q, n_k), choices, seed=length_k).cuda()
    index = torch.randperm(length_q, generator=torch.Generator().manual_seed(1)).cuda()
    order = TokenOrder(index, index.argsort())
    stored = tuple(sorted({*choices} - {0}))
    pyramid = build_pyramid(k, v, stored, block_kv)
    extras = (more_k, more_v) if extra else (None, None)
    wide = dataclasses.replace(
        pyramid,
        keys={f: x.float() for f, x in pyramid.keys.items()},
        values={f: x.float() for f, x in pyramid.values.items()},
    )
    queries, wide_extras = q.float(), tuple(None if x is None else x.float() for x in extras)
    if int8:
        pyramid = quantise_keys(pyramid, mean_key(k))
        wide = dataclasses.replace(dequantise_keys(pyramid), values=wide.values)
        # The order puts other queries together; the scale is that of 64 of them.
        queries = order.undo(dequantise(*quantise(order.apply(q), 64), 64))
        if extra:
            extras = ((more_k - pyramid.mean).to(dtype), more_v)
            wide_extras = (dequantise(*quantise(extras[0], 64), 64), more_v.float())
    assert attend_hopper.serves(q, pyramid, stored, 128)
    lists = group_by_level(factors, stored)
    rows = lists.density.argsort(-1, descending=True).to(torch.int32)
    expected = order.undo(attend_reference(order.apply(queries), wide, factors, 128, dim**-0.5, *wide_extras))
    for start in (None, rows):
        out = torch.full((2, length_q, 2, dim), torch.nan, dtype=dtype, device="cuda").transpose(1, 2)
        overflow = torch.full((2, 2, n_q, 2), 7, dtype=torch.int32, device="cuda")
        attend_hopper.attend_hopper(q, pyramid, lists, dim**-0.5, order, *extras, out, overflow, start)
        assert (overflow == 0).all()
        tolerance = 3e-2 if dtype == torch.bfloat16 else 6e-3
        torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_overflow_is_marked(random_tensor):
    """What lies too far above the first tile for the type of the weights is left to the careful launch."""
    from comfyui_psa.kernels import attend_hopper

    for dtype, gap in ((torch.float16, 40.0), (torch.bfloat16, 200.0)):
        q = torch.ones(1, 1, 256, 64, dtype=dtype, device="cuda")
        q[:, :, 64:] = 0
        k = torch.zeros(1, 1, 320, 64, dtype=dtype, device="cuda")
        k[:, :, 64:128] = gap / 8
        v = random_tensor(1, 1, 320, 64).to("cuda", dtype)
        factors = torch.ones(1, 1, 2, 5, dtype=torch.int16, device="cuda")
        out, overflow = torch.empty_like(q), torch.zeros(1, 1, 2, 2, dtype=torch.int32, device="cuda")
        lists = group_by_level(factors, (1,))
        pyramid = build_pyramid(k, v, (1,), 64)
        order = TokenOrder(None, None)
        attend_hopper.attend_hopper(q, pyramid, lists, 0.125, order, None, None, out, overflow, None)
        assert overflow.flatten().tolist() == [1, 0, 0, 0]

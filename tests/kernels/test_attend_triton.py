"""The Triton kernel against `attend_reference` on injected maps, in the interpreter or on a GPU."""

import dataclasses

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.attend import attend_reference, attend_streaming
from comfyui_psa.kernels.int8 import dequantise, dequantise_keys, mean_key, quantise, quantise_keys
from comfyui_psa.kernels.levels import group_by_level
from comfyui_psa.kernels.pyramid import build_pyramid

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# length_q, length_k, head size, block_q, block_kv, choices of the map, extra tokens
CASES = [
    (64, 64, 64, 32, 32, (0, 1, 2, 4, 8), 0),
    (65, 129, 64, 32, 32, (0, 1, 2, 4, 8, 32), 0),
    (129, 300, 64, 128, 64, (0, 1, 2, 4, 8, 64), 0),
    (63, 300, 128, 128, 128, (0, 1, 2, 4, 8, 128), 5),
    (300, 129, 48, 128, 64, (1, 2, 4, 8, 16, 32, 64), 0),
    (64, 63, 48, 32, 64, (0, 8, 64), 70),
    (1, 1, 64, 32, 32, (1,), 0),
    (1, 1, 64, 32, 64, (8,), 3),
    (1, 300, 128, 32, 32, (0, 1, 8), 0),
    (129, 1, 64, 128, 128, (1, 2, 128), 0),
    (33, 65, 64, 32, 64, (1, 8), 0),
    (33, 65, 64, 32, 128, (2, 4), 0),
    (64, 300, 64, 32, 32, (8,), 0),
    (64, 300, 64, 32, 64, (0, 8), 0),
    (64, 300, 64, 32, 128, (0, 8), 0),
    (64, 129, 64, 32, 64, (64,), 1),
    (40, 100, 80, 64, 32, (0, 1, 4, 32), 65),
    (40, 100, 16, 32, 32, (0, 1, 4), 0),
    (40, 100, 5, 32, 32, (0, 1, 4), 2),
]


LARGE = [
    (4096, 4096, 128, 128, 64, (0, 0, 1, 2, 8, 64), 226),
    (5000, 7001, 64, 128, 32, (0, 0, 1, 2, 4, 8, 32), 0),
    (3000, 5001, 128, 128, 128, (0, 1, 4, 8, 128), 0),
    (3000, 5001, 128, 64, 64, (0, 1, 16, 64), 0),
]


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request, half_types, triton_device):
    if request.param == torch.float32 and triton_device == "cuda":
        pytest.skip("float32 is for the interpreter: on a GPU it takes minutes to compile and is not offered")
    if request.param not in (torch.float32, *half_types):
        pytest.skip("the interpreter mishandles bfloat16; on a GPU it is tried")
    return request.param


def attend(q, pyramid, factors, block_q, scale, extra=(None, None), **more):
    """The kernel on a map of pooling factors; the storage of the output is poisoned first."""
    from comfyui_psa.kernels.gpu.attend import attend_triton

    out = torch.full_like(q, torch.nan).transpose(1, 2).contiguous().transpose(1, 2)
    lists = group_by_level(factors, tuple(pyramid.keys))
    attend_triton(q, pyramid, lists, block_q, scale, *extra, out, **more)
    return out


def inputs(case, dtype, device, random_tensor, random_factors, poisoned, batch=2, heads=2):
    """q, k, v, extra keys and values, map, pooling factors of a case."""
    length_q, length_k, dim, block_q, block_kv, choices, extra = case
    q, k, v, more_k, more_v = (
        poisoned(random_tensor(batch, heads, length, dim, seed=seed).to(device=device, dtype=dtype))
        for seed, length in enumerate((length_q, length_k, length_k, extra, extra))
    )
    shape = (batch, heads, -(-length_q // block_q), -(-length_k // block_kv))
    factors = random_factors(shape, choices, seed=length_k).to(device)
    return q, k, v, (more_k, more_v) if extra else (None, None), factors, tuple(sorted({*choices} - {0}))


def check_attend(case, dtype, device, *fixtures, **sizes):
    q, k, v, extra, factors, stored = inputs(case, dtype, device, *fixtures, **sizes)
    length_q, length_k, dim, block_q, block_kv, *_ = case
    pyramid, scale = build_pyramid(k, v, stored, block_kv), dim**-0.5
    out = attend(q, pyramid, factors, block_q, scale, extra)
    form = attend_reference if length_q * length_k < 2**20 else attend_streaming
    expected = form(q, pyramid, factors, block_q, scale, *extra)
    torch.testing.assert_close(out.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(attend(q, pyramid, factors, block_q, scale, extra, uneven=True), out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(triton_device, dtype, case, random_tensor, random_factors, poisoned):
    heads = 2 if dtype == torch.float32 or triton_device == "cuda" else 1
    check_attend(case, dtype, triton_device, random_tensor, random_factors, poisoned, batch=2 // heads, heads=heads)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_cases(triton_device, dtype, case, random_tensor, random_factors, poisoned):
    if triton_device == "cpu":
        pytest.skip("needs a GPU")
    check_attend(case, dtype, triton_device, random_tensor, random_factors, poisoned)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8(triton_device, half_types, case, random_tensor, random_factors, poisoned):
    """Against the reference on the rounded queries and keys: products of int8 are exact."""
    dtype = half_types[-1]
    q, k, v, extra, factors, stored = inputs(
        case, dtype, triton_device, random_tensor, random_factors, poisoned, batch=1, heads=2
    )
    _, _, dim, block_q, block_kv, *_ = case
    k = k + 2 * random_tensor(1, 2, 1, dim, seed=9).to(k)
    pyramid = quantise_keys(build_pyramid(k, v, stored, block_kv), mean_key(k))
    if extra[0] is not None:
        extra = ((extra[0] - pyramid.mean).to(dtype), extra[1])
    out = attend(q, pyramid, factors, block_q, dim**-0.5, extra)
    # Only level 1 sees the rounded query: keys of twice the size choose the half of (rounded, exact) that they see.
    both = torch.cat([dequantise(*quantise(q, block_q), block_q), q.float()], -1)
    zeros = torch.zeros(1, 2, 1, dim, device=triton_device)
    keys = {f: x.float() for f, x in dequantise_keys(pyramid).keys.items()}
    halves = {f: (x, zeros.expand_as(x)) if f == 1 else (zeros.expand_as(x), x) for f, x in keys.items()}
    wide = dataclasses.replace(
        pyramid,
        keys={f: torch.cat(half, -1) for f, half in halves.items()},
        values={f: x.float() for f, x in pyramid.values.items()},
    )
    more = (None, None)
    if extra[0] is not None:
        more = torch.cat([zeros.expand(-1, -1, extra[0].shape[2], -1), extra[0].float()], -1), extra[1].float()
    expected = attend_reference(both, wide, factors, block_q, dim**-0.5, *more)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_output_may_take_the_place_of_the_queries(triton_device, half_types, random_tensor, random_factors):
    from comfyui_psa.kernels.gpu.attend import attend_triton

    q, k, v = (random_tensor(1, 2, 300, 64, seed=s).to(triton_device, half_types[-1]) for s in (1, 2, 3))
    # The logits of the second query block overflow after the first tile: it is computed again, from queries that must
    # still be there.
    q[:, :, 128:256] *= 1000
    k[:, :, 64:] *= 20
    factors = random_factors((1, 2, 3, 5), (1, 8)).to(triton_device)
    pyramid = build_pyramid(k, v, (1, 8), 64)
    expected = attend(q, pyramid, factors, 128, 0.125)
    assert expected.isfinite().all()
    attend_triton(q, pyramid, group_by_level(factors, (1, 8)), 128, 0.125, None, None, q)
    assert torch.equal(q, expected)


def test_row_that_sees_nothing(triton_device):
    x = torch.ones(1, 1, 64, 64, device=triton_device, dtype=torch.float16)
    factors = torch.tensor([[0, 0], [0, 1]], dtype=torch.int16, device=triton_device).view(1, 1, 2, 2)
    out = attend(x, build_pyramid(x, x, (1, 8), 32), factors, 32, 0.1)
    assert torch.equal(out[:, :, :32], torch.zeros_like(out[:, :, :32]))
    torch.testing.assert_close(out[:, :, 32:], x[:, :, 32:])


@pytest.mark.parametrize("gap", [10.0, 60.0, 300.0])
def test_logits_far_above_the_first_tile(triton_device, half_types, random_tensor, gap):
    """Weights are relative to a reference from the first tile; logits far above it must not overflow."""
    for dtype in half_types if triton_device == "cuda" else (torch.float32, *half_types):
        q = torch.ones(1, 1, 64, 16, dtype=dtype, device=triton_device)
        k = torch.zeros(1, 1, 320, 16, dtype=dtype, device=triton_device)
        k[:, :, 32:64] = gap / 4
        v = random_tensor(1, 1, 320, 16).to(triton_device, dtype)
        factors = torch.ones(1, 1, 2, 10, dtype=torch.int16, device=triton_device)
        pyramid = build_pyramid(k, v, (1,), 32)
        out = attend(q, pyramid, factors, 32, 0.25)
        expected = attend_reference(q, pyramid, factors, 32, 0.25)
        torch.testing.assert_close(out.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("int8", [False, True], ids=["16 bit", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(triton_device, random_tensor, bad, int8):
    """A NaN or an infinite number in one query is in that query's output and in no other."""
    q, k, v = (random_tensor(1, 1, 128, 32, seed=s).to(triton_device, torch.float16) for s in (1, 2, 3))
    pyramid = build_pyramid(k, v, (1, 8), 32)
    if int8:
        pyramid = quantise_keys(pyramid, mean_key(k))
    factors = torch.ones(1, 1, 4, 4, dtype=torch.int16, device=triton_device)
    factors[..., 2] = 8
    before = attend(q, pyramid, factors, 32, 0.25)
    q[0, 0, 5, 3] = bad
    out = attend(q, pyramid, factors, 32, 0.25)
    assert out[0, 0, 5].isnan().all()
    others = torch.arange(128) != 5
    torch.testing.assert_close(out[0, 0, others], before[0, 0, others], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("importance", "mode"),
    [("pooled", "topk"), ("pooled", "budget"), ("pooled", "threshold"), ("means", "topk"), ("sampled", "budget")],
)
def test_the_whole_call_is_that_of_the_torch_backend(triton_device, random_tensor, importance, mode):
    layout = TokenLayout((3, 8, 9), before=5, after=3)
    dtype, tolerance = (torch.float32, 2e-5) if triton_device == "cpu" else (torch.float16, 4e-3)
    q, k, v = (random_tensor(1, 2, layout.length, 64, seed=s).to(triton_device, dtype) for s in (1, 2, 3))
    config = PyramidConfig(
        mode=mode,
        sparsity=None if mode == "threshold" else 0.7,
        block_q=32,
        block_kv=32,
        order="curve",
        importance=importance,
    )
    first, second = (
        pyramid_sparse_attention(q, k, v, config, layout=layout, backend=name) for name in ("triton", "torch")
    )
    assert (first.backend, second.backend) == ("triton", "torch")
    same = first.factors == second.factors
    assert (~same).float().mean() < (
        0.01 if triton_device == "cpu" else 0.03
    )  # a pair exactly at a cut may fall to either side
    rows = same.all(-1).repeat_interleave(32, -1)[:, :, : layout.video]
    video = slice(layout.before, layout.before + layout.video)
    for out, ours in ((first.output, second.output),):
        difference = (out[:, :, video] - ours[:, :, video]).abs().amax(-1)
        order = rows.gather(-1, torch.argsort(_curve(triton_device)).expand_as(rows))
        assert difference[order].max() < tolerance
    torch.testing.assert_close(first.output[:, :, :5], second.output[:, :, :5], atol=tolerance, rtol=tolerance)
    assert first.density.item() == pytest.approx(second.density.item(), abs=1e-2)


@pytest.mark.parametrize(
    ("batch", "order", "importance", "dim"),
    [
        (2, "raster", "pooled", 16),
        (1, "curve", "pooled", 80),
        (2, "curve", "pooled", 16),
        (1, "semantic", "pooled", 16),
        (1, "semantic", "pooled", 72),
        (2, "hybrid", "sampled", 16),
    ],
)
def test_heads_go_in_parts(triton_device, random_tensor, batch, order, importance, dim):
    """With the levels given, so that no pair can fall to the other side of a cut."""
    layout = TokenLayout((3, 8, 9), before=5)
    dtype, tolerance = (torch.float32, 2e-5) if triton_device == "cpu" else (torch.float16, 4e-3)
    q, k, v = (random_tensor(batch, 2, layout.length, dim, seed=s).to(triton_device, dtype) for s in (1, 2, 3))
    config = PyramidConfig(sparsity=0.7, block_q=32, block_kv=32, order=order, importance=importance)
    expected = pyramid_sparse_attention(q, k, v, config, layout=layout, backend="torch")
    if importance == "sampled":  # the same representatives, through the index of each head
        got = pyramid_sparse_attention(q, k, v, config, layout=layout, backend="triton")
        assert (got.factors != expected.factors).float().mean() < 0.03
    got = pyramid_sparse_attention(q, k, v, config, layout=layout, backend="triton", lists=expected.lists)
    torch.testing.assert_close(got.output, expected.output, atol=tolerance, rtol=tolerance)


def _curve(device):
    from comfyui_psa.kernels.order import curve_index

    return curve_index((3, 8, 9)).to(device)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31(triton_device, random_tensor):
    if triton_device == "cpu":
        pytest.skip("needs a GPU")
    length, stride = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * 2 * length * stride:
        pytest.skip("needs 14 GB of free GPU memory")
    wide = torch.empty(1, length, 1, stride, dtype=torch.float16, device="cuda")
    for start, seed in ((0, 1), (64, 2)):
        wide[..., start : start + 64] = random_tensor(1, length, 1, 64, seed=seed).to(wide)
    k, v = wide[..., :64].transpose(1, 2), wide[..., 64:128].transpose(1, 2)
    assert (length - 1) * k.stride(2) > 2**31
    q = random_tensor(1, 1, 128, 64, seed=3, dtype=torch.float16).cuda()
    factors = torch.zeros(1, 1, 1, -(-length // 64), dtype=torch.int16, device="cuda")
    factors[..., 0] = factors[..., -3:] = 1
    pyramid = build_pyramid(k, v, (1,), 64)
    out = attend(q, pyramid, factors, 128, 0.125)
    expected = attend_streaming(q, pyramid, factors, 128, 0.125)
    torch.testing.assert_close(out.float(), expected.float(), atol=4e-3, rtol=4e-3)

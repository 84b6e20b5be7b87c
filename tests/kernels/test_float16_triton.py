"""float16 where its narrow range could be passed: peaky rows, sinks, flat rows, extra tokens, compared with float64.

ComfyUI computes Wan in float16 for files of fp16 and fp8. The bounds are those that bfloat16 holds.
"""

import dataclasses
import math

import pytest
import torch

from comfyui_psa.choices.presets import RANKING
from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.importance import pooled, reduced_softmax
from comfyui_psa.kernels.levels import choose_levels

FULL = PyramidConfig(mode="topk", shares={1: 1.0}, sparsity=None, tail=False)
MODES = {
    "topk": PyramidConfig(mode="topk", shares={1: 0.1, 2: 0.05, 8: 0.2}, sparsity=0.7, tail=False, **RANKING),
    "budget": PyramidConfig(mode="budget", sparsity=0.7, **RANKING),
    "threshold": PyramidConfig(mode="threshold", sparsity=None, **RANKING),
    "max": PyramidConfig(mode="topk", shares={1: 0.1, 8: 0.2}, sparsity=0.7, **(RANKING | {"reduction": "max"})),
    "sampled": PyramidConfig(mode="topk", shares={1: 0.1, 8: 0.2}, sparsity=0.7, importance="sampled"),
}


def dense(q, k, v):
    """softmax(q k^T / sqrt(D)) v in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def error(got, expected):
    return ((got.double() - expected).abs().mean() / expected.abs().mean()).item()


def alike(heads, length, dim, logit, device, seed=0):
    """q, k, v of a video whose tokens are alike in groups of 8: a query's own group has about `logit`, others none."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, heads, -(-length // 8), dim, generator=generator).repeat_interleave(8, 2)[:, :, :length]
    base = torch.nn.functional.normalize(base, dim=-1) * math.sqrt(logit * dim**0.5)
    q, k = (base + 0.05 * torch.randn(base.shape, generator=generator) for _ in range(2))
    v = torch.randn(base.shape, generator=generator) + 0.5
    return tuple(x.to(device, torch.float16) for x in (q, k, v))


def sink(length, dim, logit, at, device):
    """q, k, v where every query has `logit` to the keys at `at` and 0 to all others; v is 1 at all but the sinks."""
    q = torch.zeros(1, 1, length, dim)
    k = torch.zeros_like(q)
    q[..., 0] = math.sqrt(logit * dim**0.5)
    k[:, :, at, 0] = math.sqrt(logit * dim**0.5)
    v = torch.ones_like(q)
    v[:, :, at] = -1
    return tuple(x.to(device, torch.float16) for x in (q, k, v))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("logit", "dim"), [(12, 64), (14, 128), (16, 64), (20, 128), (60, 64)])
def test_peaky_rows_are_ranked_and_attended(triton_device, mode, logit, dim):
    """No worse than the same levels chosen and attended in float32, plus twice what float16 costs dense attention."""
    small = triton_device == "cpu"
    if small and logit in (14, 16):
        pytest.skip("the interpreter tries the lowest and the highest logits")
    q, k, v = alike(1 if small else 4, 640 if small else 9216, dim, logit, triton_device)
    expected = dense(q, k, v)
    config = MODES[mode]
    got = pyramid_sparse_attention(q, k, v, config, backend="triton")
    exact = pyramid_sparse_attention(*(x.float() for x in (q, k, v)), config, backend="torch")
    rounding = error(torch.nn.functional.scaled_dot_product_attention(q, k, v), expected)
    assert got.output.isfinite().all()
    assert not got.unranked
    assert error(got.output, expected) <= 1.1 * error(exact.output, expected) + 2 * rounding + 1e-3
    # Budget mode learns from few rows here; ranking by what is not a number gave it a density of 1.
    assert abs(got.density - exact.density) < (0.1 if small else 0.02)


@pytest.mark.parametrize("at", [0, 700, -1])
@pytest.mark.parametrize("logit", [0, 6, 9, 11, 12, 13, 16, 24, 80])
def test_no_mass_is_lost_beside_a_sink(triton_device, logit, at):
    """Of a sink and thousands of flat keys, both sides keep their share: the output says how much the sink took."""
    if triton_device == "cpu" and logit not in (0, 11, 13, 80):
        pytest.skip("the interpreter tries a few of the logits")
    q, k, v = sink(1024 if triton_device == "cpu" else 65_536, 64, logit, at, triton_device)
    q = q[:, :, :64].contiguous()
    out = pyramid_sparse_attention(q, k, v, FULL, backend="triton").output.double()
    torch.testing.assert_close(out, dense(q, k, v), atol=1.5e-3, rtol=0)


@pytest.mark.parametrize("logit", [11, 13, 30])
def test_no_mass_is_lost_beside_text_that_is_a_sink(triton_device, logit):
    q, k, v = sink(1024 if triton_device == "cpu" else 65_536, 64, logit, 3, triton_device)
    layout = TokenLayout((1, 1, q.shape[2] - 8), before=8)
    rows = slice(8, 136)
    out = pyramid_sparse_attention(q, k, v, FULL, layout=layout, backend="triton").output[:, :, rows].double()
    torch.testing.assert_close(out, dense(q[:, :, rows], k, v), atol=1.5e-3, rtol=0)


@pytest.mark.parametrize("factors", [(1, 8), (2, 4), (8,)], ids=str)
@pytest.mark.parametrize("step", [0.01, 0.4, 2.0])
@pytest.mark.parametrize("way", [1, -1])
def test_logits_that_rise_or_fall_along_the_sequence(triton_device, factors, step, way):
    """Whatever the first tile held, later ones may be far above or below it, at any level."""
    length, dim = 512 if triton_device == "cpu" else 16_384, 64
    place = torch.arange(length) // 64 * (step * 16_384 / length)
    k = torch.zeros(1, 1, length, dim)
    k[..., 0] = way * place
    q = torch.zeros(1, 1, 128, dim)
    q[..., 0] = dim**0.5
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)) + 1
    q, k, v = (x.to(triton_device, torch.float16) for x in (q, k, v))
    shares = {f: 1 / len(factors) for f in factors}
    config = PyramidConfig(mode="topk", shares=shares, sparsity=None, tail=False)
    got = pyramid_sparse_attention(q, k, v, config, backend="triton")
    exact = pyramid_sparse_attention(*(x.float() for x in (q, k, v)), config, lists=got.lists, backend="torch")
    assert error(got.output, exact.output.double()) <= 1e-3


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_importance_of_rows_above_their_sum_is_finite_and_in_order(triton_device, reduction):
    """The sum is over coarser means than those that are ranked: a weight may pass any bound of 16 bits."""
    from comfyui_psa.kernels.gpu.importance import reduced_softmax_triton

    q, k, _ = alike(1, 1024, 64, 40, triton_device)
    k[:, :, 64:72] *= 4
    rows = pooled(q, 128, 8), pooled(k, 64, 8)
    norm = pooled(k, 64, 32)
    scores = reduced_softmax_triton(*rows, 0.125, reduction, norm)
    expected = reduced_softmax(*rows, 0.125, reduction, norm)
    assert scores.isfinite().all()
    assert expected.isfinite().all()
    assert torch.equal(scores.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=3e-2)


@pytest.mark.parametrize("mode", ["topk", "budget", "threshold"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_rank_last(triton_device, mode, bad):
    from comfyui_psa.kernels.gpu.levels import choose_lists_triton

    config = dataclasses.replace(MODES[mode], tail=False)
    rows = 8 if triton_device == "cpu" else 64
    scores = torch.rand(1, 2, rows, 90, generator=torch.Generator().manual_seed(1)).to(triton_device)
    scores[..., 10:20] = 0
    scores[:, :, :, 3] = bad
    scores[:, :, 5, 40:50] = bad
    lists = choose_lists_triton(scores, config, None, 90 * 64)
    factors = lists.factors()
    assert (factors[..., 3] == 0).all()
    assert (factors[:, :, 5, 40:50] == 0).all()
    assert lists.unranked.sum() == 2 * (rows + 10)
    assert torch.equal(lists.unranked[0, 0, 5].cpu(), torch.tensor(11, dtype=torch.int32))
    if mode != "budget":  # which learns its scale from a part of the rows
        assert torch.equal(factors, choose_levels(scores, config))


def test_one_query_that_is_not_finite_is_counted(triton_device):
    q, k, v = alike(1, 1200, 64, 8, triton_device)
    q[:, :, 5] = math.nan
    for backend in ("triton", "torch"):
        result = pyramid_sparse_attention(q, k, v, MODES["topk"], backend=backend)
        assert result.unranked == 19  # the key blocks of one row of query blocks
        assert result.output[:, :, 128:].isfinite().all()

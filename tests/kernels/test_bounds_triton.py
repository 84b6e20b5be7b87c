"""How far the Triton kernels are from the mathematics: the whole call against float64 with the same map.

16 bits: at most twice the error of dense attention in the same type, plus 1e-3. int8: relative L2 error at most 1.5e-2.
The data are the benchmark's, smooth as a video's, with heads from flat to peaky. A head so peaky that dense attention
hands on single values, exact in any type, counts with what rounding the exact result of its map costs.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.levels import group_by_level

BLOCK_Q, BLOCK_KV = 128, 64
# The levels of a row, many blocks of the coarse ones so that they weigh something; 0 is dropped.
CHOICES = (0, 1, 1, 2, 4, 8, 8, 16, 32, 64)
ALL_LEVELS = dict.fromkeys((1, 2, 4, 8, 16, 32), 0.1)

# Grids whose last block holds 48, 1, 63 and 64 keys, and one shorter than a block.
SMALL = [(3, 8, 10), (1, 1, 257), (1, 11, 29), (2, 8, 20), (1, 5, 7)]
REAL = [(18, 45, 80), (13, 30, 45), (21, 30, 52), (1, 1, 20_001)]


@pytest.fixture(scope="module")
def smooth_qkv():
    """The recipe of the benchmarks."""
    path = Path(__file__).parents[2] / "workshop" / "benchmarks" / "synthetic.py"
    spec = importlib.util.spec_from_file_location("psa_synthetic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.smooth_qkv


def pooled_rows(x, factor):
    """x [L, D] -> float64 means of `factor` tokens [R, D] and how many tokens each stands for; no row of padding."""
    rows = -(-len(x) // factor)
    padded = F.pad(x.double(), (0, 0, 0, rows * factor - len(x))).view(rows, factor, -1)
    tokens = (len(x) - factor * torch.arange(rows, device=x.device)).clamp_max(factor).double()
    return padded.sum(1) / tokens[:, None], tokens


def exact(q, k, v, factors, rows):
    """One head: float64 output of the query blocks `rows` for q, k, v [L, D] and the map [n_q, n_k]."""
    out = []
    levels = {f: (*pooled_rows(k, f), pooled_rows(v, f)[0]) for f in factors.unique().tolist() if f}
    for block in rows:
        logits, values = [], []
        for factor, (keys, tokens, means) in levels.items():
            seen = (factors[block] == factor)[torch.arange(len(keys), device=q.device) * factor // BLOCK_KV]
            queries = q[block * BLOCK_Q : (block + 1) * BLOCK_Q].double()
            logits.append(queries @ keys[seen].T * q.shape[1] ** -0.5 + tokens[seen].log())
            values.append(means[seen])
        out.append(torch.cat(logits, 1).softmax(1) @ torch.cat(values))
    return torch.cat(out)


def relative_l2(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def errors(smooth_qkv, random_factors, grid, dim, heads, device, dtype, precision, most_rows):
    """Relative L2 error of every head: of the call, and of dense attention in the same type against dense float64 (no
    less than that of the call's exact result rounded to the type)."""
    q, k, v = smooth_qkv(heads, grid, dim, dtype, device)
    length = q.shape[2]
    n_q, n_k = -(-length // BLOCK_Q), -(-length // BLOCK_KV)
    factors = random_factors((1, heads, n_q, n_k), CHOICES, seed=length).to(device)
    config = PyramidConfig(mode="topk", shares=ALL_LEVELS, sparsity=None, precision=precision)
    lists = group_by_level(factors, config.stored_factors)
    out = pyramid_sparse_attention(q, k, v, config, layout=TokenLayout(grid), lists=lists, backend="triton").output
    dense = F.scaled_dot_product_attention(q, k, v)
    # The first and the last block, which may be short, and some between.
    rows = sorted({*range(0, n_q, max(1, n_q // most_rows)), n_q - 1})
    tokens = torch.cat([torch.arange(i * BLOCK_Q, min(length, (i + 1) * BLOCK_Q)) for i in rows]).to(device)
    full = torch.ones(n_q, n_k, dtype=torch.int16, device=device)
    for h in range(heads):
        parts = q[0, h], k[0, h], v[0, h]
        expected = exact(*parts, factors[0, h], rows)
        yield (
            relative_l2(out[0, h, tokens], expected),
            max(relative_l2(dense[0, h, tokens], exact(*parts, full, rows)), relative_l2(expected.to(dtype), expected)),
        )


def check_errors(precision, *case):
    for head, (ours, dense) in enumerate(errors(*case, precision, most_rows=8)):
        bound = 1.5e-2 if precision == "int8" else 2 * dense + 1e-3
        assert ours <= bound, (case[2:], head, ours, dense)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(("grid", "dim"), [*((grid, 64) for grid in SMALL), (SMALL[0], 128), (SMALL[-1], 128)], ids=str)
def test_small(triton_device, half_types, smooth_qkv, random_factors, grid, dim, precision):
    check_errors(precision, smooth_qkv, random_factors, grid, dim, 2, triton_device, half_types[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("grid", REAL, ids=str)
def test_real_sizes(triton_device, smooth_qkv, random_factors, grid, dim, dtype, precision):
    if triton_device == "cpu":
        pytest.skip("needs a GPU")
    check_errors(precision, smooth_qkv, random_factors, grid, dim, 4, triton_device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["raster", "curve"])
def test_a_whole_call_with_strides_past_two_to_the_31(triton_device, order):
    """q, k and v as narrow views of very wide rows give, bit by bit, what their copies give."""
    if triton_device == "cpu":
        pytest.skip("needs a GPU")
    length, stride = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * 2 * length * stride:
        pytest.skip("needs 14 GB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    wide = torch.empty(1, length, 1, stride, dtype=torch.bfloat16, device="cuda")
    wide[..., :192].normal_(generator=generator)
    q, k, v = (wide[..., start : start + 64].transpose(1, 2) for start in (0, 64, 128))
    assert (length - 1) * k.stride(2) > 2**31
    config = PyramidConfig(mode="topk", shares={1: 0.1, 2: 0.05, 8: 0.2}, sparsity=None, order=order)
    layout = TokenLayout((7, 100, 100))
    far = pyramid_sparse_attention(q, k, v, config, layout=layout)
    near = pyramid_sparse_attention(*(x.contiguous() for x in (q, k, v)), config, layout=layout)
    assert torch.equal(far.factors, near.factors)
    assert torch.equal(far.output, near.output)


@pytest.mark.gpu
def test_more_elements_than_two_to_the_31(triton_device):
    """The last head of a tensor of 2^31 elements equals a call with only that head."""
    if triton_device == "cpu":
        pytest.skip("needs a GPU")
    if torch.cuda.mem_get_info()[0] < 50e9:
        pytest.skip("needs 50 GB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.empty(1, 65, 2**18, 128, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        for _ in range(3)
    )
    config = PyramidConfig(mode="topk", shares={1: 0.02, 8: 0.1}, sparsity=None, order="curve")
    layout = TokenLayout((256, 32, 32))
    whole = pyramid_sparse_attention(q, k, v, config, layout=layout)
    alone = pyramid_sparse_attention(q[:, -1:], k[:, -1:], v[:, -1:], config, layout=layout)
    assert whole.output.numel() > 2**31
    assert torch.equal(whole.output[:, -1:], alone.output)

"""What must hold for the Triton backend for any numbers: known answers and symmetries of the whole call."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.levels import group_by_level

LEVELS = (1, 2, 4, 8, 16, 32, 64)
CONFIG = PyramidConfig(mode="topk", shares=dict.fromkeys(LEVELS[:-1], 0.1), sparsity=None, block_q=32)
FULL = dataclasses.replace(CONFIG, shares={1: 1.0}, tail=False)
BUDGET = PyramidConfig(sparsity=0.6, block_q=32, block_kv=32)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def dtypes(triton_device, half_types):
    """In the interpreter the exact one alone; `test_attend_triton.py` and `test_bounds_triton.py` try 16 bits there."""
    return half_types if triton_device == "cuda" else [torch.float32]


@pytest.fixture
def qkv(triton_device, random_tensor):
    def make(dtype, length_q, length_k=None, batch=1, heads=2, dim=64):
        lengths = (length_q, length_k or length_q, length_k or length_q)
        return tuple(
            random_tensor(batch, heads, n, dim, seed=s).to(triton_device, dtype) for s, n in enumerate(lengths)
        )

    return make


def call(q, k, v, config, **more):
    return pyramid_sparse_attention(q, k, v, config, backend="triton", **more)


def with_map(q, k, v, factors, config=CONFIG):
    return call(q, k, v, config, lists=group_by_level(factors.to(q.device), config.stored_factors)).output


def check_same(got, expected):
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("order", ["raster", "curve"])
@pytest.mark.parametrize(("dim", "batch"), [(64, 2), (128, 1), (48, 1)])
def test_level_one_everywhere_is_dense_attention(dtypes, qkv, poisoned, dim, batch, order):
    layout = TokenLayout((3, 8, 9), before=5, after=3)
    config = dataclasses.replace(FULL, order=order)
    for dtype in dtypes:
        q, k, v = qkv(dtype, layout.length, batch=batch, dim=dim)
        out = call(poisoned(q), poisoned(k), poisoned(v), config, layout=layout).output
        check_same(out, F.scaled_dot_product_attention(q.float(), k.float(), v.float()))


@pytest.mark.parametrize(
    ("length_q", "length_k"), [(1, 1), (1, 100), (100, 1), (31, 33), (64, 128), (63, 191), (129, 65), (40, 300)]
)
def test_queries_of_another_length(dtypes, qkv, length_q, length_k):
    for dtype in dtypes:
        q, k, v = qkv(dtype, length_q, length_k)
        check_same(call(q, k, v, FULL).output, F.scaled_dot_product_attention(q.float(), k.float(), v.float()))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_constant_values_come_back_under_any_map(dtypes, qkv, random_factors, precision):
    factors = random_factors((1, 2, 8, 4), (0, *LEVELS))
    config = dataclasses.replace(CONFIG, precision=precision)
    for dtype in dtypes:
        q, k, v = qkv(dtype, 250)
        v = v[:, :, :1].expand(-1, -1, 250, -1).contiguous()
        check_same(with_map(q, k, v, factors, config), v)


@pytest.mark.parametrize("length", [256, 193, 255])
def test_pooling_is_exact_where_blocks_are_constant(dtypes, qkv, random_factors, length):
    """Then every map that drops nothing gives dense attention, including the short last block."""
    factors = random_factors((1, 2, -(-length // 32), 4), LEVELS, seed=length)
    for dtype in dtypes:
        q, k, v = qkv(dtype, length)
        k, v = (x[:, :, :: CONFIG.block_kv].repeat_interleave(CONFIG.block_kv, 2)[:, :, :length] for x in (k, v))
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        check_same(with_map(q, k.contiguous(), v.contiguous(), factors), expected)


def test_permuting_keys_inside_a_level_one_block_changes_nothing(dtypes, qkv, random_factors):
    factors = random_factors((1, 2, 7, 4), (0, 2, 8))
    factors[..., 1] = 1
    index = torch.arange(200)
    index[64:128] = 64 + torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for dtype in dtypes:
        q, k, v = qkv(dtype, 200)
        moved = with_map(q, k[:, :, index].contiguous(), v[:, :, index].contiguous(), factors)
        check_same(moved, with_map(q, k, v, factors))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_shifting_the_keys_changes_nothing(dtypes, qkv, random_factors, precision):
    """Softmax does not see what all keys have in common; in int8 it must not cost resolution either."""
    factors = random_factors((1, 2, 7, 4), (0, *LEVELS))
    config = dataclasses.replace(CONFIG, precision=precision)
    for dtype in dtypes:
        q, k, v = qkv(dtype, 200)
        shift = torch.full_like(k[:, :, :1], 2.0)
        first, second = (with_map(q, keys, v, factors, config).float() for keys in (k, k + shift))
        tolerance = 8e-2 if precision == "int8" or dtype == torch.bfloat16 else 5 * TOLERANCE[dtype]
        torch.testing.assert_close(first, second, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_full_and_empty(oracle, dtypes, qkv, random_factors, level):
    dtype = dtypes[0]
    q, k, v = qkv(dtype, 70, 200, heads=1)
    maps = [torch.full((1, 1, 3, 4), level, dtype=torch.int16)]
    maps.append(random_factors((1, 1, 3, 4), tuple(f for f in (0, *LEVELS) if f != level), seed=level))
    for factors in maps:
        expected = oracle.attend_all(q.cpu(), k.cpu(), v.cpu(), factors, 32, 64, 0.125)
        check_same(with_map(q, k, v, factors), expected.to(q.device))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("importance", ["pooled", "means", "sampled"])
def test_calls_repeat_and_leave_generators_and_inputs_alone(dtypes, qkv, importance, precision):
    q, k, v = qkv(dtypes[-1], 130)
    originals = [x.clone() for x in (q, k, v)]
    config = dataclasses.replace(BUDGET, importance=importance, precision=precision)
    states = [torch.random.get_rng_state(), *(torch.cuda.get_rng_state_all() if q.is_cuda else [])]
    first = call(q, k, v, config)
    after = [torch.random.get_rng_state(), *(torch.cuda.get_rng_state_all() if q.is_cuda else [])]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    torch.rand(5)
    second = call(q, k, v, config)
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.factors, second.factors)
    assert all(torch.equal(x, original) for x, original in zip((q, k, v), originals, strict=True))

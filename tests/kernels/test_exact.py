"""The exact rows that the kernels are checked with: right outputs pass whatever the call, and small faults do not."""

import dataclasses

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.delta import measure_delta
from comfyui_psa.kernels.gpu.call import Call
from comfyui_psa.kernels.gpu.exact import what_differs
from comfyui_psa.kernels.int8 import dequantise_keys, mean_key, quantise_keys
from comfyui_psa.kernels.levels import group_by_level
from comfyui_psa.kernels.order import TokenOrder
from comfyui_psa.kernels.pyramid import build_pyramid

GRID = (3, 9, 11)  # 297 tokens: the last block holds a few only
KINDS = {
    "raster": {},
    "curve": {"order": "curve"},
    "own orders": {"order": "semantic", "clusters": (3, 4)},
    "no tail": {"tail": False, "mode": "topk"},
    "one level": {"shares": {1: 0.3}, "mode": "topk", "sparsity": None},
    "large blocks": {"block_q": 128, "block_kv": 128, "order": "curve"},
    "budget": {"mode": "budget"},
}


def call_of(random_tensor, dtype=torch.float32, extra=True, delta=0, **changes):
    """A call as a backend sees it, and the output of the torch backend."""
    settings = {"block_q": 32, "block_kv": 32, "sparsity": 0.7, "mode": "topk"} | changes
    config = PyramidConfig(**settings)
    layout = TokenLayout(GRID, before=5 if extra else 0)
    q, k, v = (random_tensor(2, 3, layout.length, 40, seed=seed).to(dtype) for seed in (1, 2, 3))
    result = pyramid_sparse_attention(q, k, v, config, layout=layout, backend="torch")
    orders = result.query_order, result.key_order
    lost = None
    if delta:
        video = result.output[:, :, layout.before :]
        lost = measure_delta(random_tensor(*video.shape, seed=4).to(video), video, result.query_order, delta)
        more = {"lists": result.lists, "delta": lost}
        # The order of a call that follows the data is made again, from the same data.
        result = pyramid_sparse_attention(q, k, v, config, layout=layout, backend="torch", **more)
    parts = (x[:, :, layout.before :] for x in (q, k, v))
    others = (x[:, :, : layout.before] if extra else None for x in (k, v))
    call = Call(*parts, config, *orders, 40**-0.5, *others, result.lists, lost)
    return call, result.output[:, :, layout.before :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_passes(random_tensor, kind, dtype):
    assert what_differs(*call_of(random_tensor, dtype, **KINDS[kind])) is None


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("order", ["raster", "curve"])
def test_the_correction_is_part_of_it(random_tensor, order, group):
    call, out = call_of(random_tensor, order=order, delta=group)
    assert what_differs(call, out) is None
    assert "times what is allowed" in what_differs(dataclasses.replace(call, delta=None), out)


def wrong(out, call, fault):
    """The output [B, H, L, D] with a fault."""
    out = out.clone()
    if fault == "one head":
        out[1, 2] *= 1.05
    elif fault == "zeros":
        out.zero_()
    elif fault == "not a number":
        out[0, 1, :, 3] = torch.nan
    elif fault == "neighbours changed places":
        out = out.roll(1, 2)
    elif fault == "the last row":
        index = call.query_order.index
        out[:, :, -1 if index is None else index[-1]] = 0
    return out


@pytest.mark.parametrize("fault", ["one head", "zeros", "not a number", "neighbours changed places", "the last row"])
@pytest.mark.parametrize("order", ["raster", "curve"])
def test_what_is_wrong_is_found(random_tensor, order, fault):
    call, out = call_of(random_tensor, torch.float16, order=order)
    assert what_differs(call, wrong(out, call, fault)) is not None


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.2}, {"extra_k": None, "extra_v": None}, {"key_order": TokenOrder(None, None)}, {"v": 1.03}],
    ids=str,
)
def test_what_a_kernel_may_get_wrong_is_found(random_tensor, change):
    """Another factor, no text, keys in another order, values that are a little larger."""
    call, out = call_of(random_tensor, torch.float16, order="curve")
    if "v" in change:
        change = {"v": call.v * change["v"]}
    assert what_differs(dataclasses.replace(call, **change), out) is not None


def test_lists_that_name_no_blocks_or_one_twice_are_found(random_tensor):
    call, out = call_of(random_tensor)
    lists = call.lists
    for blocks, ends in [
        (lists.blocks + 1000, lists.ends),
        (lists.blocks * 0, lists.ends),
        (-1 - lists.blocks, lists.ends),
        (lists.blocks, lists.ends.flip(-1)),
        (lists.blocks, lists.ends + 1000),
    ]:
        broken = dataclasses.replace(lists, blocks=blocks, ends=ends)
        assert "lists" in what_differs(dataclasses.replace(call, lists=broken), out)


def test_the_rounding_of_large_logits_is_allowed(random_tensor):
    """Two keys share every row's weight, and float32 tells logits of such a size apart by less than it may matter."""
    call, _ = call_of(random_tensor, extra=False, shares={1: 1.0}, sparsity=None)
    k = call.k.clone()
    k[:, :, 1::2] = k[:, :, : 2 * (k.shape[2] // 2) : 2]
    call = dataclasses.replace(call, q=call.q * 4000, k=k)
    off = k * (1 + 2.0**-20 * random_tensor(*k.shape, seed=5))
    arguments = {"layout": TokenLayout(GRID), "backend": "torch", "lists": call.lists}
    assert what_differs(call, pyramid_sparse_attention(call.q, off, call.v, call.config, **arguments).output) is None
    off[:, 1] *= -1
    assert what_differs(call, pyramid_sparse_attention(call.q, off, call.v, call.config, **arguments).output)


def test_what_a_gpu_takes_for_zero_is_allowed(random_tensor):
    call, out = call_of(random_tensor, extra=False)
    assert what_differs(dataclasses.replace(call, v=call.v * 1e-42), torch.zeros_like(out)) is None


def test_weighted_values_that_overflow_before_they_are_divided_say_nothing(random_tensor):
    call, out = call_of(random_tensor, extra=False, shares={1: 1.0}, sparsity=None)
    assert what_differs(dataclasses.replace(call, v=torch.full_like(call.v, 1e38)), out * torch.inf) == ""
    assert what_differs(dataclasses.replace(call, v=torch.full_like(call.v, 1e20)), out * torch.inf)


def test_rows_without_an_exact_result_say_nothing(random_tensor):
    """The model's own infinities are not the kernels' fault; a wrong head beside them still is."""
    call, _ = call_of(random_tensor, extra=False)
    k = call.k.clone()
    k[:, 0, 7] = torch.inf
    arguments = {"layout": TokenLayout(GRID), "backend": "torch", "lists": call.lists}
    out = pyramid_sparse_attention(call.q, k, call.v, call.config, **arguments).output
    call = dataclasses.replace(call, k=k)
    assert what_differs(call, out) is None
    out[:, 1] = torch.nan
    assert what_differs(call, out) == "head 1 is not finite"


def test_eight_bits(random_tensor, oracle, random_factors):
    """Against attention over the keys and queries that were rounded, level by level."""
    q, k, v = (random_tensor(1, 2, 200, 32, seed=seed) for seed in (1, 2, 3))
    k += 3  # a mean key that must be subtracted
    levels = (1, 4)
    factors = random_factors((1, 2, 7, 7), levels, seed=5)
    pyramid = dequantise_keys(quantise_keys(build_pyramid(k, v, levels, 32), mean_key(k)))
    config = PyramidConfig(mode="topk", shares={1: 0.5, 4: 0.5}, sparsity=None, tail=False, block_q=32, block_kv=32,
                           precision="int8")  # fmt: skip
    lists = group_by_level(factors, levels)
    raster = TokenOrder(None, None)
    from comfyui_psa.kernels.int8 import dequantise, quantise

    logits, values = [], []
    rounded = dequantise(*quantise(q, 32), 32)
    for factor, queries in ((1, rounded), (4, q)):
        rows = (torch.arange(200) // 32, torch.arange(pyramid.keys[factor].shape[2]) * factor // 32)
        seen = (factors == factor)[:, :, rows[0]][..., rows[1]]
        bias = pyramid.tokens(factor)[: pyramid.keys[factor].shape[2]].float().log()
        level = queries @ pyramid.keys[factor].transpose(-1, -2) * 32**-0.5 + bias
        logits.append(level.masked_fill(~seen, -torch.inf))
        values.append(pyramid.values[factor])
    out = torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 2)
    call = Call(q, k, v, config, raster, raster, 32**-0.5, None, None, lists, None)
    assert what_differs(call, out) is None
    plain = dataclasses.replace(call, config=dataclasses.replace(config, precision="bf16"))
    assert what_differs(plain, out) is not None


def test_it_needs_little(random_tensor):
    """Torch calls per run of rows: the check may cost a few milliseconds, not seconds."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    call, out = call_of(random_tensor, block_q=64, extra=False, order="curve")
    with Count() as count:
        what_differs(call, out)
    assert count.calls <= 60 + 2 * 3 * 2 * 150, "batch entries, heads, runs"

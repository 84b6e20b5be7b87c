"""The correction of one call: against plain loops in float64, and what it does to a whole call."""

import dataclasses

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention
from comfyui_psa.kernels.delta import GROUPS, delta_bytes, measure_delta
from comfyui_psa.kernels.order import TokenOrder


def lost_rows(dense, sparse, index, group, gamma):
    """What every token of one head [L, D] gets back, by the definition, in float64 and before rounding to 8 bits."""
    dense, sparse, back = dense.double(), sparse.double(), torch.zeros_like(dense, dtype=torch.float64)
    for first in range(0, len(index), group):
        members = [int(token) for token in index[first : first + group]]
        mean = sum(dense[token] - sparse[token] for token in members) / len(members)
        for token in members:
            back[token] = gamma * mean
    return back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [*GROUPS.values(), 5])
@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 7, 9), (2, 8, 8)])
def test_rows_are_the_means_of_what_was_lost(random_tensor, grid, group, dtype):
    length = grid[0] * grid[1] * grid[2]
    dense, sparse = (random_tensor(2, 3, length, 16, seed=seed).to(dtype) for seed in (1, 2))
    order = make_order("curve", grid)
    delta = measure_delta(dense, sparse, order, group, gamma=0.9)
    got = order.undo(delta.rows(length))
    for entry, head in ((0, 0), (1, 2)):
        expected = lost_rows(dense[entry, head], sparse[entry, head], order.index, group, 0.9)
        # Half a step of float8_e4m3 is a sixteenth of a number; below its normal range, 2^-10 of the largest / 448.
        bound = expected.abs() / 16 + expected.abs().amax(-1, keepdim=True) * 2**-10 / 448 * 1.01
        assert ((got[entry, head].double() - expected).abs() <= bound * 1.001).all()


def test_every_head_may_have_its_own_order(random_tensor):
    dense, sparse = (random_tensor(1, 2, 40, 8, seed=seed) for seed in (1, 2))
    order = TokenOrder.of(
        torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])[None]
    )
    got = order.undo(measure_delta(dense, sparse, order, 4, gamma=1.0).rows(40))
    for head in (0, 1):
        expected = lost_rows(dense[0, head], sparse[0, head], order.index[0, head], 4, 1.0)
        torch.testing.assert_close(got[0, head].double(), expected, atol=0.01, rtol=0.07)


def test_bytes_are_those_of_the_tensors(random_tensor):
    x = random_tensor(1, 3, 77, 20)
    for group in GROUPS.values():
        delta = measure_delta(x, -x, TokenOrder(None, None), group)
        held = sum(part.numel() * part.element_size() for part in (delta.values, delta.scales))
        assert delta_bytes(3, 77, 20, group) == held


def test_many_heads_are_measured_a_few_at_a_time(random_tensor, monkeypatch):
    from comfyui_psa.kernels import delta as module

    dense, sparse = (random_tensor(2, 5, 30, 8, seed=seed) for seed in (1, 2))
    whole = measure_delta(dense, sparse, TokenOrder(None, None), 2)
    monkeypatch.setattr(module, "_AT_ONCE", 2 * 2 * 30 * 8)
    parts = measure_delta(dense, sparse, TokenOrder(None, None), 2)
    assert torch.equal(whole.values.view(torch.uint8), parts.values.view(torch.uint8))
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_given_back(random_tensor, bad):
    dense, sparse = random_tensor(1, 1, 8, 4, seed=1), random_tensor(1, 1, 8, 4, seed=2)
    dense[0, 0, 3, 1] = bad
    rows = measure_delta(dense, sparse, TokenOrder(None, None)).rows(8)
    assert rows.isfinite().all()
    assert rows[0, 0, 3, 1] == 0


def test_equal_outputs_give_nothing_back(random_tensor):
    x = random_tensor(1, 1, 8, 4)
    assert (measure_delta(x, x, TokenOrder(None, None)).rows(8) == 0).all()


@pytest.mark.parametrize("order", ["raster", "curve"])
@pytest.mark.parametrize(
    "layout", [TokenLayout((4, 6, 7)), TokenLayout((4, 6, 7), before=9, after=3)], ids=["plain", "text"]
)
def test_a_corrected_call_is_the_dense_one_where_it_was_measured(random_tensor, layout, order):
    """sparse + (dense - sparse), up to the rounding of the difference to 8 bits; text rows are dense already."""
    q, k, v = (random_tensor(1, 2, layout.length, 16, seed=seed) for seed in (1, 2, 3))
    config = PyramidConfig(mode="topk", sparsity=0.8, block_q=32, block_kv=32, order=order)
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    first = pyramid_sparse_attention(q, k, v, config, layout=layout)
    video = slice(layout.before, layout.before + layout.video)
    delta = measure_delta(dense.float()[:, :, video], first.output[:, :, video], first.query_order, gamma=1.0)
    again = pyramid_sparse_attention(q, k, v, config, layout=layout, lists=first.lists.packed(), delta=delta)
    lost = (dense - first.output.double()).abs()
    left = (dense - again.output.double()).abs()
    assert lost[:, :, video].max() > 0.1
    assert left.max() < lost.max() / 15
    bound = lost.amax(-1, keepdim=True) / 15 + 1e-5
    assert (left <= bound).all()


def test_a_delta_of_another_shape_is_refused(random_tensor):
    q = random_tensor(1, 2, 64, 16)
    config = PyramidConfig(sparsity=0.5, block_q=32, block_kv=32)
    delta = measure_delta(q, q, TokenOrder(None, None), 2)
    with pytest.raises(ValueError, match="delta has rows of"):
        pyramid_sparse_attention(q, q, q, config, delta=dataclasses.replace(delta, group=1))


def test_an_output_may_be_given(random_tensor):
    q, k, v = (random_tensor(2, 2, 64, 16, seed=seed) for seed in (1, 2, 3))
    config = PyramidConfig(sparsity=0.5, block_q=32, block_kv=32)
    out = torch.full((2, 64, 4, 16), torch.nan).transpose(1, 2)[:, 1:3]
    result = pyramid_sparse_attention(q, k, v, config, out=out)
    assert result.output is out
    assert torch.equal(out, pyramid_sparse_attention(q, k, v, config).output)
    with pytest.raises(ValueError, match="unlike q"):
        pyramid_sparse_attention(q, k, v, config, out=out.double())

"""The whole call: dense equivalence, layouts and orders, invariances, determinism, errors."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.kernels import PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention
from comfyui_psa.kernels.backends import BackendError

GRID = (3, 8, 9)
FULL = PyramidConfig(shares={1: 1.0}, mode="topk", sparsity=None, tail=False, block_q=32, block_kv=32)
BUDGET = PyramidConfig(sparsity=0.6, block_q=32, block_kv=32)
LAYOUTS = [TokenLayout(GRID), TokenLayout(GRID, before=11), TokenLayout(GRID, after=7), TokenLayout(GRID, 5, 6)]


def qkv(random_tensor, length_q, length_k=None, batch=1, heads=2, dim=16, **more):
    length_k = length_k or length_q
    return tuple(
        random_tensor(batch, heads, n, dim, seed=s, **more) for n, s in ((length_q, 1), (length_k, 2), (length_k, 3))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["raster", "curve", "tiles"])
def test_level_one_everywhere_is_dense_attention(random_tensor, poisoned, order, layout):
    q, k, v = qkv(random_tensor, layout.length, batch=2, heads=1)
    config = dataclasses.replace(FULL, order=order, tile=(2, 4, 3))
    result = pyramid_sparse_attention(poisoned(q), poisoned(k), poisoned(v), config, layout=layout)
    torch.testing.assert_close(result.output, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=1e-5)
    assert (result.factors == 1).all()
    assert result.factors.shape == (2, 1, 7, 7)
    assert result.factors.dtype == torch.int16
    assert result.density.item() == pytest.approx(1.0)
    assert result.backend == "torch"


@pytest.mark.parametrize(
    ("length_q", "length_k"), [(1, 1), (1, 100), (100, 1), (31, 33), (32, 64), (63, 65), (129, 97), (300, 130)]
)
def test_level_one_everywhere_is_dense_for_other_query_lengths(random_tensor, length_q, length_k):
    q, k, v = qkv(random_tensor, length_q, length_k)
    result = pyramid_sparse_attention(q, k, v, FULL)
    torch.testing.assert_close(result.output, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("order", "layout"), [("raster", LAYOUTS[0]), ("curve", LAYOUTS[1]), ("tiles", LAYOUTS[2]), ("curve", LAYOUTS[3])]
)
@pytest.mark.parametrize(
    "config",
    [
        BUDGET,
        dataclasses.replace(BUDGET, shares={2: 0.3, 8: 0.2}, sparsity=0.8, tail=False),
        PyramidConfig(shares={1: 0.3, 4: 0.2}, mode="threshold", sparsity=None, tail=False, block_q=64, block_kv=32),
        PyramidConfig(
            shares={1: 0.2, 8: 0.4}, mode="topk", sparsity=None, block_q=32, block_kv=32, importance="sampled"
        ),
        dataclasses.replace(BUDGET, similarity_cap={2: 0.1, 8: 0.0}),
    ],
)
def test_against_the_oracle(oracle, random_tensor, poisoned, config, order, layout):
    """Attention over the map that the call reports, text first or last at full resolution, all put back in order."""
    config = dataclasses.replace(config, order=order, tile=(3, 4, 3))
    q, k, v = qkv(random_tensor, layout.length)
    result = pyramid_sparse_attention(poisoned(q), poisoned(k), poisoned(v), config, layout=layout)
    video = torch.arange(layout.before, layout.before + layout.video)
    index = make_order(order, GRID, (3, 4, 3)).index
    video = video if index is None else video[index]
    text = torch.tensor([t for t in range(layout.length) if not layout.before <= t < layout.before + layout.video])
    extra = (k[:, :, text], v[:, :, text]) if len(text) else (None, None)
    expected = oracle.dense(q, k, v, 0.25)  # text queries see everything
    expected[:, :, video] = oracle.attend_all(
        q[:, :, video], k[:, :, video], v[:, :, video], result.factors, config.block_q, config.block_kv, 0.25, *extra
    )
    torch.testing.assert_close(result.output.double(), expected, atol=1e-5, rtol=1e-5)
    tokens = [config.block_kv] * (layout.video // config.block_kv) + [layout.video % config.block_kv or 0]
    rows = result.factors.flatten(0, -2).tolist()
    assert result.density.item() == pytest.approx(oracle.density(rows, [t for t in tokens if t]), abs=1e-5)


@pytest.mark.parametrize("mode", ["budget", "topk"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_density_is_the_one_asked_for(random_tensor, mode, sparsity):
    layout = TokenLayout((5, 32, 32), before=20)
    q, k, v = qkv(random_tensor, layout.length, heads=1, dim=8)
    config = PyramidConfig(mode=mode, sparsity=sparsity, block_kv=32)
    result = pyramid_sparse_attention(q, k, v, config, layout=layout)
    assert result.density.item() == pytest.approx(1 - sparsity, abs=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_values_are_exact(random_tensor, layout):
    q, k, _ = qkv(random_tensor, layout.length)
    v = torch.linspace(-2, 2, 16).expand(1, 2, layout.length, 16)
    result = pyramid_sparse_attention(5 * q, k, v, dataclasses.replace(BUDGET, sparsity=0.9), layout=layout)
    torch.testing.assert_close(result.output, v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [128, 129, 160, 191])
@pytest.mark.parametrize("shares", [{8: 1.0}, {32: 1.0}, {1: 0.2, 2: 0.3, 8: 0.5}])
def test_pooling_is_exact_where_blocks_are_constant(random_tensor, length, shares):
    q = random_tensor(1, 2, length, 16)
    k, v = (random_tensor(1, 2, 6, 16, seed=s).repeat_interleave(32, 2)[:, :, :length] for s in (1, 2))
    result = pyramid_sparse_attention(q, k, v, dataclasses.replace(FULL, shares=shares))
    torch.testing.assert_close(result.output, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("importance", ["means", "sampled"])
def test_shifting_the_keys_changes_nothing(random_tensor, importance):
    q, k, v = qkv(random_tensor, 300)
    config = dataclasses.replace(BUDGET, importance=importance)
    first = pyramid_sparse_attention(q, k, v, config)
    second = pyramid_sparse_attention(q, k + 2 * random_tensor(1, 2, 1, 16, seed=9), v, config)
    # A pair exactly at a cut may change its level by rounding; not more than that.
    assert (first.factors != second.factors).float().mean() < 0.02
    same = (first.factors == second.factors).all(-1).repeat_interleave(32, -1)[:, :, :300]
    torch.testing.assert_close(second.output[same], first.output[same], atol=1e-4, rtol=1e-4)


def test_grouped_queries(random_tensor):
    """Query head h reads key head h // group, as in torch."""
    q, _, _ = qkv(random_tensor, 216, heads=6)
    _, k, v = qkv(random_tensor, 216, heads=2)
    layout = TokenLayout(GRID)
    grouped = pyramid_sparse_attention(q, k, v, BUDGET, layout=layout)
    repeated = pyramid_sparse_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), BUDGET, layout=layout)
    assert torch.equal(grouped.factors, repeated.factors)
    torch.testing.assert_close(grouped.output, repeated.output)
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(pyramid_sparse_attention(q, k, v, FULL).output, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("importance", ["means", "sampled"])
def test_calls_repeat_and_leave_the_global_generator_alone(random_tensor, importance):
    q, k, v = qkv(random_tensor, 300)
    config = dataclasses.replace(BUDGET, importance=importance)
    originals = [x.clone() for x in (q, k, v)]
    before = torch.random.get_rng_state()
    first = pyramid_sparse_attention(q, k, v, config)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    second = pyramid_sparse_attention(q, k, v, config)
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.factors, second.factors)
    assert all(torch.equal(x, original) for x, original in zip((q, k, v), originals, strict=True))


def test_a_generator_can_be_given(random_tensor):
    q, k, v = qkv(random_tensor, 300)
    config = dataclasses.replace(BUDGET, importance="sampled")
    maps = [
        pyramid_sparse_attention(q, k, v, config, generator=torch.Generator().manual_seed(seed)).factors
        for seed in (3, 3, 4)
    ]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(random_tensor, dtype):
    q, k, v = qkv(random_tensor, 200, dtype=dtype)
    result = pyramid_sparse_attention(q, k, v, FULL)
    assert result.output.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(result.output.double(), dense, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dim", [1, 5, 48, 80, 96])
def test_any_head_size(random_tensor, dim):
    q, k, v = qkv(random_tensor, 70, dim=dim)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(pyramid_sparse_attention(q, k, v, FULL).output, dense, atol=2e-6, rtol=1e-5)


def test_scale(random_tensor):
    q, k, v = qkv(random_tensor, 100)
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.7)
    torch.testing.assert_close(pyramid_sparse_attention(q, k, v, FULL, scale=0.7).output, dense, atol=2e-6, rtol=1e-5)


def test_an_order_made_once_gives_the_same(random_tensor):
    layout = TokenLayout(GRID, before=4)
    q, k, v = qkv(random_tensor, layout.length)
    config = dataclasses.replace(BUDGET, order="curve")
    own = pyramid_sparse_attention(q, k, v, config, layout=layout)
    given = pyramid_sparse_attention(q, k, v, config, layout=layout, order=make_order("curve", GRID))
    assert torch.equal(own.output, given.output)


def test_queries_with_a_layout_of_their_own(random_tensor):
    keys, queries = TokenLayout(GRID, before=6), TokenLayout((2, 5, 7), before=3, after=2)
    q, k, v = qkv(random_tensor, queries.length, keys.length)
    config = dataclasses.replace(FULL, order="curve")
    result = pyramid_sparse_attention(q, k, v, config, layout=keys, query_layout=queries)
    torch.testing.assert_close(result.output, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape_q", "shape_k", "shape_v"),
    [
        ((2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
        ((1, 2, 8, 4), (2, 8, 4), (2, 8, 4)),
        ((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 9, 4)),
        ((1, 2, 8, 4), (1, 2, 8, 4), (1, 1, 8, 4)),
        ((2, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
        ((1, 2, 8, 4), (1, 2, 8, 5), (1, 2, 8, 5)),
        ((1, 3, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
        ((1, 2, 0, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
        ((1, 2, 8, 4), (1, 2, 0, 4), (1, 2, 0, 4)),
    ],
)
def test_shapes_that_do_not_fit(shape_q, shape_k, shape_v):
    with pytest.raises(ValueError, match="q"):
        pyramid_sparse_attention(torch.zeros(shape_q), torch.zeros(shape_k), torch.zeros(shape_v), FULL)


def test_layouts_that_do_not_fit(random_tensor):
    q, k, v = qkv(random_tensor, 216)
    for layout in (TokenLayout((3, 8, 8)), TokenLayout(GRID, before=1), TokenLayout((0, 8, 9), before=216)):
        with pytest.raises(ValueError, match="layout"):
            pyramid_sparse_attention(q, k, v, FULL, layout=layout)
    with pytest.raises(ValueError, match="query_layout"):
        pyramid_sparse_attention(q, k, v, FULL, query_layout=TokenLayout((3, 8, 8)))


def test_an_order_of_another_grid_is_refused(random_tensor):
    """It would read a part of the tokens only, and return as many."""
    q, k, v = qkv(random_tensor, 216)
    with pytest.raises(ValueError, match="order"):
        pyramid_sparse_attention(q, k, v, FULL, layout=TokenLayout(GRID), order=make_order("curve", (1, 8, 26)))


def test_a_backend_that_cannot_serve_says_why(random_tensor, monkeypatch):
    q, k, v = qkv(random_tensor, 40)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"triton|Triton"):
        pyramid_sparse_attention(q, k, v, FULL, backend="triton")
    with pytest.raises(ValueError, match="backend"):
        pyramid_sparse_attention(q, k, v, FULL, backend="numpy")


@pytest.mark.parametrize("batch", [1, 2])
def test_levels_of_another_call_can_be_used(oracle, random_tensor, batch):
    """Attention over given levels, no matter what the queries and keys would choose now."""
    layout = LAYOUTS[1]
    config = dataclasses.replace(BUDGET, order="curve")
    lists = pyramid_sparse_attention(*qkv(random_tensor, layout.length, batch=batch), config, layout=layout).lists
    q, k, v = (random_tensor(batch, 2, layout.length, 16, seed=seed) for seed in (7, 8, 9))
    result = pyramid_sparse_attention(q, k, v, config, layout=layout, lists=lists)
    assert result.lists is lists
    video = layout.before + make_order("curve", GRID).index
    expected = oracle.attend_all(
        q[:, :, video], k[:, :, video], v[:, :, video], lists.factors(), 32, 32, 0.25, k[:, :, :11], v[:, :, :11]
    )
    torch.testing.assert_close(result.output[:, :, video].double(), expected, atol=1e-5, rtol=1e-5)


def test_levels_of_other_shapes_are_refused(random_tensor):
    lists = pyramid_sparse_attention(*qkv(random_tensor, 200), BUDGET).lists
    with pytest.raises(ValueError, match=r"lists are for \[1, 2, 7, 7\] pairs"):
        pyramid_sparse_attention(*qkv(random_tensor, 300), BUDGET, lists=lists)
    with pytest.raises(ValueError, match=r"at \(1, 2, 4, 8, 32\), not"):
        pyramid_sparse_attention(*qkv(random_tensor, 200), dataclasses.replace(BUDGET, tail=False), lists=lists)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_are_declined_not_lost(random_tensor, backend, which):
    tensors = qkv(random_tensor, 200)
    tensors[which].requires_grad_()
    with pytest.raises(BackendError, match="gradients are asked for, and PSA computes none"):
        pyramid_sparse_attention(*tensors, BUDGET, backend=backend)
    with torch.no_grad():
        pyramid_sparse_attention(*tensors, BUDGET)


ON_THE_SECOND_GPU = """
import importlib.util, sys, torch
from pathlib import Path
root = Path(sys.argv[1])
face = root / "__init__.py"
spec = importlib.util.spec_from_file_location("comfyui_psa", face, submodule_search_locations=[str(root)])
sys.modules["comfyui_psa"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from comfyui_psa.kernels import PyramidConfig, pyramid_sparse_attention

config = PyramidConfig(mode="topk", shares={1: 0.3, 8: 0.3}, sparsity=None, precision=sys.argv[2])
q, k, v = torch.randn(3, 1, 2, 1000, 64, generator=torch.Generator().manual_seed(0)).half().unbind(0)
results = [pyramid_sparse_attention(*(x.to(f"cuda:{i}") for x in (q, k, v)), config) for i in (1, 0)]
assert torch.cuda.current_device() == 0
assert results[0].backend == "triton"
assert torch.equal(results[0].output.cpu(), results[1].output.cpu())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_tensors_on_another_device_than_the_current_one(precision):
    """In a separate process, where nothing has enabled access between the two GPUs yet."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", ON_THE_SECOND_GPU, root, precision]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

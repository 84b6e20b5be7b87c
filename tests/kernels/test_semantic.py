"""The orders that follow the data: k-means against scipy, permutations, attention in them against the oracle."""

import contextlib
import dataclasses

import pytest
import torch

from comfyui_psa.kernels import ConfigError, PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention
from comfyui_psa.kernels.semantic import Centroids, k_means, nearest, semantic_orders, spread_tokens

GRID = (3, 8, 9)
CONFIG = PyramidConfig(
    sparsity=0.6, block_q=32, block_kv=32, order="semantic", clusters=(5, 6), cluster_iterations=(4, 1)
)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_k_means_is_that_of_scipy(random_tensor, iterations):
    vq = pytest.importorskip("scipy.cluster.vq")
    x = random_tensor(2, 3, 150, 8)
    x[:, :, 40:90] += 3
    start = spread_tokens(x, 7)
    start[0, 0, 3] = 1000.0  # never anyone's nearest: stays where it is
    centres = k_means(x, start, iterations)
    labels = nearest(x, centres)
    for b in range(2):
        for h in range(3):
            with pytest.warns(UserWarning, match="empty") if (b, h) == (0, 0) else contextlib.nullcontext():
                expected, _ = vq.kmeans2(x[b, h].double().numpy(), start[b, h].double().numpy(), iter=iterations)
            torch.testing.assert_close(centres[b, h].double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
            assert torch.equal(labels[b, h], torch.from_numpy(vq.vq(x[b, h].numpy(), centres[b, h].numpy())[0]).long())
    assert (centres[0, 0, 3] == 1000).all()


def test_tokens_of_a_cluster_lie_together_in_raster_order(random_tensor):
    kinds = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2] * 18)
    x = torch.eye(8)[kinds] * 10 + 0.1 * random_tensor(216, 8)
    q = x.expand(1, 2, 216, 8)
    config = dataclasses.replace(CONFIG, clusters=(3, 3))
    query_order, key_order, centroids = semantic_orders(q, q, config, GRID)
    for order in (query_order, key_order):
        assert torch.equal(order.undo(order.apply(q)), q)
        for index in order.index[0]:
            assert (kinds[index].diff() != 0).sum() == 2
            assert all((index[kinds[index] == kind].diff() > 0).all() for kind in range(3))
    assert centroids.keys.shape == (1, 2, 3, 8)


def test_later_steps_begin_where_the_last_one_ended(random_tensor):
    q, k = random_tensor(1, 2, 216, 8, seed=1), random_tensor(1, 2, 216, 8, seed=2)
    first = semantic_orders(q, k, CONFIG, GRID)[2]
    assert torch.equal(first.keys, k_means(k, spread_tokens(k, 6), 4))
    second = semantic_orders(q, k, CONFIG, GRID, first)[2]
    assert torch.equal(second.queries, k_means(q, first.queries, 1))
    other = Centroids(first.queries[:, :, :2], first.keys[:, :1])
    assert torch.equal(semantic_orders(q, k, CONFIG, GRID, other)[2].keys, first.keys)


def test_there_are_no_more_clusters_than_blocks(random_tensor):
    x = random_tensor(1, 1, 216, 8)
    _, _, centroids = semantic_orders(x, x, dataclasses.replace(CONFIG, clusters=(200, 1000)), GRID)
    assert centroids.queries.shape[2] == centroids.keys.shape[2] == 216 // 32


def test_the_hybrid_order_keeps_queries_on_the_curve(random_tensor):
    x = random_tensor(1, 2, 216, 8)
    query_order, key_order, centroids = semantic_orders(x, x, dataclasses.replace(CONFIG, order="hybrid"), GRID)
    assert torch.equal(query_order.index, make_order("curve", GRID).index)
    assert key_order.index.shape == (1, 2, 216)
    assert centroids.queries is None


@pytest.mark.parametrize("order", ["semantic", "hybrid"])
@pytest.mark.parametrize("importance", ["pooled", "sampled"])
def test_attention_against_the_oracle(oracle, random_tensor, order, importance):
    layout = TokenLayout(GRID, before=5)
    config = dataclasses.replace(CONFIG, order=order, importance=importance)
    q, k, v = (random_tensor(2, 2, layout.length, 16, seed=seed) for seed in (1, 2, 3))
    result = pyramid_sparse_attention(q, k, v, config, layout=layout)
    video = [result.query_order.apply(q[:, :, 5:]), *(result.key_order.apply(x[:, :, 5:]) for x in (k, v))]
    expected = oracle.attend_all(*video, result.factors, 32, 32, 0.25, k[:, :, :5], v[:, :, :5])
    torch.testing.assert_close(
        result.query_order.apply(result.output[:, :, 5:]).double(), expected, atol=1e-5, rtol=1e-5
    )
    assert result.density.item() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("field", "given"), [("clusters", (0, 5)), ("clusters", (5,)), ("cluster_iterations", (1.5, 2))]
)
def test_impossible_settings_are_named(field, given):
    with pytest.raises(ConfigError, match=f"{field}: .*two whole numbers"):
        dataclasses.replace(CONFIG, **{field: given})

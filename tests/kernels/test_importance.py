"""Importance against the oracle, its randomness, and the similarity cap."""

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig
from comfyui_psa.kernels.importance import importance, pooled, reduced_softmax, sampled
from comfyui_psa.kernels.similarity import similarity_cap

SHAPES = [
    (64, 64, 32, 32),
    (1, 1, 32, 32),
    (31, 33, 32, 32),
    (129, 200, 128, 64),
    (65, 257, 32, 128),
    (300, 63, 64, 32),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def means_importance(q, k, block_q, block_kv, scale):
    return reduced_softmax(pooled(q, block_q, block_q), pooled(k, block_kv, block_kv), scale, "max")


def sampled_importance(q, k, block_q, block_kv, scale, source, share=0.25, reduction="max"):
    chosen = (sampled(x, block, share, source) for x, block in ((q, block_q), (k, block_kv)))
    return reduced_softmax(*chosen, scale, reduction)


@pytest.mark.parametrize(("length_q", "length_k", "block_q", "block_kv"), SHAPES)
def test_means_against_the_oracle(oracle, random_tensor, poisoned, length_q, length_k, block_q, block_kv):
    q, k = 4 * random_tensor(2, 2, length_q, 8, seed=1), 4 * random_tensor(2, 2, length_k, 8, seed=2)
    scores = means_importance(poisoned(q), poisoned(k), block_q, block_kv, 0.3)
    assert scores.dtype == torch.float32
    for b in range(2):
        for h in range(2):
            expected = oracle.means_importance(q[b, h], k[b, h], block_q, block_kv, 0.3)
            torch.testing.assert_close(scores[b, h].double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize(("length_q", "length_k", "block_q", "block_kv"), SHAPES)
def test_sampling_everything_is_the_exact_softmax(
    oracle, random_tensor, poisoned, length_q, length_k, block_q, block_kv, reduction
):
    """The official code takes exp(score - maximum) without the sum; a row then ranks by its own maximum only."""
    q, k = 2 * random_tensor(1, 2, length_q, 8, seed=3), 2 * random_tensor(1, 2, length_k, 8, seed=4)
    scores = sampled_importance(
        poisoned(q), poisoned(k), block_q, block_kv, 0.35, generator(), share=1.0, reduction=reduction
    )
    assert scores.dtype == torch.float32
    for h in range(2):
        expected = oracle.exact_importance(q[0, h], k[0, h], block_q, block_kv, 0.35, reduction)
        torch.testing.assert_close(scores[0, h].double(), expected, atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize(("length_q", "length_k", "block_q", "block_kv"), SHAPES)
def test_pooled_rows_are_divided_by_the_sum_over_means_of_32(random_tensor, length_q, length_k, block_q, block_kv):
    """Exact where 32 neighbours are alike; elsewhere a quarter of the rows represents all."""
    config = PyramidConfig(importance="pooled", reduction="max", block_q=block_q, block_kv=block_kv)
    q, k = random_tensor(1, 2, length_q, 8, seed=3), random_tensor(1, 2, -(-length_k // 32), 8, seed=4)
    alike = k.repeat_interleave(32, 2)[:, :, :length_k]
    exact = reduced_softmax(pooled(q, block_q, 8), pooled(alike, block_kv, 8), 0.35, "max")
    torch.testing.assert_close(importance(q, alike, config.ranking, 0.35), exact, atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
def test_a_sample_finds_the_needle_block(share):
    """Blocks that are alike inside are ranked right by any sample."""
    direction = torch.eye(8).repeat_interleave(32, 0)[None, None]
    scores = sampled_importance(direction, direction, 32, 32, 8.0, generator(), share=share)
    assert torch.equal(scores[0, 0].argmax(-1), torch.arange(8))
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()


@pytest.mark.parametrize("kind", ["means", "sampled"])
def test_the_same_seed_gives_the_same_scores_and_the_global_generator_is_untouched(random_tensor, kind):
    q, k = random_tensor(1, 2, 200, 16, seed=5), random_tensor(1, 2, 300, 16, seed=6)
    config = PyramidConfig(importance=kind, seed=7)
    before = torch.random.get_rng_state()
    first = importance(q, k, config.ranking, 0.25)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(importance(q, k, config.ranking, 0.25), first)
    if kind == "sampled":
        assert not torch.equal(importance(q, k, PyramidConfig(importance=kind, seed=8).ranking, 0.25), first)
        assert torch.equal(importance(q, k, config.ranking, 0.25, generator(7)), first)


def test_sampled_importance_is_the_same_in_chunks(random_tensor, monkeypatch):
    q, k = random_tensor(1, 1, 300, 8, seed=1), random_tensor(1, 1, 300, 8, seed=2)
    whole = sampled_importance(q, k, 32, 32, 0.3, generator())
    monkeypatch.setitem(reduced_softmax.__globals__, "_SCORES_AT_ONCE", 1)
    torch.testing.assert_close(sampled_importance(q, k, 32, 32, 0.3, generator()), whole)


def test_bfloat16_is_scored_in_float32(oracle, random_tensor):
    q, k = (random_tensor(1, 1, 256, 16, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    scores = sampled_importance(q, k, 64, 64, 0.25, generator(), share=1.0)
    expected = oracle.exact_importance(q[0, 0], k[0, 0], 64, 64, 0.25)
    torch.testing.assert_close(scores[0, 0].double(), expected, atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("length", [1, 2, 33, 64, 100, 160, 191])
def test_similarity_cap_against_the_oracle(oracle, random_tensor, length):
    thresholds = {2: 0.7, 4: 0.65, 8: 0.6}
    steps = random_tensor(2, 3, length, 6, seed=length)
    # A random walk: the nearer its starting point to zero, the less its neighbours resemble each other.
    k = steps.cumsum(2) + 3 * random_tensor(2, 3, 1, 6, seed=9)
    cap = similarity_cap(k, dict(reversed(thresholds.items())), 32)
    assert cap.dtype == torch.int16
    for b in range(2):
        for h in range(3):
            assert cap[b, h].tolist() == oracle.similarity_caps(k[b, h], thresholds, 32)


def test_similarity_cap_extremes():
    alike = torch.ones(1, 1, 64, 4)
    assert similarity_cap(alike, {2: 0.7, 4: 0.65, 8: 0.6}, 32).tolist() == [[[8, 8]]]
    opposed = alike * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    assert similarity_cap(opposed, {2: 0.7, 4: 0.65, 8: 0.6}, 32).tolist() == [[[1, 1]]]


def test_pooled_is_the_block_max_of_the_softmax_over_means_of_eight(random_tensor):
    """Written out in float64: means of the tokens that exist, bias ln of their number, max over the block pair; the sum
    that weights are divided by is that over means of 32."""
    q, k = random_tensor(1, 2, 70, 16), random_tensor(1, 2, 101, 16)
    scale = 0.25
    groups_q = [q[0, :, i : i + 8].double().mean(1) for i in range(0, 70, 8)]
    groups_k = [k[0, :, i : i + 8].double().mean(1) for i in range(0, 101, 8)]
    bias = torch.tensor([min(8, 101 - i) for i in range(0, 101, 8)], dtype=torch.float64).log()
    logits = torch.stack(groups_q, 1) @ torch.stack(groups_k, 1).transpose(1, 2) * scale + bias
    summed_k = torch.stack([k[0, :, i : i + 32].double().mean(1) for i in range(0, 101, 32)], 1)
    summed_bias = torch.tensor([32, 32, 32, 5], dtype=torch.float64).log()
    sums = (torch.stack(groups_q, 1) @ summed_k.transpose(1, 2) * scale + summed_bias).exp().sum(-1, keepdim=True)
    weights = logits.exp() / sums
    expected = torch.stack(
        [
            torch.stack([weights[:, a : a + 4, b : b + 8].amax((1, 2)) for b in range(0, 13, 8)], -1)
            for a in range(0, 9, 4)
        ],
        1,
    )
    scores = importance(q, k, PyramidConfig(block_q=32, block_kv=64, importance="pooled").ranking, scale)
    torch.testing.assert_close(scores[0].double(), expected, atol=1e-5, rtol=1e-4)

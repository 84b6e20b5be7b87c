"""Ways to rank blocks that are only tried: equal to the kernels' where these have them, and to sums over all tokens."""

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig
from comfyui_psa.kernels.importance import importance, reduced_softmax
from comfyui_psa.workshop.quality.ranking import ranked_lists, representatives, with_second_order

CONFIG = {"shares": {1: 0.2, 8: 0.3}, "mode": "topk", "sparsity": 0.7, "tail": False, "block_q": 32, "block_kv": 32}


def _smooth(length: int, seed: int) -> torch.Tensor:
    noise = torch.randn(1, 2, length, 16, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(2) / 4


@pytest.mark.parametrize(
    ("way", "config"),
    [
        ("pooled 8", {"importance": "pooled", "reduction": "mean"}),
        ("sampled 4", {"importance": "sampled", "reduction": "mean"}),
    ],
)
def test_equal_to_the_kernels(way, config):
    from comfyui_psa.kernels.levels import choose_levels

    q, k = _smooth(1000, 0), _smooth(1000, 1)  # the last block is short
    config = PyramidConfig(**CONFIG, **config)
    found = ranked_lists(q, k, config, {"q": way, "k": way}).factors()
    expected = choose_levels(importance(q, k, config.ranking, 0.25), config)
    # Pooled importance sums over coarser means than it compares, which moves a few blocks.
    assert (found == expected).float().mean() > (0.98 if way == "pooled 8" else 0.9999)


@pytest.mark.parametrize("kind", ["spread", "strided"])
def test_one_token_of_every_group(kind):
    x = torch.arange(100.0).view(1, 1, 100, 1)
    found = representatives(x, 32, f"{kind} 8", torch.Generator().manual_seed(0))
    rows = found.rows[0, 0, :, 0].view(4, 4)
    there = found.tokens() > 0
    assert there.sum() == 13  # 100 tokens in groups of 8
    assert torch.equal((rows[there] // 8).long(), torch.arange(13))


def test_second_order_comes_closer_to_the_mass_of_all_tokens():
    # Groups of unlike spread: where all are alike, leaving it out changes nothing.
    spread = torch.rand(1, 2, 64, 1, 1, generator=torch.Generator().manual_seed(2)).expand(-1, -1, -1, 8, 1)
    k = torch.randn(1, 2, 512, 64, generator=torch.Generator().manual_seed(1)) * spread.reshape(1, 2, 512, 1)
    q, scale, one = torch.randn(1, 2, 512, 64, generator=torch.Generator().manual_seed(0)), 0.125, torch.Generator()
    queries, every = (representatives(x, 32, "pooled 1", one) for x in (q, k))
    keys = representatives(k, 32, "pooled 8", one)
    exact, first, second = (
        reduced_softmax(*pair, scale, "mean")
        for pair in ((queries, every), (queries, keys), with_second_order(queries, keys, k, scale))
    )
    # Rows of `keys` stand for 8 tokens each, and a mean over them is 8 times the mean over tokens.
    assert (second / 8 - exact).abs().mean() < 0.5 * (first / 8 - exact).abs().mean()

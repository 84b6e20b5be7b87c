"""diffusers' context parallel (Ulysses) in two processes on a CPU: the video that one makes, to the last bit."""

import pytest
import torch

PSA = {"sparsity": 0.6, "min_tokens": 0, "warm_up": 1, "correction": "off"}
ODD = (1, 16, 3, 20, 36)
"""540 tokens: a last block of 28, and 270 tokens on each rank."""

UNEVEN = "enable parallelism with ulysses_anything=True"
BUDGET = {"mode": "budget", "shares": {1: 0.4, 2: 0.1, 4: 0.1, 8: 0.2}}

CASES = {
    "dense": {"psa": None},
    "topk": {"psa": PSA},
    "curve, odd length": {"psa": PSA | {"order": "curve"}, "size": ODD},
    "semantic": {"psa": PSA | {"order": "semantic"}},
    "hybrid, odd length": {"psa": PSA | {"order": "hybrid"}, "size": ODD},
    "random samples": {"psa": PSA | {"importance": "sampled"}},
    "similarity cap": {"psa": PSA | {"similarity_cap": {2: 0.7, 4: 0.6}}},
    "falling, levels kept": {"psa": PSA | {"falling": 0.3, "reuse_steps": 2}, "steps": 4},
    "budget": {"psa": PSA | BUDGET},
    "budget, similarity cap, levels kept": {
        "psa": PSA | BUDGET | {"similarity_cap": {2: 0.7, 4: 0.6}, "reuse_steps": 2}, "steps": 4, "size": ODD,
    },
    "budget, correction, guidance": {
        "psa": PSA | BUDGET | {"correction": "full"}, "steps": 4, "guidance": 3.0,
    },
    "correction": {"psa": PSA | {"correction": "full"}, "steps": 4},
    "correction, guidance, odd length": {
        "psa": PSA | {"correction": "half", "warm_up": 2}, "steps": 5, "size": ODD, "guidance": 3.0,
    },
}  # fmt: skip


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_what_one_makes(start_ranks, work, name):
    case = CASES[name]
    alone = work.wan(**case)
    for psa_first in (True, False)[: 1 if case["psa"] is None else 2]:
        for rank in start_ranks(2).run(
            work.__file__, "wan", parallel={"ulysses_degree": 2}, psa_first=psa_first, **case
        ):
            assert torch.equal(rank["latents"], alone["latents"])
            halves = [(batch, heads // 2, *rest) for batch, heads, *rest in alone["self_attention"]]
            assert rank["self_attention"] == halves, "half of the heads, all of the tokens"
            for figure in ("sparse", "dense", "fallbacks"):
                assert rank.get(figure) == alone.get(figure)
    if case["psa"] is not None:
        assert alone["sparse"] > 0
        assert not torch.equal(alone["latents"], work.wan(**case | {"psa": None})["latents"])


@pytest.mark.parametrize("size", [(1, 16, 3, 34, 30), (1, 16, 5, 22, 26)])
def test_unequal_parts(start_ranks, work, size):
    """765 and 715 tokens, 5 heads: one rank has 3 of them."""
    case = {"psa": PSA | BUDGET | {"correction": "full"}, "steps": 4, "size": size, "heads": 5}
    alone = work.wan(**case)
    ranks = start_ranks(2).run(work.__file__, "wan", parallel={"ulysses_degree": 2, "ulysses_anything": True}, **case)
    for rank, heads in zip(ranks, (3, 2), strict=True):
        assert distance(rank["latents"], alone["latents"]) < 1e-5
        assert rank["self_attention"] == [(1, heads, *rest) for _, _, *rest in alone["self_attention"]]
        assert rank["sparse"] == alone["sparse"] > 0


@pytest.mark.parametrize(
    ("parallel", "changes", "words"),
    [
        ({}, {"heads": 3}, f"divides the 3 heads of the model; choose one of 3, or {UNEVEN}"),
        ({}, {"size": (1, 16, 3, 34, 30)}, f"divides the 765 video tokens; {UNEVEN}"),
        ({"ulysses_anything": True}, {"heads": 1}, "divides the 1 heads"),
    ],
)
def test_what_cannot_be_shared_says_what_to_choose(start_ranks, work, parallel, changes, words):
    given = {"psa": PSA, "parallel": {"ulysses_degree": 2} | parallel} | changes
    for said in start_ranks(2).run(work.__file__, "refused", **given):
        assert said.startswith(f"enable_parallelism, ulysses_degree: 2 was given; allowed: a number that {words}")


def test_a_rank_that_goes_its_own_way_does_not_stop_the_others(start_ranks, work):
    """One runs out of memory, computes some calls in two parts and some dense: the sums of a budget still meet."""
    case = {"psa": PSA | BUDGET, "steps": 4, "guidance": 3.0}
    alone = work.wan(**case)
    one, other = start_ranks(2).run(work.__file__, "wan", parallel={"ulysses_degree": 2}, troubled=1, **case)
    assert torch.equal(one["latents"], other["latents"])
    assert one["sparse"] == alone["sparse"]
    assert 0 < other["sparse"] < alone["sparse"]
    assert distance(one["latents"], alone["latents"]) < 0.02


def test_ring_attention_stays_dense_and_says_what_to_choose(start_ranks, work):
    for rank in start_ranks(2).run(work.__file__, "ring"):
        assert rank["same"]
        assert rank["dense"] == 6
        (reason,) = rank["fallbacks"]
        assert "ulysses_degree instead of ring_degree" in reason
        assert [words for words in rank["said"] if reason in words] == [f"PSA: staying dense: {reason}"]


def distance(one, other):
    return float((one - other).norm() / other.norm())

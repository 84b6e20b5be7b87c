"""diffusers' context parallel (Ulysses) on two processes of a CPU: the video that one process makes, to the last bit."""

import pytest
import torch

PSA = {"sparsity": 0.6, "min_tokens": 0, "warm_up": 1, "correction": "off"}
ODD = (1, 16, 3, 20, 36)
"""540 tokens: a last block of 28, and 270 tokens on each rank."""

CASES = {
    "dense": {"psa": None},
    "topk": {"psa": PSA},
    "curve, odd length": {"psa": PSA | {"order": "curve"}, "size": ODD},
    "semantic": {"psa": PSA | {"order": "semantic"}},
    "hybrid, odd length": {"psa": PSA | {"order": "hybrid"}, "size": ODD},
    "random samples": {"psa": PSA | {"importance": "sampled"}},
    "similarity cap": {"psa": PSA | {"similarity_cap": {2: 0.7, 4: 0.6}}},
    "falling, levels kept": {"psa": PSA | {"falling": 0.3, "reuse_steps": 2}, "steps": 4},
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

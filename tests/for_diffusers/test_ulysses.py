"""diffusers' context parallel (Ulysses) in two processes on a CPU: the video that one makes, to the last bit."""

from types import SimpleNamespace

import pytest
import torch

from comfyui_psa.for_diffusers import enable_ulysses
from comfyui_psa.for_diffusers.cogvideox import SharedProcessor
from comfyui_psa.for_diffusers.parallel import find_parallel
from comfyui_psa.kernels.order import TokenLayout

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
    "two experts": {"psa": PSA, "experts": 2, "steps": 4},
    "a timestep for every token": {"psa": PSA | {"correction": "full"}, "steps": 4, "by_token": True},
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


@pytest.mark.parametrize("psa", [None, PSA | {"warm_up": 0}])
def test_a_video_from_an_image(start_ranks, work, psa):
    """257 tokens of the image, which two ranks cannot share evenly, are whole in both."""
    alone = work.wan_from_an_image(psa=psa)
    for rank in start_ranks(2).run(work.__file__, "wan_from_an_image", psa=psa, parallel={"ulysses_degree": 2}):
        assert torch.equal(rank["output"], alone["output"])
        assert rank.get("sparse") == alone.get("sparse") != 0


COGVIDEOX = {
    "dense": {"kind": "5b", "size": (1, 16, 6, 24, 32)},
    "topk": {"kind": "5b", "size": (1, 16, 6, 24, 32), "psa": PSA, "guidance": 3.0},
    "fused projections": {"kind": "5b", "size": (1, 16, 5, 20, 26), "psa": PSA, "fused": True},
    "2B, which has no rotary positions": {"kind": "2b", "size": (1, 16, 6, 24, 32), "psa": PSA | BUDGET},
    "1.5, correction, guidance": {
        "kind": "1.5", "size": (1, 16, 6, 24, 32), "psa": PSA | {"correction": "full"}, "steps": 4, "guidance": 3.0,
    },
    "unequal parts": {
        "kind": "5b", "size": (1, 16, 5, 22, 26), "psa": PSA | BUDGET, "heads": 3, "guidance": 3.0,
        "parallel": {"uneven": True},
    },
}  # fmt: skip


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("name", COGVIDEOX)
def test_cogvideox_with_its_text_in_every_rank(start_ranks, work, name):
    case = COGVIDEOX[name] | {"parallel": None}
    alone = work.cogvideox(**case)
    case["parallel"] = COGVIDEOX[name].get("parallel", {})
    for psa_first in (True, False)[: 1 if name in ("dense", "unequal parts") else 2]:
        ranks = start_ranks(2).run(work.__file__, "cogvideox", psa_first=psa_first, **case)
        for number, rank in enumerate(ranks):
            assert distance(rank["latents"], alone["latents"]) < 1e-5
            heads = (case.get("heads", 4) + 1 - number) // 2
            assert rank["self_attention"] == [(batch, heads, *rest) for batch, _, *rest in alone["self_attention"]]
            for figure in ("sparse", "dense", "fallbacks"):
                assert rank.get(figure) == alone.get(figure)
        assert torch.equal(ranks[0]["latents"], ranks[1]["latents"])
    if case.get("psa"):
        assert alone["sparse"] > 0


@pytest.mark.parametrize(("fused", "name"), [(True, "FusedCogVideoXAttnProcessor2_0"), (False, "function")])
def test_processors_that_share_nothing_are_refused(start_ranks, work, fused, name):
    for said in start_ranks(2).run(work.__file__, "own_processors", fused=fused):
        assert said.startswith(f"enable_parallelism, attention processor: '{name}' was given; allowed: one that shares")
        assert said.endswith("call enable_ulysses after anything that changes it")


@pytest.mark.slow(seconds=60)
def test_four_ranks_make_what_one_makes(start_ranks, work):
    case = {"psa": PSA | BUDGET | {"correction": "full"}, "steps": 4}
    alone = work.wan(**case)
    for rank in start_ranks(4).run(work.__file__, "wan", parallel={"ulysses_degree": 4}, **case):
        assert torch.equal(rank["latents"], alone["latents"])
        assert {shape[1] for shape in rank["self_attention"]} == {1}


@pytest.mark.slow(seconds=60)
def test_three_ranks_whose_parts_are_all_unequal(start_ranks, work):
    """715 tokens, and 7 heads of which the ranks have 3, 3 and 1."""
    case = {"psa": PSA | BUDGET | {"correction": "full"}, "steps": 4, "size": (1, 16, 5, 22, 26), "heads": 7}
    parallel, three = {"ulysses_degree": 3, "ulysses_anything": True}, start_ranks(3)
    alone = work.wan(**case)
    for rank, heads in zip(three.run(work.__file__, "wan", parallel=parallel, **case), (3, 3, 1), strict=True):
        assert distance(rank["latents"], alone["latents"]) < 1e-5
        assert rank["self_attention"] == [(1, heads, *rest) for _, _, *rest in alone["self_attention"]]
        assert rank["sparse"] == alone["sparse"] > 0
    for said in three.run(work.__file__, "refused", parallel=parallel, **case | {"heads": 4}):
        assert said.endswith("a number that divides the 4 heads of the model; choose one of 2, 4"), "2, 2 and none"


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


@pytest.mark.parametrize(("keeps_text", "before", "fits"), [(False, 0, False), (False, 1, True), (True, 1, False)])
def test_the_tokens_that_must_divide_are_those_that_are_split(keeps_text, before, fits):
    """75 video tokens, and one before them that is split with them, or whole in every process."""
    mesh = SimpleNamespace(get_group=lambda: None, get_local_rank=lambda: 0)
    config = SimpleNamespace(ring_degree=1, ulysses_degree=2, ulysses_anything=False, _ulysses_mesh=mesh)
    transformer = SimpleNamespace(
        _parallel_config=SimpleNamespace(context_parallel_config=config), config=SimpleNamespace(num_attention_heads=4)
    )
    processor = SharedProcessor() if keeps_text else SimpleNamespace(_parallel_config=config)
    given = transformer, [SimpleNamespace(processor=processor)], TokenLayout((3, 5, 5), before)
    if fits:
        assert find_parallel(*given).ranks == 2
    else:
        with pytest.raises(ValueError, match="divides the 75 video tokens"):
            find_parallel(*given)


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


def vace():
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(num_attention_heads=5, num_layers=1, ffn_dim=64, text_dim=32, vace_layers=[0])


def test_enable_ulysses_says_what_is_missing(pipes, tiny, monkeypatch):
    with pytest.raises(RuntimeError, match="start the script with torchrun"):
        enable_ulysses(pipes.pipeline(pipes.wan()))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 5)
    with pytest.raises(TypeError, match="enable_ulysses, pipe: 'object' was given"):
        enable_ulysses(object())
    with pytest.raises(ValueError, match=r"a number that divides the 2 heads of the model; choose one of 2$"):
        enable_ulysses(pipes.wan(), uneven=True)
    with pytest.raises(ValueError, match=r"WanVACETransformer3DModel was given; allowed: WanTransformer3DModel, CogV"):
        enable_ulysses(SimpleNamespace(transformer=vace()))
    model = tiny.transformer("5b", num_attention_heads=5)

    class Own:
        pass

    model.set_attn_processor(Own())
    with pytest.raises(
        ValueError, match=r"attention processors Own were given; .* CogVideoXAttnProcessor2_0, .*set one"
    ):
        enable_ulysses(model)
    assert model._parallel_config is None


def test_shared_attention_takes_no_mask_and_computes_no_gradients():
    states = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="leave it out"):
        SharedProcessor()(None, states, states, attention_mask=states)
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        SharedProcessor()(None, states, states)

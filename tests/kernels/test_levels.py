"""Levels from importance: topk, threshold and budget against loops, the cap, and the grouping for the kernels."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_psa.kernels import PyramidConfig
from comfyui_psa.kernels.levels import choose_levels, group_by_level, listed_blocks, remaining_mass

PUBLISHED = {1: "0.10", 2: "0.05", 8: "0.20"}


def make_config(shares, mode, sparsity=None, tail=False, **more):
    shares = {factor: float(share) for factor, share in shares.items()}
    return PyramidConfig(shares=shares, mode=mode, sparsity=sparsity, tail=tail, **more)


def softmax_scores(shape, temperature, seed=0):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * temperature
    return torch.softmax(logits, -1)


def rows_of(scores, factors):
    return zip(scores.flatten(0, -2).tolist(), factors.flatten(0, -2).tolist(), strict=True)


# --- topk ---


@pytest.mark.parametrize("blocks", [100, 20, 40, 200, 1000])
def test_topk_counts_of_the_published_shares(blocks):
    """10 % at full resolution, 5 % at factor 2, none at 4, 20 % at 8."""
    scores = softmax_scores((2, 2, 3, blocks), 2.0)
    factors = choose_levels(scores, make_config({1: 0.1, 2: 0.05, 4: 0.0, 8: 0.2}, "topk"))
    assert factors.dtype == torch.int16
    for factor, share in ((1, 10), (2, 5), (4, 0), (8, 20), (0, 65)):
        assert ((factors == factor).sum(-1) == blocks * share // 100).all()


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 13, 50, 143])
@pytest.mark.parametrize("tail", [False, True])
def test_topk_against_the_oracle(oracle, blocks, tail):
    scores = softmax_scores((1, 2, 4, blocks), 2.0, seed=blocks)
    factors = choose_levels(scores, make_config(PUBLISHED, "topk", tail=tail))
    for row, got in rows_of(scores, factors):
        assert got == oracle.topk_levels(row, PUBLISHED, 64 if tail else 0)


def test_topk_ties_go_to_the_lower_index():
    scores = torch.tensor([1, 3, 3, 1, 3, 1, 3, 3, 0, 0.0]).view(1, 1, 1, 10)
    factors = choose_levels(scores, make_config({1: 0.2, 2: 0.2, 4: 0.2}, "topk"))
    assert factors.flatten().tolist() == [4, 1, 1, 0, 2, 0, 2, 4, 0, 0]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.85, 0.95])
@pytest.mark.parametrize("tail", [False, True])
def test_topk_scaled_to_a_sparsity(oracle, sparsity, tail):
    scores = softmax_scores((1, 2, 3, 300), 1.0)
    factors = choose_levels(scores, make_config(PUBLISHED, "topk", sparsity, tail))
    assert oracle.density(factors.flatten(0, -2).tolist()) == pytest.approx(1 - sparsity, abs=0.01)


def test_topk_of_too_few_blocks_is_refused_with_the_field():
    with pytest.raises(ValueError, match="sparsity") as caught:
        choose_levels(softmax_scores((1, 1, 1, 3), 1.0), make_config(PUBLISHED, "topk", 0.95))
    assert caught.value.field == "sparsity"


# --- threshold ---


def test_threshold_is_inclusive():
    """A block whose cumulative importance equals the bound belongs to the level; the official code takes one more."""
    scores = torch.tensor([0.0625, 0.5, 0.125, 0.25, 0.0625]).view(1, 1, 1, 5)
    factors = choose_levels(scores, make_config({1: 0.5, 2: 0.25, 4: 0.125}, "threshold"))
    assert factors.flatten().tolist() == [0, 1, 4, 2, 0]
    factors = choose_levels(scores, make_config({1: 0.49, 2: 0.25, 4: 0.125}, "threshold"))
    assert factors.flatten().tolist() == [0, 1, 0, 4, 0]


@pytest.mark.parametrize("blocks", [1, 2, 9, 65, 144])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0, 60.0])
@pytest.mark.parametrize("tail", [False, True])
def test_threshold_against_the_oracle(oracle, blocks, temperature, tail):
    shares = {8: 0.15, 1: 0.37, 2: 0.11, 4: 0.13}
    scores = softmax_scores((2, 2, 3, blocks), temperature, seed=blocks)
    factors = choose_levels(scores, make_config(shares, "threshold", tail=tail))
    dropped = 64 if tail else 0
    for row, got in rows_of(scores, factors):
        # Sums in float32 may fall on either side of a bound that is this close.
        low = oracle.threshold_levels(row, shares, dropped, -1e-5)
        high = oracle.threshold_levels(row, shares, dropped, 1e-5)
        assert all(g in {a, b} for g, a, b in zip(got, low, high, strict=True))


def test_threshold_has_no_hidden_floor_at_full_resolution():
    scores = torch.full((1, 1, 1, 100), 1e-6)
    scores[..., 42] = 1.0
    factors = choose_levels(scores, make_config({1: 0.5, 8: 0.2}, "threshold"))
    assert factors.flatten().nonzero().tolist() == [[42]]


@pytest.mark.parametrize("mode", ["threshold", "topk"])
@pytest.mark.parametrize("temperature", [0.3, 3.0, 60.0])
def test_a_bound_of_one_keeps_every_block(mode, temperature):
    """E <= 1 holds for every block, the last and those whose importance underflowed included."""
    scores = softmax_scores((1, 2, 3, 50), temperature)
    factors = choose_levels(scores, make_config({1: 1.0}, mode))
    assert (factors == 1).all()


def test_levels_are_chosen_row_by_row():
    scores = softmax_scores((2, 2, 3, 80), 2.0)
    config = make_config({1: 0.4, 2: 0.1, 8: 0.2}, "threshold")
    whole = choose_levels(scores, config)
    assert torch.equal(choose_levels(scores[1:, :1, 2:], config), whole[1:, :1, 2:])
    assert torch.equal(choose_levels(scores * 1024, config), whole)


# --- heads that several processes share ---


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (4, 2), (1, 5)])
@pytest.mark.parametrize("capped", [False, True])
def test_a_budget_is_that_of_all_heads_wherever_they_are(in_parts, sizes, capped):
    """Heads of very different temper: each part alone would get another scale."""
    scores = torch.cat([softmax_scores((2, 1, 7, 80), 0.5 + 2 * head, seed=head) for head in range(6)], 1)
    config = make_config({1: 0.4, 2: 0.1, 8: 0.2}, "budget", 0.8)
    cap = None
    if capped:
        config = dataclasses.replace(config, similarity_cap={2: 0.5, 4: 0.4})
        choices = torch.tensor([1, 2, 4], dtype=torch.int16)
        cap = choices[torch.randint(3, (2, 6, 80), generator=torch.Generator().manual_seed(9))]
    whole = choose_levels(scores, config, cap)
    assert torch.equal(torch.cat(in_parts(choose_levels, scores, config, sizes, cap), 1), whole)
    alone = choose_levels(scores[:, : sizes[0]], config, None if cap is None else cap[:, : sizes[0]])
    assert not torch.equal(alone, whole[:, : sizes[0]])


# --- any rule ---

SHARES = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([0.03, 0.07, 0.11, 0.19]), min_size=1)


@settings(max_examples=40, deadline=None)
@given(
    shares=SHARES,
    mode=st.sampled_from(["topk", "threshold"]),
    tail=st.booleans(),
    blocks=st.integers(1, 90),
    temperature=st.sampled_from([0.0, 1.0, 8.0, 80.0]),
    seed=st.integers(0, 1000),
)
def test_properties_of_every_map(shares, mode, tail, blocks, temperature, seed):
    scores = softmax_scores((1, 2, 2, blocks), temperature, seed)
    config = make_config(shares, mode, tail=tail)
    factors = choose_levels(scores, config)
    dropped = 64 if tail else 0
    assert factors.shape == scores.shape
    assert set(factors.unique().tolist()) <= {*shares, dropped}
    # Every row keeps its most important block, at the finest level.
    best = scores.argmax(-1, keepdim=True) if temperature else torch.zeros(1, 2, 2, 1, dtype=torch.int64)
    assert (factors.gather(-1, best) == min(shares)).all()
    # A more important block is never coarser, and among equals the lower index comes first.
    ranked = factors.gather(-1, scores.sort(dim=-1, descending=True, stable=True).indices).int()
    ranked = torch.where(ranked == 0, 10**4, ranked)
    assert (ranked[..., 1:] >= ranked[..., :-1]).all()
    # The order in which the shares are written decides nothing.
    backward = dict(sorted(shares.items(), reverse=True))
    assert torch.equal(choose_levels(scores, make_config(backward, mode, tail=tail)), factors)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("tail", [False, True])
def test_leaving_out_the_last_level_changes_no_other(mode, tail):
    """Levels of the official code are positional: without level 8 its skipped part becomes level 8."""
    scores = softmax_scores((1, 2, 3, 100), 2.0)
    dropped = 64 if tail else 0
    full = choose_levels(scores, make_config({1: 0.1, 2: 0.05, 8: 0.2}, mode, tail=tail))
    without = choose_levels(scores, make_config({1: 0.1, 2: 0.05}, mode, tail=tail))
    assert torch.equal(without, torch.where(full == 8, dropped, full))
    zero = choose_levels(scores, make_config({1: 0.1, 2: 0.05, 8: 0.0}, mode, tail=tail))
    assert torch.equal(zero, without)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_each_level_full_and_empty(factor, mode):
    scores = softmax_scores((1, 1, 3, 40), 1.0)
    full = choose_levels(scores, make_config({factor: 1.0}, mode))
    assert (full == factor).all()
    empty = choose_levels(scores, make_config({factor: 1e-9}, mode))
    assert ((empty == factor).sum(-1) == 1).all()
    assert ((empty == 0).sum(-1) == 39).all()


@pytest.mark.parametrize("mode", ["topk", "threshold", "budget"])
def test_rows_that_weigh_nothing_still_see_something(mode):
    """A row of zeros must select a block: the official code divides zero by zero there."""
    scores = torch.zeros(1, 1, 2, 30)
    factors = choose_levels(scores, make_config({1: 0.1, 8: 0.2}, mode, 0.8 if mode == "budget" else None))
    assert ((factors == 1).sum(-1) >= 1).all()


# --- budget ---


def budget_scores(kind, blocks):
    if kind == "one block":
        scores = torch.zeros(2, 2, 6, blocks)
        scores[..., 5] = 1.0
        return scores
    if kind == "uniform":
        return torch.full((2, 2, 6, blocks), 1 / blocks)
    if kind == "mixed":
        halves = softmax_scores((2, 2, 3, blocks), 0.5, 1), softmax_scores((2, 2, 3, blocks), 80.0, 2)
        return torch.cat(halves, 2)
    return softmax_scores((2, 2, 6, blocks), {"smooth": 0.3, "middling": 2.0, "peaky": 80.0}[kind], 3)


@pytest.mark.parametrize("kind", ["smooth", "middling", "peaky", "mixed", "uniform", "one block"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("tail", [False, True])
def test_budget_meets_the_density(oracle, kind, sparsity, tail):
    for blocks, shares in ((144, {1: 0.4, 2: 0.1, 4: 0.1, 8: 0.2}), (333, {1: 0.5, 8: 0.2})):
        scores = budget_scores(kind, blocks)
        if kind == "peaky":
            assert (scores == 0).any()
        factors = choose_levels(scores, make_config(shares, "budget", sparsity, tail))
        for entry in factors:  # each batch entry on its own
            assert oracle.density(entry.flatten(0, -2).tolist()) == pytest.approx(1 - sparsity, abs=0.01)
        assert ((factors == 1).sum(-1) >= 1).all()


def test_budget_entries_of_a_batch_do_not_influence_each_other():
    scores = torch.cat([softmax_scores((1, 2, 4, 150), 0.5, 1), softmax_scores((1, 2, 4, 150), 9.0, 2)])
    config = make_config({1: 0.4, 2: 0.1, 8: 0.2}, "budget", 0.8)
    both = choose_levels(scores, config)
    assert torch.equal(choose_levels(scores[1:], config), both[1:])


def test_budget_gives_more_to_rows_that_spread():
    scores = torch.cat([softmax_scores((1, 1, 4, 200), 0.2, 1), softmax_scores((1, 1, 4, 200), 8.0, 2)], 2)
    factors = choose_levels(scores, make_config({1: 0.4, 8: 0.2}, "budget", 0.7))
    assert (factors[:, :, :4] == 1).sum() > 2 * (factors[:, :, 4:] == 1).sum()


# --- cap ---


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_the_cap_refines_what_was_chosen_and_nothing_else(mode, tail):
    scores = softmax_scores((2, 2, 5, 60), 2.0)
    cap = torch.tensor([1, 2, 4, 8], dtype=torch.int16).repeat(15).expand(2, 2, 60)
    config = make_config({1: 0.2, 2: 0.2, 8: 0.3}, mode, tail=tail, similarity_cap={2: 0.7, 4: 0.65, 8: 0.6})
    plain, capped = choose_levels(scores, config), choose_levels(scores, config, cap)
    for index, level in enumerate(plain.flatten(0, -2).tolist()):
        expected = [f if f in (0, 64) else min(f, (1, 2, 4, 8)[j % 4]) for j, f in enumerate(level)]
        assert capped.flatten(0, -2)[index].tolist() == expected
    assert set(capped.unique().tolist()) <= {0, *config.stored_factors}


def test_the_cap_leaves_the_tail_alone_where_a_level_is_as_coarse():
    """Factor 64 is both a level and the tail here; only what the level took may be refined."""
    scores = softmax_scores((1, 1, 2, 20), 1.0)
    config = make_config({1: 0.1, 64: 0.3}, "topk", tail=True, similarity_cap={2: 0.7})
    factors = choose_levels(scores, config, torch.ones(1, 1, 20, dtype=torch.int16))
    assert ((factors == 1).sum(-1) == 8).all()
    assert ((factors == 64).sum(-1) == 12).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_the_cost_of_the_cap_is_inside_the_budget(oracle, sparsity):
    scores = softmax_scores((1, 2, 6, 200), 1.0)
    cap = torch.tensor([1, 1, 2, 8], dtype=torch.int16).repeat(50).expand(1, 2, 200)
    config = make_config({1: 0.4, 2: 0.1, 8: 0.2}, "budget", sparsity, similarity_cap={2: 0.7, 8: 0.6})
    factors = choose_levels(scores, config, cap)
    assert oracle.density(factors.flatten(0, -2).tolist()) == pytest.approx(1 - sparsity, abs=0.01)


# --- parts ---


def test_remaining_mass(oracle):
    scores = softmax_scores((1, 1, 1, 30), 3.0)
    left, ranked = remaining_mass(scores)
    row = scores.flatten().tolist()
    order = oracle.by_importance(row)
    assert ranked.flatten().tolist() == order
    for rank in range(1, 29):
        expected = sum(row[j] for j in order[rank + 1 :]) / sum(row)
        assert left.flatten()[rank].item() == pytest.approx(expected, rel=1e-4)


def test_group_by_level(oracle, random_factors):
    factors = random_factors((2, 3, 4, 37), (0, 1, 2, 8, 64), seed=1)
    levels = (1, 2, 4, 8, 64)
    lists = group_by_level(factors, levels, torch.tensor([64] * 36 + [5]))
    assert lists.blocks.dtype == lists.ends.dtype == torch.int32
    rows = zip(*(x.flatten(0, -2).tolist() for x in (factors, lists.blocks, lists.ends)), strict=True)
    for row, listed, row_ends in rows:
        start = 0
        for level, end in zip(levels, row_ends, strict=True):
            assert listed[start:end] == [j for j, f in enumerate(row) if f == level]
            start = end
    for row, density in zip(factors.flatten(0, -2).tolist(), lists.density.flatten().tolist(), strict=True):
        assert density == pytest.approx(oracle.density([row], [64] * 36 + [5]), abs=1e-6)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("cap", [None, 1, 2])
@pytest.mark.parametrize("mode", ["topk", "threshold", "budget"])
def test_lists_are_packed_into_the_room_that_the_setting_tells(mode, cap, tail):
    """Without looking at them, and without losing a block."""
    sparsity = None if mode == "threshold" else 0.8
    config = PyramidConfig(shares={1: 0.1, 2: 0.2, 8: 0.5}, mode=mode, sparsity=sparsity, tail=tail)
    scores = torch.rand(2, 3, 4, 37, generator=torch.Generator().manual_seed(5))
    scores[0, 0, 0] = torch.nan
    cap = None if cap is None else torch.full((2, 3, 37), cap, dtype=torch.int16)
    factors = choose_levels(scores, config, cap)
    lists, told = group_by_level(factors, (1, 2, 4, 8, 64)), listed_blocks(37, config)
    packed = lists.packed(37 if told is None else told)
    assert torch.equal(packed.factors(), factors)
    assert packed.blocks.dtype == torch.int16
    assert packed.blocks.shape[-1] == (told or 37)
    if mode == "topk":
        assert told == int(lists.ends[..., -1].max()), "no more room than needed"


def test_the_map_comes_back_from_its_lists(random_factors):
    """Entries after the last group of a list are undefined."""
    factors = random_factors((2, 3, 4, 37), (0, 1, 2, 8, 64), seed=2)
    lists = group_by_level(factors, (1, 2, 8, 64))
    seen = torch.arange(37) < lists.ends[..., -1:]
    lists = dataclasses.replace(lists, blocks=torch.where(seen, lists.blocks, -(10**6)))
    assert torch.equal(lists.factors(), factors)
    assert torch.equal(lists.of_head(1, 2).factors(), factors[1, 2])

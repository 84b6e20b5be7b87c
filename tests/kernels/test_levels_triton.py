"""The kernel that chooses levels against `choose_levels`: all modes, ties, zeros, the cap, the lists and densities."""

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig
from comfyui_psa.kernels.density import block_tokens, row_density
from comfyui_psa.kernels.levels import choose_levels, group_by_level

SHARES = {1: 0.1, 2: 0.05, 8: 0.2}


def softmax_scores(shape, temperature, seed=0):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * temperature
    return torch.softmax(logits, -1)


def lists_of(scores, config, device, cap=None, spare=3):
    """The kernel's lists for a sequence whose last block lacks `spare` tokens."""
    from comfyui_psa.kernels.gpu.levels import choose_lists_triton

    length = scores.shape[-1] * config.block_kv - spare
    cap = None if cap is None else cap.to(device)
    return choose_lists_triton(scores.to(device).contiguous(), config, cap, length), length


def check_lists(lists, length, block_kv):
    """The lists are those of their own map: ascending, complete, with the right density."""
    factors = lists.factors()
    again = group_by_level(factors, lists.levels, block_tokens(length, block_kv, factors.device))
    assert torch.equal(lists.ends, again.ends)
    listed = torch.arange(factors.shape[-1], device=factors.device) < lists.ends[..., -1:]
    assert torch.equal(torch.where(listed, lists.blocks, -1), torch.where(listed, again.blocks, -1))
    torch.testing.assert_close(lists.density, again.density, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.9])
@pytest.mark.parametrize("blocks", [40, 63, 64, 65, 150])
def test_topk(triton_device, blocks, sparsity, tail):
    scores = softmax_scores((2, 1, 2, blocks), 2.0, seed=blocks)
    config = PyramidConfig(shares=SHARES, mode="topk", sparsity=sparsity, tail=tail)
    lists, length = lists_of(scores, config, triton_device)
    assert torch.equal(lists.factors().cpu(), choose_levels(scores, config))
    check_lists(lists, length, 64)


def test_topk_of_few_blocks(triton_device):
    for blocks in (1, 2, 3, 7):
        config = PyramidConfig(shares=SHARES, mode="topk", sparsity=None)
        scores = softmax_scores((1, 1, 4, blocks), 1.0)
        lists, length = lists_of(scores, config, triton_device)
        assert torch.equal(lists.factors().cpu(), choose_levels(scores, config))
        check_lists(lists, length, 64)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_ties_and_zeros(triton_device, mode):
    """Equal importance goes to the lower index; rows of zeros still have a first block."""
    rows = [[1, 3, 3, 1, 3, 1, 3, 3, 0, 0.0], [0.0] * 10, [1.0] * 10, [0.0] * 9 + [1.0], [1e-38] * 10]
    scores = torch.tensor(rows).view(1, 1, 5, 10)
    shares = {1: 0.2, 2: 0.2, 4: 0.2} if mode == "topk" else {1: 0.25, 2: 0.25, 4: 0.2}
    config = PyramidConfig(shares=shares, mode=mode, sparsity=None, tail=False)
    lists, length = lists_of(scores, config, triton_device)
    expected = choose_levels(scores, config)
    if mode == "threshold":  # a row without any importance has no shares: only its first block counts
        rows = [0, 2, 3]
        assert torch.equal(lists.factors().cpu()[:, :, rows], expected[:, :, rows])
        assert lists.factors()[0, 0, 1].tolist()[0] == 1
    else:
        assert torch.equal(lists.factors().cpu(), expected)
    check_lists(lists, length, 64)


@pytest.mark.parametrize("bounds", [{1: 0.4, 2: 0.1, 4: 0.1, 8: 0.2}, {1: 0.5, 8: 0.5}, {2: 1.0}])
@pytest.mark.parametrize("temperature", [0.1, 2.0, 8.0])
def test_threshold(triton_device, temperature, bounds):
    scores = softmax_scores((1, 2, 5, 130), temperature)
    config = PyramidConfig(shares=bounds, mode="threshold", sparsity=None, tail=True)
    lists, length = lists_of(scores, config, triton_device)
    # Sums are taken in another order: a block exactly at a bound may fall to either side.
    assert (lists.factors().cpu() != choose_levels(scores, config)).float().mean() < 2e-3
    check_lists(lists, length, 64)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("temperature", [0.1, 2.0, 30.0])
def test_budget(triton_device, temperature, sparsity, capped):
    scores = softmax_scores((2, 2, 3, 200), temperature)
    caps = {2: 0.7, 8: 0.6} if capped else {}
    config = PyramidConfig(mode="budget", sparsity=sparsity, similarity_cap=caps)
    cap = torch.tensor([1, 2, 8, 8], dtype=torch.int16).repeat(50).expand(2, 2, 200) if capped else None
    lists, length = lists_of(scores, config, triton_device, cap)
    expected = choose_levels(scores, config, cap)
    assert (lists.factors().cpu() != expected).float().mean() < 5e-3
    tokens = block_tokens(length, 64)
    assert abs(lists.density.mean().item() - row_density(expected, tokens).mean().item()) < 2e-3
    check_lists(lists, length, 64)


def test_budget_of_rows_in_which_every_block_outweighs_all_after_it(triton_device):
    """Its own weight does not count as what is left after a block."""
    place = torch.arange(24).expand(1, 2, 4, 24)
    steepness = torch.tensor([2.0, 3.0, 5.0, 9.0])[:, None]
    order = torch.rand(place.shape, generator=torch.Generator().manual_seed(5)).argsort(-1)
    scores = (steepness ** -place.float()).gather(-1, order).contiguous()
    config = PyramidConfig(mode="budget", sparsity=0.6)
    lists, length = lists_of(scores, config, triton_device)
    assert torch.equal(lists.factors().cpu(), choose_levels(scores, config))
    check_lists(lists, length, 64)


def test_budget_learns_its_scale_from_a_part_of_the_rows(triton_device, monkeypatch):
    from comfyui_psa.kernels.gpu import levels as levels_triton

    monkeypatch.setattr(levels_triton, "_BUDGET_ROWS", 16)
    scores = torch.cat([softmax_scores((1, 2, 16, 200), t, seed=3) for t in (0.5, 3.0)], 2)
    config = PyramidConfig(mode="budget", sparsity=0.85)
    lists, _ = lists_of(scores, config, triton_device)
    assert lists.density.mean().item() == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize(("rows", "sizes"), [(1024, (3, 3)), (16, (1, 3, 2)), (7, (1, 3, 2))])
def test_a_budget_is_that_of_all_heads_wherever_they_are(triton_device, in_parts, monkeypatch, rows, sizes):
    """The rows that the scale is learnt from are the same, too."""
    from comfyui_psa.kernels.gpu import levels as levels_triton

    monkeypatch.setattr(levels_triton, "_BUDGET_ROWS", rows)
    scores = torch.cat([softmax_scores((1, 1, 5, 60), 0.5 + 2 * head, seed=head) for head in range(6)], 1)
    config = PyramidConfig(mode="budget", sparsity=0.8)

    def choose(part, config, cap=None, shared=None):
        part = part.to(triton_device).contiguous()
        return levels_triton.choose_lists_triton(part, config, cap, 60 * 64, shared).factors()

    parts = in_parts(choose, scores, config, sizes)
    assert torch.equal(torch.cat(parts, 1), choose(scores, config))


@pytest.mark.parametrize("tail", [False, True])
def test_the_cap_refines_what_was_chosen(triton_device, tail):
    scores = softmax_scores((2, 2, 5, 60), 2.0)
    cap = torch.tensor([1, 2, 4, 8], dtype=torch.int16).repeat(15).expand(2, 2, 60).contiguous()
    caps = {2: 0.7, 4: 0.65, 8: 0.6}
    config = PyramidConfig(shares={1: 0.2, 8: 0.5}, mode="topk", sparsity=None, tail=tail, similarity_cap=caps)
    lists, length = lists_of(scores, config, triton_device, cap)
    assert torch.equal(lists.factors().cpu(), choose_levels(scores, config, cap))
    check_lists(lists, length, 64)

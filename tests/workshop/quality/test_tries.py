"""The tries beside the product's correction: the same as it where nothing is changed, exact where they learn, and no
dearer than what they are compared with."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.kernels.attend import attend_reference
from comfyui_psa.kernels.pyramid import build_pyramid
from comfyui_psa.workshop.quality.attention import SparseAttention
from comfyui_psa.workshop.quality.demo_model import simple_schedule
from comfyui_psa.workshop.quality.setting import Setting, resolve
from comfyui_psa.workshop.quality.tries import TRIES, attention_of, tries, with_mass

GRID, HEADS, DIM, STEPS, BLOCKS = (4, 16, 16), 2, 32, 8, 3
SCHEDULE = simple_schedule(STEPS, BLOCKS)
KINDS = {
    "by hand": {"renew": 4},
    "by mass": {"gamma": 1.0, "renew": 0},
    "by head": {"renew": 0},
    "by drift": {"by": "losses", "renew": 4},
    "by rows": {"every": 2, "share": 0.25},
}


def inputs():
    """q, k, v [2, H, L, D] of every step and block, which change slowly from step to step."""
    generator = torch.Generator().manual_seed(0)
    shape = 3, 2, HEADS, 4 * 16 * 16, DIM
    first = [torch.randn(shape, generator=generator) for _ in range(BLOCKS)]
    change = [torch.randn(shape, generator=generator) for _ in range(BLOCKS)]
    return [[(a + 0.05 * step * b).unbind(0) for a, b in zip(first, change, strict=True)] for step in range(STEPS)]


def outputs(attention):
    found = []
    for step, calls in enumerate(inputs()):
        attention.begin_step(step)
        found.append([attention(*call) for call in calls])
    return found


def made(compute, kind=None, correction=None, **options):
    """The attention of a run at this compute, and its settings."""
    if kind is None:
        setting = Setting("", "", {"correction": "full"}, correction=correction or {}, compute=compute)
    else:
        setting = Setting("", "", prototype={"try": kind, **options}, compute=compute)
    settings = resolve(setting, SCHEDULE, "torch", compute)
    return attention_of(settings, SCHEDULE, GRID, setting.prototype)


def test_without_a_change_it_is_the_products_correction():
    for renew in (0, 4):
        product, ours = made(0.6, correction={"renew": renew, "keep_levels": True}), made(0.6, "by hand", renew=renew)
        assert isinstance(product, SparseAttention)
        for expected, found in zip(outputs(product), outputs(ours), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert ours.step_densities() == pytest.approx(product.step_densities(), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_try_takes_the_compute_it_is_asked_for(kind):
    attention = made(0.6, kind, **KINDS[kind])
    outputs(attention)
    densities = attention.step_densities()
    assert sum(densities) / STEPS == pytest.approx(0.6, abs=0.02)
    for step, density in enumerate(densities):
        dense, sparse = attention.cost(step)
        assert density == pytest.approx((dense + sparse * (1 - attention.config.sparsity)) / BLOCKS, abs=0.03)


def test_every_setting_names_a_try_and_options_that_it_has():
    schedule = simple_schedule(20, 6)
    for setting in tries():
        settings = resolve(setting, schedule, "torch", setting.compute)
        attention = attention_of(settings, schedule, (9, 32, 32), setting.prototype)
        assert setting.prototype == {} or type(attention) is TRIES[setting.prototype["try"]]


def test_mass_is_that_of_the_definition():
    q, k, v = inputs()[0][0]
    q, k, v = (x[:1].double() for x in (q, k, v))
    factors = torch.randint(4, (1, HEADS, 8, 16), generator=torch.Generator().manual_seed(1))
    factors = torch.tensor([0, 1, 2, 8], dtype=torch.int16)[factors]
    factors[..., 3] = 1  # no row sees nothing
    pyramid = build_pyramid(k, v, (1, 2, 8), 64)
    output, mass = with_mass(q, pyramid, factors, 128)
    expected = attend_reference(q, pyramid, factors, 128, DIM**-0.5)
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=1e-4)
    # A value of 1 in one more key with a logit of 0 comes out as its share of the whole.
    one, zero = torch.ones(1, HEADS, 1, DIM).double(), torch.zeros(1, HEADS, 1, DIM).double()
    nothing = build_pyramid(k, torch.zeros_like(v), (1, 2, 8), 64)
    share = attend_reference(q, nothing, factors, 128, DIM**-0.5, zero, one)[..., 0]
    torch.testing.assert_close(mass, (1 / share - 1).log().float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", ["mass", "share"])
def test_merging_by_mass_gives_back_all_that_was_lost_where_nothing_has_changed(keep):
    attention = made(0.6, "by mass", keep=keep, gamma=1.0, renew=0)
    call = inputs()[0][0]
    for step in range(3):
        attention.begin_step(step)
        found = attention(*call)
    assert attention.active[2]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*call), atol=1e-4, rtol=1e-3)


def test_kept_mass_weighs_less_where_more_is_seen():
    attention = made(0.6, "by mass", keep="mass", gamma=1.0, renew=0)
    q, k, v = inputs()[0][0]
    for step in range(2):
        attention.begin_step(step)
        attention(q, k, torch.zeros_like(v))
    attention.begin_step(2)
    # What was lost had values of 0 and keeps its mass, so the output is what is seen times the share of its mass.
    lists = attention.lists[0, 0]
    found = attention(2 * q, k, torch.ones_like(v))[:1]
    order = attention.sparse(q[:1], k[:1], v[:1]).query_order
    ordered = [order.apply(x[:1]) for x in (q, k, v)]
    pyramid = build_pyramid(*ordered[1:], attention.config.stored_factors, attention.config.block_kv)
    seen_before, seen = (with_mass(x * ordered[0], pyramid, lists.factors(), 128)[1] for x in (1, 2))
    everything = (ordered[0] @ ordered[1].mT * DIM**-0.5).logsumexp(-1)
    lost = everything.exp() - seen_before.exp()
    share = seen.exp() / (seen.exp() + lost)
    torch.testing.assert_close(order.apply(found)[..., 0], share, atol=1e-3, rtol=1e-2)


def test_a_heads_gamma_is_how_much_of_its_loss_remains():
    attention = made(0.8, "by head", by="fit", renew=0)
    q, k, v = (x[:1] for x in inputs()[0][0])
    factors = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)  # of each head's values in the second step: of its loss too
    for step, values in enumerate((v, v * factors)):
        attention.begin_step(step)
        attention(q, k, values)
    torch.testing.assert_close(attention.gammas[0, 0], factors.view(1, 2), atol=1e-3, rtol=1e-3)
    attention.begin_step(2)
    found = attention(q, k, v * factors)
    sparse = attention.sparse(q, k, v * factors, attention.lists[0, 0]).output
    lost = F.scaled_dot_product_attention(q, k, v * factors) - sparse
    assert (found - sparse - factors * lost).norm() < 0.03 * lost.norm()  # eight bits


def test_blocks_that_drift_most_are_renewed():
    attention = made(0.8, "by drift", by="inputs", renew=4)
    calls = inputs()[0]
    drifting = 1
    renewed = []
    for step in range(STEPS):
        attention.begin_step(step)
        if attention.active[step]:
            renewed.append(attention.renewed(0))
        for block, (q, k, v) in enumerate(calls):
            moved = q + 0.2 * step * (block == drifting)
            attention(moved, k, v)
    turns = [attention.turns(step) for step in range(STEPS) if attention.active[step]]
    assert [len(blocks) for blocks in renewed] == [len(blocks) for blocks in turns]
    assert turns[1] == turns[5] == [2]
    assert renewed[1] == renewed[5] == [drifting]  # in between it has just learned


def test_losses_that_changed_fastest_are_renewed():
    attention = made(0.9, "by drift", by="losses", renew=2)
    renewed = []
    for step in range(STEPS):
        attention.begin_step(step)
        renewed.append(attention.renewed(0) if attention.active[step] else [])
        for block, (q, k, v) in enumerate(inputs()[0]):
            attention(q, k, v * (1 + (step if block == 2 else 0)))
    renewed = [blocks for blocks in renewed if blocks]
    assert {*renewed[0], *renewed[1]} == set(range(BLOCKS))  # each once, before any change is known
    assert all(2 in blocks for blocks in renewed[2:])


def test_renewed_rows_are_dense_and_take_the_new_levels():
    attention = made(0.6, "by rows", every=2, share=0.25, gamma=0.95)
    calls = inputs()
    for step in range(4):
        attention.begin_step(step)
        q, k, v = (x[:1] for x in calls[step][0])
        before = attention.lists.get((0, 0))
        output = attention(q, k, v)
    dense = F.scaled_dot_product_attention(q, k, v)
    order = attention.sparse(q, k, v).query_order
    exact = (order.apply(output - dense).abs().unflatten(2, (-1, 128)).amax((-2, -1)) < 1e-5)[0]
    assert exact.sum(-1).tolist() == [2, 2]
    changed = (attention.lists[0, 0].factors() != before.factors()).any(-1)[0]
    assert changed.any()
    assert not (changed & ~exact).any()
    attention.begin_step(4)
    found = attention(q, k, v)
    sparse = attention.sparse(q, k, v, attention.lists[0, 0]).output
    rows = exact.repeat_interleave(128, -1)
    left, lost = (order.apply(dense - x)[0][rows].norm() for x in (found, sparse))
    assert left < 0.1 * lost  # 1 - gamma, and what eight bits lose

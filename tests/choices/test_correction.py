"""What may be chosen about the correction, and what it does to the sparsity of the other calls."""

import pytest

from comfyui_psa.choices.correction import CORRECTIONS, Correction, reason_against
from comfyui_psa.choices.errors import InputError
from comfyui_psa.choices.presets import load_presets
from comfyui_psa.choices.settings import make_settings
from comfyui_psa.kernels.config import ORDERS
from comfyui_psa.kernels.falling import renews, with_renewals
from comfyui_psa.kernels.semantic import SEMANTIC_ORDERS

INPUTS = {"sparsity": 0.75, "preset": "auto"}
PRESETS = load_presets()
WITHOUT = [*(name for name in PRESETS if name.endswith("(published)")), "cogvideox-5b-4step"]
"""As published; and without a dense step, where learning would cost a quarter of the run."""


@pytest.mark.parametrize("value", CORRECTIONS)
def test_every_value(value):
    correction = make_settings(**INPUTS, correction=value).correction
    assert correction == (None if value == "off" else Correction(size=value))


def test_another_value_is_refused_with_what_is_allowed():
    with pytest.raises(InputError, match="correction") as error:
        make_settings(**INPUTS, correction="most")
    assert all(value in str(error.value) for value in CORRECTIONS)


@pytest.mark.parametrize("name", WITHOUT)
def test_some_presets_have_none_unless_asked(name):
    inputs = INPUTS | {"preset": name}
    assert make_settings(**inputs).correction is None
    assert make_settings(**inputs, correction="off").correction is None
    for size in ("full", "half", "quarter", "eighth"):
        assert make_settings(**inputs, correction=size).correction.size == size


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in WITHOUT])
def test_all_others_have_one(name):
    assert make_settings(**INPUTS | {"preset": name}).correction.size == "auto"


def config(sparsity, **changes):
    return PRESETS["module-default"].config(sparsity, **changes)


def decided(sparsity, steps=None, falling=0.0, **correction):
    return Correction(**correction).decided(config(sparsity), falling, steps)


@pytest.mark.parametrize("percent", range(5, 97))
def test_renewal_wants_a_fifth_of_the_work_left_and_more_saved_than_it_costs(percent):
    expected = 4 if 25 <= percent <= 50 else 8 if 12.5 <= percent <= 80 else 0
    assert decided(percent / 100).renew == decided(percent / 100, 13).renew == expected
    assert decided(percent / 100, 12).renew == decided(percent / 100, falling=0.3).renew == 0
    assert decided(percent / 100, 3, renew=5).renew == 5
    assert decided(percent / 100, renew=0).renew == 0
    eighth = [decided(percent / 100, steps, size="eighth").renew for steps in (12, 13, 24, 25, None)]
    assert eighth == [0, *[expected if expected == 4 else 0] * 2, expected, expected]


def test_levels_as_written_are_not_renewed():
    written = [PRESETS[name].config(0.5) for name in WITHOUT if not PRESETS[name].is_scaled]
    assert written
    assert {Correction().decided(config, 0.0, None).renew for config in written} == {0}


def test_the_older_a_loss_the_less_is_given_back():
    assert decided(0.7, 30).gamma > decided(0.85, 30).gamma > decided(0.7, 5).gamma == decided(0.85, 8).gamma
    assert decided(0.7, 10).gamma == decided(0.7, 30, renew=0).gamma == decided(0.7, 30, falling=0.3).gamma
    assert decided(0.7, 30, gamma=0.5).gamma == decided(0.7, 3, gamma=0.5).gamma == 0.5


def test_blocks_take_turns():
    for block in range(30):
        assert [renews(step, block, 8) for step in range(1, 25)].count(True) == 3
    for step in range(1, 25):
        assert [renews(step, block, 8) for block in range(32)].count(True) == 4
    assert not any(renews(step, block, 0) for step in range(9) for block in range(9))


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7, 0.8])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1])
def test_all_calls_together_cost_what_was_asked_for(sparsity, share):
    """A renewed call is dense, and measures PSA beside it."""
    others = 1 - with_renewals(config(sparsity), share).sparsity
    work = (1 - share) * others + share * (1 + others)
    assert 1 - work == pytest.approx(sparsity)


def test_the_others_keep_half_of_their_work():
    assert 1 - with_renewals(config(0.8), 0.5).sparsity == pytest.approx(0.1)


def test_few_steps_choose_their_levels():
    assert [decided(0.7, steps).keep_levels for steps in (1, 8, 9, 50, None)] == [False, False, True, True, True]
    assert decided(0.7, 1, keep_levels=True).keep_levels
    assert not decided(0.7, 50, keep_levels=False).keep_levels
    assert not decided(0.7, 50, falling=0.3, keep_levels=True).keep_levels


@pytest.mark.parametrize("order", ORDERS)
def test_orders_that_follow_the_data_have_none(order):
    reason = reason_against(order)
    assert bool(reason) == (order in SEMANTIC_ORDERS)
    if reason:
        assert order in reason
        assert "set order to" in reason

"""Where losses are held: the finest size that fits, what does not fit, and all of it given back."""

import gc
import weakref

import pytest
import torch

from comfyui_psa.choices.correction import Correction
from comfyui_psa.kernels.config import PyramidConfig
from comfyui_psa.kernels.delta import GROUPS, measure_delta
from comfyui_psa.kernels.levels import choose_levels, group_by_level
from comfyui_psa.kernels.order import TokenOrder
from comfyui_psa.sampling.correction import Loss, LossStore, Memory

HEADS, TOKENS, DIM, CALLS = 2, 1000, 64, 12
BYTES = {size: HEADS * -(-TOKENS // group) * (DIM + 4) for size, group in GROUPS.items()}
"""Of one call: a byte for every number and a scale of 4 bytes for every row."""


def memory(free):
    """A program with `free` bytes free on the device; nothing here is pinned."""

    def refuse(*_):
        raise AssertionError("memory of the CPU is not pinned for the CPU")

    return Memory(lambda device: free, refuse, refuse, refuse)


def store(size="auto"):
    return LossStore(Correction(size=size))


def chosen(size, free, lists=None):
    made = store(size)
    made.choose_size(torch.zeros(1, HEADS, TOKENS, DIM), lists, CALLS, memory(free))
    return made


def loss(group=1, seed=0, lists=None):
    generator = torch.Generator().manual_seed(seed)
    dense, sparse = (torch.randn(1, HEADS, TOKENS, DIM, generator=generator) for _ in range(2))
    return Loss(lists, measure_delta(dense, sparse, TokenOrder(None, None), group))


def kept_lists(blocks):
    """Levels with `blocks` blocks in every row."""
    config = PyramidConfig(shares={1: blocks / 16}, mode="topk", sparsity=None, order="raster", tail=False)
    scores = torch.rand(1, HEADS, 8, 16, generator=torch.Generator().manual_seed(blocks))
    return group_by_level(choose_levels(scores, config), config.stored_factors).packed()


@pytest.mark.parametrize("size", GROUPS)
def test_the_finest_that_fits(size, caplog):
    with caplog.at_level("INFO"):
        made = chosen("auto", CALLS * BYTES[size])
    assert (made.size, made.where, made.reason, made.on) == (size, "CPU memory", None, True)
    assert f"correction: {size}, about" in caplog.text
    assert "does not fit" not in caplog.text
    assert chosen("auto", CALLS * BYTES[size] - 1).size != size


def test_levels_count():
    lists = kept_lists(8)
    free = CALLS * (BYTES["half"] + lists.blocks.nbytes)
    assert chosen("auto", free, lists).size == "half"
    assert chosen("auto", free - 1, lists).size == "quarter"


@pytest.mark.parametrize("asked", ["half", "quarter", "eighth"])
def test_a_size_that_is_asked_for_is_not_made_finer(asked):
    assert chosen(asked, 10**12).size == asked


def test_a_size_that_does_not_fit_takes_the_next_and_says_so(caplog):
    with caplog.at_level("INFO"):
        made = chosen("full", CALLS * BYTES["quarter"])
    assert made.size == "quarter"
    assert "quarter, about" in caplog.text
    assert "full does not fit" in caplog.text


@pytest.mark.parametrize("asked", ["auto", "full", "eighth"])
def test_nothing_fits(asked):
    made = chosen(asked, CALLS * BYTES["eighth"] - 1)
    assert (made.size, made.on) == (None, False)
    assert made.reason.startswith("no correction: it needs")
    assert "close other programs" in made.reason


@pytest.mark.parametrize("size", GROUPS)
def test_what_is_held_is_what_was_counted(size):
    made = chosen(size, 10**12)
    assert made.put("a", loss(GROUPS[size]))
    assert made.nbytes == made.most == BYTES[size]


def test_a_loss_put_again_replaces_the_earlier_one():
    made, first, second = chosen("full", 2 * CALLS * BYTES["full"]), loss(), loss(seed=1)
    gone = weakref.ref(first.delta.values)
    for one in (first, second):
        assert made.put("a", one)
        assert (made.nbytes, len(made)) == (BYTES["full"], 1)
    del first, one
    gc.collect()
    assert gone() is None
    assert made.get("a") is second
    assert made.get("b") is None


def test_beyond_the_budget_a_loss_is_refused_and_the_old_one_is_gone():
    made = chosen("full", CALLS * BYTES["full"])
    assert all(made.put(place, loss()) for place in range(CALLS))
    assert not made.put("one more", loss())
    assert (made.without_room, made.has("one more"), len(made)) == (1, False, CALLS)
    assert made.nbytes == CALLS * BYTES["full"]
    assert made.put(0, loss(seed=3)), "its own room is free again"
    made._budget = made.nbytes - 1
    assert not made.put(0, loss(seed=4))
    assert made.get(0) is None, "an outdated loss is not used instead"
    assert made.most == CALLS * BYTES["full"]


def test_a_loss_takes_the_room_of_those_that_nothing_asks_for_any_more():
    made = chosen("full", CALLS * BYTES["full"])
    for place in range(CALLS):
        assert made.put(("early", place), loss())
    made.next_step()
    assert not made.put(("late", 0), loss()), "all of them may still be needed"
    made.next_step()
    assert made.get(("early", 3)) is not None
    assert all(made.put(("late", place), loss(seed=1)) for place in range(CALLS - 1))
    assert [place for place in range(CALLS) if made.has(("early", place))] == [3], "it was asked for"
    assert not made.put(("late", CALLS), loss())
    assert made.nbytes == CALLS * BYTES["full"]
    assert made.without_room == 2


def test_windows_that_never_come_back_do_not_fill_the_memory():
    made, one = chosen("full", 10**12), loss()
    kept = [made.put(("window", number), one) for number in range(CALLS * 10)]
    assert sum(kept) == 4 * CALLS
    assert made.nbytes == 4 * CALLS * BYTES["full"]


def test_in_the_last_step_a_loss_is_given_back_as_soon_as_it_is_used():
    made = chosen("full", 10**12)
    made.put("a", loss())
    made.put("b", loss())
    made.last = True
    assert made.get("a") is not None
    assert (made.has("a"), made.nbytes) == (False, BYTES["full"])
    made.drop("b")
    assert (len(made), made.nbytes) == (0, 0)


def test_clear_and_giving_up_leave_nothing_alive():
    for end in (LossStore.clear, lambda made: made.give_up("no correction: whatever; do this")):
        made = chosen("full", 10**12)
        alive = []
        for place in range(3):
            one = loss(seed=place)
            alive += [weakref.ref(tensor) for tensor in one.tensors()]
            made.put(place, one)
        del one
        end(made)
        gc.collect()
        assert [ref() for ref in alive] == [None] * 6
        assert (len(made), made.nbytes, made.most) == (0, 0, 3 * BYTES["full"])
    assert (made.on, made.get(0)) == (False, None)


class Stream:
    """What the store asks of streams and events where there are none: a copy on a CPU is done when it returns."""

    def __getattr__(self, name):
        return lambda *_: None


def same(one, other):
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_loss_that_is_renewed_on_the_host_is_pinned_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Stream)
    pinned, pins = {}, []
    made, lists = store("full"), kept_lists(8)
    made.choose_size(
        torch.zeros(1, HEADS, TOKENS, DIM), lists, CALLS,
        Memory(lambda device: 10**12, lambda: 10**12, lambda x: (pins.append(x), pinned.update({x.data_ptr(): x})),
               lambda x: pinned.pop(x.data_ptr())),
    )  # fmt: skip
    made.where = "host memory"
    for step in range(5):
        for place in range(3):
            assert made.put(place, loss(seed=10 * step + place, lists=lists))
    assert len(pins) == len(pinned) == 3 * 3, "values, scales and levels of three places"
    assert made.nbytes == made.most == 3 * loss(lists=lists).nbytes
    for place in range(3):
        expected = loss(seed=40 + place, lists=lists).tensors()
        held = made._hosted[place].loss.tensors()
        assert all(map(same, held, expected))
        assert all(any(one is tensor for tensor in pinned.values()) for one in held)
    longer = loss(seed=7, lists=kept_lists(12))  # rows of another length: only the levels are pinned again
    assert made.put(0, longer)
    assert (len(pins), len(pinned)) == (10, 9)
    assert all(map(same, made._hosted[0].loss.tensors(), longer.tensors()))
    assert made.nbytes == 2 * loss(lists=lists).nbytes + longer.nbytes
    made._budget = made.nbytes
    assert not made.put(1, loss(lists=kept_lists(12)))
    assert (made.has(1), made.nbytes) == (False, loss(lists=lists).nbytes + longer.nbytes)
    made.clear()
    assert (pinned, made.nbytes) == ({}, 0)


def test_workers_are_added_up():
    one, other, without = chosen("full", 10**12), chosen("full", 10**12), store()
    one.put("a", loss())
    other.put("a", loss())
    other.without_room = 2
    other.give_up("no correction: full; do this")
    without.take_in(one)
    without.take_in(other)
    assert (without.size, without.most, without.without_room) == ("full", 2 * BYTES["full"], 2)
    assert without.reason == "no correction: full; do this"

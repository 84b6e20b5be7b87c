"""Losses that wait in pinned memory of the host are those that were put, bit for bit, and are unpinned again."""

import pytest
import torch

from comfyui_psa.choices.correction import Correction
from comfyui_psa.for_diffusers import memory as for_diffusers
from comfyui_psa.kernels.config import PyramidConfig
from comfyui_psa.kernels.delta import measure_delta
from comfyui_psa.kernels.levels import choose_levels, group_by_level
from comfyui_psa.kernels.order import TokenOrder
from comfyui_psa.sampling.correction import Loss, LossStore, Memory

pytestmark = pytest.mark.gpu
HEADS, TOKENS, DIM, CALLS = 4, 4096, 128, 6


class Pins:
    """What is pinned now, by the functions for diffusers."""

    def __init__(self):
        self.held, self.count = set(), 0

    def pin(self, tensor):
        self.count += 1
        for_diffusers.pin(tensor)
        assert tensor.is_pinned()
        self.held.add(tensor.data_ptr())

    def unpin(self, tensor):
        for_diffusers.unpin(tensor)
        assert not tensor.is_pinned()
        self.held.remove(tensor.data_ptr())


def loss(seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    dense, sparse = (torch.randn(1, HEADS, TOKENS, DIM, device="cuda", generator=generator) for _ in range(2))
    config = PyramidConfig(shares={1: 0.2, 4: 0.3}, mode="topk", order="raster")
    scores = torch.rand(1, HEADS, 32, 64, device="cuda", generator=generator)
    lists = group_by_level(choose_levels(scores, config), config.stored_factors).packed()
    return Loss(lists, measure_delta(dense, sparse, TokenOrder(None, None)))


def made(pins, on_gpu):
    store, free = LossStore(Correction(size="full")), 10**12 if on_gpu else 0
    store.choose_size(
        torch.zeros(1, HEADS, TOKENS, DIM, device="cuda"), loss(0).lists, CALLS,
        Memory(lambda device: free, lambda: 10**12, pins.pin, pins.unpin),
    )  # fmt: skip
    return store


def same(one, other):
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one.tensors(), other.tensors(), strict=True)
    )


def test_the_host_gives_back_what_the_gpu_would():
    pins = Pins()
    here, there = made(pins, True), made(pins, False)
    assert (here.where, there.where) == ("GPU memory", "host memory")
    busy = torch.randn(2048, 2048, device="cuda")
    for step in range(4):
        for call in range(CALLS):
            if step == 0 or (step + call) % 3 == 0:  # renewed in between
                for store in (here, there):
                    assert store.put(call, loss(100 * step + call))
                continue
            busy = busy @ busy / 2048  # the copy of the next loss runs beside it
            one, other = here.get(call), there.get(call)
            assert other.delta.values.is_cuda
            assert same(one, other)
            assert one.lists.shape == other.lists.shape
    assert here.nbytes == there.nbytes == CALLS * loss(0).nbytes
    assert len(pins.held) == pins.count == 3 * CALLS, "a loss that is renewed is written over the earlier one"
    there.clear()
    assert pins.held == set()
    assert there.nbytes == 0


def test_order_and_gaps_do_not_matter():
    """Fetching ahead is a guess; a wrong one costs time only."""
    pins = Pins()
    store = made(pins, False)
    wanted = [loss(seed) for seed in range(CALLS)]
    for call, one in enumerate(wanted):
        store.put(call, one)
    for call in (3, 0, 5, 5, 1, 4, 2, 0):
        assert same(store.get(call), wanted[call])
    store.last = True
    for call in range(CALLS):
        assert same(store.get(call), wanted[call])
        assert not store.has(call)
    assert (pins.held, store.nbytes) == (set(), 0)


def test_memory_is_flat_over_runs():
    pins, seen = Pins(), []
    for _ in range(10):
        store = made(pins, False)
        for call in range(CALLS):
            store.put(call, loss(call))
        for call in range(CALLS):
            store.get(call)
        store.give_up("no correction: enough; stop")
        del store
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_allocated())
    assert max(seen[1:]) == min(seen[1:])
    assert not pins.held


def test_nothing_pending_is_left_by_pinning_twice():
    """A second registration fails, which CUDA remembers until it is asked; the next kernel must not raise it."""
    tensor = torch.zeros(2**20)
    for _ in range(2):
        for_diffusers.pin(tensor)
    assert float(torch.ones(4, device="cuda").sum()) == 4
    torch.cuda.synchronize()
    for_diffusers.unpin(tensor)
    assert not tensor.is_pinned()

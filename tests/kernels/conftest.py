"""Fixtures of the tests of the mathematics: the oracle, and tensors whose surroundings are poisoned with NaN.

Nothing here calls `kernels/`; `in_parts` only fills in what it takes.
"""

import importlib
import math
import os

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device():
    """Where the Triton kernels of this process run: "cpu" in the interpreter, "cuda" on a GPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; test_interpreter.py runs this file in Triton's interpreter")
    return "cuda"


@pytest.fixture(scope="session")
def half_types(triton_device):
    """Types of 16 bits that the kernels can be tried with; the interpreter mishandles bfloat16."""
    return [torch.float16] if triton_device == "cpu" else [torch.float16, torch.bfloat16]


@pytest.fixture(scope="session")
def oracle():
    """The module `oracle.py` next to this file."""
    return importlib.import_module(".oracle", __package__)


@pytest.fixture(scope="session")
def random_tensor():
    """random_tensor(*shape, seed, dtype) -> normal numbers that depend on nothing but the arguments."""

    def make(*shape, seed=0, dtype=torch.float32):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    return make


@pytest.fixture(scope="session")
def poisoned():
    """poisoned(x [B, H, L, D]) -> the same numbers as a strided view of [B, L, H, D] storage full of NaN."""

    def make(x, spare=70):
        batch, heads, length, dim = x.shape
        storage = torch.full((batch, length + spare, heads, dim + 3), math.nan, dtype=x.dtype, device=x.device)
        view = storage[:, :length, :, :dim].transpose(1, 2)
        view.copy_(x)
        return view

    return make


@pytest.fixture(scope="session")
def random_factors():
    """random_factors(shape, choices, seed) -> int16 map of pooling factors; no row drops everything."""

    def make(shape, choices, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(choices), shape, generator=generator)
        factors = torch.tensor(choices, dtype=torch.int16)[pick]
        finest = min(factor for factor in choices if factor)
        keep = torch.randint(shape[-1], shape[:-1], generator=generator)[..., None]
        current = factors.gather(-1, keep)
        return factors.scatter(-1, keep, torch.where(current == 0, finest, current).to(torch.int16))

    return make


@pytest.fixture(scope="session")
def in_parts():
    """in_parts(choose, scores, config, sizes, cap): the maps that processes with so many heads each would choose.

    choose: as `choose_levels`. Every process gets the sums of all, from a first round in which they only count.
    """
    from comfyui_psa.kernels.levels import SharedHeads

    def choose_in_parts(choose, scores, config, sizes, cap=None):
        counts, maps = [], []
        for collecting in (True, False):

            def add(entry, own, collecting=collecting):
                if collecting:
                    counts.append((entry, own))
                return sum(other for where, other in counts if where == entry)

            first = 0
            for size in sizes:
                part = slice(None), slice(first, first + size)
                shared = SharedHeads(first, scores.shape[1], add)
                maps.append(choose(scores[part], config, None if cap is None else cap[part], shared))
                first += size
        return maps[len(sizes) :]

    return choose_in_parts

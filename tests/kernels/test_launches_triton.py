"""How much the host does for a call: launches of kernels and operators of torch. Nothing is computed here."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_psa.kernels import PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention
from comfyui_psa.kernels.delta import measure_delta

pytest.importorskip("triton")

from comfyui_psa.kernels.gpu import attend, backend, importance, levels, order, pyramid

GRID = (6, 16, 16)
CONFIG = PyramidConfig(shares={1: 0.1, 2: 0.05, 8: 0.2}, mode="topk", sparsity=0.85, order="curve", tail=False)
KERNELS = ((pyramid, "_pool"), (importance, "_reduce"), (levels, "_choose"), (order, "_move"), (attend, "_attend"))


class Operators(TorchDispatchMode):
    """The operators of torch inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Known:
    """A kind of call that was checked before."""

    checked = True

    def refuse(self):
        pass


@pytest.fixture
def count(triton_device, random_tensor, monkeypatch):
    """count(dim, kept): the kernels that a call launches, and the operators of torch in it."""
    launched = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(self.name)

    def of(dim, kept):
        dtype = torch.float32 if triton_device == "cpu" else torch.bfloat16
        layout, device_order = TokenLayout(GRID), make_order("curve", GRID, device=triton_device)
        q, k, v = (random_tensor(1, 2, layout.length, dim, seed=s).to(triton_device, dtype) for s in (1, 2, 3))
        lists, delta = None, None
        if kept:
            exact = pyramid_sparse_attention(
                *(x.float().cpu() for x in (q, k, v)), CONFIG, layout=layout, order=make_order("curve", GRID),
                backend="torch",
            )  # fmt: skip
            lists = exact.lists.packed()
            delta = measure_delta(exact.output * 1.1, exact.output, exact.query_order, 1)

            def moved(thing):
                tensors = {name: x.to(triton_device) for name, x in vars(thing).items() if torch.is_tensor(x)}
                return type(thing)(**vars(thing) | tensors)

            lists, delta = moved(lists), moved(delta)
        with monkeypatch.context() as patch:
            for module, name in KERNELS:
                patch.setattr(module, name, Counted(name))
            patch.setattr(backend, "trust", lambda *_: Known())

            def call():
                return pyramid_sparse_attention(
                    q, k, v, CONFIG, layout=layout, order=device_order, lists=lists, delta=delta, backend="triton"
                )

            call()
            launched.clear()
            with Operators() as operators:
                call()
        return sorted(launched), operators.names

    return of


@pytest.mark.parametrize("dim", [64, 128])
def test_a_call_with_kept_levels(count, dim):
    launches, operators = count(dim, kept=True)
    moves = ["_move", "_move"] if dim > backend.FINDS_QUERIES else []
    assert launches == ["_attend", "_attend", *moves, "_pool"], "keys and values in one launch"
    assert len(operators) <= 13, operators


@pytest.mark.parametrize("dim", [64, 128])
def test_a_call_that_chooses_its_levels(count, dim):
    launches, operators = count(dim, kept=False)
    moves = ["_move", "_move"] if dim > backend.FINDS_QUERIES else []
    assert launches == ["_attend", "_attend", "_choose", *moves, "_pool", "_pool", "_pool", "_reduce"]
    assert len(operators) <= 25, operators

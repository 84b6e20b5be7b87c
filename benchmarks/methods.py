"""What is timed: shapes of models, and attention methods over them, ours and others.

A method makes, for q, k, v [1, H, L, D] on a grid, a call without arguments that returns the output [1, H, L, D], and
the density of what it computes. What the machine or an installed package cannot serve is left out, with the reason.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {
    "synthetic": (2, (9, 32, 32), 128),
    "wan1.3b-480p": (12, (21, 30, 52), 128),
    "wan1.3b-720p": (12, (18, 45, 80), 128),
    "wan14b-720p": (40, (18, 45, 80), 128),
    "wan2.2-5b-720p": (24, (31, 22, 40), 128),
    "cogvideox-5b": (48, (13, 30, 45), 64),
    "cogvideox1.5-5b": (48, (11, 48, 85), 64),
}
"""Name -> heads, grid (time, height, width) of tokens, head size. `synthetic` is the demo's shape, for a CPU."""

PUBLISHED = {1: 0.10, 2: 0.05, 8: 0.20}

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table: `make(q, k, v, grid)` returns the call and a function that gives its density."""

    name: str
    precision: str
    setting: str
    make: Callable[..., tuple[Callable[[], torch.Tensor], Callable[[], float]]]


def dense(backend: SDPBackend) -> Callable[..., tuple]:
    """Dense attention by one of torch's backends."""

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call, lambda: 1.0

    return make


def psa(**settings: object) -> Callable[..., tuple]:
    """PSA with fields of `PyramidConfig`; the token order is made once, as it is in a sampling run."""
    from comfyui_psa.kernels import PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention

    config = PyramidConfig(**settings)

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
        order = make_order(config.order, grid, config.tile, q.device)

        def result():
            return pyramid_sparse_attention(q, k, v, config, layout=TokenLayout(grid), order=order)

        return lambda: result().output, lambda: result().density.item()

    return make


def sol_attn(tau: float) -> Callable[..., tuple]:
    """ComfyUI's own sparse attention (comfy-kitchen's Sol-Attn); blocks of 64 in curve order, made before the call."""
    from comfyui_psa.kernels import make_order

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
        import comfy_kitchen

        order = make_order("curve", grid, device=q.device)
        ordered = [order.apply(x).transpose(1, 2).contiguous() for x in (q, k, v)]

        def call() -> torch.Tensor:
            return comfy_kitchen.sol_attn(*ordered, tau=tau).transpose(1, 2)

        call.restore = order.undo
        return call, lambda: float("nan")

    return make


def methods(dim: int, cuda: bool, full: bool) -> Iterator[Method]:
    """The methods for a head size; `full` adds the curve of error against time, and what is slow to compile."""
    precision = "bfloat16" if cuda else "float32"
    topk = {"mode": "topk", "shares": PUBLISHED, "importance": "pooled"}
    # The first is what `auto` takes.
    settings = [("curve", False, "bf16", 0.85), ("curve", False, "bf16", 0.9), ("curve", False, "bf16", 0.95)]
    settings += [("raster", True, "bf16", 0.85), ("curve", True, "bf16", 0.85)]
    if cuda:
        settings += [("curve", False, "int8", 0.85), ("raster", True, "int8", 0.85)]
        yield Method("sdpa-flash", precision, "dense", dense(SDPBackend.FLASH_ATTENTION))
    for order, tail, number, sparsity in settings:
        yield Method(
            "psa",
            "int8" if number == "int8" else precision,
            f"topk 10/5/0/20 at {sparsity}, {order}, pooled, {'tail' if tail else 'no tail'}",
            psa(**topk, sparsity=sparsity, order=order, tail=tail, precision=number),
        )
    yield Method(
        "psa", precision, "published: topk 10/5/0/20, curve, sampled, no tail",
        psa(**topk | {"importance": "sampled", "reduction": "max"}, sparsity=None, order="curve", tail=False),
    )  # fmt: skip
    yield Method("psa", precision, "budget 40/10/10/20 at 0.85, curve, pooled, tail", psa(sparsity=0.85, order="curve"))
    if full:
        for share in (0.01, 0.02, 0.03, 0.05, 0.08, 0.15, 0.25):
            for number in ("bf16", "int8"):
                yield Method(
                    "psa", "int8" if number == "int8" else precision, f"full {share} and tail, curve, pooled",
                    psa(mode="topk", shares={1: share}, sparsity=None, order="curve", precision=number),
                )  # fmt: skip
    if cuda and dim == 128 and importlib.util.find_spec("comfy_kitchen") is not None:
        for tau in (0.5, 1.0, 1.5, 2.0) if full else (1.0, 2.0):
            yield Method("sol-attn", "int8", f"tau {tau}", sol_attn(tau))

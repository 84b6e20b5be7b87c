"""What is timed: the shapes of real models, and attention methods for them, ours and others'.

For q, k, v [1, H, L, D] on a grid, a method returns a function without arguments that computes the output [1, H, L, D],
and a function that returns its density. Methods that this machine or its packages do not support are skipped, with the
reason.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import captured
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {
    "synthetic": (2, (9, 32, 32), 128),
    "demo": (captured.HEADS, captured.GRID, captured.DIM),
    "wan1.3b-480p": (12, (21, 30, 52), 128),
    "wan1.3b-720p": (12, (18, 45, 80), 128),
    "wan14b-720p": (40, (18, 45, 80), 128),
    "wan2.2-5b-720p": (24, (31, 22, 40), 128),
    "cogvideox-5b": (48, (13, 30, 45), 64),
    "cogvideox1.5-5b": (48, (11, 48, 85), 64),
}
"""Name -> heads, token grid (time, height, width), head size. `synthetic` has the demo's shape, for a CPU; for `demo`
see `captured.py`."""

PUBLISHED = {1: 0.10, 2: 0.05, 8: 0.20}

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table: `make(q, k, v, grid)` returns the function to time and one that returns its density."""

    name: str
    precision: str
    setting: str
    make: Callable[..., tuple[Callable[[], torch.Tensor], Callable[[], float]]]
    dtype: torch.dtype | None = None
    """The type of q, k, v; None is the usual one: bfloat16 on a GPU, float32 on a CPU. The first method of each type is
    dense, and the others' times are compared with it."""
    knows_result: bool = False
    """Whether it has seen the exact result of these very inputs, so that its error says nothing."""


def dense(backend: SDPBackend) -> Callable[..., tuple]:
    """Dense attention with one of torch's backends."""

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call, lambda: 1.0

    return make


def psa(*, kept: bool = False, correction: str | None = None, learns: bool = False, **settings: object) -> Callable:
    """PSA with the given fields of `PyramidConfig`; the token order is built once, as in a sampling run.

    kept: use the levels of an earlier call, as most steps of a corrected run do. correction: also add what that call
    lost, stored in this size. learns: the call that measures it, without the dense one that it needs.
    """
    from comfyui_psa.kernels import PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention
    from comfyui_psa.kernels.delta import GROUPS, measure_delta

    config = PyramidConfig(**settings)

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
        order = make_order(config.order, grid, config.tile, q.device)

        def result(lists=None, delta=None):
            return pyramid_sparse_attention(
                q, k, v, config, layout=TokenLayout(grid), order=order, lists=lists, delta=delta
            )

        first = result()
        lists = first.lists.packed() if kept else None
        if correction is None:
            return lambda: result(lists).output, lambda: first.density.item()
        exact = F.scaled_dot_product_attention(q, k, v)

        def measure(call):
            call.lists.packed()
            return measure_delta(exact, call.output, call.query_order, GROUPS[correction])

        if learns:

            def learn():
                call = result()
                measure(call)
                return call.output

            return learn, lambda: first.density.item()
        delta = measure(first)
        return lambda: result(lists, delta).output, lambda: first.density.item()

    return make


def flex_attention(share: float, block_kv: int) -> Callable[..., tuple]:
    """torch's flex_attention, compiled, over the same blocks that PSA chooses when it sees `share` of all in full.

    Order and blocks are computed before the call, so only attention itself is timed.
    """
    from comfyui_psa.kernels import PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention

    config = PyramidConfig(**_binary(share), block_kv=block_kv)

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
        from torch.nn.attention import flex_attention as flex

        order = make_order("curve", grid, device=q.device)
        chosen = pyramid_sparse_attention(q, k, v, config, layout=TokenLayout(grid), order=order)
        index = torch.arange(chosen.lists.blocks.shape[-1], device=q.device)
        blocks = torch.where(index < chosen.lists.ends, chosen.lists.blocks, 0)
        count = chosen.lists.ends[..., 0].contiguous()
        # All of them are full blocks; none needs a mask within.
        mask = flex.BlockMask.from_kv_blocks(
            torch.zeros_like(count), torch.zeros_like(blocks), count, blocks, (config.block_q, block_kv),
            seq_lengths=(q.shape[2], k.shape[2]),
        )  # fmt: skip
        ordered = [order.apply(x).contiguous() for x in (q, k, v)]
        torch.compiler.reset()  # every shape is recompiled, and torch limits the number of recompilations
        compiled = torch.compile(flex.flex_attention, dynamic=False)
        options = {"BLOCK_M": config.block_q, "BLOCK_N": block_kv} if block_kv < 128 and q.is_cuda else None

        def call() -> torch.Tensor:
            return compiled(*ordered, block_mask=mask, kernel_options=options)

        call.restore = order.undo
        return call, lambda: chosen.density.item()

    return make


def sol_attn(tau: float) -> Callable[..., tuple]:
    """ComfyUI's own sparse attention (comfy-kitchen's Sol-Attn), with blocks of 64 in curve order, sorted before."""
    from comfyui_psa.kernels import make_order
    from comfyui_psa.workshop.quality.sol_attn import density

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
        import comfy_kitchen

        order = make_order("curve", grid, device=q.device)
        ordered = [order.apply(x).transpose(1, 2).contiguous() for x in (q, k, v)]
        share = density(order.apply(q), order.apply(k), tau).item()

        def call() -> torch.Tensor:
            return comfy_kitchen.sol_attn(*ordered, tau=tau).transpose(1, 2)

        call.restore = order.undo
        return call, lambda: share

    return make


def kitchen_int8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple) -> tuple:
    """comfy-kitchen's dense attention with queries, keys, values and weights in 8 bits."""
    import comfy_kitchen

    return lambda: comfy_kitchen.int8_attention(q, k, v), lambda: 1.0


def methods(dim: int, cuda: bool, full: bool) -> Iterator[Method]:
    """The methods for a head size, grouped by the type of q, k, v. `full` adds curves of error against time."""
    precision = "bfloat16" if cuda else "float32"
    if not cuda:
        yield Method("sdpa", precision, "dense", dense(SDPBackend.FLASH_ATTENTION))
    else:
        yield Method("sdpa-cudnn", precision, "dense", dense(SDPBackend.CUDNN_ATTENTION))
        yield Method("sdpa-flash", precision, "dense", dense(SDPBackend.FLASH_ATTENTION))
    yield from _psa_methods(precision, cuda, full)
    for share in (0.05, 0.15, 0.25, 0.4) if full else (0.15, 0.25):
        yield Method(
            "block-sparse", precision, f"PSA's kernel, full {share} alone, curve, pooled", psa(**_binary(share))
        )
    if cuda:
        yield from _rivals(dim, precision, full)
        yield from _float16_methods()


def length_methods(dim: int, cuda: bool) -> Iterator[Method]:
    """The methods plotted against sequence length: dense, the setting behind `auto`, and Sol-Attn."""
    wanted = ("sdpa", "sdpa-cudnn", "psa", "sol-attn")
    for method in methods(dim, cuda, full=False):
        if method.name in wanted and (method.name != "psa" or method.setting == AUTO) and method.dtype is None:
            yield method


AUTO = "topk 10/5/0/20 at 0.85, curve, pooled, no tail"
"""The setting behind `auto`, in 16 bits; the `psa` rows at other sparsities are named the same way."""
AUTO_KEPT = "topk 10/5/0/20 at 0.85, curve, levels kept, no tail"
"""The same as most steps of a corrected run compute it."""


def _psa_methods(precision: str, cuda: bool, full: bool) -> Iterator[Method]:
    from comfyui_psa.choices.presets import RANKING

    topk = {"mode": "topk", "shares": PUBLISHED} | RANKING
    settings = [("curve", False, "bf16", 0.85), ("curve", False, "bf16", 0.9), ("curve", False, "bf16", 0.95)]
    settings += [("raster", True, "bf16", 0.85), ("curve", True, "bf16", 0.85)]
    if cuda:
        settings += [("curve", False, "int8", 0.85), ("curve", True, "int8", 0.85), ("raster", True, "int8", 0.85)]
    for order, tail, number, sparsity in settings:
        yield Method(
            "psa",
            "int8" if number == "int8" else precision,
            f"topk 10/5/0/20 at {sparsity}, {order}, pooled, {'tail' if tail else 'no tail'}",
            psa(**topk, sparsity=sparsity, order=order, tail=tail, precision=number),
        )
    yield Method(
        "psa", precision, AUTO_KEPT,
        psa(**topk, sparsity=0.85, order="curve", tail=False, kept=True),
    )  # fmt: skip
    for size in ("full", "eighth"):
        corrected = psa(**topk, sparsity=0.85, order="curve", tail=False, kept=True, correction=size)
        yield Method("psa-corrected", precision, f"{AUTO_KEPT}, correction {size}", corrected, knows_result=True)
    learning = psa(**topk, sparsity=0.85, order="curve", tail=False, correction="full", learns=True)
    yield Method("psa-learning", precision, f"{AUTO}, measures its correction; without the dense call", learning)
    yield Method(
        "psa", precision, "published: topk 10/5/0/20, curve, sampled, no tail",
        psa(**topk | {"importance": "sampled", "reduction": "max"}, sparsity=None, order="curve", tail=False),
    )  # fmt: skip
    yield Method(
        "psa",
        precision,
        "budget 40/10/10/20 at 0.85, curve, pooled, tail",
        psa(sparsity=0.85, order="curve", **RANKING),
    )
    for share in (0.01, 0.02, 0.03, 0.05, 0.08, 0.15, 0.25) if full else (0.03,):
        for number in ("bf16", "int8") if cuda else ("bf16",):
            yield Method(
                "psa", "int8" if number == "int8" else precision, f"full {share} and tail, curve, pooled",
                psa(mode="topk", shares={1: share}, sparsity=None, order="curve", precision=number, **RANKING),
            )  # fmt: skip


def _float16_methods() -> Iterator[Method]:
    """Dense attention and the setting behind `auto` on a GPU, for a model in float16."""
    from comfyui_psa.choices.presets import RANKING

    yield Method("sdpa-cudnn", "float16", "dense", dense(SDPBackend.CUDNN_ATTENTION), torch.float16)
    auto = psa(mode="topk", shares=PUBLISHED, sparsity=0.85, order="curve", tail=False, precision="bf16", **RANKING)
    yield Method("psa", "float16", AUTO, auto, torch.float16)


def _rivals(dim: int, precision: str, full: bool) -> Iterator[Method]:
    """Other authors' methods, on a GPU."""
    for share in (0.05, 0.15, 0.25, 0.4) if full else (0.15, 0.25):
        for block_kv in (64, 128) if full else (128,):  # each takes seconds to compile for every shape
            setting = f"full {share} alone, curve, blocks of 128 and {block_kv}"
            yield Method("flex-attention", precision, setting, flex_attention(share, block_kv))
    if importlib.util.find_spec("comfy_kitchen") is None:
        return
    yield Method("kitchen-int8", "int8", "dense", kitchen_int8)
    if dim == 128:
        for tau in (0.5, 1.0, 1.5, 2.0) if full else (1.0, 2.0):
            yield Method("sol-attn", "int8", f"tau {tau}", sol_attn(tau))


def _binary(share: float) -> dict[str, object]:
    """Fields of `PyramidConfig` where each block is seen either in full or not at all."""
    from comfyui_psa.choices.presets import RANKING

    return {"mode": "topk", "shares": {1: share}, "sparsity": None, "tail": False, "order": "curve"} | RANKING

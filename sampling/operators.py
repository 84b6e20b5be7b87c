"""Attention as an operator of torch, which a compiled graph holds as one node: how ours are registered.

A graph is made once and runs many times, so what an operator does must be decided when it runs, not when it is traced.
That also keeps it out of CUDA graphs, which would repeat the kernels of the step that they recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

Operator = Callable[..., torch.Tensor]


def register(name: str, function: Operator, like: Operator, schema: str | None = None) -> Operator | None:
    """`function` as an operator, or None if this torch would record it in a CUDA graph (before 2.8).

    Args:
        name: what it is called in a graph. Its full name has the name of this package in it, because the pack may be
            loaded twice in one process, as a custom node and as a library, and the two know different runs.
        like: an empty output with the shape, type and strides of `function`'s.
        schema: in torch's words; by default worked out from the annotations.
    """
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        return None
    full_name = f"psa::{name}_{re.sub(r'[^0-9a-zA-Z]', '_', __package__)}"
    tags = (torch.Tag.cudagraph_unsafe,)
    operator = torch.library.custom_op(full_name, function, mutates_args=(), schema=schema, tags=tags)
    operator.register_fake(like)
    return getattr(torch.ops.psa, full_name.partition("::")[2]).default

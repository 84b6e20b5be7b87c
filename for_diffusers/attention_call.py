"""One call of scaled_dot_product_attention as torch understands it, and why PSA leaves it dense."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..kernels.backends import NO_GRADIENTS, in_autocast


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What a call attends with.

    Attributes:
        query, key, value: [B, H, L, D] in the type in which torch computes them; heads of keys and values that several
            heads of queries share are repeated.
        masked: whether it has a mask. hides: whether it hides keys without one, as causal attention and dropout do.
        scale: of the scores, None for torch's own.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    masked: bool
    hides: bool
    scale: float | None

    def without_padding(self, length: int) -> AttentionCall:
        """The first `length` tokens, for a mask that only hides the others."""
        query, key, value = (x[..., :length, :] for x in (self.query, self.key, self.value))
        return dataclasses.replace(self, query=query, key=key, value=value, masked=False)

    def decline_reason(self, expected: int, with_graph: bool) -> str | None:
        """Why the call stays dense; None if PSA can take it.

        Args:
            expected: number of tokens of the model's self-attention.
            with_graph: whether autograd was on when the model's forward began.
        """
        if self.masked or self.hides:
            return "the attention call has a mask"
        if self.query.ndim != 4:
            return (
                f"the attention call is on tensors of {self.query.ndim} dimensions, and PSA knows batch, heads, tokens "
                f"and head size; remove your own attention processor"
            )
        queries, keys = self.query.shape[2], self.key.shape[2]
        if (queries, keys) != (expected, expected):
            return f"{queries} and {keys} tokens, but {expected} are expected of this model"
        if not self.query.shape == self.key.shape == self.value.shape:
            return (
                "the attention call has keys or values of other heads than its queries; remove your own attention "
                "processor"
            )
        # The first pass of a reentrant checkpoint runs without a graph, and its second pass must compute the same.
        return NO_GRADIENTS if with_graph and not torch.is_grad_enabled() else None


def read_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> AttentionCall:
    """The call with these arguments of scaled_dot_product_attention."""
    query, key, value = in_autocast(query, key, value)
    if enable_gqa:
        key, value = for_every_head(query, key), for_every_head(query, value)
    return AttentionCall(query, key, value, attn_mask is not None, is_causal or bool(dropout_p), scale)


def for_every_head(query: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., h, L, D] that the heads of query [..., H, L, D] share in groups, repeated for each head."""
    times = query.shape[-3] // shared.shape[-3]
    return shared.repeat_interleave(times, -3) if times > 1 else shared

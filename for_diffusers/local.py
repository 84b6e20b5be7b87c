"""PSA for engines that share the heads themselves, such as xDiT and yunchang: a function for their attention.

Before it, the engine has exchanged tokens for heads, so it gets [B, L, H, D]: all tokens, some heads. It knows no
steps: the script sets `sparse`, and there is no correction. Pipelines of diffusers need none of this, see `ulysses.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F

from ..choices.presets import load_presets
from ..choices.settings import MOST_SPARSITY, PatchInputs
from ..kernels.attention import pyramid_sparse_attention
from ..kernels.backends import BACKENDS, gradient_reason, in_autocast
from ..kernels.order import TokenLayout
from ..sampling.self_attention import own_words
from .arguments import ArgumentChecks, wrong
from .attention_call import for_every_head
from .operator import Untraced

log = logging.getLogger("ComfyUI-PSA")


class LocalAttention:
    """Attention of q, k, v [B, L, H, D] as yunchang and xDiT call it. Heads may share keys and values in groups.

    Attributes:
        sparse: whether calls are sparse; set it to False for the first steps, and to True for the others.
        sparse_calls: how many were.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        sparsity: float = PatchInputs.sparsity,
        preset: str = "module-default",
        *,
        text_before: int = 0,
        text_after: int = 0,
        backend: str = PatchInputs.backend,
        **changes: Any,
    ) -> None:
        """
        Args:
            grid: (time, height, width) of the video in tokens, as the latent divided by the model's patch size.
            sparsity: share of the attention work that is saved, 0.01 to 0.97.
            preset: a name from `choices.presets.load_presets`.
            text_before, text_after: tokens before and after the video's in the sequence.
            backend: auto, triton or torch.
            changes: other fields of `kernels.config.PyramidConfig`, such as block_kv. In budget mode, every process
                meets the sparsity with its own heads.

        Raises:
            ValueError: an input is wrong; the error says what was given and what is allowed.
        """
        checked = ArgumentChecks("LocalAttention")
        checked.numbers("grid", grid, 1, None, count=3)
        checked.number("sparsity", sparsity, 0.01, MOST_SPARSITY)
        checked.preset(preset)
        for name, count in (("text_before", text_before), ("text_after", text_after)):
            checked.number(name, count, 0, None, whole=True)
        checked.choice("backend", backend, BACKENDS)
        self._config = checked.config(load_presets()[preset], sparsity, changes)
        self._layout = TokenLayout(grid, text_before, text_after)
        self._backend = backend
        self._failed = False
        self.sparse, self.sparse_calls = True, 0
        self._untraced = Untraced(
            self._attend, "LocalAttention is not part of a graph; compile the model with fullgraph=False"
        )

    def __call__(self, *args: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `_attend`. A compiled model leaves it alone: what it does changes from step to step."""
        return self._untraced(*args, **given)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [B, L, H, D], and zeros [B, H, L] instead of the sums that only ring attention needs.

        Cross-attention, causal attention, dropout, a mask (as that of scaled_dot_product_attention), gradients and
        `sparse` set to False are computed dense. Engines pass more arguments; those that are not named here change
        nothing of the output.

        Raises:
            ValueError: the tokens are not those of the grid, for example because ring attention has split the keys; or
                the attention has a window, a cap or slopes.
        """
        window = None if window_size is None or tuple(window_size) == (-1, -1) else tuple(window_size)
        changes = {"window_size": window, "softcap": softcap or None, "alibi_slopes": alibi_slopes}
        for name, given in changes.items():
            if given is not None:
                raise _error(name, given, "none, every token sees all tokens alike", "compute this attention elsewhere")
        q, k, v = in_autocast(*(x.transpose(1, 2) for x in (query, key, value)))
        k, v = for_every_head(q, k), for_every_head(q, v)
        output = None
        if q.shape == k.shape:
            if q.shape[2] != self._layout.length:
                tokens = f"{self._layout.grid}, with text {self._layout.length} tokens"
                allowed = f"that of the {q.shape[2]} tokens of a call"
                raise _error("grid", tokens, allowed, "correct it, or share by Ulysses alone, without ring attention")
            if self.sparse and not (causal or dropout_p or self._failed or gradient_reason(q, k, v)):
                if attn_mask is None:
                    output = self._sparse(q, k, v, softmax_scale)
                else:
                    self._stay_dense(
                        "the self-attention has a mask, and PSA has none; use a model without, such as Wan"
                    )
        if output is None:
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
            )
        return output.transpose(1, 2), q.new_zeros(q.shape[:3], dtype=torch.float32)

    def _sparse(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor | None:
        try:
            result = pyramid_sparse_attention(
                q, k, v, self._config, layout=self._layout, scale=scale, backend=self._backend
            )
        except Exception as error:  # whatever fails, the engine goes on with dense attention
            self._stay_dense(own_words(error) or "no reason was given")
            return None
        self.sparse_calls += 1
        return result.output

    def _stay_dense(self, reason: str) -> None:
        self._failed = True
        log.warning("PSA: LocalAttention stays dense from here on: %s", reason)


def _error(argument: str, given: object, allowed: str, do: str) -> ValueError:
    return wrong("LocalAttention", argument, given, allowed, do)

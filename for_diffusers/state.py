"""The state of a patched transformer: step and grid of its current call, and what its attention calls came to."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

import torch

from ..kernels.attention import pyramid_sparse_attention
from ..kernels.config import PyramidConfig
from ..kernels.falling import config_at, place_among
from ..kernels.order import TokenLayout, TokenOrder, make_order
from ..kernels.semantic import SEMANTIC_ORDERS

log = logging.getLogger("ComfyUI-PSA")


class CallState:
    """Decides for every attention call of one transformer; counts what it decided."""

    def __init__(
        self,
        config: PyramidConfig,
        scheduler: Any,
        warm_up: float | int,
        dense_blocks: frozenset[int],
        min_tokens: int,
        backend: str,
        falling: float,
        off: bool,
    ) -> None:
        self.config, self.scheduler, self.warm_up = config, scheduler, warm_up
        self.falling, self._mean_config = falling, config
        self.dense_blocks, self.min_tokens, self.backend, self.off = dense_blocks, min_tokens, backend, off
        self.layout: TokenLayout | None = None
        self.active = False
        self.sparse_calls = 0
        self.dense_calls = 0
        self.fallbacks: Counter[str] = Counter()
        self.failure: str | None = None
        self.density: torch.Tensor | None = None  # summed over the sparse calls, on the device
        self._orders: dict[tuple, TokenOrder] = {}

    def begin_call(self, layout: TokenLayout, timestep: torch.Tensor | float) -> None:
        """Before a forward of the transformer. One read from the device where steps are told apart."""
        self.layout = layout
        self.active = not self.off
        if self.off or self.scheduler is None or not (self.warm_up or self.falling):
            return
        # A timestep of Wan2.2 5B is one per token, zero where an image is given.
        now = float(torch.as_tensor(timestep).max())
        listed = sorted(self.scheduler.timesteps.double().unique().tolist(), reverse=True)
        steps = self.warm_up if isinstance(self.warm_up, int) else self.warm_up * len(listed)
        sparse = listed[math.ceil(steps - 1e-6) :]
        self.active = bool(sparse) and now <= sparse[0] * (1 + 1e-6)
        self.config = config_at(self._mean_config, self.falling, place_among(sparse, now))

    def attend(
        self,
        block: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """PSA on query, key, value [B, H, L, D], with the arguments of scaled_dot_product_attention.

        None where the call stays dense; that is counted and, once for each reason, logged.
        """
        if not self.active:
            self.dense_calls += 1
            return None
        reason = self._decline_reason(block, query, key, attn_mask, dropout_p, is_causal)
        if reason is None:
            try:
                order = self._order(query.device)
                result = pyramid_sparse_attention(
                    query, key, value, self.config, layout=self.layout, order=order, scale=scale, backend=self.backend
                )
            except Exception as error:  # dense is always better than a dead pipeline
                told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                # Not tried again: there is a call in every block and step, and a compiler may need seconds to fail.
                reason = self.failure = f"{told} (until apply_psa is called again)"
            else:
                self.sparse_calls += 1
                density = result.density
                self.density = density if self.density is None else self.density + density.to(self.density.device)
                return result.output
        if not self.fallbacks[reason]:
            log.warning("PSA: staying dense: %s", reason)
        self.fallbacks[reason] += 1
        self.dense_calls += 1
        return None

    def _decline_reason(
        self, block: int, q: torch.Tensor, k: torch.Tensor, mask: Any, dropout_p: float, is_causal: bool
    ) -> str | None:
        if self.failure is not None:
            return self.failure
        tokens = q.shape[2]
        if mask is not None or is_causal or dropout_p:
            return "the attention call carries a mask"
        if q.shape != k.shape or tokens != self.layout.length:
            return f"{tokens} and {k.shape[2]} tokens, but {self.layout.length} are expected of this model"
        if tokens < self.min_tokens:
            return f"{tokens} tokens are fewer than min_tokens {self.min_tokens}; dense is usually faster there"
        if self.layout.video < 2 * self.config.block_q:
            return f"{self.layout.video} video tokens are fewer than two query blocks of {self.config.block_q}"
        if block in self.dense_blocks:
            return f"block {block} is listed in dense_blocks"
        return None

    def _order(self, device: torch.device) -> TokenOrder | None:
        if self.config.order in SEMANTIC_ORDERS:
            return None
        key = (self.layout.grid, device)
        if key not in self._orders:
            self._orders[key] = make_order(self.config.order, self.layout.grid, self.config.tile, device)
        return self._orders[key]

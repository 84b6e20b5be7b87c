"""The state of a patched transformer: its current calls, one for each thread, and what its attention calls came to."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.attention import AttentionResult, pyramid_sparse_attention
from ..kernels.backends import NO_GRADIENTS, BackendError, gradient_reason
from ..kernels.config import ConfigError, PyramidConfig
from ..kernels.falling import config_at, place_among
from ..kernels.order import TokenLayout, TokenOrder, make_order
from ..kernels.semantic import SEMANTIC_ORDERS
from .layout import MODELS
from .schedule import Schedule

log = logging.getLogger("ComfyUI-PSA")

UNREADABLE = (
    "PSA does not know the arguments that the transformer is called with; call it with those of diffusers' pipelines"
)
NO_STEPS = (
    "no scheduler is known, so a warm-up cannot be told; run the transformer by a pipeline, or call apply_psa on the "
    "transformer with warm_up=0"
)
UNREACHED = (
    "no self-attention of the model came to PSA: a cache answers it, or something has replaced its forward since "
    "apply_psa; if you use no cache, call apply_psa again"
)


@dataclasses.dataclass
class Call:
    """One forward of the transformer.

    Attributes:
        layout: where the video tokens lie; None where the call could not be read.
        config: the pyramid of its step. active: whether its step is one for PSA.
        reason: why all of it stays dense, None where nothing speaks against PSA.
        with_graph: whether autograd was on when it began.
        orders: the token orders that it uses, by device.
        attentions: how many self-attention modules have run.
    """

    config: PyramidConfig
    active: bool
    layout: TokenLayout | None = None
    reason: str | None = None
    with_graph: bool = False
    orders: dict[torch.device, TokenOrder] = dataclasses.field(default_factory=dict)
    attentions: int = 0


class TransformerState:
    """Decides for every attention call of one transformer; counts what it decided."""

    def __init__(
        self,
        family: str,
        config: PyramidConfig,
        schedule: Schedule | None,
        dense_blocks: frozenset[int],
        min_tokens: int,
        backend: str,
        falling: float,
        off: bool,
    ) -> None:
        """family: a name of `layout.MODELS`. schedule: None where steps are not told apart. off: every call stays
        dense, and no reason is given."""
        self.family = family
        self.config, self.schedule, self.falling, self.off = config, schedule, falling, off
        self.dense_blocks, self.min_tokens, self.backend = dense_blocks, min_tokens, backend
        self.sparse_calls = 0
        self.dense_calls = 0
        self.fallbacks: Counter[str] = Counter()
        # Density and pairs without a finite score, summed over the sparse calls, on the device.
        self.figures: torch.Tensor | None = None
        self._told: set[str] = set()
        self._failures: dict[tuple, str] = {}  # by the sizes and the type of the call
        self._calls: dict[int, Call] = {}  # by thread: two pipelines may run one transformer at the same time
        self._kept_orders: tuple[TokenLayout | None, dict[torch.device, TokenOrder]] = None, {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_calls": {}, "_lock": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def begin_call(self, transformer: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before a forward of the transformer. One read from the device where steps are told apart."""
        call = Call(self.config, active=not self.off, with_graph=torch.is_grad_enabled())
        self._calls[threading.get_ident()] = call
        if self.off:
            return
        try:
            call.layout, timestep = MODELS[self.family].read_call(transformer, args, kwargs)
        except Exception:  # the transformer itself says what it needs
            log.debug("PSA: a call that cannot be read", exc_info=True)
            call.reason = UNREADABLE
            return
        layout, orders = self._kept_orders
        call.orders = dict(orders) if layout == call.layout else {}
        if self.schedule is not None:
            place = self.schedule.place(timestep)
            if place is None:
                call.reason = NO_STEPS
                return
            sparse, now = place
            call.active = now in sparse
            call.config = config_at(self.config, self.falling, place_among(sparse, now))

    def end_call(self, transformer: torch.nn.Module, _: Any, output: Any) -> None:
        """After a forward, `output` being None where it failed. What it used is kept for the next one, and no more."""
        call = self._calls.pop(threading.get_ident(), None)
        if call is None or self.off:
            return
        self._kept_orders = call.layout, call.orders
        if output is not None and not call.attentions:
            self._stays_dense(call, UNREACHED, len(MODELS[self.family].blocks(transformer)))

    def current_call(self) -> Call | None:
        """The call of the transformer that this thread is in."""
        return self._calls.get(threading.get_ident())

    def end_attention(self, call: Call, attention: torch.nn.Module, seen: bool) -> None:
        """After a self-attention module; seen: whether `attend` was asked meanwhile."""
        call.attentions += 1
        if not seen and not self.off:
            self._stays_dense(call, _unseen_reason(attention))

    def attend(
        self,
        call: Call,
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
        if not call.active:
            self._stays_dense(call, None)
            return None
        case = call.layout, query.shape, query.dtype, query.device
        reason = call.reason or self._failures.get(case)
        reason = reason or self._decline_reason(call, block, query, key, value, attn_mask, dropout_p, is_causal)
        if reason is None:
            try:
                order = self._order(call, query.device)
                result = pyramid_sparse_attention(
                    query, key, value, call.config, layout=call.layout, order=order, scale=scale, backend=self.backend
                )
            except Exception as error:  # dense is always better than a dead pipeline
                # Not tried again: there is a call in every block and step, and a compiler may need seconds to fail.
                reason = self._failures[case] = f"{_failure(error)} (until apply_psa is called again)"
            else:
                self._count_sparse(result)
                return result.output
        self._stays_dense(call, reason)
        return None

    def _decline_reason(
        self,
        call: Call,
        block: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        dropout_p: float,
        is_causal: bool,
    ) -> str | None:
        tokens = q.shape[2]
        if mask is not None or is_causal or dropout_p:
            return "the attention call carries a mask"
        if q.shape != k.shape or tokens != call.layout.length:
            return f"{tokens} and {k.shape[2]} tokens, but {call.layout.length} are expected of this model"
        if tokens < self.min_tokens:
            return (
                f"{tokens} tokens are fewer than min_tokens {self.min_tokens}, where dense is usually faster; set "
                f"min_tokens to {tokens} or less to have them sparse"
            )
        if call.layout.video < 2 * self.config.block_q:
            return f"{call.layout.video} video tokens are fewer than two query blocks of {self.config.block_q}"
        if block in self.dense_blocks:
            return f"block {block} is listed in dense_blocks"
        # The first pass of a reentrant checkpoint runs without a graph, its second pass must compute the same.
        if call.with_graph and not torch.is_grad_enabled():
            return NO_GRADIENTS
        return gradient_reason(q, k, v)

    def _order(self, call: Call, device: torch.device) -> TokenOrder | None:
        if call.config.order in SEMANTIC_ORDERS:
            return None
        if device not in call.orders:
            call.orders[device] = make_order(call.config.order, call.layout.grid, call.config.tile, device)
        return call.orders[device]

    def _count_sparse(self, result: AttentionResult) -> None:
        figures = torch.stack([result.density, result.unranked.to(result.density)])
        with self._lock:
            self.sparse_calls += 1
            self.figures = figures if self.figures is None else self.figures + figures.to(self.figures.device)

    def _stays_dense(self, call: Call, reason: str | None, calls: int = 1) -> None:
        """Count; and say why, once. In the warm-up there is only something to say where no step would be sparse."""
        with self._lock:
            self.dense_calls += calls
            if reason is None:
                return
            if call.active:
                self.fallbacks[reason] += calls
            told = reason in self._told
            self._told.add(reason)
        if not told:
            log.warning("PSA: staying dense: %s", reason)


def _unseen_reason(attention: torch.nn.Module) -> str:
    backend = getattr(getattr(attention, "processor", None), "_attention_backend", None)
    named = "" if backend is None else f" (attention backend: {getattr(backend, 'value', backend)})"
    return (
        f"the self-attention does not go through torch's scaled_dot_product_attention{named}, so PSA cannot see it; "
        "choose a backend that does, such as pipe.transformer.set_attention_backend('native'), or take your own "
        "attention processor away"
    )


def _failure(error: Exception) -> str:
    if isinstance(error, BackendError | ConfigError):
        return str(error)
    log.debug("PSA: the failure in full", exc_info=True)
    return f"PSA failed: {str(error).splitlines()[0] if str(error) else 'no reason was given'}"

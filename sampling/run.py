"""One sampling run in three parts: where it is (`position`), what its next attention call may reuse (`kept`), and what
was measured (`record`). Only its own methods change a part; this module does what concerns several parts at once.

A run is made when sampling starts and dropped when it ends, even after an error or an interrupt. Only the report
remains, plain numbers on the host. Densities stay on the device until the end, so that measuring never has to wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch

from ..choices.settings import PatchSettings
from ..kernels.attention import AttentionResult
from ..kernels.config import PyramidConfig
from ..kernels.falling import config_at
from ..kernels.order import TokenLayout, TokenOrder
from ..kernels.semantic import SEMANTIC_ORDERS
from .kept import Kept
from .position import Position, is_active
from .record import Record, log

__all__ = ["Run", "is_active", "log"]


class Run:
    """State of one run, see above.

    Args:
        pictured_block: the block whose first head is pictured, -1 for no pictures. on_step: see `Record`.
        blocks: number of the model's transformer blocks, if known.
        latent_size: (time, height, width) of the latent that is sampled, if known; a call on a smaller latent is on a
            part of the video.
        pixels: frames and pixels per step of the latent, in time and in space, for messages in the user's sizes.
        kept: what an earlier run on the same model kept. told: reasons that were logged already, see `Record`.

    Attributes:
        config: the settings of the attention at the step of the current model call.
    """

    def __init__(
        self,
        settings: PatchSettings,
        sigma_start: float,
        sigma_end: float,
        pictured_block: int,
        on_step: Callable[[dict], None] | None = None,
        *,
        blocks: int | None = None,
        latent_size: tuple[int, ...] = (),
        pixels: tuple[int, int] | None = None,
        kept: Kept | None = None,
        told: set[str] | None = None,
    ) -> None:
        self.settings, self.config = settings, settings.config
        self.position = Position(sigma_start, sigma_end, latent_size, pixels)
        self.kept = kept or Kept(settings.reuse_steps)
        self.record = Record(pictured_block, on_step, blocks=blocks, verbose=settings.verbose, told=told)
        self._workers: dict[Hashable, Run] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        """A run cannot be sent to another process: if options are sent there during one, it arrives as None, and the
        calls there are dense."""
        return _no_run, ()

    def __deepcopy__(self, memo: dict) -> Run:
        """A copy of the options still refers to the same run."""
        return self

    def of_worker(self, worker: Hashable) -> Run:
        """The run as a worker sees it: the first worker gets the run itself, every other one gets its own run.

        ComfyUI can compute the prompts of a step on several GPUs at once, each in its own thread. Every worker has its
        own position and its own kept levels; what was measured is put together at the end.
        """
        with self._lock:
            if worker not in self._workers:
                self._workers[worker] = self._for_worker() if self._workers else self
            return self._workers[worker]

    def _for_worker(self) -> Run:
        run = Run.__new__(Run)
        run.settings, run.config = self.settings, self.settings.config
        run.position, run.record = self.position.for_worker(), self.record.for_worker()
        run.kept = Kept(self.settings.reuse_steps)
        run._workers, run._lock = {}, threading.Lock()
        return run

    def plan(self, sigmas: list[float] | None, device: torch.device, replaced: Sequence[str] = ()) -> None:
        """Called before the first model call, with the sampler's noise levels (steps + 1), if they are known.

        Args:
            replaced: parts of the model whose forward another node has replaced.
        """
        self.position.plan(sigmas)
        self.record.plan(self.position.planned_steps, device, replaced)

    def begin_model_call(
        self,
        sigma: float,
        layout: TokenLayout | None,
        context_tokens: tuple[int, ...],
        *,
        latent_size: tuple[int, ...] = (),
        foreign: bool = False,
    ) -> None:
        """Called once per forward of the diffusion model, before its first attention call.

        Args:
            layout: where the video tokens are; None if the call could not be read.
            latent_size: (time, height, width) of the latent of this call, if known.
            foreign: whether another attention override is in front of PSA's.
        """
        steps = self.position.begin_model_call(sigma, layout, context_tokens, latent_size)
        self.config = config_at(self.settings.config, self.settings.falling, self.position.share)
        self.record.begin_steps(steps, self.position)
        for _ in steps:
            self.kept.next_step()
        self.record.model_call(layout, foreign)

    def begin_self_attention(self, block: int | None) -> None:
        """Called at every self-attention call. Models that do not name the block have one call per block, in order."""
        self.position.begin_self_attention(block)
        self.record.self_attention(self.position)

    def order(self, device: torch.device) -> TokenOrder | None:
        """The token order of the current grid on `device`; None for one that follows the data."""
        if self.config.order in SEMANTIC_ORDERS:
            return None
        return self.kept.order(self.config.order, self.position.known_layout.grid, self.config.tile, device)

    def cases(self, q: torch.Tensor) -> tuple[Hashable, Hashable]:
        """What a call on q [B, H, L, D] can fail because of: its size and type, or these at the sparsity of this step.
        A call with the same case fails again."""
        case = self.position.layout, q.shape, q.dtype, q.device
        return case, (case, self.config.sparsity)

    def decide(self, config: PyramidConfig, active: bool) -> None:
        """For experiments, which choose the settings of the current call, and whether it is sparse, themselves."""
        self.config = config
        self.position.decide(active)

    def sparse_call(self, result: AttentionResult) -> None:
        """PSA has computed the self-attention call that began last."""
        self.record.sparse_call(self.position, self.config, result)

    def end(self, completed: bool = True) -> None:
        """Close the last step; what was measured can now be read (`figures.py`).

        Args:
            completed: False after an error or an interrupt, which stopped the last step.
        """
        self.record.end(self.position, completed)
        self.kept.clear()
        for run in self._workers.values():
            if run is not self:
                run.end(completed)
                self.record.take_in(run.record)


def _no_run() -> None:
    return None

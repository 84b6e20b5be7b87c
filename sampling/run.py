"""One sampling run in four parts: where it is (`position`), what its next attention call may reuse (`kept`), what its
sparse calls get back (`losses`), and what was measured (`record`). Only its own methods change a part; this module does
what concerns several parts at once.

A run is made when sampling starts and dropped when it ends, even after an error or an interrupt. Only the report
remains, plain numbers on the host. Densities stay on the device until the end, so that measuring never has to wait.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch

from ..choices.correction import OURS, reason_against
from ..choices.settings import PatchSettings
from ..kernels.attention import AttentionResult
from ..kernels.config import PyramidConfig
from ..kernels.falling import config_at, renews, with_renewals
from ..kernels.levels import BlockLists, can_meet
from ..kernels.order import TokenLayout, TokenOrder
from ..kernels.semantic import SEMANTIC_ORDERS
from .correction import LossStore, Memory, with_other_weights
from .kept import Kept
from .position import NO_BLOCKS, Position, is_active
from .record import Record, log

__all__ = ["Run", "is_active", "log"]


@dataclasses.dataclass
class Again:
    """A run that learns again in a sparse step.

    Attributes:
        paid_by: numbers of the steps after it, of all sparse steps counted from 1. cost: what they pay for, in dense
            steps: this one, and what is not paid yet of an earlier one.
    """

    paid_by: range
    cost: float

    @property
    def steps(self) -> int:
        """How many there are, this one included."""
        return 1 + len(self.paid_by)


class Run:
    """State of one run, see above.

    Args:
        pictured_block: the block whose first head is pictured, -1 for no pictures. on_step: see `Record`.
        blocks: number of the model's transformer blocks, if known.
        latent_size: (time, height, width) of the latent that is sampled, if known; a call on a smaller latent is on a
            part of the video.
        pixels: frames and pixels per step of the latent, in time and in space, for messages in the user's sizes.
        kept: what an earlier run on the same model kept. told: reasons that were logged already, see `Record`.
        prompts: how many prompts a step has, if known. patch: which patch of the model the run belongs to.

    Attributes:
        config: the settings of the attention at the step of the current model call.
        correction: how its sparse calls are corrected, if they are.
        learns: whether the current self-attention call is dense and measures what PSA would lose.
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
        prompts: int | None = None,
        patch: str = "",
    ) -> None:
        self.settings, self.config, self._prompts, self.patch = settings, settings.config, prompts, patch
        self.position = Position(sigma_start, sigma_end, latent_size, pixels, settings.reuse_steps)
        self.kept = kept or Kept(settings.reuse_steps)
        self.record = Record(pictured_block, on_step, blocks=blocks, verbose=settings.verbose, told=told)
        self._begin_learning()
        self._workers: dict[Hashable, Run | None] = {}
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
                # None for this run: if it referred to itself, its tensors would outlive it on the GPU.
                self._workers[worker] = self._for_worker() if self._workers else None
            return self._workers[worker] or self

    def _for_worker(self) -> Run:
        run = Run.__new__(Run)
        run.settings, run.config, run._prompts = self.settings, self.settings.config, self._prompts
        run.patch = self.patch
        run.position, run.record = self.position.for_worker(), self.record.for_worker()
        run.kept = Kept(self.settings.reuse_steps)
        run._begin_learning()
        run._workers, run._lock = {}, threading.Lock()
        return run

    def _begin_learning(self) -> None:
        """Nothing has been learned yet."""
        correction = self.settings.correction
        self.losses = LossStore(correction)
        if correction is not None:
            self.losses.reason = reason_against(self.settings.config.order)
        self.learns = False
        self._sparse_steps = 0
        self._learning_step: int | None = None
        self._learned: dict[Hashable, Hashable] = {}
        self._changed_step: int | None = None
        self._again: Again | None = None
        self._decide()

    def _decide(self) -> None:
        """How to correct depends on the number of steps, which is known once the run is planned, on the size of the
        correction, which is known once there is a loss to keep, and on the tokens of the model call."""
        settings, size = self.settings, self.losses.size
        correction = settings.correction or OURS
        if size is not None:
            correction = dataclasses.replace(correction, size=size)
        steps = self.position.sparse_steps if self._again is None else self._again.steps
        self.correction = correction.decided(settings.config, settings.falling, steps, self._can_renew)
        self._set_config()

    def _can_renew(self, renew: int) -> bool:
        """Whether the other calls can be as sparse as it takes to renew one block in so many."""
        config, layout, share = self.settings.config, self.position.layout, self._renewed_share(renew)
        if self._again is not None and self._too_much(share):
            return False
        return layout is None or can_meet(-(-layout.video // config.block_kv), with_renewals(config, share))

    def _set_config(self) -> None:
        """The settings at this step: what renewals cost is taken from the other calls."""
        self.config = config_at(self.settings.config, self.settings.falling, self.position.share)
        renew = self.correction.renew if self.losses.on else 0
        self.config = with_renewals(self.config, self._renewed_share(renew))

    def plan(self, sigmas: list[float] | None, device: torch.device, replaced: Sequence[str] = ()) -> None:
        """Called before the first model call, with the sampler's noise levels (steps + 1), if they are known.

        Args:
            replaced: parts of the model whose forward another node has replaced.
        """
        self.record.tell_once(self.losses.reason)
        self.position.plan(sigmas)
        self._decide()
        self.record.plan(self.position.planned_steps, device, replaced)

    def begin_model_call(
        self,
        sigma: float,
        layout: TokenLayout | None,
        context_tokens: tuple[int, ...],
        width: int | None = None,
        first_blocks: Mapping[str, int] = NO_BLOCKS,
        *,
        latent_size: tuple[int, ...] = (),
        foreign: bool = False,
        rows: Collection[Hashable] = (),
    ) -> None:
        """Called once per forward of the diffusion model, before its first attention call.

        Args:
            layout: where the video tokens are; None if the call could not be read.
            context_tokens, width, first_blocks: see `Position`.
            latent_size: (time, height, width) of the latent of this call, if known.
            foreign: whether another attention override is in front of PSA's.
            rows: what it computes: prompts, of which parts of the video.
        """
        steps = self.position.begin_model_call(sigma, layout, context_tokens, latent_size, width, first_blocks, rows)
        self.record.begin_steps(steps, self.position)
        for _ in steps:
            self.kept.next_step()
        if steps:
            self.losses.next_step()
        if steps and self.position.active:
            self._begin_sparse_step()
        if not self.position.active and self.position.sparse_steps_left == 0:  # PSA's part is over
            self.losses.clear()
        self._decide()
        self.record.model_call(layout, foreign)

    def begin_prompts(self, prompts: Sequence[Hashable], strengths: Hashable) -> None:
        """A model call is for `prompts`, with LoRAs of these strengths on its weights. If nothing is known of a prompt,
        or what was lost was lost with other weights, the run learns again."""
        position, learned = self.position, self._learned
        if position.before_sparse_part or position.step == self._learning_step:
            learned.update(dict.fromkeys(prompts, strengths))
        unknown = [prompt for prompt in prompts if learned.get(prompt) != strengths]
        if not unknown or not position.active or not self.losses.on or not len(self.losses):
            return
        goes_on = self._changed_step is not None and position.step - self._changed_step < 2
        self._changed_step = position.step
        if not goes_on and self._learn_again():
            learned.update(dict.fromkeys(prompts, strengths))
        elif any(prompt in learned for prompt in unknown):
            self.give_up_correction(with_other_weights())

    def _learn_again(self) -> bool:
        """Make this sparse step a dense one that learns, as if the run began here; False if the calls after it cannot
        pay for that with half of their work at most."""
        left, before = self.position.sparse_steps_left, self._again
        if not left:
            return False
        self._again = Again(range(self._sparse_steps + 1, self._sparse_steps + left + 1), 1.0)
        if before is not None:
            self._again.cost += before.cost * self._again.steps / before.steps
        self._decide()
        if self._too_much(self._renewed_share(self.correction.renew)):
            self._again = before
            self._decide()
            return False
        self._learning_step = self.position.step
        self.losses.begin_again()
        log.info("PSA: correction: learned again in step %d, for other prompts or weights", self.position.step)
        return True

    def choose_size(self, video: torch.Tensor, lists: BlockLists | None, rows: int, memory: Memory) -> bool:
        """Choose the size of the correction by what a first call of `rows` prompts would keep, see `LossStore`; whether
        that has changed the settings, so that the call would keep something else."""
        self.losses.choose_size(video, lists, self.calls_of_step(rows) * self.kept.groups, memory)
        if self.losses.reason is not None:
            self.give_up_correction(self.losses.reason)
            return False
        before = self.config
        self._decide()
        return self.config != before

    def give_up_correction(self, reason: str) -> None:
        """Go on without a correction, for a reason that ends with what to do. No call renews anything any more, so
        sparse ones have the settings of a run without correction."""
        self.losses.give_up(reason)
        self.record.tell_once(reason)
        self._set_config()

    def whole_call_dense(self, reason: str) -> None:
        """No attention of the model call that began last can be sparse."""
        self.record.whole_call_dense(self.position, reason)

    def _begin_sparse_step(self) -> None:
        """A run that learned nothing before its sparse part, for there was no step or a cache answered it, makes the
        first step of that part dense, or the first that no cache answers. That needs two sparse steps after it to be
        worth its time."""
        left = self.position.sparse_steps_left
        computed = any(step.densities or step.learned for step in self.record.steps)
        if not computed and (left is None or left >= 2):
            self._learning_step = self.position.step
        self._sparse_steps += 1

    def begin_self_attention(self, block: int | None) -> None:
        """Called at every self-attention call. Models that do not name the block have one call per block, in order."""
        self.position.begin_self_attention(block)
        self.learns = self.losses.on and self._learns()
        self.record.self_attention(self.position)

    def _learns(self) -> bool:
        position = self.position
        if not position.active:
            return position.before_sparse_part
        if position.step == self._learning_step:
            return True
        return renews(self._sparse_steps, position.block, self.correction.renew)

    def _renewed_share(self, renew: int) -> float:
        """Share of the calls in all sparse steps that are dense to renew a loss, if one block in `renew` is; or in the
        steps since the run learned again, which pay for that."""
        steps, blocks, again = self.position.sparse_steps, self.record.blocks, self._again
        if not steps or not blocks:
            return 1 / renew if renew else 0.0
        sparse = range(1 if self._learning_step is None else 2, steps + 1) if again is None else again.paid_by
        turns = sum(renews(step, block, renew) for step in sparse for block in range(blocks)) / blocks
        if again is None:
            return turns / len(sparse) if sparse else 0.0
        return (again.cost + turns) / again.steps

    def _too_much(self, share: float) -> bool:
        """Whether the other calls cannot pay for this share with half of their work."""
        return self.settings.config.sparsity is None or 2 * share > 1 - self.settings.config.sparsity

    def calls_of_step(self, rows: int) -> int:
        """About how many calls a step has, over all blocks and prompts, for calls of `rows` prompts each."""
        blocks = max(1, (self.record.blocks or self.position.block + 1) - len(self.settings.dense_blocks))
        if self.position.forwards_before:
            return blocks * rows * self.position.forwards_before
        return blocks * max(rows, self._prompts or 2)

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

    def sparse_call(self, results: Sequence[AttentionResult], corrected: bool) -> None:
        """PSA has computed the self-attention call that began last, in one piece or several."""
        self.record.sparse_call(self.position, self.config, results, corrected)

    def end(self, completed: bool = True) -> None:
        """Close the last step; what was measured can now be read (`figures.py`).

        Args:
            completed: False after an error or an interrupt, which stopped the last step.
        """
        workers = [run for run in self._workers.values() if run is not None]
        try:
            self.record.end(self.position, completed)
            for run in workers:
                run.end(completed)
                self.record.take_in(run.record)
                self.losses.take_in(run.losses)
        finally:  # reading from a device may raise what went wrong there earlier
            for run in (self, *workers):
                run.release()

    def release(self) -> None:
        """Give back all memory that is held for the calls to come."""
        self.kept.clear()
        self.losses.clear()


def _no_run() -> None:
    return None

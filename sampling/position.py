"""Where a run is: its step, the grid of the model call, the block of the attention call. It knows no settings."""

from __future__ import annotations

import types
from collections.abc import Collection, Hashable, Mapping

from ..kernels.order import TokenLayout
from .schedule import Place, Schedule

NO_BLOCKS: Mapping[str, int] = types.MappingProxyType({})
"""`first_blocks` of a model that numbers its blocks through."""


def is_active(sigma: float, sigma_start: float, sigma_end: float) -> bool:
    """Whether a model call at noise level `sigma` is in PSA's part of the schedule.

    A step exactly at the start is inside, and a step exactly at the end is outside. The sampler's noise levels are
    rounded to float32 and the bounds are not: without slack, 16 steps at a shift of 12 would have 5 dense steps at a
    start of 0.25.
    """
    slack = 1 + 1e-6
    return sigma_end * slack < sigma <= sigma_start * slack


class Position:
    """Follows model calls and attention calls; measures nothing and keeps nothing.

    Attributes:
        active: whether the current model call is in PSA's part of the schedule.
        layout: where its video tokens are; None before the first call, or if the call could not be read.
        context_tokens: lengths of other sequences of the model, which its cross-attention may have.
        width: heads times head size of its self-attention, if other attention can be as long; None if none can.
        first_blocks: number of the first block of each kind of block that the model counts from 0 again, by kind.
        forward: which of the model calls in a row at its noise level it is, counted from 0. forwards_before: how many
            there were at the level before, 0 if there was none.
        block: transformer block of the current attention call; named: whether the model itself said which.
        planned_steps: number of steps of the sampler, None if it is not known.
    """

    def __init__(
        self,
        sigma_start: float,
        sigma_end: float,
        latent_size: tuple[int, ...] = (),
        pixels: tuple[int, int] | None = None,
        reuse_steps: int = 1,
    ) -> None:
        """latent_size: (time, height, width) of the latent that is sampled, if known; a call on a smaller latent is on
        a part of the video. pixels: frames and pixels per step of the latent, in time and in space, if known.
        reuse_steps: for how many sparse steps in a row levels are chosen."""
        self._bounds, self._reuse_steps = (sigma_start, sigma_end), reuse_steps
        self._latent_size, self._pixels = latent_size, pixels
        self._call_size: tuple[int, ...] = ()
        self._schedule = Schedule(None, self.is_active)
        self._place = Place(-1, False)
        self._furthest = -1  # the latest step that has begun
        self._calls = 0
        self.layout: TokenLayout | None = None
        self.context_tokens: tuple[int, ...] = ()
        self.width: int | None = None
        self.first_blocks = NO_BLOCKS
        self.active = False
        self.forward = self.forwards_before = 0
        self.block = -1
        self.named = True
        self.planned_steps: int | None = None

    def for_worker(self) -> Position:
        """A position in the same run for another worker."""
        position = Position(*self._bounds, self._latent_size, self._pixels, self._reuse_steps)
        if self._schedule.levels:
            position.plan([*self._schedule.levels, 0.0])
        return position

    def plan(self, sigmas: list[float] | None) -> None:
        """Called before the first model call, with the sampler's noise levels (steps + 1), if they are known."""
        if sigmas is not None and len(sigmas) > 1:
            self._schedule = Schedule(sigmas[:-1], self.is_active, self._reuse_steps)
            self.planned_steps = len(sigmas) - 1

    def is_active(self, sigma: float) -> bool:
        """Whether a model call at noise level `sigma` is in PSA's part of the schedule."""
        return is_active(sigma, *self._bounds)

    def begin_model_call(
        self,
        sigma: float,
        layout: TokenLayout | None,
        context_tokens: tuple[int, ...],
        call_size: tuple[int, ...] = (),
        width: int | None = None,
        first_blocks: Mapping[str, int] = NO_BLOCKS,
        rows: Collection[Hashable] = (),
    ) -> list[tuple[int, float]]:
        """A model call begins, see `Run.begin_model_call`.

        Returns:
            The steps that began since the last call, as (index, noise level), with this call's own at the end: none if
            its step continues or the sampler has returned to an earlier one, several if some steps had no model call.
        """
        self.layout, self.context_tokens, self._call_size = layout, context_tokens, call_size
        self.width, self.first_blocks = width, first_blocks
        self.active = self.is_active(sigma)
        before, place = self._place, self._schedule.move(sigma, rows)
        self._place = place
        self._calls = 0
        if place is before:
            self.forward += 1
            return []
        self.forwards_before = 0 if before.step < 0 else self.forward + 1
        self.forward = 0
        if place.step <= self._furthest:
            return []
        skipped = self._levels(self._furthest + 1, place.step) if before.on_level and place.on_level else []
        self._furthest = place.step
        return [*skipped, (place.step, sigma)]

    def steps_left(self) -> list[tuple[int, float]]:
        """Steps of the schedule that have not begun, as (index, noise level); none while it is between levels."""
        return self._levels(self._furthest + 1, len(self._schedule.levels)) if self._place.on_level else []

    def _levels(self, first: int, end: int) -> list[tuple[int, float]]:
        return [(step, self._schedule.levels[step]) for step in range(first, end)]

    def begin_self_attention(self, block: int | None) -> None:
        """A self-attention call begins. Models that do not name the block have one call per block, in order."""
        self.named = block is not None
        self.block = self._calls if block is None else block
        self._calls += 1

    def decide(self, active: bool) -> None:
        """For experiments, see `Run.decide`."""
        self.active = active

    @property
    def share(self) -> float:
        """How far along the sparse steps the current model call is, see `schedule.Place`."""
        return self._place.share

    @property
    def step(self) -> int:
        """Index of the sampler's step that the current model call belongs to."""
        return self._place.step

    @property
    def before_sparse_part(self) -> bool:
        """Whether this is a dense step and the next one is in PSA's part of the schedule; a schedule that returns to
        dense levels (restarts) has several."""
        return not self.active and self._place.step + 1 in self._schedule.sparse_steps

    @property
    def sparse_steps(self) -> int | None:
        """How many steps of the schedule are sparse; None if it is not known."""
        return len(self._schedule.sparse_steps) if self._schedule.levels else None

    @property
    def sparse_steps_left(self) -> int | None:
        """How many sparse steps come after the current one; None if the schedule is not known."""
        if not self._schedule.levels:
            return None
        return sum(step > self._place.step for step in self._schedule.sparse_steps)

    @property
    def in_last_step(self) -> bool:
        """Whether no other step of the schedule comes after this one."""
        return self._place.on_level and self._place.step == len(self._schedule.levels) - 1

    @property
    def in_last_sparse_step(self) -> bool:
        """Whether this is the last step of the schedule in which PSA is active."""
        return self._schedule.sparse_steps[-1:] == [self._place.step]

    @property
    def whole(self) -> bool:
        """Whether the current model call is on the whole video, not on an area or window of it."""
        return not any(size < whole for size, whole in zip(self._call_size, self._latent_size, strict=False))

    @property
    def known_layout(self) -> TokenLayout:
        """`layout`, for code that only runs once it is known: a call without one stays dense before that."""
        assert self.layout is not None
        return self.layout

    @property
    def size(self) -> str:
        """The size of the current model call, in frames and pixels if these are known."""
        if self._pixels is None or not self._call_size:
            return "x".join(map(str, self.known_layout.grid)) + " of them in time, height, width"
        (time, height, width), (frames, pixels) = self._call_size, self._pixels
        return f"{(time - 1) * frames + 1} frames of {width * pixels}x{height * pixels}"

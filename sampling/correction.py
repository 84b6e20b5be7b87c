"""What PSA lost in a run, by the place of a call: measured once, held in as much memory as there is, given back later.

The GPU comes first. If it has no room, deltas wait in pinned memory of the host. While one call computes, the delta of
the next one is copied to the GPU by another stream.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence

import torch

from ..choices.correction import AUTO, Correction
from ..kernels.delta import GROUPS, Delta, delta_bytes
from ..kernels.levels import BlockLists

log = logging.getLogger("ComfyUI-PSA")

_MOST_OVER = 4
"""A run may hold so many times what was estimated: it may have more context windows than the estimate knows of, but
windows that move on and never come back must not fill the memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """How a program accounts for memory.

    Attributes:
        free: bytes that a run may hold on a device, besides what the model needs there. free_on_host: the same for
            pinned memory of the host.
        pin: pins a tensor of the host, so that copies need not wait; unpin undoes it.
    """

    free: Callable[[torch.device], int]
    free_on_host: Callable[[], int]
    pin: Callable[[torch.Tensor], None]
    unpin: Callable[[torch.Tensor], None]


@dataclasses.dataclass
class Loss:
    """What is known of the call at one place: the levels to keep, if any, and what they lost."""

    lists: BlockLists | None
    delta: Delta

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The large ones."""
        levels = () if self.lists is None else (self.lists.blocks,)
        return self.delta.values, self.delta.scales, *levels

    def with_tensors(self, values: torch.Tensor, scales: torch.Tensor, *levels: torch.Tensor) -> Loss:
        """The same with these tensors instead."""
        lists = None if self.lists is None else dataclasses.replace(self.lists, blocks=levels[0])
        return Loss(lists, Delta(values, scales, self.delta.group))

    @property
    def nbytes(self) -> int:
        """Bytes of the large tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())


def with_other_weights() -> str:
    """Why a run in which the model has changed goes on without its correction."""
    return (
        "the correction ends here: the strength of a LoRA has changed, and what was learned with other weights "
        "does not fit; to keep it, change the strength in the dense steps only"
    )


@dataclasses.dataclass
class _Waiting:
    """A loss on the host, and the event after which it is complete there."""

    loss: Loss
    written: torch.cuda.Event


class LossStore:
    """The losses of one run on one device.

    Attributes:
        size: one of `GROUPS`, None until it is chosen. where: the name of its memory. nbytes: held now; most:
            the most that were held.
        reason: why there is no correction, or none any more; None if there is. last: whether every loss is needed once
            more at most. without_room: how many losses could not be kept.
    """

    def __init__(self, settings: Correction | None) -> None:
        self.settings = settings
        self.size: str | None = None
        self.where = ""
        self.nbytes = self.most = 0
        self.reason: str | None = None
        self._budget = 0
        self._device = torch.device("cpu")
        self._memory: Memory | None = None
        self._losses: dict[Hashable, Loss] = {}
        self._hosted: dict[Hashable, _Waiting] = {}
        self._ahead: dict[Hashable, tuple[Loss, torch.cuda.Event]] = {}
        self._next: dict[Hashable, Hashable] = {}
        self._latest: Hashable = None
        self._step = 1
        self._asked: dict[Hashable, int] = {}
        self._stream: torch.cuda.Stream | None = None
        self.last = False
        self.without_room = 0

    @property
    def on(self) -> bool:
        """Whether calls are corrected, or may be later."""
        return self.settings is not None and self.reason is None

    def __len__(self) -> int:
        return len(self._losses) + len(self._hosted)

    def choose_size(self, video: torch.Tensor, lists: BlockLists | None, calls: int, memory: Memory) -> None:
        """Choose how finely deltas are kept, and where, before the first one is kept. Chosen again for other levels, a
        size does not get finer.

        Args:
            video: a call's output for the video tokens [1, H, L, D]. lists: the levels that are kept with it, packed.
            calls: how many such calls a step has, over all blocks and prompts.
        """
        assert self.settings is not None
        device = self._device = video.device
        _, heads, tokens, dim = video.shape
        levels = 0 if lists is None else lists.blocks.nbytes
        free = memory.free(device)
        places = [("GPU memory" if device.type == "cuda" else f"{device.type.upper()} memory", free)]
        if device.type == "cuda":
            places.append(("host memory", memory.free_on_host()))
        chosen, asked = self.size, list(GROUPS)
        if (most := chosen or self.settings.size) != AUTO:
            asked = asked[asked.index(most) :]
        self._memory = memory
        for size in asked:
            needed = calls * (delta_bytes(heads, tokens, dim, GROUPS[size]) + levels)
            for where, room in places:
                if needed <= room:
                    self.size, self.where, self._budget = size, where, min(room, _MOST_OVER * needed)
                    if size == chosen:
                        return
                    words = f"PSA: correction: {size}, about {gigabytes(needed)} in {where}"
                    if self.settings.size not in (AUTO, size):
                        words += f"; {self.settings.size} does not fit"
                    log.info("%s", words)
                    return
        self.size, self.where = None, ""
        largest = gigabytes(max(room for _, room in places))
        self.give_up(
            f"no correction: it needs {gigabytes(needed)}, and {largest} are free; close other programs that use "
            f"memory, or sample a shorter or smaller video"
        )

    def next_step(self) -> None:
        """A step begins that has model calls."""
        self._step += 1

    def begin_again(self) -> None:
        """All calls of this step that are still to come learn, so what they do not replace may make room for them."""
        self._asked = {place: step if step == self._step else -1 for place, step in self._asked.items()}

    def put(self, place: Hashable, loss: Loss) -> bool:
        """Keep the loss of the call at `place`, instead of an earlier one; returns whether there was room for it. It
        may take the room of losses that were not asked for in this step and the one before."""
        self._follow(place)
        self._ahead.pop(place, None)
        earlier = self._hosted.get(place)
        held = self._losses.get(place) if earlier is None else earlier.loss
        more = loss.nbytes - (0 if held is None else held.nbytes)
        if self.nbytes + more > self._budget:
            for other, step in list(self._asked.items()):
                if step < self._step - 1 and other != place:
                    self.drop(other)
        nbytes = self.nbytes + more
        if nbytes > self._budget:
            self.drop(place)
            self.without_room += 1
            return False
        if self.where == "host memory":
            self._hosted[place] = self._to_host(loss, earlier)
        else:
            self._losses[place] = loss
        self._asked[place] = self._step
        self.nbytes = nbytes
        self.most = max(self.most, self.nbytes)
        return True

    def get(self, place: Hashable) -> Loss | None:
        """The loss of the call at `place` on its device; None if it is not known."""
        if not self.on:
            return None
        if self.has(place):
            self._asked[place] = self._step
        loss = self._losses.get(place)
        if loss is not None:
            if self.last:
                self.drop(place)
            return loss
        if place not in self._hosted:
            return None
        self._follow(place)
        loss, copied = self._ahead.pop(place) if place in self._ahead else self._fetch(place)
        current = torch.cuda.current_stream(loss.delta.values.device)
        current.wait_event(copied)
        for tensor in loss.tensors():
            tensor.record_stream(current)
        following = self._next.get(place)
        self._ahead = {following: self._fetch(following)} if following in self._hosted else {}
        if self.last:
            self.drop(place)
        return loss

    def has(self, place: Hashable) -> bool:
        """Whether the loss of the call at `place` is known."""
        return place in self._losses or place in self._hosted

    def give_up(self, reason: str) -> None:
        """Go on without a correction, for a reason that ends with what to do."""
        self.clear()
        self.reason = reason

    def clear(self) -> None:
        """Give all memory back."""
        for place in list(self._hosted):
            self.drop(place)
        self._losses.clear()
        self._asked.clear()
        self._ahead.clear()
        self._next.clear()
        self._latest, self._stream, self.last = None, None, False
        self.nbytes = 0

    def take_in(self, other: LossStore) -> None:
        """Add the figures of another worker of the same run, which has its own store on its own device."""
        self.size, self.where = self.size or other.size, self.where or other.where
        self.most += other.most
        self.without_room += other.without_room
        self.reason = self.reason or other.reason

    def _follow(self, place: Hashable) -> None:
        """Calls come in the same order in every step, so this tells which one comes next."""
        if self._latest is not None:
            self._next[self._latest] = place
        self._latest = place

    def drop(self, place: Hashable) -> None:
        """Give back what is held for the call at `place`, if anything."""
        self._ahead.pop(place, None)
        self._asked.pop(place, None)
        loss = self._losses.pop(place, None)
        waiting = self._hosted.pop(place, None)
        if waiting is not None:
            loss = waiting.loss
            self._unpin(waiting, loss.tensors())
        if loss is not None:
            self.nbytes -= loss.nbytes

    def _to_host(self, loss: Loss, earlier: _Waiting | None) -> _Waiting:
        """Copy a loss to pinned memory, over an earlier one where it fits: to pin takes longer than to copy."""
        assert self._memory is not None
        current = torch.cuda.current_stream(loss.delta.values.device)
        unused = [] if earlier is None else list(earlier.loss.tensors())
        copies = []
        for tensor in loss.tensors():
            fitting = next((one for one in unused if (one.shape, one.dtype) == (tensor.shape, tensor.dtype)), None)
            if fitting is None:
                fitting = torch.empty_like(tensor, device="cpu")
                self._memory.pin(fitting)
            else:
                unused = [one for one in unused if one is not fitting]
            copies.append(fitting)
        if earlier is not None:
            self._unpin(earlier, unused)
            current.wait_event(earlier.written)
            if self._stream is not None:  # it may still be reading the earlier one
                current.wait_stream(self._stream)
        for copy, tensor in zip(copies, loss.tensors(), strict=True):
            copy.copy_(tensor, non_blocking=True)
        written = torch.cuda.Event()
        written.record(current)
        return _Waiting(loss.with_tensors(*copies), written)

    def _unpin(self, waiting: _Waiting, tensors: Sequence[torch.Tensor]) -> None:
        """Give back pinned memory, once nothing reads or writes it any more."""
        assert self._memory is not None
        if not tensors:
            return
        waiting.written.synchronize()
        if self._stream is not None:
            self._stream.synchronize()
        for tensor in tensors:
            self._memory.unpin(tensor)

    def _fetch(self, place: Hashable) -> tuple[Loss, torch.cuda.Event]:
        waiting = self._hosted[place]
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(waiting.written)
            loss = waiting.loss.with_tensors(*(x.to(self._device, non_blocking=True) for x in waiting.loss.tensors()))
            copied.record(self._stream)
        return loss, copied


def gigabytes(count: int) -> str:
    """A number of bytes as people read it: 3.1 GB, 40 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"

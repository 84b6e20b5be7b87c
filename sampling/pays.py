"""Whether the sparse steps of a run were faster than its dense ones, by the run's own clock, and if not, why."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..choices.settings import PatchInputs
from .record import DENSE, SPARSE, Record, Step

ENOUGH = 1.1
"""How many times as fast as dense steps sparse ones must be to be worth it."""

# Share of a dense step that must be something other than self-attention to leave it little to give.
_MOSTLY_OTHERS = 0.75


def pays(record: Record) -> dict[str, Any] | None:
    """Seconds of a `dense` and a `sparse` step of a run, how many `times` as fast the second was, and `why` that is
    less than 1.1 times, None if it is not. None if nothing in the run can be compared."""
    dense, sparse = comparable(record.steps, DENSE), comparable(record.steps, SPARSE)
    if not dense or not sparse:
        return None
    one, other = (statistics.median(step.seconds for step in steps) for steps in (dense, sparse))
    if not one or not other:
        return None
    why = None if one >= ENOUGH * other else _why(record, one, sparse)
    return {"dense": round(one, 4), "sparse": round(other, 4), "times": round(one / other, 2), "why": why}


def how_it_pays(found: dict[str, Any]) -> str:
    """What `pays` found, in words."""
    if found["why"] is None:
        return f"a sparse step is {found['times']:.1f} times as fast"
    return f"a sparse step is {found['times']:.2f} times as fast: {found['why']}"


def comparable(steps: Sequence[Step], kind: str) -> list[Step]:
    """The steps of a kind that did what such a step does, and nothing else.

    The first step of a run and the first sparse one also load, compile and tune. A dense step that measures what PSA
    loses computes a sparse call beside every dense one.
    """
    ran = [step for step in steps if step.kind in (DENSE, SPARSE)]
    begins = ran[:1] + [step for step in ran if step.kind == SPARSE][:1]
    found = [step for step in ran if step.kind == kind and not any(step is first for first in begins)]
    return [step for step in found if not step.learned] if kind == DENSE else found


def _why(record: Record, dense: float, sparse: Sequence[Step]) -> str:
    """Why sparse steps were not faster than a dense one of so many seconds, and what to do: the likeliest cause."""
    dense_calls = sum(step.dense_calls - len(step.learned) for step in sparse)
    if dense_calls > sum(len(step.densities) for step in sparse):
        return "most calls of the sparse steps stayed dense; change what the reasons in the log name"
    if record.offloaded:
        return (
            "the model does not fit the GPU, and moving its weights takes longer than attention; free GPU memory, or "
            "load a smaller file of the model"
        )
    if record.backend == "torch":
        dtype = str(record.dtype).removeprefix("torch.")
        return (
            f"attention was computed in {dtype} by plain torch, which saves little; use a GPU with Triton, and the "
            f"model in bfloat16 or float16"
        )
    tokens = max((layout.length for layout in record.layouts), default=0)
    if tokens < PatchInputs.min_tokens:
        return (
            f"{tokens} tokens are so few that dense attention takes about as long; sample a longer or larger video, or "
            f"set min_tokens to {PatchInputs.min_tokens}"
        )
    clocked = [step.seconds - step.attention for step in sparse if step.attention is not None]
    others = min(1.0, statistics.median(clocked) / dense) if clocked else 0.0
    if others >= _MOSTLY_OTHERS:
        return (
            f"everything but self-attention takes {others:.0%} of a dense step, so there is little to save; sample a "
            f"longer or larger video"
        )
    if not record.tuned:
        return (
            "the attention kernel was not tuned for this GPU, which is so on all AMD GPUs; elsewhere, start without "
            "PSA_AUTOTUNE=0, or see in the log why tuning failed"
        )
    return "sparse attention took about as long as dense attention; raise sparsity, or set order to raster"

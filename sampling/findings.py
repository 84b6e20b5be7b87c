"""What only the run as a whole can show: attention that never reached PSA, and why, as far as we can tell."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from .record import SKIPPED, SPARSE, Record, Step
from .run import Run

NONE_ACTIVE = (
    "no step is between start_percent and end_percent; lower start_percent, raise end_percent, or sample more steps"
)
NO_PLAIN_GRID = "so this model is no plain grid, and PSA cannot make it sparse; set preset to auto"


def find(record: Record) -> list[str]:
    """Sentences about a finished run, each with what to do; none if everything went as intended."""
    if not record.steps:
        return [
            "no call of the model reached PSA in this run: a cache or a compiled model answered all of them; "
            "bypass that node to use PSA"
        ]
    watched = [step for step in record.steps if step.active] or record.steps
    if any(step.reached for step in watched):
        unranked = sum(int(pairs) for step in record.steps for pairs in step.unranked)
        return _unseen_blocks(record, watched) + unranked_note(unranked)
    if all(step.kind == SKIPPED for step in watched):
        return [
            f"a cache answered all {len(watched)} steps in which PSA is active, so no attention was left to make "
            f"sparse; lower the cache's threshold, or let PSA begin earlier (start_percent)"
        ]
    if any(step.foreign for step in watched):
        return [
            "no self-attention reached PSA in this run: a node has put its own attention in front of PSA's and "
            "computes all of it; put PSA Patch after that node, or bypass the node if it is Model Sparse Attention, "
            "which always goes first"
        ]
    if record.assumed:
        lengths = " or ".join(str(layout.length) for layout in record.layouts)
        return [f"no self-attention of this model is over {lengths} tokens, {NO_PLAIN_GRID}"]
    return [
        f"no self-attention reached PSA in this run: a node has replaced the model's own forward"
        f"{_named(record.replaced)} with one that computes attention without PSA; changing the order of the nodes does "
        f"not help. Bypass that node (TeaCache and MagCache packs, a Sage Attention patch that saves memory, a "
        f"compiled model) to use PSA; core's EasyCache works with PSA"
    ]


def unranked_note(pairs: int) -> list[str]:
    """What to say if the importance of `pairs` pairs of blocks was not a finite number; nothing if `pairs` is 0."""
    if not pairs:
        return []
    return [
        f"the importance of {pairs} pairs of blocks was not a finite number, and they ranked last: the model's own "
        f"queries or keys are infinite or not a number; run the model in bfloat16, or try another file of its weights"
    ]


@functools.lru_cache(maxsize=16)  # every call of such a block asks
def listed(blocks: frozenset[int]) -> str:
    """Why calls of these blocks stay dense: one reason for all of them."""
    numbers = ranges(sorted(blocks))
    if len(blocks) == 1:
        return f"block {numbers} is listed in dense_blocks"
    return f"blocks {numbers} are listed in dense_blocks"


def why_dense(run: Run) -> str | None:
    """Why nothing was sparse in a finished run, and what to do; None if something was sparse."""
    record = run.record
    if any(step.kind == SPARSE for step in record.steps):
        return None
    active = [step for step in record.steps if step.active]
    if record.fallbacks:
        reached = set().union(*(step.blocks for step in active))
        if reached and run.settings.dense_blocks >= reached:
            return "all blocks are listed in dense_blocks; list fewer"
        return max(record.fallbacks, key=record.fallbacks.__getitem__)
    if record.notes:
        return record.notes[0]
    if not active:
        return NONE_ACTIVE
    return None


def _unseen_blocks(record: Record, watched: list[Step]) -> list[str]:
    """A sentence about blocks whose self-attention reached PSA in no watched step, while that of other blocks did."""
    missing = unseen_blocks(record, watched)
    if not missing:
        return []
    if record.blocks_are_named:
        which = f"{'blocks' if len(missing) > 1 else 'block'} {ranges(missing)}"
    else:
        which = f"{len(missing)} of {record.blocks} blocks"
    return [
        f"PSA never saw {which}: a node computes or compiles that part of the model separately, or skips it"
        f"{_named(record.replaced)}; bypass that node to make it sparse"
    ]


def unseen_blocks(record: Record, steps: Sequence[Step]) -> list[int]:
    """The blocks whose self-attention reached PSA in none of the steps."""
    return sorted(set(range(record.blocks or 0)) - set().union(*(step.blocks for step in steps)))


def _named(replaced: list[str]) -> str:
    if not replaced:
        return ""
    return f" ({replaced[0]}{f' and {len(replaced) - 1} more' if len(replaced) > 1 else ''})"


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)

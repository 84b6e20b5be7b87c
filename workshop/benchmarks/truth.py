"""The reference for every method's error: dense attention in float64 on some query rows of every head.

A dense 16-bit kernel would not do: its own rounding error would be counted against a good method.
"""

from __future__ import annotations

import dataclasses

import torch

_BLOCKS, _ROWS = 8, 64
"""Query blocks per head, and rows per block."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """Exact outputs float64 [H, R, D] at the query rows int64 [H, R], which differ from head to head."""

    rows: torch.Tensor
    output: torch.Tensor

    def error(self, out: torch.Tensor) -> float:
        """Relative L1 error of out [1, H, L, D]: mean |out - exact| / mean |exact| over the rows of all heads."""
        picked = out[0].gather(1, self.rows[..., None].expand_as(self.output)).double()
        return ((picked - self.output).abs().mean() / self.output.abs().mean()).item()


def exact_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Truth:
    """The truth for q, k, v [1, H, L, D], on blocks spread evenly over the sequence; computed head by head."""
    heads, length = q.shape[1:3]
    count = min(_BLOCKS, -(-length // _ROWS))
    rows, outputs = [], []
    for head in range(heads):
        # Shifted from head to head, so that together the heads cover all parts of a video.
        starts = (torch.arange(count, device=q.device) + head / heads) * (length / count)
        chosen = (starts.long()[:, None] + torch.arange(_ROWS, device=q.device)).flatten() % length
        logits = q[0, head, chosen].double() @ k[0, head].double().T * q.shape[-1] ** -0.5
        outputs.append(logits.softmax(-1) @ v[0, head].double())
        rows.append(chosen)
    return Truth(torch.stack(rows), torch.stack(outputs))

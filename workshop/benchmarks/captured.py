"""Queries, keys and values of a trained model: the demo model's self-attention while it samples, without ComfyUI.

Two heads of 9216 tokens from each of three blocks, at an early and a late step of a dense run of ten steps. They are
combined into twelve heads, so that one call is large enough for a GPU and its error is the mean over all of them.
"""

from __future__ import annotations

import torch

HEADS, GRID, DIM = 12, (9, 32, 32), 128
STEPS, BLOCKS = (3, 8), (1, 3, 5)
"""The recorded steps, out of ten (sigma .97 and .75), and transformer blocks, out of six."""


def demo_qkv(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, 12, 9216, 128], with heads ordered by step, block and head."""
    from comfyui_psa.workshop.quality.demo_model import Clip, DemoModel, DenseAttention, Video, simple_schedule
    from comfyui_psa.workshop.training.shapes_sheet import SHEET_SCENES

    class Recorder(DenseAttention):
        def __init__(self) -> None:
            self.step = self.block = 0
            self.taken: list[tuple[torch.Tensor, ...]] = []

        def begin_step(self, step: int) -> None:
            self.step, self.block = step, 0

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if self.step in STEPS and self.block in BLOCKS:
                self.taken.append((q, k, v))
            self.block += 1
            return super().__call__(q, k, v)

    model, recorder = DemoModel(torch.device(device), dtype), Recorder()
    model.sample([Clip(SHEET_SCENES[0], 42, "scene 1")], Video(), simple_schedule(10, model.blocks), recorder)
    q, k, v = (torch.cat(parts, 1).to(dtype).clone() for parts in zip(*recorder.taken, strict=True))
    return q, k, v

"""The demo's figures, and where each comes from.

PSNR and SSIM are PSA Compare's, computed from the decoded, losslessly saved frames; seconds come from the server's
progress messages, sparsity from PSA Report. Nothing is estimated.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from comfyui_psa.reports.draw_compare import compare

from .client import Prompt, PromptResult
from .terminal import Failure


@dataclass(frozen=True)
class Figures:
    """What one demo run measured. Seconds are per sampling step; `None` if a run had no such step."""

    psnr: float
    """dB over all pixels of all frames, 8-bit; infinite if the videos are identical."""
    ssim: float
    """Mean over the frames, colour channels included."""
    dense_seconds: list[float]
    psa_seconds: list[float]
    sparsity: list[float | None]
    """Per step of the PSA run; None for a dense step."""
    report: dict
    """PSA Report's JSON."""

    @property
    def sparse_steps(self) -> list[int]:
        """Numbers of the steps in which PSA was sparse, from 0."""
        return [step for step, value in enumerate(self.sparsity) if value is not None]

    @property
    def mean_sparsity(self) -> float | None:
        """Mean over the sparse steps."""
        return _mean([value for value in self.sparsity if value is not None])

    @property
    def dense_step(self) -> float | None:
        """Median seconds per step of the dense run, without the first, which includes what the sampler prepares."""
        return _median(self.dense_seconds[1:])

    @property
    def psa_warm_up_step(self) -> float | None:
        """Median seconds per dense step of the PSA run, without the first step."""
        steps = range(1, len(self.psa_seconds))
        return _median([self.psa_seconds[step] for step in steps if step not in self.sparse_steps])

    @property
    def psa_sparse_step(self) -> float | None:
        """Median seconds per sparse step of the PSA run, without step 0."""
        return _median([self.psa_seconds[step] for step in self.sparse_steps if step > 0])

    def headline(self) -> str:
        """The run in a sentence or two: seconds, likeness, and a warning if the seconds cannot be compared."""
        parts = [
            f"Sampling took {sum(self.psa_seconds):.1f} s with PSA and {sum(self.dense_seconds):.1f} s without",
            f"a sparse step {_text(self.psa_sparse_step, '.2f')} s, a dense one {_text(self.dense_step, '.2f')} s",
            f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f}",
        ]
        return f"{'; '.join(parts)}. {self.warning or ''}".rstrip()

    @property
    def warning(self) -> str | None:
        """A sentence if the dense steps of the two runs, which compute the same, took times that differ by a third."""
        times = [seconds for seconds in (self.dense_step, self.psa_warm_up_step) if seconds]
        if len(times) < 2 or max(times) < min(times) * 4 / 3:
            return None
        return (
            f"The machine was busy with something else: dense steps took {times[0]:.2f} s in one run and "
            f"{times[1]:.2f} s in the other, so do not compare the seconds, and run it again."
        )

    def summary(self) -> str:
        """All figures in one line."""
        parts = [
            f"sparsity of the sparse steps {_text(self.mean_sparsity, '.3f')} "
            f"(slider {_text(self.report.get('target_sparsity'), '.2f')})",
            f"PSNR {self.psnr:.2f} dB",
            f"SSIM {self.ssim:.4f}",
            f"seconds per step: dense {_text(self.dense_step, '.2f')}, "
            f"PSA sparse {_text(self.psa_sparse_step, '.2f')}, PSA warm-up {_text(self.psa_warm_up_step, '.2f')}",
        ]
        return "; ".join(parts)


def measure(dense: np.ndarray, psa: np.ndarray, nodes: dict[str, str], result: PromptResult, report: dict) -> Figures:
    """Compute the figures.

    Args:
        dense, psa: uint8 [F, H, W, 3].
        nodes: {"dense": id of the dense sampler, "psa": id of the other}.
        result: of the prompt that made both videos.
        report: PSA Report's JSON.

    Raises:
        Failure: the videos differ in shape, or the report has a different number of steps.
    """
    if dense.shape != psa.shape:
        raise Failure(f"The two videos differ in shape: {dense.shape} and {psa.shape}.")
    found = compare(*(torch.from_numpy(frames).float() / 255 for frames in (dense, psa)))
    seconds = {name: result.step_seconds(node) for name, node in nodes.items()}
    sparsity = [step["sparsity"] for step in report.get("steps", [])]
    if len(sparsity) != len(seconds["psa"]):
        raise Failure(f"PSA Report has {len(sparsity)} steps, but the sampler ran {len(seconds['psa'])}.")
    return Figures(found.psnr, found.ssim, seconds["dense"], seconds["psa"], sparsity, report)


def find_node(prompt: Prompt, class_type: str, **inputs: object) -> str:
    """Id of the only node of a class whose inputs have the given values.

    Raises:
        Failure: there is none, or more than one.
    """
    found = [
        node
        for node, entry in prompt.items()
        if entry["class_type"] == class_type and all(entry["inputs"].get(name) == inputs[name] for name in inputs)
    ]
    if len(found) != 1:
        raise Failure(f"The demo workflow has {len(found)} nodes {class_type} {inputs or ''}; expected exactly one.")
    return found[0]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _text(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)

"""Measures a list of settings: sample, decode, compare with dense, and write each result as soon as it is done."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from . import metrics
from .attention import Calls
from .demo_model import Clip, DemoModel, DenseAttention, Sampled, Video, simple_schedule
from .gallery import Gallery
from .results import RunRow, StepRow, Writer
from .rivals import EasyCache
from .setting import Schedule, Setting, resolve
from .sheet import Sheet
from .tries import attention_of

DENSE = "dense"


@dataclasses.dataclass
class Measurement:
    """Where and how a list of settings is measured."""

    model: DemoModel
    clips: Sequence[Clip]
    video: Video
    schedule: Schedule
    backend: str
    facts: dict[str, object]
    """Columns with the same value in every row."""

    def run(
        self,
        settings: Sequence[Setting],
        folder: Path,
        deadline: float,
        say: Callable[[str], None],
        sheet: Sheet | Gallery | None = None,
    ) -> int:
        """Measure the settings and return how many were measured; none is started after `deadline` (monotonic).

        sheet: draws the settings that ask for it; None draws contact sheets.
        """
        writer, sheet = Writer(folder), sheet or Sheet(folder)
        lpips = metrics.load_lpips(self.model.device)
        self.model.sample(self.clips, self.video, dataclasses.replace(self.schedule, sigmas=self.schedule.sigmas[:1]),
                          DenseAttention())  # fmt: skip
        dense = self.model.sample(self.clips, self.video, self.schedule, DenseAttention())
        began = time.monotonic()
        truth = self.model.decode(dense.latents[-1])
        say(f"dense: {sum(dense.seconds):.2f} s, decoding {time.monotonic() - began:.2f} s")
        sheet.add(DENSE, truth)
        rows = [RunRow(DENSE, DENSE, clip.name, 1.0, 1.0, 1.0, run_s=sum(dense.seconds),
                       dense_step_s=median(dense.seconds), **self.facts) for clip in self.clips]  # fmt: skip
        writer.add(rows)
        computes: dict[str, float] = {}
        averages: dict[str, list[torch.Tensor]] = {}
        measured = 0
        for setting in settings:
            if time.monotonic() > deadline:
                say(f"out of time: {len(settings) - measured} settings not measured")
                break
            began = time.monotonic()
            try:
                rows, steps, frames, last = self._one(setting, computes, dense.latents, truth, lpips)
            except Exception as error:  # one failure must not end a run of a hundred settings
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                writer.add([RunRow(setting.name, setting.group, "", error=reason, **self.facts)])
                say(f"{setting.name}: failed: {reason}")
                continue
            measured += 1
            writer.add(rows, steps)
            if setting.sheet:
                sheet.add(setting.name, frames)
            if setting.average:
                averages.setdefault(setting.average, []).append(last)
            means = {name: sum(getattr(row, name) for row in rows) / len(rows) for name in ("psnr", "ssim", "flicker")}
            say(
                f"{setting.name}: compute {rows[0].compute:.3f}, PSNR {means['psnr']:.2f} dB, "
                f"SSIM {means['ssim']:.4f}, flicker {means['flicker']:.3f} ({time.monotonic() - began:.1f} s)"
            )
        for name, latents in averages.items():
            # The mean of several draws: noise that differs between draws averages out, bias remains.
            frames = self.model.decode(torch.stack(latents).mean(0))
            for i, clip in enumerate(self.clips):
                row = RunRow(f"mean of {len(latents)} {name}", "noise", clip.name, **self.facts)
                row.psnr, row.ssim, row.flicker = (
                    measure(truth[i], frames[i]) for measure in (metrics.psnr, metrics.ssim, metrics.flicker)
                )
                writer.add([row])
        sheet.write(self.clips, self.model.facts.world.describe)
        return measured

    def _one(
        self,
        setting: Setting,
        computes: dict[str, float],
        dense: torch.Tensor,
        truth: torch.Tensor,
        lpips: Callable[[torch.Tensor, torch.Tensor], float] | None,
    ) -> tuple[list[RunRow], list[StepRow], torch.Tensor, torch.Tensor]:
        compute = computes[setting.match] if setting.match else setting.compute
        sampled, densities, forwards, calls, sparsity = self._sample(setting, compute)
        computes[setting.name] = sum(densities) / len(self.schedule.sigmas)
        frames = self.model.decode(sampled.latents[-1])
        pairs = list(zip(dense, sampled.latents, strict=True)) if len(densities) == len(dense) else []
        errors = [metrics.latent_error(a, b).tolist() for a, b in pairs]
        last = metrics.latent_error(dense[-1], sampled.latents[-1]).tolist()
        sparse = [i for i, density in enumerate(densities) if density < 1]
        times = {True: [], False: []}
        for i, seconds in enumerate(sampled.seconds):
            times[i in sparse].append(seconds)
        said = {
            k: v
            for k, v in dataclasses.asdict(setting).items()
            if k in ("node", "config", "correction", "prototype") and v
        }
        said["sparsity"] = sparsity
        rows = [
            RunRow(
                setting.name,
                setting.group,
                clip.name,
                compute=computes[setting.name],
                density=sum(densities[i] for i in sparse) / len(sparse) if sparse else None,
                warm_up=1 - len(sparse) / len(densities),
                psnr=metrics.psnr(truth[i], frames[i]),
                ssim=metrics.ssim(truth[i], frames[i]),
                lpips=lpips(truth[i], frames[i]) if lpips else None,
                flicker=metrics.flicker(truth[i], frames[i]),
                latent_error=last[i],
                dense_step_s=median(times[False]) if times[False] else None,
                sparse_step_s=median(times[True]) if times[True] else None,
                run_s=sum(sampled.seconds),
                settings=json.dumps(said),
                forwards=forwards,
                dense_calls=calls.dense,
                sparse_calls=calls.sparse,
                learning_calls=calls.learning,
                **self.facts,
            )
            for i, clip in enumerate(self.clips)
        ]
        steps = [
            StepRow(setting.name, clip.name, step, self.schedule.sigmas[step], densities[step], error[i])
            for i, clip in enumerate(self.clips)
            for step, error in enumerate(errors)
        ]
        return rows, steps, frames, sampled.latents[-1]

    def _sample(
        self, setting: Setting, compute: float | None
    ) -> tuple[Sampled, list[float], float, Calls, float | None]:
        """A run; the work of its steps; its model calls as a share of the dense run's; its attention calls; the
        sparsity, if any is sparse."""
        of_all = len(self.schedule.sigmas)
        if "steps" in setting.prototype:
            schedule = simple_schedule(round(setting.prototype["steps"] * of_all), self.schedule.blocks)
            sampled = self.model.sample(self.clips, self.video, schedule, DenseAttention())
            share = len(schedule.sigmas) / of_all
            return sampled, [1.0] * len(schedule.sigmas), share, Calls(dense=share), None
        if "easycache" in setting.prototype:
            cache = EasyCache(self.schedule, len(self.clips), setting.prototype["easycache"])
            sampled = self.model.sample(self.clips, self.video, self.schedule, DenseAttention(), cache)
            share = sum(cache.computed) / of_all
            return sampled, cache.computed, share, Calls(dense=share), None
        settings = resolve(setting, self.schedule, self.backend, compute)
        attention = attention_of(settings, self.schedule, self.video.grid, setting.prototype)
        sampled = self.model.sample(self.clips, self.video, self.schedule, attention)
        return sampled, attention.step_densities(), 1.0, attention.calls(), settings.config.sparsity

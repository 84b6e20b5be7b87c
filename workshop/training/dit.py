"""Training of the demonstration diffusion transformer on fresh procedural clips, half resolution first.

No data set and no encoder: each step renders clips, projects them on the latent basis and learns their velocity.
Not distributed: one device. Flow matching as in `flow`; matrices by Muon, everything else by AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ...demo.scene import TOKEN_COUNT, conditioning_from_indices, random_indices
from .clips import CLIP_FRAMES, render, sample_parameters
from .files import DIT_FILE, load_weights, save_weights
from .flow import draw_sigmas
from .latents import LatentBasis
from .schedule import ClockSchedule, moving_average
from .settings import DitStage, Settings
from .wan_dit import WanTransformer, rotary_table

GRID_FRAMES = 1 + (CLIP_FRAMES - 1) // 4
CHECKPOINT_SECONDS = 120


def _split(model: WanTransformer) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Weight matrices of the blocks for Muon; the rest for AdamW."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and name.startswith("blocks.") else others).append(parameter)
    return matrices, others


def make_muon(matrices: list[torch.nn.Parameter]) -> torch.optim.Muon:
    """Muon for the weight matrices (K. Jordan et al., https://kellerjordan.github.io/posts/muon/), whose steps are as
    long as those of AdamW at the same rate: 0.2 * sqrt(longer side), J. Liu et al., arXiv 2502.16982."""
    return torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


class _Data:
    """Fresh latents and context of one stage."""

    def __init__(self, stage: DitStage, basis: LatentBasis, device: torch.device, compiled: bool):
        self.stage, self.basis = stage, basis
        self.render = torch.compile(render, dynamic=False) if compiled else render
        grid = (GRID_FRAMES, stage.side // 16, stage.side // 16)
        self.table = rotary_table(grid, device, stage.spatial_step)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        indices = random_indices(self.stage.batch, generator)
        parameters = sample_parameters(indices, generator)
        clip = self.render(parameters, CLIP_FRAMES, self.stage.side, self.stage.side)
        return self.basis.encode(clip), conditioning_from_indices(indices)


def _make_loss(model: WanTransformer, device: torch.device) -> Callable[..., torch.Tensor]:
    def loss(
        data: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        context: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * data + level * noise
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(noisy, sigma * 1000, context, table)
        return (velocity.float() - (noise - data)).square().mean()

    return loss


@torch.no_grad()
def _held_out_loss(loss: Callable, data: _Data, device: torch.device, batches: int) -> dict[str, float]:
    """Loss at fixed noise levels on clips of a seed that training never uses."""
    result = {}
    for sigma in (0.3, 0.6, 0.85, 0.95, 0.98):
        generator = torch.Generator(device).manual_seed(99991)
        total = 0.0
        for _ in range(batches):
            latents, context = data.draw(generator)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            level = torch.full((latents.shape[0],), sigma, device=device)
            total += loss(latents, noise, level, context, data.table).item()
        result[f"{sigma:.2f}"] = round(total / batches, 5)
    return result


def train_dit(
    basis: LatentBasis,
    settings: Settings,
    device: torch.device,
    deadline: float,
    folder: Path,
    resume: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict:
    """Train until `deadline` (as `time.time()` counts) and write the averaged weights into `folder`.

    resume: weights to go on from, through the same stages at `resume_rate` of the learning rate.
    Returns the figures of the run: steps, clips, seconds and losses.
    """
    begun = time.time()
    model = WanTransformer(settings.width, settings.hidden, settings.layers)
    model.initialise(torch.Generator().manual_seed(settings.seed))
    rate = 1.0
    if resume is not None:
        load_weights(model, resume)
        rate = settings.resume_rate
    model.to(device)
    matrices, others = _split(model)
    muon = make_muon(matrices)
    adam = torch.optim.AdamW(
        others, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    average = moving_average(model, settings.dit_decay)
    loss_function = _make_loss(model, device)
    if settings.compile:
        # Block by block: one compiled block serves all layers, a sixth of the compilation of the whole model.
        for block in model.blocks:
            block.compile(dynamic=False)
    generator = torch.Generator(device).manual_seed(settings.seed + 1000)
    stages = [_Data(stage, basis, device, settings.compile) for stage in settings.dit_stages]

    def backward(data: _Data) -> torch.Tensor:
        latents, context = data.draw(generator)
        assert context.shape[1] == TOKEN_COUNT
        noise = torch.randn(latents.shape, generator=generator, device=device)
        sigma = draw_sigmas(latents.shape[0], data.stage.shift, generator)
        loss = loss_function(latents, noise, sigma, context, data.table)
        loss.backward()
        return loss.detach()

    rates = {muon: settings.matrix_rate * rate, adam: settings.other_rate * rate}

    def clear() -> None:
        for optimiser in rates:
            optimiser.zero_grad()

    for data in reversed(stages):
        for _ in range(2):
            backward(data)
            clear()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        log(f"dit: side {data.stage.side} ready after {time.time() - begun:.0f} s")

    schedule = ClockSchedule(deadline)
    steps, clips, history, checkpoint = 0, 0, [], time.time()
    running = torch.zeros((), device=device)
    mark_time, mark_step, progress = time.time(), 0, 0.0
    for number, data in enumerate(stages):
        stage_begin, stage_first = time.time(), steps
        while progress < data.stage.until:
            factor = schedule.factor(steps, progress)
            loss = backward(data)
            for optimiser, peak in rates.items():
                optimiser.param_groups[0]["lr"] = peak * factor
                optimiser.step()
            clear()
            average.update_parameters(model)
            running.lerp_(loss, 0.02 if steps > 50 else 0.2)
            steps += 1
            clips += data.stage.batch
            if steps % 10 == 0:
                running.item()  # keeps the clock honest: work is queued ahead of the device otherwise
            progress = schedule.progress()
            if steps % 200 == 0:
                milliseconds = (time.time() - mark_time) / (steps - mark_step) * 1000
                mark_time, mark_step = time.time(), steps
                history.append([steps, round(running.item(), 5)])
                log(f"dit: {progress:4.0%} step {steps} loss {running.item():.4f} {milliseconds:.1f} ms/step")
            if time.time() - checkpoint > CHECKPOINT_SECONDS:
                checkpoint = time.time()
                save_weights(average.module, folder / DIT_FILE, torch.bfloat16, steps=steps, complete=False)
        log(
            f"dit: side {data.stage.side}: {steps - stage_first} steps in {time.time() - stage_begin:.0f} s "
            f"(stage {number + 1} of {len(stages)})"
        )
    model.load_state_dict(average.module.state_dict())
    save_weights(model, folder / DIT_FILE, torch.bfloat16, steps=steps, complete=True)
    return {
        "steps": steps,
        "clips": clips,
        "seconds_training": round(time.time() - schedule.begin, 1),
        "seconds_compiling": round(schedule.begin - begun, 1),
        "training_loss": history[-1][1] if history else None,
        "loss_history": history[:: max(1, len(history) // 24)],
        "held_out_loss_by_sigma": _held_out_loss(loss_function, stages[-1], device, max(1, settings.held_out // 2)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }

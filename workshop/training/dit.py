"""Trains a diffusion transformer on freshly rendered procedural clips, first at half resolution.

There is no data set and no encoder: each step renders clips on the device, projects them onto the latent basis and
learns their velocity. With several processes, one per device, each draws different clips, and gradients are averaged.
Flow matching as in `flow`; Muon for matrices, AdamW for everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from .clips import CLIP_FRAMES
from .fast_attention import fastest_attention
from .files import dit_file, load_weights, save_weights
from .flow import draw_sigmas
from .latents import LatentBasis
from .schedule import ClockSchedule, moving_average
from .settings import DitStage, Settings
from .team import ALONE, Team, fingerprint
from .wan_dit import HEAD_WIDTH, AttentionFunction, WanTransformer, rotary_table
from .worlds import WORLDS

GRID_FRAMES = 1 + (CLIP_FRAMES - 1) // 4
CHECKPOINT_SECONDS = 60


def _split(model: WanTransformer) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The blocks' weight matrices (for Muon) and all other parameters (for AdamW)."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and name.startswith("blocks.") else others).append(parameter)
    return matrices, others


def make_muon(matrices: list[torch.nn.Parameter], team: Team = ALONE) -> torch.optim.Optimizer:
    """Muon for the weight matrices (K. Jordan et al., https://kellerjordan.github.io/posts/muon/), scaled so that its
    steps are as long as AdamW's at the same rate: 0.2 * sqrt(longer side), J. Liu et al., arXiv 2502.16982."""
    # Divided among the team: it runs thousands of small kernels per step, which take longer to launch than to run.
    return team.divide(matrices, torch.optim.Muon, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


class Data:
    """Draws fresh latents and context for one stage."""

    def __init__(self, stage: DitStage, settings: Settings, basis: LatentBasis, device: torch.device):
        self.stage, self.basis, self.world = stage, basis, WORLDS[settings.world]
        self.prompt_dropout = settings.prompt_dropout
        self.render = torch.compile(self.world.render, dynamic=False) if settings.compile else self.world.render
        grid = (GRID_FRAMES, stage.side // 16, stage.side // 16)
        self.table = rotary_table(grid, device, stage.spatial_step)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 16, T, H, W] and context tokens [B, tokens, 4096]; for a dropped prompt they are zeros."""
        indices = self.world.draw(self.stage.batch, generator)
        parameters = self.world.sample(indices, generator)
        clip = self.render(parameters, CLIP_FRAMES, self.stage.side, self.stage.side)
        context = self.world.context(indices)
        if self.prompt_dropout:
            kept = torch.rand(len(indices), 1, 1, generator=generator, device=indices.device) >= self.prompt_dropout
            context = context * kept
        return self.basis.encode(clip), context


def _make_loss(model: torch.nn.Module, device: torch.device, attend: AttentionFunction) -> Callable[..., torch.Tensor]:
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
            velocity = model(noisy, sigma * 1000, context, table, attend)
        return (velocity.float() - (noise - data)).square().mean()

    return loss


def _held_out_loss(loss: Callable, data: Data, device: torch.device, batches: int) -> dict[str, float]:
    """Loss at fixed noise levels, on clips from a seed that training never uses.

    Gradients stay enabled although they are not needed: otherwise every block would be compiled again.
    """
    result = {}
    for sigma in (0.3, 0.6, 0.85, 0.95, 0.98):
        generator = torch.Generator(device).manual_seed(99991)
        total = 0.0
        for _ in range(batches):
            latents, context = data.draw(generator)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            level = torch.full((latents.shape[0],), sigma, device=device)
            total += loss(latents, noise, level, context, data.table).detach().item()
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
    team: Team = ALONE,
) -> dict:
    """Train until `deadline` (in `time.time()` seconds) and write the averaged weights into `folder`.

    resume: weights to continue from, through the same stages, at `resume_rate` of the learning rate.
    team: processes that train together; all call this function, the leader writes the files.
    Returns the figures of the run: steps, clips, seconds and losses.
    """
    begun = time.time()
    model = WanTransformer(settings.width, settings.hidden, settings.layers)
    model.initialise(torch.Generator().manual_seed(settings.seed))
    words = sum(len(words) for _, _, words in WORLDS[settings.world].vocabulary)
    with torch.no_grad():
        model.text_embedding[0].weight[:, words:] = 0.0  # tokens are always zero there
    rate = 1.0
    if resume is not None:
        load_weights(model, resume)
        rate = settings.resume_rate
    model.to(device)
    matrices, others = _split(model)
    muon = make_muon(matrices, team)
    adam = torch.optim.AdamW(
        others, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    average = moving_average(model, settings.dit_decay)
    last = settings.dit_stages[-1]
    tokens = GRID_FRAMES * (last.side // 16) ** 2
    attend = fastest_attention(device, last.batch, settings.width // HEAD_WIDTH, tokens, log)
    plain_loss = _make_loss(model, device, attend)
    if settings.compile:
        # Block by block: one compiled block serves all layers, which takes a sixth of the time of compiling the model.
        for block in model.blocks:
            block.compile(dynamic=False)
    loss_function = _make_loss(team.wrap(model, device), device, attend)
    generator = torch.Generator(device).manual_seed(settings.seed + 1000 + 7919 * team.rank)
    stages = [Data(stage, settings, basis, device) for stage in settings.dit_stages]
    file = folder / dit_file(settings.name)

    def save(weights: torch.nn.Module, complete: bool) -> None:
        facts = {"world": settings.world, "guidance": settings.guidance, "steps": steps, "complete": complete}
        save_weights(weights, file, torch.bfloat16, settings.weight_bits, **facts)

    def backward(data: Data) -> torch.Tensor:
        latents, context = data.draw(generator)
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
        clock = time.time()
        for _ in range(4):
            latents, _ = data.draw(generator)
        drawn = team.gather(str(latents.sum().item()))
        rate_of_clips = 4 * data.stage.batch / (time.time() - clock)
        log(
            f"dit: side {data.stage.side} ready after {time.time() - begun:.0f} s; "
            f"{rate_of_clips:.0f} clips/s can be rendered"
        )

    team.share(0.0)  # the clock starts once all processes have compiled
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
            clips += data.stage.batch * team.size
            if steps % 10 == 0:
                running.item()  # waits for the device, which would otherwise lag behind the clock
            progress = team.share(schedule.progress())
            if steps % 200 == 0:
                milliseconds = (time.time() - mark_time) / (steps - mark_step) * 1000
                mark_time, mark_step = time.time(), steps
                history.append([steps, round(running.item(), 5)])
                log(f"dit: {progress:4.0%} step {steps} loss {running.item():.4f} {milliseconds:.1f} ms/step")
            if team.leads and time.time() - checkpoint > CHECKPOINT_SECONDS:
                checkpoint = time.time()
                save(average.module, complete=False)
        log(
            f"dit: side {data.stage.side}: {steps - stage_first} steps in {time.time() - stage_begin:.0f} s "
            f"(stage {number + 1} of {len(stages)})"
        )
    fingerprints = team.gather(fingerprint(model))
    model.load_state_dict(average.module.state_dict())
    if team.leads:
        save(model, complete=True)
    return {
        "steps": steps,
        "clips": clips,
        "processes": team.size,
        "different_clips": len(set(drawn)),
        "same_weights_in_all": len(set(fingerprints)) == 1,
        "seconds_training": round(time.time() - schedule.begin, 1),
        "seconds_compiling": round(schedule.begin - begun, 1),
        "training_loss": history[-1][1] if history else None,
        "loss_history": history[:: max(1, len(history) // 24)],
        "held_out_loss_by_sigma": _held_out_loss(plain_loss, stages[-1], device, max(1, settings.held_out // 2)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }

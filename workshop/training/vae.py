"""Trains the demo autoencoder: a decoder that inverts the latent basis, and an encoder that reproduces it.

Both learn from fresh crops of procedural clips, without adversarial or perceptual loss: the clips are smooth, so the
absolute error at three scales and of differences is enough. Uses one device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from .clips import CLIP_FRAMES
from .files import save_weights, vae_file
from .latents import CHANNELS, VAE_MEAN, VAE_STD, LatentBasis, from_vae_space, to_vae_space
from .schedule import ClockSchedule, moving_average
from .settings import Settings, VaeStage
from .wan_vae import WanAutoencoder
from .worlds import WORLDS, World

FULL_SIDE = 512
LATENT_NOISE = 0.15
LOG_VARIANCE = -8.0
CHECKPOINT_SECONDS = 60


@torch.no_grad()
def fix_scale(model: WanAutoencoder) -> None:
    """Set the two pointwise convolutions to the map between normalised and Wan latents, and freeze them.

    The values are first rounded to half precision, because that is how they are saved.
    """
    mean, std = (torch.tensor(v).half().float() for v in (VAE_MEAN, VAE_STD))
    model.conv1.weight.zero_()
    model.conv1.weight[:CHANNELS, :CHANNELS, 0, 0, 0] = torch.diag(std)
    model.conv1.bias.fill_(LOG_VARIANCE)
    model.conv1.bias[:CHANNELS] = mean
    model.conv2.weight[:, :, 0, 0, 0] = torch.diag(1 / std).half().float()
    model.conv2.bias.copy_((-mean / std).half().float())
    model.conv1.requires_grad_(False)
    model.conv2.requires_grad_(False)


@torch.no_grad()
def initialise(model: WanAutoencoder, generator: torch.Generator) -> None:
    """Initialise with He-scaled convolutions, weak residual branches, no attention and a fixed latent scale."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 4 and not name.endswith("gamma"):
            parameter.normal_(0.0, (1.4 / parameter[0].numel()) ** 0.5, generator=generator)
            if name.endswith("residual.6.weight"):
                parameter.mul_(0.3)
        elif name.endswith("bias"):
            parameter.zero_()
    model.disable_attention()
    fix_scale(model)


def decoder_loss(decoded: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """Absolute error at full, half and quarter size and of differences along x, y and time, plus the squared error."""
    error = decoded.float() - clip
    loss = error.abs().mean()
    for axis in (2, 3, 4):
        loss = loss + 0.5 * error.diff(dim=axis).abs().mean()
    for factor in (2, 4):
        loss = loss + 0.5 * F.avg_pool3d(error, (1, factor, factor)).abs().mean()
    return loss + error.square().mean()


class _Data:
    """Draws fresh crops for one stage: clips and their normalised latents."""

    def __init__(self, stage: VaeStage, world: World, basis: LatentBasis, compiled: bool):
        self.stage, self.world, self.basis = stage, world, basis
        self.render = torch.compile(world.render, dynamic=False) if compiled else world.render

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        stage, device = self.stage, generator.device
        parameters = self.world.sample(self.world.draw(stage.batch, generator), generator)
        room = CLIP_FRAMES - stage.frames
        first = torch.floor(torch.rand(stage.batch, generator=generator, device=device) * (room + 1))
        # Most crops show an object, since that is where the edges are.
        places = self.world.focus(parameters, (first + stage.frames / 2) / (CLIP_FRAMES - 1))
        pick = torch.randint(0, places.shape[1], (stage.batch, 1, 1), generator=generator, device=device)
        centre = places.gather(1, pick.expand(-1, -1, 2))[:, 0]
        extent = stage.side / FULL_SIDE
        jitter = torch.rand(stage.batch, 2, generator=generator, device=device)
        near = centre - extent * (0.1 + 0.8 * jitter)
        anywhere = jitter * max(0.0, 1 - extent)
        chosen = torch.rand(stage.batch, 1, generator=generator, device=device) < 0.75
        origin = torch.where(chosen, near, anywhere)
        clip = self.render(
            parameters, stage.frames, stage.side, stage.side, pixel=1 / FULL_SIDE, origin=origin, first_frame=first
        )
        return clip, self.basis.encode(clip)


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """PSNR in dB of clips in -1..1, clamped as any viewer would."""
    error = (a.float().clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4
    return float(-10 * torch.log10(error))


@torch.no_grad()
def evaluate(
    model: WanAutoencoder, basis: LatentBasis, world: World, device: torch.device, count: int, side: int
) -> dict[str, float]:
    """Decoder PSNR, round-trip PSNR and encoder error on whole held-out clips with sides of `side` pixels."""
    generator = torch.Generator(device).manual_seed(99991)
    decoder, round_trip, encoder = [], [], []
    for _ in range(count):
        clip = world.render(world.sample(world.draw(1, generator), generator), CLIP_FRAMES, side, side)
        latents = basis.encode(clip)
        with torch.autocast(device.type, torch.bfloat16):
            encoded = model.encode(clip)
            decoded = model.decode(to_vae_space(latents))
            again = model.decode(encoded.float())
        decoder.append(_psnr(decoded, clip))
        round_trip.append(_psnr(again, clip))
        encoder.append(float((from_vae_space(encoded.float()) - latents).square().mean().sqrt()))
    return {
        "decoder_psnr_db": round(sum(decoder) / count, 2),
        "decoder_psnr_worst_db": round(min(decoder), 2),
        "round_trip_psnr_db": round(sum(round_trip) / count, 2),
        "encoder_rms_error": round(sum(encoder) / count, 4),
    }


def train_vae(
    basis: LatentBasis,
    settings: Settings,
    device: torch.device,
    deadline: float,
    folder: Path,
    log: Callable[[str], None] = print,
) -> dict:
    """Train until `deadline` (in `time.time()` seconds) and write the averaged weights into `folder`.

    Returns the figures of the run.
    """
    begun = time.time()
    model = WanAutoencoder(settings.vae_width)
    initialise(model, torch.Generator().manual_seed(settings.seed))
    model.to(device, memory_format=torch.preserve_format)
    fused = device.type == "cuda"
    optimisers = [
        torch.optim.AdamW(
            [p for p in part.parameters() if p.requires_grad],
            lr=settings.vae_rate,
            betas=(0.9, 0.97),
            weight_decay=1e-4,
            fused=fused,
        )
        for part in (model.decoder, model.encoder)
    ]
    average = moving_average(model, settings.vae_decay)
    generator = torch.Generator(device).manual_seed(settings.seed + 2000)
    world = WORLDS[settings.world]
    stages = [_Data(stage, world, basis, settings.compile) for stage in settings.vae_stages]

    def decode_loss(latents: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            decoded = model.decode(to_vae_space(latents))
        return decoder_loss(decoded, clip)

    def encode_loss(latents: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            encoded = model.encode(clip)
        return (from_vae_space(encoded.float()) - latents).abs().mean()

    losses = [decode_loss, encode_loss]
    if settings.compile:
        losses = [torch.compile(loss, dynamic=False) for loss in losses]

    def backward(part: int, data: _Data) -> torch.Tensor:
        clip, latents = data.draw(generator)
        if part == 0:
            strength = LATENT_NOISE * torch.rand(latents.shape[0], 1, 1, 1, 1, generator=generator, device=device)
            latents = latents + strength * torch.randn(latents.shape, generator=generator, device=device)
        loss = losses[part](latents, clip)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimisers[part].param_groups[0]["params"], 1.0)
        return loss.detach()

    for data in reversed(stages):
        for part in (0, 1):
            for _ in range(2):
                backward(part, data)
                optimisers[part].zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        log(f"vae: side {data.stage.side} ready after {time.time() - begun:.0f} s")

    schedule = ClockSchedule(deadline)
    steps, progress, checkpoint = 0, 0.0, time.time()
    running = [torch.zeros((), device=device) for _ in range(2)]
    mark_time, mark_step = time.time(), 0
    for data in stages:
        while progress < data.stage.until:
            factor = schedule.factor(steps, progress)
            part = 1 if steps % settings.encoder_every == settings.encoder_every - 1 else 0
            loss = backward(part, data)
            for group in optimisers[part].param_groups:
                group["lr"] = settings.vae_rate * factor
            optimisers[part].step()
            optimisers[part].zero_grad(set_to_none=True)
            average.update_parameters(model)
            running[part].lerp_(loss, 0.02 if steps > 50 else 0.2)
            steps += 1
            if steps % 10 == 0:
                running[0].item()
            progress = schedule.progress()
            if steps % 200 == 0:
                rate = (time.time() - mark_time) / (steps - mark_step) * 1000
                mark_time, mark_step = time.time(), steps
                log(
                    f"vae: {progress:4.0%} step {steps} decoder {running[0].item():.4f} "
                    f"encoder {running[1].item():.4f} {rate:.1f} ms/step"
                )
            if time.time() - checkpoint > CHECKPOINT_SECONDS:
                checkpoint = time.time()
                save_weights(
                    average.module, folder / vae_file(settings.name), torch.float16, steps=steps, complete=False
                )
    model.load_state_dict(average.module.state_dict())
    save_weights(model, folder / vae_file(settings.name), torch.float16, steps=steps, complete=True)
    trained = time.time()
    side = settings.sheet_side
    return {
        "steps": steps,
        "seconds_training": round(trained - schedule.begin, 1),
        "seconds_compiling": round(schedule.begin - begun, 1),
        "decoder_loss": round(running[0].item(), 5),
        "encoder_loss": round(running[1].item(), 5),
        **evaluate(model, basis, world, device, settings.held_out, side),
        "parameters": sum(p.numel() for p in model.parameters()),
    }

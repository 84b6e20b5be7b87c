"""The contact sheet: scenes sampled by the finished model, five frames each, captioned with their prompts."""

from __future__ import annotations

from pathlib import Path

import torch

from ..tools.pictures import contact_sheet
from .clips import CLIP_FRAMES
from .files import SHEET_FILE, load_autoencoder, load_transformer, read_folder
from .flow import sample_euler
from .latents import to_vae_space
from .settings import Settings
from .worlds import World

TILE = 256


@torch.no_grad()
def sample_clips(folder: Path, settings: Settings, device: torch.device) -> torch.Tensor:
    """Sample the scenes of the model in `folder`: clips [6, 3, 33, S, S] in -1..1 on the CPU."""
    found = read_folder(folder)
    model, autoencoder = (
        network.to(device).eval() for network in (load_transformer(found.dit), load_autoencoder(found.vae))
    )
    side = settings.sheet_side // 8
    clips = []
    for scene in found.world.scenes:
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(1, 16, 1 + (CLIP_FRAMES - 1) // 4, side, side, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            context = found.world.conditioning([scene]).to(device)
            steps, shift = settings.sheet_steps, settings.sheet_shift
            latents = sample_euler(model, noise, context, steps, shift, found.guidance)
            clips.append(autoencoder.decode(to_vae_space(latents)).float().clamp(-1, 1).cpu())
    return torch.cat(clips)


def write_sheet(clips: torch.Tensor, world: World, path: Path) -> None:
    """Write five frames of each clip under its sentence, as a JPEG."""
    frames = [round(i * (CLIP_FRAMES - 1) / 4) for i in range(5)]
    pixels = ((clips[:, :, frames].permute(0, 2, 3, 4, 1) + 1) * 127.5).round().byte().numpy()
    rows = [(world.describe(scene), clip) for scene, clip in zip(world.scenes, pixels, strict=True)]
    contact_sheet(rows, TILE).save(path, quality=84)


def make_sheet(folder: Path, settings: Settings, device: torch.device) -> None:
    """Sample the scenes and write the sheet next to the weights."""
    write_sheet(sample_clips(folder, settings, device), read_folder(folder).world, folder / SHEET_FILE)

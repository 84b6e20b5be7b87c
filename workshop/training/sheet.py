"""The contact sheet: scenes sampled by the finished model, five frames each, captioned with what was asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from ...demo.scene import Background, Scene, SceneObject, conditioning, describe
from ..tools.pictures import contact_sheet
from .clips import CLIP_FRAMES
from .files import DIT_FILE, SHEET_FILE, VAE_FILE, load_weights
from .flow import sample_euler
from .latents import to_vae_space
from .settings import Settings
from .wan_dit import WanTransformer
from .wan_vae import WanAutoencoder

SHEET_SCENES = (
    Scene(
        SceneObject("star", "yellow", "large", "plain", "right"),
        SceneObject("ring", "magenta", "medium", "plain", "up"),
        Background("clouds", "navy", "left"),
    ),
    Scene(
        SceneObject("square", "red", "medium", "stripes", "down"),
        SceneObject("circle", "cyan", "small", "plain", "left"),
        Background("waves", "grey", "right"),
    ),
    Scene(
        SceneObject("triangle", "green", "large", "dots", "left"),
        SceneObject("cross", "white", "medium", "plain", "down-right"),
        Background("clouds", "brown", "up"),
    ),
    Scene(
        SceneObject("circle", "blue", "large", "stripes", "up-right"),
        SceneObject("star", "orange", "small", "plain", "still"),
        Background("waves", "forest", "down"),
    ),
    Scene(
        SceneObject("ring", "white", "large", "plain", "up-left"),
        SceneObject("triangle", "red", "small", "plain", "right"),
        Background("clouds", "forest", "still"),
    ),
    Scene(
        SceneObject("cross", "orange", "medium", "dots", "still"),
        SceneObject("square", "cyan", "large", "stripes", "down-left"),
        Background("clouds", "grey", "down-right"),
    ),
)
TILE = 256


@torch.no_grad()
def sample_clips(folder: Path, settings: Settings, device: torch.device) -> torch.Tensor:
    """Sample `SHEET_SCENES` with the weights in `folder`: clips [6, 3, 33, S, S] in -1..1 on the CPU."""
    model = WanTransformer(settings.width, settings.hidden, settings.layers)
    load_weights(model, folder / DIT_FILE)
    model.to(device).eval()
    autoencoder = WanAutoencoder(settings.vae_width)
    load_weights(autoencoder, folder / VAE_FILE)
    autoencoder.disable_attention()
    autoencoder.to(device).eval()
    side = settings.sheet_side // 8
    clips = []
    for scene in SHEET_SCENES:
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(1, 16, 1 + (CLIP_FRAMES - 1) // 4, side, side, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            context = conditioning([scene]).to(device)
            latents = sample_euler(model, noise, context, settings.sheet_steps, settings.sheet_shift)
            clips.append(autoencoder.decode(to_vae_space(latents)).float().clamp(-1, 1).cpu())
    return torch.cat(clips)


def write_sheet(clips: torch.Tensor, path: Path) -> None:
    """Write five frames of each clip with its sentence above as a JPEG."""
    frames = [round(i * (CLIP_FRAMES - 1) / 4) for i in range(5)]
    pixels = ((clips[:, :, frames].permute(0, 2, 3, 4, 1) + 1) * 127.5).round().byte().numpy()
    rows = [(describe(scene), clip) for scene, clip in zip(SHEET_SCENES, pixels, strict=True)]
    contact_sheet(rows, TILE).save(path, quality=84)


def make_sheet(folder: Path, settings: Settings, device: torch.device) -> None:
    """Sample the scenes and write the sheet beside the weights."""
    write_sheet(sample_clips(folder, settings, device), folder / SHEET_FILE)

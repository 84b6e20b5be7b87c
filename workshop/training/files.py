"""Reading and writing the trained weights as safetensors with their facts as metadata."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...demo.scene import VOCABULARY_VERSION
from .latents import LatentBasis

# Named as ComfyUI names the kinds, so that each folder can be one of its model folders.
DIT_FILE = "diffusion_models/psa_demo_wan_dit.safetensors"
VAE_FILE = "vae/psa_demo_wan_vae.safetensors"
SHEET_FILE = "contact_sheet.jpg"
METRICS_FILE = "metrics.json"
BASIS_FILE = "latent_basis.safetensors"


def save_weights(model: torch.nn.Module, path: Path, dtype: torch.dtype, **facts: object) -> None:
    """Write a state dict in `dtype`; `facts` become string metadata beside the vocabulary's version."""
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    metadata = {"vocabulary_version": VOCABULARY_VERSION, **{name: str(value) for name, value in facts.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path), metadata=metadata)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load what `save_weights` wrote; every key must match."""
    model.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()}, strict=True)


def save_basis(basis: LatentBasis, path: Path) -> None:
    """Write a latent basis."""
    save_file({"mean": basis.mean.cpu().contiguous(), "weight": basis.weight.cpu().contiguous()}, str(path))


def load_basis(path: Path) -> LatentBasis:
    """Read a latent basis."""
    state = load_file(str(path))
    return LatentBasis(state["mean"], state["weight"])

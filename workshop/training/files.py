"""Reads and writes trained weights as safetensors files with metadata.

A folder holds one model, that is a diffusion model and an autoencoder; their sizes are read from the files themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...demo.scene import VOCABULARY_VERSION
from .latents import LatentBasis
from .wan_dit import HEAD_WIDTH, WanTransformer
from .wan_vae import WanAutoencoder
from .worlds import WORLDS, World

SHEET_FILE = "contact_sheet.jpg"
METRICS_FILE = "metrics.json"
BASIS_FILE = "latent_basis.safetensors"


def dit_file(name: str) -> str:
    """Path of the diffusion model in its folder. Subfolders are named as in ComfyUI, so that they can serve as model
    folders there."""
    return f"diffusion_models/psa_{name}_wan_dit.safetensors"


def vae_file(name: str) -> str:
    """Path of the autoencoder in the model's folder."""
    return f"vae/psa_{name}_wan_vae.safetensors"


DIT_FILE, VAE_FILE = dit_file("demo"), vae_file("demo")


class MissingModelError(FileNotFoundError):
    """A folder does not contain a complete model; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class ModelFolder:
    """What the files in a folder say about their model. `guidance` is the scale that the model was made for."""

    name: str
    dit: Path
    vae: Path
    world: World
    blocks: int
    heads: int
    guidance: float


def read_folder(folder: Path) -> ModelFolder:
    """Find the model in a folder and read its metadata, but not its weights.

    Raises:
        MissingModelError: there is none, more than one, or only half of one.
    """
    found = sorted(folder.glob(dit_file("*")))
    advice = (
        "Train it with: python workshop/training/train_demo.py --size large --out FOLDER, or unpack one with: "
        "python workshop/training/parcel.py unpack PARTS FOLDER."
    )
    if not folder.is_dir():
        raise MissingModelError(f"There is no folder {folder}. {advice}")
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise MissingModelError(f"{folder} must hold one {dit_file('NAME')}; found: {names}. {advice}")
    name = found[0].name.removeprefix("psa_").removesuffix("_wan_dit.safetensors")
    vae = folder / vae_file(name)
    if not vae.is_file():
        raise MissingModelError(f"{folder} holds the diffusion model, but its autoencoder {vae_file(name)} is missing.")
    with safe_open(str(found[0]), framework="pt") as file:
        facts = file.metadata() or {}
        width = file.get_slice("head.modulation").get_shape()[-1]
        blocks = len({key.split(".")[1] for key in file.keys() if key.startswith("blocks.")})  # noqa: SIM118
    # The released demo model was trained before worlds had names.
    world, guidance = WORLDS[facts.get("world", "shapes")], float(facts.get("guidance", 1.0))
    return ModelFolder(name, found[0], vae, world, blocks, width // HEAD_WIDTH, guidance)


def load_transformer(path: Path) -> WanTransformer:
    """Load a diffusion model of whatever size the file has, in float32 on the CPU."""
    state = {name: value.float() for name, value in load_file(str(path)).items()}
    hidden, width = state["blocks.0.ffn.0.weight"].shape
    blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    model = WanTransformer(width, hidden, blocks)
    model.load_state_dict(state, strict=True)
    return model


def load_autoencoder(path: Path) -> WanAutoencoder:
    """Load an autoencoder of whatever size the file has, in float32 on the CPU, without its frame attention."""
    state = {name: value.float() for name, value in load_file(str(path)).items()}
    model = WanAutoencoder(state["decoder.head.2.weight"].shape[1])
    model.load_state_dict(state, strict=True)
    model.disable_attention()
    return model


def save_weights(
    model: torch.nn.Module, path: Path, dtype: torch.dtype, bits: int | None = None, **facts: object
) -> None:
    """Write a state dict in `dtype`; `facts` become string metadata, along with the vocabulary's version.

    bits: round matrix weights to this many bits, see `on_grid`. The file is written completely or not at all.
    """
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    if bits is not None:
        state = {name: on_grid(value, bits) if value.ndim == 2 else value for name, value in state.items()}
    state = {name: value.to("cpu", dtype).contiguous() for name, value in state.items()}
    metadata = {"vocabulary_version": VOCABULARY_VERSION, **{name: str(value) for name, value in facts.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(state, str(unfinished), metadata=metadata)
    unfinished.replace(path)


def on_grid(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round each row of a matrix to multiples of its own power of two, at most 2 ** (bits - 1) - 1 of them.

    Up to 8 bits, the result is exact in bfloat16, and `parcel.py` stores it as 8-bit integers.
    """
    most = 2 ** (bits - 1) - 1
    step = torch.exp2(torch.ceil(torch.log2(weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / most)))
    return (weight / step).round() * step


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load weights written by `save_weights`; every key must match."""
    model.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()}, strict=True)


def save_basis(basis: LatentBasis, path: Path) -> None:
    """Write a latent basis."""
    save_file({"mean": basis.mean.cpu().contiguous(), "weight": basis.weight.cpu().contiguous()}, str(path))


def load_basis(path: Path) -> LatentBasis:
    """Read a latent basis."""
    state = load_file(str(path))
    return LatentBasis(state["mean"], state["weight"])

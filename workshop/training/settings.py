"""Sizes and learning rates: the released model, the large one, and a tiny version of each for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DitStage:
    """One resolution of the curriculum; `until` is the share of the time budget at which it ends, `batch` is per
    process."""

    side: int
    batch: int
    spatial_step: float
    shift: float
    until: float


@dataclass(frozen=True)
class VaeStage:
    """One crop size of the autoencoder's training; `until` as above."""

    frames: int
    side: int
    batch: int
    until: float


@dataclass(frozen=True)
class Settings:
    """All settings that are not options of `workshop/training/train_demo.py`."""

    name: str = "demo"
    """Used in file names, see `files.py`."""
    world: str = "shapes"
    """What the clips show, see `worlds.py`."""
    prompt_dropout: float = 0.0
    """Share of clips trained with an empty prompt, so that the model can be guided away from it."""
    guidance: float = 1.0
    """Guidance scale for sampling; 1 means no guidance."""
    weight_bits: int | None = None
    """Bits per matrix weight in the file, including the sign, see `files.py`; None does not round."""
    width: int = 256
    hidden: int = 1024
    layers: int = 6
    # Thousands of tokens share one layout, visible up to sigma 0.97: a large shift trains at the levels that decide it.
    # At half size, a quarter of the tokens shows the same picture, so equal difficulty means half the noise: 12 / 2.
    dit_stages: tuple[DitStage, ...] = (
        DitStage(side=256, batch=32, spatial_step=2.0, shift=6.0, until=0.45),
        DitStage(side=512, batch=8, spatial_step=1.0, shift=12.0, until=1.0),
    )
    # Resuming from finished weights: the same stages at this fraction of the learning rate.
    resume_rate: float = 0.6
    matrix_rate: float = 3e-3
    other_rate: float = 1.5e-3
    dit_decay: float = 0.998
    vae_width: int = 12
    vae_stages: tuple[VaeStage, ...] = (
        VaeStage(frames=17, side=160, batch=16, until=0.6),
        VaeStage(frames=33, side=224, batch=4, until=1.0),
    )
    vae_rate: float = 3e-3
    vae_decay: float = 0.995
    encoder_every: int = 3
    compile: bool = True
    basis_clips: int = 192
    held_out: int = 8
    sheet_side: int = 512
    sheet_steps: int = 40
    sheet_shift: float = 12.0
    seed: int = 1


LARGE = Settings(
    name="large",
    world="rich",
    prompt_dropout=0.1,
    guidance=3.0,
    weight_bits=7,
    width=768,
    hidden=768,
    layers=12,
    # About 18000 tokens per process and step at either resolution.
    dit_stages=(
        DitStage(side=256, batch=8, spatial_step=2.0, shift=6.0, until=0.5),
        DitStage(side=512, batch=2, spatial_step=1.0, shift=12.0, until=1.0),
    ),
    # A Muon step changes a matrix by rate * sqrt(width), an Adam step by up to rate * width: these are the demo's rates
    # for three times the width.
    matrix_rate=1.7e-3,
    other_rate=7e-4,
    vae_width=16,
    seed=2026,
)
SIZES = {size.name: size for size in (Settings(), LARGE)}
"""The models that `train_demo.py` can train, by name."""


def tiny(settings: Settings) -> Settings:
    """The same model and curriculum, small enough to train on a CPU in seconds."""
    return replace(
        settings,
        width=128,
        hidden=128,
        layers=1,
        dit_stages=(
            DitStage(side=32, batch=2, spatial_step=2.0, shift=1.5, until=0.5),
            DitStage(side=64, batch=2, spatial_step=1.0, shift=3.0, until=1.0),
        ),
        vae_width=4,
        vae_stages=(VaeStage(frames=5, side=32, batch=2, until=0.5), VaeStage(frames=9, side=32, batch=1, until=1.0)),
        compile=False,
        basis_clips=16,
        held_out=1,
        sheet_side=64,
        sheet_steps=2,
    )

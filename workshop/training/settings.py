"""Sizes and rates of the trainings: the released model, the large one, and how each is made tiny for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DitStage:
    """One resolution of the curriculum; `until` is the share of the time budget at which it ends, `batch` that of
    every process."""

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
    """Everything that `workshop/training/train_demo.py` fixes."""

    name: str = "demo"
    """Of the files, see `files.py`."""
    world: str = "shapes"
    """What the clips show, see `worlds.py`."""
    prompt_dropout: float = 0.0
    """Share of the clips whose prompt is emptied; with it the model can be guided away from the empty prompt."""
    guidance: float = 1.0
    """Scale at which it is sampled; 1 is without guidance."""
    weight_bits: int | None = None
    """Of every matrix weight in the file, sign included, see `files.py`; None leaves them as they are trained."""
    width: int = 256
    hidden: int = 1024
    layers: int = 6
    # Thousands of tokens share one layout, which stays visible up to sigma 0.97: a large shift trains where it is made.
    # A quarter of the tokens carries the same picture, so equal difficulty needs half the noise ratio: 12 / 2.
    dit_stages: tuple[DitStage, ...] = (
        DitStage(side=256, batch=32, spatial_step=2.0, shift=6.0, until=0.45),
        DitStage(side=512, batch=8, spatial_step=1.0, shift=12.0, until=1.0),
    )
    # Going on from finished weights: the same stages at a part of the learning rate.
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
    # About 18000 tokens a process and step, at either resolution.
    dit_stages=(
        DitStage(side=256, batch=8, spatial_step=2.0, shift=6.0, until=0.5),
        DitStage(side=512, batch=2, spatial_step=1.0, shift=12.0, until=1.0),
    ),
    # A step of Muon turns a matrix by rate * sqrt(width), one of Adam by up to rate * width: the demo's rates at three
    # times the width.
    matrix_rate=1.7e-3,
    other_rate=7e-4,
    vae_width=16,
    seed=2026,
)
SIZES = {size.name: size for size in (Settings(), LARGE)}
"""Sizes that `train_demo.py` trains, by name."""


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

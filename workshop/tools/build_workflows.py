"""Writes `workflows/*.json` from the node definitions of a running server: `python dev.py workflows`.

Run it after changing a node's schema; `tests/comfyui/test_workflows.py` fails until you do. The demo's workflow is
here, the others are in a file for each family.
"""

from __future__ import annotations

from pathlib import Path

from .canvas import Canvas, Node, Output
from .cogvideox_workflows import COGVIDEOX_BUILDERS
from .hunyuan_ltx_workflows import HUNYUAN_LTX_BUILDERS
from .wan_workflows import WAN_BUILDERS
from .workflow_parts import note_in_both


def build_all(definitions: dict, folder: Path) -> list[Path]:
    """Write every workflow into `folder` and return the paths. `definitions` is what `/object_info` returns."""
    builders = {"psa_demo": _demo, **WAN_BUILDERS, **HUNYUAN_LTX_BUILDERS, **COGVIDEOX_BUILDERS}
    paths = []
    for name, build in builders.items():
        canvas = Canvas(definitions)
        build(canvas)
        paths.append(folder / f"{name}.json")
        canvas.save(paths[-1])
    return paths


def _demo(canvas: Canvas) -> None:
    with canvas.group("What this is", "grey", width=420):
        note_in_both(
            canvas,
            """
## Dense against sparse, with a model that ships with this repository

Press Run: there is nothing to download, and no GPU is needed (a few minutes on a CPU).

Both samplers start from the same noise. The blue column is stock attention, the green one goes through **PSA Patch**.
The small Wan model and its VAE come with the node pack; **PSA Demo Prompt** says what the video shows, since there
is no text encoder.

`start_percent` is 0.30: 5 of the 16 steps stay dense. The node's default of 0.25 would be 4, and without the
correction it would give this clip a second blue square that the dense video does not have.

`python dev.py demo` runs this file and writes the videos and a report into `output/psa_demo/`.
`python dev.py serve` opens ComfyUI with it.
""",
            440,
        )
    with canvas.group("Model and scene"):
        model = canvas.add("UNETLoader", unet_name="psa_demo_wan_dit.safetensors")
        model = canvas.add("ModelSamplingSD3", model=model, shift=12.0)
        vae = canvas.add("VAELoader", vae_name="psa_demo_wan_vae.safetensors")
        scene = canvas.add("PSADemoScene")
        latent = canvas.add("EmptyHunyuanLatentVideo", width=512, height=512, length=33)
    sampling = dict(seed=42, steps=16, cfg=1.0, sampler_name="euler", scheduler="simple")
    sampling |= dict(positive=scene, negative=scene, latent_image=latent)
    with canvas.group("Dense: stock attention", "blue"):
        dense = canvas.add("KSampler", "KSampler: dense", model=model, **sampling)
        dense_frames = canvas.add("VAEDecode", samples=dense, vae=vae)
        _save_webp(canvas, dense_frames, "psa_demo/dense")
    with canvas.group("Sparse: PSA", "green"):
        # 5 of 16 dense steps instead of the default's 4: this clip has 37.8 dB instead of 34.7. Without the correction
        # it has 30.8 instead of 22.6, and with 4 a second blue square that the dense video does not have.
        patched = canvas.add("PSAPatch", model=model, sparsity=0.85, start_percent=0.30, min_tokens=4096)
        sparse = canvas.add("KSampler", "KSampler: PSA", model=patched, **sampling)
        frames = canvas.add("VAEDecode", samples=sparse, vae=vae)
        _save_webp(canvas, frames, "psa_demo/psa")
    with canvas.group("What PSA did", "violet", width=560):
        canvas.add("PSAReport", model=patched, samples=sparse, images=frames, filename_prefix="psa_demo/report")
        compared = canvas.add("PSACompare", images_a=dense_frames, images_b=frames)
        _save_webp(canvas, compared.output("side_by_side"), "psa_demo/side_by_side")


def _save_webp(canvas: Canvas, frames: Node | Output, prefix: str) -> None:
    canvas.add("SaveAnimatedWEBP", images=frames, filename_prefix=prefix, fps=12.0, lossless=True, method="fastest")

"""Parts shared by several of the pack's workflows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .canvas import Canvas, Node, Output
from .notes_chinese import in_chinese

HUB = "https://huggingface.co"
PROMPT = (
    "A red fox trots through a snowy pine forest at sunrise, fresh powder flying from its paws, "
    "low golden light between the trunks, the camera glides beside it, sharp detail, natural colours."
)
IMAGE_PROMPT = "The subject slowly turns towards the camera and smiles, hair and leaves moving in a light breeze."
NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, low quality, JPEG artefacts, deformed limbs"
DENSE_START = "The first quarter of the schedule (`start_percent` 0.25) stays dense."


@dataclass(frozen=True)
class ModelFile:
    """A file that a workflow needs.

    Attributes:
        folder: the one in ComfyUI's `models/` that it goes into; url: where it is, ending in its name.
        size: in GB (10^9 bytes), as download pages show it; inside: the folder in `folder` for it, if it has its own.
    """

    folder: str
    url: str
    size: float
    inside: str = ""

    @property
    def name(self) -> str:
        """The file's name in the menus of loaders."""
        return self.inside + self.url.rsplit("/", 1)[1]

    @property
    def download(self) -> dict:
        """What the frontend offers to download, as an entry of a node's `properties.models`."""
        return {"name": self.name, "url": self.url, "directory": self.folder}


def note_in_both(canvas: Canvas, markdown: str, height: int) -> None:
    """Add a note, and the same in Chinese, which is shorter, below it."""
    canvas.note(markdown, height)
    canvas.note(in_chinese(markdown), 4 * height // 5, "说明")


def files_note(
    canvas: Canvas, title: str, files: Sequence[ModelFile], note: str = "", dense: str = DENSE_START
) -> None:
    """Add a group with a note: the model, its files, what PSA's nodes do, which steps stay `dense`, and a `note`."""
    lines = "\n".join(f"- `models/{file.folder}/`: `{file.name}` ({file.size:g} GB)" for file in files)
    sources = "\n\n".join(dict.fromkeys(file.url.split("/resolve/")[0] for file in files))
    with canvas.group("Files", "grey", width=460):
        note_in_both(
            canvas,
            f"""
## {title}

Files, and the ComfyUI folder that each goes into:

{lines}

Download them from

{sources}

**PSA Patch** goes between the model and the sampler. `sparsity` is the share of attention work that is skipped;
0 or a bypassed node gives the stock result. {dense}
**PSA Report** says what ran sparse, what stayed dense and why.

{note}
""",
            560,
        )


def load_model(canvas: Canvas, file: ModelFile) -> Node:
    """Add the loader of a diffusion model."""
    return canvas.add("UNETLoader", unet_name=file.name, models=[file.download])


def load_vae(canvas: Canvas, file: ModelFile) -> Node:
    """Add the loader of a VAE."""
    return canvas.add("VAELoader", vae_name=file.name, models=[file.download])


def prompts(canvas: Canvas, clip: Node, positive: str, negative: str = NEGATIVE) -> tuple[Node, Node]:
    """Add the nodes of both prompts."""
    return (
        canvas.add("CLIPTextEncode", "Positive prompt", clip=clip, text=positive),
        canvas.add("CLIPTextEncode", "Negative prompt", clip=clip, text=negative),
    )


def sample(
    canvas: Canvas, model: Node, positive: Node | Output, negative: Node | Output, latent: Node, **settings: object
) -> Node:
    """Add a group with PSA, KSampler with `settings`, and the report. Returns the node that passes the latent on."""
    with canvas.group("PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", model=model)
        conditions = dict(positive=positive, negative=negative, latent_image=latent)
        samples = canvas.add("KSampler", model=patched, seed=42, scheduler="simple", **conditions, **settings)
        return canvas.add("PSAReport", model=patched, samples=samples)


def save_video(canvas: Canvas, samples: Node | Output, vae: Node, fps: float, name: str) -> None:
    """Add a group that decodes and saves the video."""
    with canvas.group("Video", "violet"):
        frames = canvas.add("VAEDecode", samples=samples, vae=vae)
        video = canvas.add("CreateVideo", images=frames, fps=fps)
        canvas.add("SaveVideo", video=video, filename_prefix=f"video/psa_{name}")

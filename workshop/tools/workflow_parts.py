"""Parts shared by several of the pack's workflows."""

from __future__ import annotations

from .canvas import Canvas, Node


def model_file(name: str, folder: str, source: str) -> dict:
    """A file that the frontend offers to download for a loader, from `source`/folder/name into models/`folder`."""
    return {"name": name, "url": f"{source}/{folder}/{name}", "directory": folder}


def save_video(canvas: Canvas, samples: Node, vae: Node, fps: float, name: str) -> None:
    """Add a group that decodes and saves the video."""
    with canvas.group("Video", "violet"):
        frames = canvas.add("VAEDecode", samples=samples, vae=vae)
        video = canvas.add("CreateVideo", images=frames, fps=fps)
        canvas.add("SaveVideo", video=video, filename_prefix=f"video/psa_{name}")

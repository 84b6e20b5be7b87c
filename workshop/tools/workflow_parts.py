"""Pieces that several of the pack's workflows share."""

from __future__ import annotations

from .canvas import Canvas, Node


def model_file(name: str, folder: str, source: str) -> dict:
    """What the frontend offers to download for a loader: `folder` of ComfyUI's models, address `source`/folder/name."""
    return {"name": name, "url": f"{source}/{folder}/{name}", "directory": folder}


def save_video(canvas: Canvas, samples: Node, vae: Node, fps: float, name: str) -> None:
    """Decode and save in a group of its own."""
    with canvas.group("Video", "violet"):
        frames = canvas.add("VAEDecode", samples=samples, vae=vae)
        video = canvas.add("CreateVideo", images=frames, fps=fps)
        canvas.add("SaveVideo", video=video, filename_prefix=f"video/psa_{name}")

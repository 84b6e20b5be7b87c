"""Draws frames as contact sheets, maps and videos, in the same colours as the nodes' pictures.

Frames are uint8 arrays [F, H, W, 3].
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageSequence

from comfyui_psa.reports.paint import font, heat, level_picture, over_frame

DIFFERENCE_GAIN = 4
INK, PAPER, QUIET = (24, 26, 31), (255, 255, 255), (96, 102, 112)


def read_frames(webp: bytes) -> np.ndarray:
    """The frames of an animated WebP: uint8 [F, H, W, 3]."""
    with Image.open(io.BytesIO(webp)) as film:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)])


def write_video(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write an H.264 mp4; height and width must be even."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def side_by_side(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Videos side by side, each under its title: uint8 [F, H + title, W * n, 3]."""
    title = 36
    videos = []
    for name, frames in rows.items():
        band = Image.new("RGB", (frames.shape[2], title), INK)
        ImageDraw.Draw(band).text((12, title // 2), name, PAPER, font(20), anchor="lm")
        bands = np.broadcast_to(np.asarray(band), (len(frames), title, frames.shape[2], 3))
        videos.append(np.concatenate([bands, frames], axis=1))
    joined = np.concatenate(videos, axis=2)
    return joined[:, : joined.shape[1] // 2 * 2, : joined.shape[2] // 2 * 2]


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray | Image.Image]]],
    side: int,
    title: str = "",
    captions: Sequence[str] = (),
) -> Image.Image:
    """Rows of pictures, each row under its name.

    Args:
        rows: name (may be empty) and pictures uint8 [H, W, 3], all of one shape; rows may differ in length.
        side: width of a picture on the sheet.
        captions: text under each column.
    """
    pictures = [[x if isinstance(x, Image.Image) else Image.fromarray(x) for x in row] for _, row in rows]
    first, gap, head, foot = pictures[0][0], 4, 40 if title else 0, 24 if captions else 0
    line = 24 if any(name for name, _ in rows) else 0
    tall = round(side * first.height / first.width)
    width = max(map(len, pictures)) * (side + gap) - gap
    sheet = Image.new("RGB", (width, head + len(rows) * (line + tall + gap) - gap + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, head // 2), title, INK, font(16), anchor="lm")
    for row, (name, _) in enumerate(rows):
        y = head + row * (line + tall + gap)
        draw.text((8, y + line // 2), name, INK, font(14), anchor="lm")
        for column, picture in enumerate(pictures[row]):
            thumbnail = picture.resize((side, tall), Image.Resampling.LANCZOS)
            sheet.paste(thumbnail, (column * (side + gap), y + line))
    for column, text in enumerate(captions):
        draw.text((column * (side + gap) + side // 2, sheet.height - foot // 2), text, QUIET, font(13), anchor="mm")
    return sheet


def contact_strip(dense: np.ndarray, psa: np.ndarray, title: str, columns: int = 6, side: int = 200) -> Image.Image:
    """A few frames of the dense and PSA videos and their difference, under a title."""
    picked = np.linspace(0, len(dense) - 1, min(columns, len(dense))).round().astype(int)
    rows = [("dense", dense[picked]), ("PSA", psa[picked])]
    rows.append((f"difference, {DIFFERENCE_GAIN} times", amplified_difference(dense[picked], psa[picked])))
    return contact_sheet(rows, side, title, [f"frame {frame + 1}" for frame in picked])


def amplified_difference(dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """The absolute difference of two pictures or videos, `DIFFERENCE_GAIN` times: uint8."""
    return (np.abs(sparse.astype(int) - dense) * DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8)


def level_map(factors: list[list[int]], width: int = 760) -> Image.Image:
    """The pooling factor of every (query block, key block) pair, one square each, with query blocks as rows."""
    picture = level_picture(np.asarray(factors))
    scale = max(1, width // picture.shape[1])
    size = picture.shape[1] * scale, picture.shape[0] * scale
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)


def attention_over_video(frames: np.ndarray, token_levels: Sequence[float], grid: Sequence[int]) -> Image.Image:
    """The share of its resolution at which each token was read, drawn over the frames."""
    levels = np.asarray(token_levels, dtype=np.float64).reshape(grid)
    shown = heat((levels - levels.min()) / ((levels.max() - levels.min()) or 1.0))
    side, columns = 230, 5
    tall = round(side * frames.shape[1] / frames.shape[2])
    drawn = [over_frame(frames, colours, step, grid[0], side, tall) for step, colours in enumerate(shown)]
    return contact_sheet([("", drawn[i : i + columns]) for i in range(0, len(drawn), columns)], side)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

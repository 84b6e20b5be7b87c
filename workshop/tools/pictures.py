"""Pictures of the demo: frames to strips, maps and videos. Pillow, numpy and PyAV; no figures are computed here.

Frames are uint8 arrays [F, H, W, 3].
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageSequence

DIFFERENCE_GAIN = 4
# From dark violet over teal to yellow: light means more detail, also where colours cannot be told apart.
SCALE = np.array([(59, 28, 92), (52, 82, 139), (33, 139, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
DROPPED = (128, 128, 128)
INK, PAPER, QUIET = (24, 26, 31), (255, 255, 255), (96, 102, 112)


def read_frames(webp: bytes) -> np.ndarray:
    """The frames of an animated WebP: uint8 [F, H, W, 3]."""
    with Image.open(io.BytesIO(webp)) as film:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)])


def write_video(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write H.264 mp4; height and width must be even."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def side_by_side(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Videos beside one another under their titles: uint8 [F, H + title, W * n, 3]."""
    title = 36
    videos = []
    for name, frames in rows.items():
        band = Image.new("RGB", (frames.shape[2], title), INK)
        ImageDraw.Draw(band).text((12, title // 2), name, PAPER, font(20), anchor="lm")
        bands = np.broadcast_to(np.asarray(band), (len(frames), title, frames.shape[2], 3))
        videos.append(np.concatenate([bands, frames], axis=1))
    joined = np.concatenate(videos, axis=2)
    return joined[:, : joined.shape[1] // 2 * 2, : joined.shape[2] // 2 * 2]


def contact_strip(dense: np.ndarray, psa: np.ndarray, title: str, columns: int = 6, side: int = 200) -> Image.Image:
    """Dense, PSA and their difference at a few moments, with a title line."""
    picked = np.linspace(0, len(dense) - 1, min(columns, len(dense))).round().astype(int)
    difference = np.abs(dense.astype(int) - psa) * DIFFERENCE_GAIN
    amplified = difference.clip(0, 255).astype(np.uint8)
    rows = {"dense": dense, "PSA": psa, f"difference, {DIFFERENCE_GAIN} times": amplified}
    head, margin, gap = 44, 160, 4
    height = round(side * dense.shape[1] / dense.shape[2])
    sheet = Image.new("RGB", (margin + len(picked) * (side + gap), head + len(rows) * (height + gap) + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((12, head // 2), title, INK, font(17), anchor="lm")
    for row, (name, frames) in enumerate(rows.items()):
        y = head + row * (height + gap)
        draw.text((12, y + height // 2), name, INK, font(16), anchor="lm")
        for column, frame in enumerate(picked):
            thumbnail = Image.fromarray(frames[frame]).resize((side, height), Image.Resampling.LANCZOS)
            sheet.paste(thumbnail, (margin + column * (side + gap), y))
    for column, frame in enumerate(picked):
        where = (margin + column * (side + gap) + side // 2, sheet.height - 12)
        draw.text(where, f"frame {frame + 1}", QUIET, font(13), anchor="mm")
    return sheet


def level_colours(factors: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Pooling factor -> colour: full resolution is the lightest, a dropped block (0) is grey."""
    most = max(6, *(int(np.log2(factor)) for factor in factors if factor))
    return {f: DROPPED if f == 0 else tuple(map(int, heat(1 - np.log2(f) / most))) for f in sorted(set(factors))}


def level_map(factors: list[list[int]], width: int = 760) -> Image.Image:
    """The pooling factor of every (query block, key block) pair, one square each, query blocks downward."""
    table = np.asarray(factors)
    picture = np.zeros((*table.shape, 3), np.uint8)
    for factor, colour in level_colours(table.flatten().tolist()).items():
        picture[table == factor] = colour
    scale = max(1, width // table.shape[1])
    return Image.fromarray(picture).resize((table.shape[1] * scale, table.shape[0] * scale), Image.Resampling.NEAREST)


def attention_over_video(frames: np.ndarray, token_levels: Sequence[float], grid: Sequence[int]) -> Image.Image:
    """The share of its resolution at which each token was read, drawn over the frames that the tokens stand for."""
    time, height, width = grid
    levels = np.asarray(token_levels, dtype=np.float64).reshape(time, height, width)
    span = levels.max() - levels.min()
    shown = (levels - levels.min()) / (span or 1.0)
    side, gap, columns = 230, 4, min(5, time)
    tall = round(side * frames.shape[1] / frames.shape[2])
    rows = -(-time // columns)
    sheet = Image.new("RGBA", (columns * (side + gap) - gap, rows * (tall + gap) - gap))
    for step in range(time):
        # A latent frame stands for four video frames, the first one for a single one.
        frame = min(len(frames) - 1, round(step * (len(frames) - 1) / max(1, time - 1)))
        grey = Image.fromarray(frames[frame]).convert("L").convert("RGB").resize((side, tall))
        colour = Image.fromarray(heat(shown[step]).astype(np.uint8)).resize((side, tall), Image.Resampling.NEAREST)
        sheet.paste(Image.blend(grey, colour, 0.6), (step % columns * (side + gap), step // columns * (tall + gap)))
    return sheet


def heat(values: np.ndarray | float) -> np.ndarray:
    """Colours of values 0..1: float64 [..., 3], 0..255."""
    position = np.clip(values, 0, 1) * (len(SCALE) - 1)
    low = np.minimum(np.floor(position).astype(int), len(SCALE) - 2)
    share = np.asarray(position - low)[..., None]
    return SCALE[low] * (1 - share) + SCALE[low + 1] * share


def font(size: int) -> ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

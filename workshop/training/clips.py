"""Procedural clips of scenes: soft-edged textured shapes moving over a smooth, drifting background.

Everything is a closed formula of pixel position and time, so the same clip can be rendered at any resolution, crop or
length, on any device, in one fused kernel. There is no lighting and no rotation. Lengths are fractions of the frame, y
points down, and time runs from 0 (first frame) to 1 (last frame).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...demo.scene import ATTRIBUTES, Scene, scene_to_indices

CLIP_FRAMES = 33
TRAVEL = 0.36
"""Distance an object covers in a whole clip, as a fraction of the frame."""
DRIFT = 0.25
"""Distance the background covers in a whole clip."""
RADII = (0.090, 0.130, 0.180)
TEXTURE_PERIOD = 0.085
WAVE_COUNT = 6
EDGE_PIXELS = 2.0
"""Width of the soft edge in rendered pixels, which avoids aliasing at every resolution."""

_SQUARE_ROOT_HALF = math.sqrt(0.5)
DIRECTION_VECTORS = (
    (0.0, 0.0),
    (1.0, 0.0),
    (_SQUARE_ROOT_HALF, -_SQUARE_ROOT_HALF),
    (0.0, -1.0),
    (-_SQUARE_ROOT_HALF, -_SQUARE_ROOT_HALF),
    (-1.0, 0.0),
    (-_SQUARE_ROOT_HALF, _SQUARE_ROOT_HALF),
    (0.0, 1.0),
    (_SQUARE_ROOT_HALF, _SQUARE_ROOT_HALF),
)
COLOUR_VALUES = (
    (0.92, 0.12, 0.12),
    (1.00, 0.52, 0.05),
    (0.98, 0.90, 0.15),
    (0.12, 0.75, 0.20),
    (0.15, 0.88, 0.92),
    (0.15, 0.30, 0.98),
    (0.92, 0.20, 0.80),
    (0.96, 0.96, 0.96),
)
BACKGROUND_VALUES = ((0.36, 0.37, 0.40), (0.11, 0.14, 0.32), (0.08, 0.25, 0.14), (0.32, 0.21, 0.12))

Parameters = dict[str, torch.Tensor]


def _column(name: str, slot: str) -> int:
    return next(i for i, (s, n, _) in enumerate(ATTRIBUTES) if s == slot and n == name)


def indices_of(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> torch.Tensor:
    """Word numbers of scenes: long [B, 13]."""
    return torch.tensor([scene_to_indices(scene) for scene in scenes], device=device)


def sample_parameters(indices: torch.Tensor, generator: torch.Generator, candidates: int = 6) -> Parameters:
    """Draw what the scenes leave open: start positions, texture phases, the background's waves.

    indices: long [B, 13] on the generator's device. Start positions keep the objects mostly inside the frame; of
    `candidates` pairs of positions, the pair that stays farthest apart is used.
    Returns float32 tensors (long for ids), batch first.
    """
    device, batch = indices.device, indices.shape[0]

    def table(values: Sequence) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    pair = {
        name: torch.stack([indices[:, _column(name, slot)] for slot in ("first", "second")], 1)
        for name in ("shape", "colour", "size", "texture", "direction")
    }
    radius = table(RADII)[pair["size"]]
    velocity = table(DIRECTION_VECTORS)[pair["direction"]] * TRAVEL
    margin = 0.85 * radius[..., None]
    low = torch.maximum(margin, margin - velocity)
    high = torch.minimum(1 - margin, 1 - margin - velocity)
    start = low + uniform(candidates, batch, 2, 2) * (high - low)
    times = torch.linspace(0, 1, 5, device=device).view(5, 1, 1, 1, 1)
    path = start + times * velocity
    gap = (path[..., 0, :] - path[..., 1, :]).norm(dim=-1).amin(0)
    start = start[gap.argmax(0), torch.arange(batch, device=device)]

    waves = indices[:, _column("pattern", "background")].bool()
    drift = table(DIRECTION_VECTORS)[indices[:, _column("direction", "background")]] * DRIFT
    angle = uniform(batch, WAVE_COUNT) * 2 * math.pi
    # A plane wave shows no motion along its crests: keep the main wave within 35 degrees of the drift.
    along = torch.atan2(drift[:, 1], drift[:, 0]) + (uniform(batch) - 0.5) * 1.22
    moving_wave = waves & (drift.abs().sum(1) > 0)
    angle[:, 0] = torch.where(moving_wave, along, angle[:, 0])
    cycles = 1.0 + 2.5 * uniform(batch, WAVE_COUNT)
    cycles[:, 0] = torch.where(waves, 3.5 + 2.0 * uniform(batch), cycles[:, 0])
    amplitude = torch.where(waves[:, None], 0.10, 0.45).repeat(1, WAVE_COUNT)
    amplitude[:, 0] = torch.where(waves, 1.2, amplitude[:, 0])
    return {
        "start": start,
        "velocity": velocity,
        "radius": radius,
        "shape": pair["shape"],
        "texture": pair["texture"],
        "colour": table(COLOUR_VALUES)[pair["colour"]],
        "texture_phase": uniform(batch, 2, 2),
        "background": table(BACKGROUND_VALUES)[indices[:, _column("colour", "background")]],
        "drift": drift,
        "wave_x": cycles * torch.cos(angle),
        "wave_y": cycles * torch.sin(angle),
        "wave_phase": uniform(batch, WAVE_COUNT),
        "wave_amplitude": amplitude,
    }


def signed_distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Approximate signed distance (negative inside) to the outline of unit-size shapes, broadcast over x and y."""
    length = torch.sqrt(x * x + y * y + 1e-12)
    ax, ay = x.abs(), y.abs()
    circle = length - 0.95
    square = torch.maximum(ax, ay) - 0.84
    triangle = torch.maximum(0.8660254 * ax - 0.5 * y - 0.60, y - 0.60)
    # Fold the plane into one of the star's five arms: tip at angle 0, notch at 36 degrees.
    fold = 2 * math.pi / 5
    turn = torch.atan2(x, -y)
    turn = (turn - fold * torch.floor(turn / fold + 0.5)).abs()
    tip, notch = 1.18, 0.54
    notch_x, notch_y = notch * math.cos(fold / 2), notch * math.sin(fold / 2)
    norm = math.hypot(notch_y, tip - notch_x)
    star = ((length * torch.cos(turn) - tip) * notch_y + length * torch.sin(turn) * (tip - notch_x)) / norm
    ring = (length - 0.76).abs() - 0.25
    cross = torch.minimum(torch.maximum(ax - 1.0, ay - 0.36), torch.maximum(ay - 1.0, ax - 0.36))
    out = circle
    for number, distance in enumerate((square, triangle, star, ring, cross), start=1):
        out = torch.where(shape == number, distance, out)
    return out


def _texture(kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Darkness 0..1 of the texture at positions relative to the object's centre."""
    turn = 2 * math.pi / TEXTURE_PERIOD
    px, py = 2 * math.pi * phase[..., 0], 2 * math.pi * phase[..., 1]
    stripes = torch.sin((x + y) * (_SQUARE_ROOT_HALF * turn) + px)
    dots = 2.0 * torch.sin(x * turn + px) * torch.sin(y * turn + py) - 0.6
    wave = torch.where(kind == 1, stripes, dots)
    return torch.where(kind == 0, torch.zeros_like(wave), 0.5 + 0.5 * torch.tanh(2.0 * wave))


def render(
    parameters: Parameters,
    frames: int,
    height: int,
    width: int,
    *,
    pixel: float | None = None,
    origin: torch.Tensor | None = None,
    first_frame: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Render clips: [B, 3, frames, height, width], values -1..1, of `dtype`.

    pixel: size of a pixel as a fraction of the frame (None: 1 / height, which shows the whole frame).
    origin: float [B, 2], (x, y) of the top left corner (0, 0 if None); with `pixel` this renders a crop.
    first_frame: float [B], number of the first rendered frame of the 33 (0 if None).
    """
    device = parameters["start"].device
    pixel = 1.0 / height if pixel is None else pixel

    def spread(value: torch.Tensor) -> torch.Tensor:
        return value.view(-1, 1, 1, 1)

    time = torch.arange(frames, device=device).view(1, -1, 1, 1).float()
    if first_frame is not None:
        time = time + spread(first_frame)
    time = time / (CLIP_FRAMES - 1)
    y = (torch.arange(height, device=device).view(1, 1, -1, 1).float() + 0.5) * pixel
    x = (torch.arange(width, device=device).view(1, 1, 1, -1).float() + 0.5) * pixel
    if origin is not None:
        x, y = x + spread(origin[:, 0]), y + spread(origin[:, 1])

    p = parameters
    back_x = x - spread(p["drift"][:, 0]) * time
    back_y = y - spread(p["drift"][:, 1]) * time
    wave = torch.zeros((), device=device)
    for k in range(WAVE_COUNT):
        turn = spread(p["wave_x"][:, k]) * back_x + spread(p["wave_y"][:, k]) * back_y + spread(p["wave_phase"][:, k])
        wave = wave + spread(p["wave_amplitude"][:, k]) * torch.sin(2 * math.pi * turn)
    brightness = 1.0 + 0.6 * torch.tanh(wave)
    cover, shade = [], []
    for i in range(2):
        local_x = x - (spread(p["start"][:, i, 0]) + spread(p["velocity"][:, i, 0]) * time)
        local_y = y - (spread(p["start"][:, i, 1]) + spread(p["velocity"][:, i, 1]) * time)
        radius = spread(p["radius"][:, i])
        distance = signed_distance(spread(p["shape"][:, i]), local_x / radius, local_y / radius) * radius
        cover.append(torch.sigmoid(-distance * (4.0 / (EDGE_PIXELS * pixel))))
        phase = p["texture_phase"][:, i].view(-1, 1, 1, 1, 2)
        shade.append(1.0 - 0.55 * _texture(spread(p["texture"][:, i]), local_x, local_y, phase))
    channels = []
    for channel in range(3):
        value = spread(p["background"][:, channel]) * brightness
        for i in range(2):
            value = value + cover[i] * (spread(p["colour"][:, i, channel]) * shade[i] - value)
        channels.append((2.0 * value - 1.0).to(dtype))
    return torch.stack(channels, 1)

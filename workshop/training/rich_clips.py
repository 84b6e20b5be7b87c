"""Procedural clips of rich scenes: four textured things, a ridge and a patterned backdrop at different depths, seen by
a camera that pans, zooms or rolls.

As in `clips.py`, everything is a closed formula of position and time, and the arguments are the same. Time runs from
-0.5 to 0.5, so that the middle frame shows everything at its drawn position. Near layers respond to the camera more
than far ones, which creates parallax.
"""

from __future__ import annotations

import math

import torch

from ...demo.scene import Vocabulary
from .clips import CLIP_FRAMES, COLOUR_VALUES, DIRECTION_VECTORS, EDGE_PIXELS, RADII, Parameters, signed_distance
from .rich_scene import RICH_ATTRIBUTES, SLOTS

TRAVEL = 0.4
"""Distance a thing covers over a whole clip, as a fraction of the frame."""
THING_DEPTHS = (0.75, 0.9, 1.05, 1.2)
BACKDROP_DEPTH, RIDGE_DEPTH = 0.4, 0.6
"""Share of the camera's motion that applies to a layer."""
TEXTURE_PERIOD = 0.07
WAVE_COUNT = 6
PAN, ZOOM, ROLL = 0.4, 0.7, 0.6
"""Over a whole clip at depth 1: fraction of the frame, logarithm of the scale, radians."""
SPIN = 2.2
"""Radians over a whole clip."""
CAMERA_MOTIONS = (
    # pan x, pan y, zoom, roll, in the order of CAMERAS
    (0.0, 0.0, 0.0, 0.0),
    (-PAN, 0.0, 0.0, 0.0),
    (PAN, 0.0, 0.0, 0.0),
    (0.0, -PAN, 0.0, 0.0),
    (0.0, PAN, 0.0, 0.0),
    (0.0, 0.0, ZOOM, 0.0),
    (0.0, 0.0, -ZOOM, 0.0),
    (0.0, 0.0, 0.0, ROLL),
    (0.0, 0.0, 0.0, -ROLL),
)
EARTH_VALUES = (
    (0.40, 0.41, 0.44),
    (0.13, 0.17, 0.38),
    (0.10, 0.30, 0.17),
    (0.36, 0.23, 0.13),
    (0.34, 0.14, 0.32),
    (0.58, 0.50, 0.34),
)
_TURN = 2 * math.pi


def _column(slot: str, name: str, vocabulary: Vocabulary = RICH_ATTRIBUTES) -> int:
    return next(i for i, (s, n, _) in enumerate(vocabulary) if s == slot and n == name)


def sample_rich_parameters(indices: torch.Tensor, generator: torch.Generator, candidates: int = 8) -> Parameters:
    """Draw what the scenes leave open: positions, initial angles, phases of patterns, outlines of ridges.

    indices: long [B, 30] on the generator's device. Of `candidates` draws of positions, the one whose things stay
    farthest apart is used. Returns float32 tensors (long for ids), batch first.
    """
    device, batch = indices.device, indices.shape[0]

    def table(values: object) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def view(name: str) -> torch.Tensor:
        return indices[:, _column("view", name)]

    thing = {
        name: torch.stack([indices[:, _column(slot, name)] for slot in SLOTS], 1)
        for name in ("shape", "colour", "size", "texture", "direction", "spin")
    }
    radius = table(RADII)[thing["size"]]
    velocity = table(DIRECTION_VECTORS)[thing["direction"]] * TRAVEL
    middle = 0.14 + 0.72 * uniform(candidates, batch, len(SLOTS), 2)
    times = torch.linspace(-0.5, 0.5, 5, device=device).view(5, 1, 1, 1, 1)
    path = middle + times * velocity
    gap = (path.unsqueeze(-2) - path.unsqueeze(-3)).norm(dim=-1) - radius.unsqueeze(-1) - radius.unsqueeze(-2)
    hidden = thing["shape"] == 0
    alone = hidden.unsqueeze(-1) | hidden.unsqueeze(-2) | torch.eye(len(SLOTS), dtype=torch.bool, device=device)
    gap = gap.masked_fill(alone, 9.0).amin((0, -1, -2))
    middle = middle[gap.argmax(0), torch.arange(batch, device=device)]

    angle = uniform(batch, WAVE_COUNT) * _TURN
    cycles = 1.0 + 3.0 * uniform(batch, WAVE_COUNT)
    return {
        "start": middle,
        "velocity": velocity,
        "radius": radius,
        "shape": thing["shape"],
        "texture": thing["texture"],
        "colour": table(COLOUR_VALUES)[thing["colour"]],
        "angle": (uniform(batch, len(SLOTS)) - 0.5) * 0.8,
        "spin": table((0.0, SPIN, -SPIN))[thing["spin"]],
        "texture_phase": uniform(batch, len(SLOTS), 2),
        "camera": table(CAMERA_MOTIONS)[view("camera")],
        "light": view("light"),
        "backdrop": view("backdrop"),
        "backdrop_colour": table(EARTH_VALUES)[view("backdrop_colour")],
        "backdrop_phase": uniform(batch, 2),
        "wave_x": cycles * torch.cos(angle),
        "wave_y": cycles * torch.sin(angle),
        "wave_phase": uniform(batch, WAVE_COUNT),
        "ridge": view("ridge"),
        "ridge_colour": table(EARTH_VALUES)[view("ridge_colour")],
        "ridge_phase": uniform(batch, 2),
    }


def focus_of_rich(parameters: Parameters, time: torch.Tensor) -> torch.Tensor:
    """Positions of the things on the screen, float32 [B, 4, 2], at times 0..1 of the clip, [B]."""
    now = (time - 0.5).view(-1, 1)
    depth = torch.tensor(THING_DEPTHS, device=now.device)
    camera = parameters["camera"]
    offset = parameters["start"] + parameters["velocity"] * now.unsqueeze(2) - 0.5
    offset = offset - depth[None, :, None] * camera[:, None, :2] * now.unsqueeze(2)
    offset = offset * torch.exp(depth * camera[:, 2:3] * now).unsqueeze(2)
    cos, sin = torch.cos(camera[:, 3:] * now), torch.sin(camera[:, 3:] * now)
    x, y = offset.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1) + 0.5


def _thing_distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Like `signed_distance`, with shape numbers one higher; `nothing` is far away."""
    ax, ay = x.abs(), y.abs()
    out = signed_distance(shape - 1, x, y)
    out = torch.where(shape == 7, torch.maximum(0.8660254 * ax + 0.5 * ay, ay) - 0.84, out)
    out = torch.where(shape == 8, (ax + ay) * 0.7071068 - 0.72, out)
    return torch.where(shape == 0, torch.full_like(out, 50.0), out)


def _thing_texture(kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Darkness 0..1 of the texture at positions relative to the thing's centre; it turns with the thing."""
    turn = _TURN / TEXTURE_PERIOD
    px, py = _TURN * phase[..., 0], _TURN * phase[..., 1]
    across, down = torch.sin(x * turn + px), torch.sin(y * turn + py)
    wave = torch.where(kind == 1, across, 2.0 * across * down - 0.6)
    checks = 3.0 * torch.sin(x * (0.6 * turn) + px) * torch.sin(y * (0.6 * turn) + py)
    wave = torch.where(kind == 3, checks, wave)
    wave = torch.where(kind == 4, torch.sin(torch.sqrt(x * x + y * y + 1e-12) * turn + px), wave)
    marble = torch.sin((x + y) * (0.6 * turn) + 2.2 * torch.sin((x - 1.6 * y) * (0.35 * turn) + py) + px)
    wave = torch.where(kind == 5, marble, wave)
    return torch.where(kind == 0, torch.zeros_like(wave), 0.5 + 0.5 * torch.tanh(2.0 * wave))


def _backdrop(p: Parameters, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pattern -1..1 of the backdrop at positions on its layer."""

    def spread(value: torch.Tensor) -> torch.Tensor:
        return value.view(-1, 1, 1, 1)

    kind, phase = spread(p["backdrop"]), p["backdrop_phase"]
    px, py = spread(phase[:, 0]), spread(phase[:, 1])
    soft = torch.zeros((), device=x.device)
    for k in range(WAVE_COUNT):
        turn = spread(p["wave_x"][:, k]) * x + spread(p["wave_y"][:, k]) * y + spread(p["wave_phase"][:, k])
        soft = soft + 0.45 * torch.sin(_TURN * turn)
    waves = torch.tanh(1.6 * torch.sin(_TURN * (5.0 * y + 1.5 * x + px) + 1.2 * soft) + 0.4 * soft)
    row = y * 9.0 + py
    lay = torch.floor(row)
    column = x * 5.0 + px + 0.5 * torch.remainder(lay, 2.0)
    mortar = torch.maximum(torch.cos(_TURN * row) - 0.72, torch.cos(_TURN * column) - 0.90)
    brick = 0.35 * torch.sin(2.4 * torch.floor(column) + 1.7 * lay) + 0.25
    bricks = brick - (brick + 0.9) * torch.sigmoid(16.0 * mortar)
    marble = torch.sin(_TURN * (2.0 * x + 1.2 * y + px) + 3.0 * soft)
    tiles = torch.tanh(3.5 * torch.sin(_TURN * (4.0 * x + px)) * torch.sin(_TURN * (4.0 * y + py)))
    dunes = torch.sin(_TURN * (8.0 * y + 0.5 * torch.sin(_TURN * (1.7 * x + px)) + 0.1 * soft))
    out = torch.tanh(soft)
    for number, pattern in enumerate((waves, bricks, marble, tiles, dunes), start=1):
        out = torch.where(kind == number, pattern, out)
    return out


def render_rich(
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
    """Render clips: [B, 3, frames, height, width], values -1..1, of `dtype`. Takes the arguments of `clips.render`."""
    p = parameters
    device = p["start"].device
    pixel = 1.0 / height if pixel is None else pixel

    def spread(value: torch.Tensor) -> torch.Tensor:
        return value.view(-1, 1, 1, 1)

    time = torch.arange(frames, device=device).view(1, -1, 1, 1).float()
    if first_frame is not None:
        time = time + spread(first_frame)
    time = time / (CLIP_FRAMES - 1) - 0.5
    y = (torch.arange(height, device=device).view(1, 1, -1, 1).float() + 0.5) * pixel
    x = (torch.arange(width, device=device).view(1, 1, 1, -1).float() + 0.5) * pixel
    if origin is not None:
        x, y = x + spread(origin[:, 0]), y + spread(origin[:, 1])

    pan_x, pan_y, zoom, roll = (spread(p["camera"][:, i]) for i in range(4))
    cos, sin = torch.cos(roll * time), torch.sin(roll * time)
    turned_x = (x - 0.5) * cos + (y - 0.5) * sin
    turned_y = (y - 0.5) * cos - (x - 0.5) * sin

    def layer(depth: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions on a layer, and the camera's magnification of it."""
        scale = torch.exp(depth * zoom * time)
        return turned_x / scale + 0.5 + depth * pan_x * time, turned_y / scale + 0.5 + depth * pan_y * time, scale

    back_x, back_y, _ = layer(BACKDROP_DEPTH)
    back = 1.0 + 0.5 * _backdrop(p, back_x, back_y)

    ridge_x, ridge_y, scale = layer(RIDGE_DEPTH)
    first, second = spread(p["ridge_phase"][:, 0]), spread(p["ridge_phase"][:, 1])
    slow, quick = torch.sin(_TURN * (1.3 * ridge_x + first)), torch.sin(_TURN * (2.9 * ridge_x + second))
    hills = 0.66 + 0.07 * slow + 0.04 * quick
    towers = 0.64 + 0.08 * torch.tanh(7.0 * slow) + 0.06 * torch.tanh(7.0 * quick)
    is_towers = spread(p["ridge"]) == 2
    outline = torch.where(is_towers, towers, hills)
    ridge_cover = torch.sigmoid((ridge_y - outline) * (4.0 * scale / (EDGE_PIXELS * pixel)))
    ridge_cover = torch.where(spread(p["ridge"]) == 0, torch.zeros_like(ridge_cover), ridge_cover)
    windows = torch.tanh(3.0 * torch.sin(_TURN * 12 * ridge_x) * torch.sin(_TURN * 12 * ridge_y))
    streaks = torch.sin(_TURN * (7.0 * ridge_y + 5.0 * ridge_x) + 2.0 * quick)
    ridge_shade = 0.85 + 0.35 * torch.where(is_towers, windows, streaks)

    cover, shade = [], []
    for i, depth in enumerate(THING_DEPTHS):
        layer_x, layer_y, scale = layer(depth)
        flat_x = layer_x - (spread(p["start"][:, i, 0]) + spread(p["velocity"][:, i, 0]) * time)
        flat_y = layer_y - (spread(p["start"][:, i, 1]) + spread(p["velocity"][:, i, 1]) * time)
        angle = spread(p["angle"][:, i]) + spread(p["spin"][:, i]) * time
        c, s = torch.cos(angle), torch.sin(angle)
        local_x, local_y = flat_x * c + flat_y * s, flat_y * c - flat_x * s
        radius = spread(p["radius"][:, i])
        distance = _thing_distance(spread(p["shape"][:, i]), local_x / radius, local_y / radius) * radius
        cover.append(torch.sigmoid(-distance * (4.0 * scale / (EDGE_PIXELS * pixel))))
        phase = p["texture_phase"][:, i].view(-1, 1, 1, 1, 2)
        shade.append(1.0 - 0.6 * _thing_texture(spread(p["texture"][:, i]), local_x, local_y, phase))

    light = spread(p["light"])
    across, down = 0.45 * (1.0 - 2.0 * x), 0.45 * (1.0 - 2.0 * y)
    spot = 0.25 - 1.6 * ((x - 0.5) * (x - 0.5) + (y - 0.5) * (y - 0.5))
    gain = torch.where(light == 1, across, torch.zeros((), device=device))
    gain = torch.where(light == 2, -across, gain)
    gain = torch.where(light == 3, down, gain)
    gain = 1.0 + torch.where(light == 4, spot, gain)

    channels = []
    for channel in range(3):
        value = spread(p["backdrop_colour"][:, channel]) * back
        value = value + ridge_cover * (spread(p["ridge_colour"][:, channel]) * ridge_shade - value)
        for i in range(len(THING_DEPTHS)):
            value = value + cover[i] * (spread(p["colour"][:, i, channel]) * shade[i] - value)
        channels.append((2.0 * (value * gain).clamp(0.0, 1.0) - 1.0).to(dtype))
    return torch.stack(channels, 1)

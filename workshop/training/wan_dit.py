"""The Wan 2.1 text-to-video diffusion transformer, written for training at small sizes.

Parameter names and shapes match the released checkpoints, so ComfyUI's own loader accepts the weights unchanged. Not
meant for inference in ComfyUI; has no image, camera or reference inputs. Architecture: the Wan technical report (arXiv
2503.20314) and the released configuration files.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

PATCH = (1, 2, 2)
FREQUENCY_WIDTH = 256
HEAD_WIDTH = 128
EPSILON = 1e-6

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Output of q, k, v, all [B, heads, L, 128]."""


def timestep_embedding(timestep: torch.Tensor, width: int = FREQUENCY_WIDTH) -> torch.Tensor:
    """Cosines, then sines, of timesteps [B] in 0..1000: float32 [B, width]."""
    half = width // 2
    rates = 10000.0 ** (-torch.arange(half, device=timestep.device, dtype=torch.float32) / half)
    angle = timestep.float()[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], 1)


def rotary_table(
    grid: tuple[int, int, int], device: torch.device | str, spatial_step: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the 3-D rotary embedding: float32 [T*H*W, 64] each.

    Of the head's width, 44 goes to time and 42 to each side (d - 4*(d//6), 2*(d//6), 2*(d//6)), with base 10000.
    spatial_step: distance between neighbouring tokens; 2 makes a half-size grid cover the positions of the full one.
    """
    sixth = HEAD_WIDTH // 6
    widths = (HEAD_WIDTH - 4 * sixth, 2 * sixth, 2 * sixth)
    angles = []
    for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
        rates = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
        position = torch.arange(length, device=device, dtype=torch.float64) * (spatial_step if axis else 1.0)
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        angles.append((position[:, None] * rates).view(shape).expand(*grid, -1))
    angle = torch.cat(angles, -1).reshape(-1, HEAD_WIDTH // 2)
    return angle.cos().float(), angle.sin().float()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate neighbouring pairs (2i, 2i + 1) of [B, L, heads, 128]; computed in float32, returned in x's dtype."""
    cos, sin = (part[None, :, None, :] for part in table)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension, computed in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPSILON)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys; self-attention unless a context is given."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm_q = RMSNorm(width)
        self.norm_k = RMSNorm(width)

    def forward(
        self,
        x: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor] | None = None,
        context: torch.Tensor | None = None,
        attend: AttentionFunction = F.scaled_dot_product_attention,
    ) -> torch.Tensor:
        source = x if context is None else context
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, HEAD_WIDTH))
        k = self.norm_k(self.k(source)).unflatten(-1, (self.heads, HEAD_WIDTH))
        v = self.v(source).unflatten(-1, (self.heads, HEAD_WIDTH))
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).flatten(2))


def _normalise(x: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> torch.Tensor:
    y = F.layer_norm(x.float(), (x.shape[-1],), eps=EPSILON)
    return y if scale is None else y * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the timestep."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.self_attn = Attention(width)
        self.norm3 = nn.LayerNorm(width, eps=EPSILON)
        self.cross_attn = Attention(width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        context: torch.Tensor,
        attend: AttentionFunction = F.scaled_dot_product_attention,
    ) -> torch.Tensor:
        e = (self.modulation + time).float().chunk(6, 1)
        x = x + self.self_attn(_normalise(x, e[0], e[1]), table, attend=attend) * e[2]
        x = x + self.cross_attn(self.norm3(x), context=context)
        return x + self.ffn(_normalise(x, e[3], e[4])) * e[5]


class Head(nn.Module):
    """Modulated normalisation, then projection back to latent patches."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.head = nn.Linear(width, out_width)
        self.modulation = nn.Parameter(torch.zeros(1, 2, width))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.modulation + time.unsqueeze(1)).float().chunk(2, 1)
        return self.head(_normalise(x, shift, scale))


class WanTransformer(nn.Module):
    """Predicts the velocity (noise minus data) of latents [B, channels, T, H, W].

    width must be a multiple of 128 (one head each); text_width is 4096 in every released model.
    """

    def __init__(
        self,
        width: int = 256,
        hidden: int = 1024,
        layers: int = 6,
        channels: int = 16,
        text_width: int = 4096,
    ):
        super().__init__()
        if width % HEAD_WIDTH:
            raise ValueError(f"width {width} is not a multiple of {HEAD_WIDTH}")
        self.channels = channels
        self.patch_embedding = nn.Conv3d(channels, width, PATCH, PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_embedding = nn.Sequential(nn.Linear(FREQUENCY_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(layers))
        self.head = Head(width, channels * math.prod(PATCH))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Start every residual branch at zero with its gate open, so that training starts stable and fast."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.endswith("modulation"):
                parameter.zero_()
            elif parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, 0.7 / math.sqrt(fan_in), generator=generator)
        self.text_embedding[0].weight.normal_(0.0, 0.05, generator=generator)
        self.time_projection[1].weight.mul_(0.1)
        self.head.head.weight.zero_()
        for block in self.blocks:
            block.self_attn.o.weight.zero_()
            block.cross_attn.o.weight.zero_()
            block.ffn[2].weight.zero_()
            block.modulation[:, 2] = 1.0
            block.modulation[:, 5] = 1.0

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor] | None = None,
        attend: AttentionFunction = F.scaled_dot_product_attention,
    ) -> torch.Tensor:
        """Velocity, shape and dtype of x.

        x: [B, channels, T, H, W], H and W even. timestep: [B], 0..1000. context: [B, tokens, text_width].
        table: from `rotary_table`, made here if None. attend: the self-attention of every block, first block first.
        """
        batch, _, frames, height, width = x.shape
        grid = (frames, height // 2, width // 2)
        if table is None:
            table = rotary_table(grid, x.device)
        # The patch convolution as a matrix product over patches: same result, easier to compile.
        patches = x.view(batch, self.channels, frames, grid[1], 2, grid[2], 2).permute(0, 2, 3, 5, 1, 4, 6)
        patches = patches.reshape(batch, math.prod(grid), -1)
        tokens = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).float()
        time = self.time_embedding(timestep_embedding(timestep).to(context.dtype))
        modulation = self.time_projection(time).unflatten(1, (6, -1))
        text = self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, modulation, table, text, attend)
        out = self.head(tokens, time).view(batch, *grid, 2, 2, self.channels)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape).to(x.dtype)

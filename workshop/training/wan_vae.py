"""The Wan 2.1 causal video autoencoder, evaluated on whole clips, written for training at small sizes.

Parameter names and shapes match the released checkpoint, so ComfyUI's own loader accepts the weights unchanged, and
results equal ComfyUI's chunked evaluation. It processes whole clips without caching or splitting, and so takes much
memory. Architecture: the Wan technical report (arXiv 2503.20314, section 4.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH_FACTORS = (1, 2, 4, 4)
LATENT_CHANNELS = 16
RESIDUAL_BLOCKS = 2
TEMPORAL = (False, True, True)
"""Which of the three downsampling steps also halve time, starting from the pixels."""


class CausalConv3d(nn.Conv3d):
    """Convolution that zero-pads time only at the start."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int], time_stride: int = 1):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(inputs, outputs, kernel, stride=(time_stride, 1, 1), padding=padding)
        # A strided temporal convolution starts at a real frame instead (see Downsample).
        self.past = 0 if time_stride > 1 else kernel[0] - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.past, 0)) if self.past else x)


class ChannelNorm(nn.Module):
    """Unit length over channels times sqrt(channels) times a learned gain."""

    def __init__(self, width: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * axes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        length = y.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        return (y / length * (self.gamma.shape[0] ** 0.5 * self.gamma)).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(inputs),
            nn.SiLU(),
            CausalConv3d(inputs, outputs, 3),
            ChannelNorm(outputs),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(outputs, outputs, 3),
        )
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.residual(x)


class FrameAttention(nn.Module):
    """Single-head attention within each frame.

    `enabled = False` skips it, which is exact while `proj` is zero. The demo model leaves it disabled, because an
    attention trained on crops would face sixteen times as many positions in a whole frame.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width, axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return x
        batch, _, frames, height, _ = x.shape
        flat = x.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(flat)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, (height, -1))
        return x + self.proj(out).unflatten(0, (batch, frames)).transpose(1, 2)


def _each_frame(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    batch, _, frames = x.shape[:3]
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve the sides and, if `temporal`, time: frame 0 is kept, then every two frames become one."""

    def __init__(self, width: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = CausalConv3d(width, width, (3, 1, 1), time_stride=2) if temporal else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _each_frame(self.resample, x)
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], 2)


class Upsample(nn.Module):
    """Double the sides and halve the channels; if `temporal`, first turn every frame but the first into two."""

    def __init__(self, width: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(width, width // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(width, 2 * width, (3, 1, 1)) if temporal else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.time_conv is not None and x.shape[2] > 1:
            # Frame 0 never enters the temporal convolution: its past is zero, not frame 0.
            doubled = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
            x = torch.cat([x[:, :, :1], doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
        return _each_frame(self.resample, x)


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width))


def _head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(width), nn.SiLU(), CausalConv3d(width, outputs, 3))


class Encoder(nn.Module):
    """Clips [B, 3, 1 + 4n, H, W] to moments [B, 32, 1 + n, H/8, W/8]."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = CausalConv3d(3, width, 3)
        layers: list[nn.Module] = []
        current = width
        for level, factor in enumerate(WIDTH_FACTORS):
            for _ in range(RESIDUAL_BLOCKS):
                layers.append(ResidualBlock(current, width * factor))
                current = width * factor
            if level < len(TEMPORAL):
                layers.append(Downsample(current, TEMPORAL[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(current)
        self.head = _head(current, 2 * LATENT_CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    """Latents [B, 16, 1 + n, h, w] to clips [B, 3, 1 + 4n, 8h, 8w]."""

    def __init__(self, width: int):
        super().__init__()
        current = width * WIDTH_FACTORS[-1]
        self.conv1 = CausalConv3d(LATENT_CHANNELS, current, 3)
        self.middle = _middle(current)
        layers: list[nn.Module] = []
        for level, factor in enumerate(reversed(WIDTH_FACTORS)):
            for _ in range(RESIDUAL_BLOCKS + 1):
                layers.append(ResidualBlock(current, width * factor))
                current = width * factor
            if level < len(TEMPORAL):
                layers.append(Upsample(current, tuple(reversed(TEMPORAL))[level]))
                current //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(current, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x))))


class WanAutoencoder(nn.Module):
    """Autoencoder with `width` channels at full resolution (96 in the released model)."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.encoder = Encoder(width)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(width)

    @torch.no_grad()
    def disable_attention(self) -> None:
        """Zero and freeze the two frame attentions, and skip them."""
        for module in self.modules():
            if isinstance(module, FrameAttention):
                module.proj.weight.zero_()
                module.proj.bias.zero_()
                module.requires_grad_(False)
                module.enabled = False

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """Mean latents [B, 16, 1 + n, H/8, W/8] of clips [B, 3, 1 + 4n, H, W] in -1..1."""
        return self.conv1(self.encoder(clip))[:, :LATENT_CHANNELS]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Clips [B, 3, 1 + 4n, 8h, 8w], about -1..1 and not clamped, of latents [B, 16, 1 + n, h, w]."""
        return self.decoder(self.conv2(latents))

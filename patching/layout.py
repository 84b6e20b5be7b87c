"""Where the video tokens lie in the sequence that a model's self-attention sees.

It is derived from the input of the diffusion model and its patch size; nothing is read from attention calls. A reader
gets the model and the arguments of one of its calls. It returns the layout and the lengths of other sequences:
cross-attention calls may have those, and must not be taken for self-attention. What the Wan readers assume about
ComfyUI's models is the table "Wan variants" in docs/compatibility.md; tests/patching/test_wan_variants.py checks it row
by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..kernels.order import TokenLayout

CallReader = Callable[..., tuple[TokenLayout, tuple[int, ...]]]

_VACE_REFERENCE_FRAMES = 4
"""How many leading frames are checked for VACE references; its node adds one."""


def read_wan_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """Wan T2V, I2V and the variants that share their forward.

    A Fun reference is before the grid; frames concatenated in time (Phantom) and in-context references are after it.

    Args:
        x: [B, C, T, H, W]; context: [B, L, C].
        conds: the forward's other inputs, by ComfyUI's names: clip_fea [B, L, C], time_dim_concat [B, C, T, H, W],
            reference_latent [B, C, H, W] here and [B, C, T, H, W] elsewhere.
    """
    before = 0
    reference = conds.get("reference_latent")
    if reference is not None and getattr(network, "ref_conv", None) is not None:
        before = _whole_patches(network, (1, *reference.shape[-2:]))
    after = _concatenated(network, conds)
    after += sum(_patches(network, latent.shape) for latent in conds.get("context_latents") or ())
    return TokenLayout(_grid(x.shape[2:], network.patch_size), before, after), _contexts(context, conds)


def read_vace_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """VACE: reference images are the first frames of the latent. Its node leaves everything but the image itself blank:
    nothing reactive (channels 16 to 31 of vace_context [B, n, 96, T, H, W]) and no mask (the 64 after them)."""
    grid = _grid(x.shape[2:], network.patch_size)
    control = conds["vace_context"]
    blank = (control[:, :, 16:, :_VACE_REFERENCE_FRAMES] == 0).all(dim=(2, 4, 5)).any(dim=1).all(dim=0)
    frames = int(blank.to(torch.int32).cumprod(0).sum()) if control.shape[3] == grid[0] else 0
    return _leading_frames(grid, frames, _concatenated(network, conds)), _contexts(context, conds)


def read_animate_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """Animate: the first frame of the latent is the reference (the pose is added from the second on)."""
    layout = _leading_frames(_grid(x.shape[2:], network.patch_size), 1, _concatenated(network, conds))
    return layout, _contexts(context, conds)


def read_humo_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """HuMo: reference frames, reference_latent [B, C, T, H, W], after the grid."""
    after = _concatenated(network, conds) + _reference(network, conds)
    return TokenLayout(_grid(x.shape[2:], network.patch_size), after=after), _contexts(context, conds)


def read_s2v_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """S2V: after the grid come reference frames, then the motion frames before this clip, packed at three sizes."""
    after = _concatenated(network, conds) + _reference(network, conds)
    motion = conds.get("reference_motion")
    if motion is not None:
        packer = network.frame_packer
        projections = (packer.proj, packer.proj_2x, packer.proj_4x)
        for frames, projection in zip(packer.zip_frame_buckets, projections, strict=True):
            sizes = zip((frames, *motion.shape[-2:]), projection.kernel_size, strict=True)
            after += _product([size // patch for size, patch in sizes])
    return TokenLayout(_grid(x.shape[2:], network.patch_size), after=after), _contexts(context, conds)


def read_scail_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """SCAIL: reference frames before the grid, the pose video (half size) after it."""
    reference, pose = conds.get("reference_latent"), conds.get("pose_latents")
    before = 0 if reference is None else _patches(network, reference.shape)
    after = _concatenated(network, conds) + (0 if pose is None else _patches(network, pose.shape))
    return TokenLayout(_grid(x.shape[2:], network.patch_size), before, after), _contexts(context, conds)


def read_cogvideox_call(
    network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]
) -> tuple[TokenLayout, tuple[int, ...]]:
    """CogVideoX: x [B, C, T, H, W], context [B, L, C]; one joint attention per block, no cross-attention."""
    patch = (network.patch_size_t or 1, network.patch_size, network.patch_size)
    return cogvideox_layout(x.shape, patch, context.shape[1]), ()


def cogvideox_layout(latent_shape: Sequence[int], patch_size: Sequence[int], text_tokens: int) -> TokenLayout:
    """Layout of CogVideoX: the text (226 tokens, or a multiple if ComfyUI repeats a prompt), then the grid."""
    return TokenLayout(_grid(latent_shape[2:], patch_size), before=text_tokens)


def _contexts(context: torch.Tensor, conds: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths that Wan's cross-attention may have: the text, CLIP's image tokens, both together."""
    clip = conds.get("clip_fea")
    text = context.shape[1]
    return (text,) if clip is None else (text, clip.shape[-2], text + clip.shape[-2])


def _concatenated(network: Any, conds: Mapping[str, Any]) -> int:
    """Tokens of the frames that Wan concatenates in time after the latent."""
    concat = conds.get("time_dim_concat")
    return 0 if concat is None else _patches(network, concat.shape)


def _reference(network: Any, conds: Mapping[str, Any]) -> int:
    """Tokens of reference_latent [B, C, T, H, W] if the model does not pad it."""
    reference = conds.get("reference_latent")
    return 0 if reference is None else _whole_patches(network, reference.shape[-3:])


def _leading_frames(grid: tuple[int, int, int], frames: int, after: int) -> TokenLayout:
    """A grid whose first `frames` are references; at least one frame stays video."""
    frames = min(frames, grid[0] - 1)
    return TokenLayout((grid[0] - frames, *grid[1:]), frames * grid[1] * grid[2], after)


def _patches(network: Any, shape: Sequence[int]) -> int:
    return _product(_grid(shape[-3:], network.patch_size))


def _whole_patches(network: Any, sizes: Sequence[int]) -> int:
    return _product([size // patch for size, patch in zip(sizes, network.patch_size, strict=True)])


def _grid(sizes: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    time, height, width = (-(-size // patch) for size, patch in zip(sizes, patch_size, strict=True))
    return time, height, width


def _product(sizes: Sequence[int]) -> int:
    return sizes[0] * sizes[1] * sizes[2]

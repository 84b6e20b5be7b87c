"""Wan2.1 and Wan2.2 with their variants. Self-attention over the video grid and reference tokens beside it; the text is
in cross-attention.

What is assumed about ComfyUI's models is checked variant by variant in tests/patching/test_wan_variants.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...kernels.order import TokenLayout
from ..core import is_causal_wan, network_of
from ..layout import CallReader, ModelCall, count, grid_of
from ..support import Family, Support, Variant

# On the demo model topk 10/5/0/20 is 2 dB closer to dense than the budget mode of the per-size presets
# (docs/performance.md). `auto` takes it for every size until this is measured on real weights.
_PRESET = "module-default"
_VACE_REFERENCE_FRAMES = 4
"""How many leading frames are checked for VACE references; its node adds one."""


def _read_wan(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
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
    layout = TokenLayout(grid_of(x.shape[2:], network.patch_size), before, after)
    return ModelCall(layout, _contexts(context, conds))


def _read_vace(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    """VACE: reference images are the first frames of the latent. Its node leaves everything but the image itself blank:
    nothing reactive (channels 16 to 31 of vace_context [B, n, 96, T, H, W]) and no mask (the 64 after them)."""
    grid = grid_of(x.shape[2:], network.patch_size)
    control = conds["vace_context"]
    blank = (control[:, :, 16:, :_VACE_REFERENCE_FRAMES] == 0).all(dim=(2, 4, 5)).any(dim=1).all(dim=0)
    frames = int(blank.to(torch.int32).cumprod(0).sum()) if control.shape[3] == grid[0] else 0
    return ModelCall(_leading_frames(grid, frames, _concatenated(network, conds)), _contexts(context, conds))


def _read_animate(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    """Animate: the first frame of the latent is the reference (the pose is added from the second on)."""
    layout = _leading_frames(grid_of(x.shape[2:], network.patch_size), 1, _concatenated(network, conds))
    return ModelCall(layout, _contexts(context, conds))


def _read_humo(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    """HuMo: reference frames, reference_latent [B, C, T, H, W], after the grid."""
    after = _concatenated(network, conds) + _reference(network, conds)
    layout = TokenLayout(grid_of(x.shape[2:], network.patch_size), after=after)
    return ModelCall(layout, _contexts(context, conds))


def _read_s2v(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    """S2V: after the grid come reference frames, then the motion frames before this clip, packed at three sizes."""
    after = _concatenated(network, conds) + _reference(network, conds)
    motion = conds.get("reference_motion")
    if motion is not None:
        packer = network.frame_packer
        projections = (packer.proj, packer.proj_2x, packer.proj_4x)
        for frames, projection in zip(packer.zip_frame_buckets, projections, strict=True):
            sizes = zip((frames, *motion.shape[-2:]), projection.kernel_size, strict=True)
            after += count([size // patch for size, patch in sizes])
    layout = TokenLayout(grid_of(x.shape[2:], network.patch_size), after=after)
    return ModelCall(layout, _contexts(context, conds))


def _read_scail(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    """SCAIL: reference frames before the grid, the pose video (half size) after it."""
    reference, pose = conds.get("reference_latent"), conds.get("pose_latents")
    before = 0 if reference is None else _patches(network, reference.shape)
    after = _concatenated(network, conds) + (0 if pose is None else _patches(network, pose.shape))
    layout = TokenLayout(grid_of(x.shape[2:], network.patch_size), before, after)
    return ModelCall(layout, _contexts(context, conds))


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
    return count(grid_of(shape[-3:], network.patch_size))


def _whole_patches(network: Any, sizes: Sequence[int]) -> int:
    return count([size // patch for size, patch in zip(sizes, network.patch_size, strict=True)])


_READERS: dict[str, CallReader] = {
    "t2v": _read_wan,
    "i2v": _read_wan,
    "camera": _read_wan,
    "camera_2.2": _read_wan,
    "wandancer": _read_wan,
    "vace": _read_vace,
    "animate": _read_animate,
    "humo": _read_humo,
    "s2v": _read_s2v,
    "scail": _read_scail,
    "scail2": _read_scail,
}
"""By ComfyUI's name of the variant. First-last frame, Fun, Phantom and in-context references are t2v or i2v."""


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    if is_causal_wan(model):
        return "this Wan model is autoregressive: it samples frame by frame with a cache, which PSA does not support"
    variant = config.get("model_type")
    if variant == "animate2":
        return (
            "this Wan model is Animate 2: each frame has attention of its own, over the video and a frame of the pose "
            "video, which PSA does not support"
        )
    if variant not in _READERS:
        return f"PSA supports the Wan variants {', '.join(_READERS)} so far; this one is {variant}"
    name = f"Wan {variant}, hidden size {config.get('dim')}"
    return Support(name, len(network_of(model).blocks), _READERS[variant], _PRESET)


FAMILY = Family(
    "Wan2.1 and Wan2.2",
    ("wan2.1",),
    _support,
    (
        Variant("T2V 2.1, A14B 2.2 (both experts)"),
        Variant("T2V / I2V 5B 2.2"),
        Variant("I2V 2.1, A14B 2.2 (both experts)"),
        Variant("First-last frame"),
        Variant("Fun Control and InP, with reference", before="reference"),
        Variant("Fun Control and InP, without reference"),
        Variant("VACE"),
        Variant("VACE with reference image", before="its frames, the latent's first", grid="(T - n) x H x W"),
        Variant("Camera 2.1 and 2.2"),
        Variant("Animate", before="reference, the latent's first frame", grid="(T - 1) x H x W"),
        Variant("S2V", after="reference, packed motion frames"),
        Variant("HuMo", after="reference"),
        Variant("In-context references", after="references"),
        Variant("Phantom", after="reference frames"),
        Variant("SCAIL, SCAIL-2", before="references", after="pose video, a quarter of the grid"),
        Variant("WanDancer"),
        Variant(
            "Autoregressive (causal) Wan",
            before="",
            grid="",
            after="",
            psa="dense: samples with a cache, frame by frame",
        ),
        Variant("Animate 2", before="", grid="", after="", psa="dense: each frame attends for itself"),
    ),
)

"""ComfyUI's own Wan nodes make the conditioning, so that what PSA reads from it is what those nodes put there."""

import pytest
import torch

from comfyui_psa.patching.patch import KEY, patch_model
from comfyui_psa.sampling import self_attention

PATCH = {"sparsity": 0.5, "preset": "auto", "mode": "topk", "min_tokens": 0, "start_percent": 0.0, "end_percent": 1.0}
SIZE = {"width": 256, "height": 256, "length": 9, "batch_size": 1}


class Encoder:
    """In place of a Wan VAE: random latents of the right size."""

    def encode(self, pixels):
        frames, height, width = pixels.shape[0], pixels.shape[1], pixels.shape[2]
        generator = torch.Generator().manual_seed(frames)
        return torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)


@pytest.fixture
def layouts(monkeypatch):
    """The layouts (before, grid, after) that PSA took."""
    seen = set()
    real = self_attention.pyramid_sparse_attention

    def attention(*args, layout, **kwargs):
        seen.add((layout.before, layout.grid, layout.after))
        return real(*args, layout=layout, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    return seen


def sample(tiny_wan, kind, positive, negative, latent):
    psa = patch_model(tiny_wan.load(kind), **PATCH)
    size = tuple(latent["samples"].shape)
    out = tiny_wan.sample(psa, size=size, cfg=3.0, positive=positive, negative=negative)
    assert torch.isfinite(out).all()
    assert psa.get_attachment(KEY).report["fallbacks"] == []


def image(frames=1, seed=0):
    return torch.rand(frames, 256, 256, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_vace(tiny_wan, layouts, reference, masked):
    from comfy_extras.nodes_wan import WanVaceToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    # A mask of zeros keeps the whole control video: its frames have no mask, and are no references.
    mask = torch.zeros(9, 256, 256) if masked else None
    positive, negative, latent, trim = WanVaceToVideo.execute(
        *conds, Encoder(), **SIZE, strength=1.0, control_video=image(9), control_masks=mask,
        reference_image=image(seed=1) if reference else None,
    ).result  # fmt: skip
    assert trim == int(reference)
    sample(tiny_wan, "vace", positive, negative, latent)
    assert layouts == {(256 * trim, (3, 16, 16), 0)}


def test_phantom(tiny_wan, layouts):
    from comfy_extras.nodes_wan import WanPhantomSubjectToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    positive, negative, _, latent = WanPhantomSubjectToVideo.execute(*conds, Encoder(), **SIZE, images=image(2)).result
    sample(tiny_wan, "t2v", positive, negative, latent)
    assert layouts == {(0, (3, 16, 16), 512)}


def test_animate(tiny_wan, layouts):
    from comfy_extras.nodes_wan import WanAnimateToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    positive, negative, latent, trim, *_ = WanAnimateToVideo.execute(
        *conds, Encoder(), **SIZE, continue_motion_max_frames=5, video_frame_offset=0, reference_image=image(),
        pose_video=image(9),
    ).result  # fmt: skip
    assert trim == 1
    sample(tiny_wan, "animate", positive, negative, latent)
    assert layouts == {(256, (3, 16, 16), 0)}


def test_s2v(tiny_wan, layouts):
    from comfy_extras.nodes_wan import WanSoundImageToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    s2v = WanSoundImageToVideo.execute(*conds, Encoder(), **SIZE, ref_image=image(), ref_motion=image(73)).result
    sample(tiny_wan, "s2v", *s2v)
    assert layouts == {(0, (3, 16, 16), 256 + 256 + 64 + 64)}

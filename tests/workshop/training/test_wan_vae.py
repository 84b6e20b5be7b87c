"""Our whole-clip autoencoder gives the numbers of ComfyUI's chunked one on random weights."""

from __future__ import annotations

import pytest
import torch

from comfyui_psa.workshop.training.wan_vae import WanAutoencoder


def _pair(width: int):
    from comfy.ldm.wan.vae import WanVAE

    generator = torch.Generator().manual_seed(3)
    ours = WanAutoencoder(width).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.2 / parameter[0].numel() ** 0.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)
        for name, parameter in ours.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(1.0, 0.2, generator=generator)
    theirs = WanVAE(dim=width, z_dim=16, temperal_downsample=[False, True, True]).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("frames", [1, 5, 13, 17])
def test_equals_comfyui(comfyui, frames):
    ours, theirs = _pair(4)
    generator = torch.Generator().manual_seed(frames)
    clip = torch.rand(2, 3, frames, 24, 16, generator=generator) * 2 - 1
    latents = torch.randn(2, 16, 1 + (frames - 1) // 4, 3, 2, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(ours.encode(clip), theirs.encode(clip), rtol=1e-4, atol=1e-4)
        decoded = ours.decode(latents)
        assert decoded.shape == clip.shape
        torch.testing.assert_close(decoded, theirs.decode(latents), rtol=1e-4, atol=1e-4)


def test_leaving_the_attention_out_is_exact():
    generator = torch.Generator().manual_seed(0)
    model = WanAutoencoder(4).eval()
    model.disable_attention()
    latents = torch.randn(1, 16, 2, 2, 2, generator=generator)
    with torch.inference_mode():
        without = model.decode(latents)
        model.decoder.middle[1].enabled = True
        torch.testing.assert_close(model.decode(latents), without, rtol=0, atol=0)

"""The frame in front of an odd number for 1.5: nobody outside a sampling run sees it. Results: tests/parity."""

from types import SimpleNamespace

import pytest
import torch

from comfyui_psa.cogvideox.frames import pad_odd_frames
from comfyui_psa.cogvideox.variant import find_variant

T2V = find_variant({"num_attention_heads": 48, "patch_size_t": 2})
I2V = find_variant({"num_attention_heads": 48, "patch_size_t": 2, "in_channels": 32})


class Run:
    """In place of a sampling run: remembers what came in, calls back once and returns its noise."""

    def __init__(self, conds=None):
        model = SimpleNamespace(latent_format=SimpleNamespace(scale_factor=0.7))
        self.class_obj = SimpleNamespace(conds=conds or {}, model_patcher=SimpleNamespace(model=model))

    def __call__(self, noise, latent, sampler, sigmas, mask, callback, disable, seed, **kwargs):
        self.noise, self.latent, self.mask, self.kwargs = noise, latent, mask, kwargs
        if callback is not None:
            callback(0, noise, latent, 4)
        return noise


def latents(frames, seed=0):
    return torch.randn(1, 16, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_an_odd_number_is_even_inside_and_odd_outside():
    run, noise, latent, mask, seen = Run(), latents(5), latents(5, 1), latents(5, 2), []
    out = pad_odd_frames(
        run, T2V, noise, latent, None, None, mask, lambda *call: seen.append(call), seed=7, latent_shapes=[noise.shape]
    )
    assert torch.equal(out, noise)
    assert torch.equal(run.noise[:, :, 1:], noise)
    assert torch.equal(run.latent, torch.cat([latent[:, :, :1], latent], 2))
    assert torch.equal(run.mask[:, :, 1:], mask)
    assert run.kwargs == {"latent_shapes": [(1, 16, 6, 4, 6)]}
    ((step, clean, x, steps),) = seen
    assert (step, steps) == (0, 4)
    assert torch.equal(clean, noise)
    assert torch.equal(x, latent)


def test_the_noise_in_front_depends_on_the_seed_alone_and_repeats_nothing():
    first, again, other = (Run() for _ in range(3))
    for run, seed in ((first, 7), (again, 7), (other, 8)):
        pad_odd_frames(run, T2V, latents(3, 7), latents(3), None, None, seed=seed)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    front = first.noise[:, :, 0]
    assert all(float((front - first.noise[:, :, frame]).abs().min(1).values.mean()) > 0.05 for frame in (1, 2, 3))


def test_a_latent_that_is_noisy_already_gets_no_noise_in_front():
    run = Run()
    pad_odd_frames(run, T2V, torch.zeros(1, 16, 3, 4, 6), latents(3), None, None, seed=7)
    assert not run.noise.any()


@pytest.mark.parametrize("noise", [latents(4), torch.zeros(1, 16, 4, 6)])
def test_an_even_number_and_single_pictures_pass_untouched(noise):
    run = Run()
    assert pad_odd_frames(run, T2V, noise, noise, None, None, seed=7) is noise
    assert run.noise is run.latent is noise


def test_the_start_image_of_1_5_comes_out_divided_by_the_latent_scale():
    image, noise = latents(1), latents(4)
    conds = {"positive": [{"concat_latent_image": image}], "negative": [{"cross_attn": None}]}
    run = Run(conds)
    pad_odd_frames(run, I2V, noise, noise, None, None, seed=7)
    (cond,) = run.class_obj.conds["positive"]
    # ComfyUI multiplies by the scale when it encodes the conditioning.
    torch.testing.assert_close(0.7 * cond["concat_latent_image"], image / 0.7)
    assert torch.equal(conds["positive"][0]["concat_latent_image"], image), "the user's conditioning stays"
    assert run.class_obj.conds["negative"] == [{"cross_attn": None}]

"""Position tables against those of diffusers' pipeline and of its patch embedding."""

from types import SimpleNamespace

import pytest
import torch

from comfyui_psa.cogvideox.positions import fitted_region, rotary_table, sincos_table


@pytest.mark.parametrize("size", [(60, 90), (12, 20), (20, 12), (96, 170), (30, 44), (2, 200), (62, 90)])
def test_rotary_positions_are_those_of_the_pipeline_at_every_size(size):
    from diffusers import CogVideoXPipeline

    config = SimpleNamespace(patch_size=2, patch_size_t=None, sample_width=90, sample_height=60, attention_head_dim=64)
    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    height, width = size
    prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
    expected = prepare(pipeline, 8 * height, 8 * width, 5, torch.device("cpu"))
    table = rotary_table((5, height // 2, width // 2), (30, 45))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(table, expected, strict=True))


def test_a_grid_of_the_training_size_takes_the_whole_region_and_others_keep_their_aspect():
    assert fitted_region((30, 45), (30, 45)) == ((0, 0), (30, 45))
    assert fitted_region((60, 90), (30, 45)) == ((0, 0), (30, 45))
    (top, left), (bottom, right) = fitted_region((45, 30), (30, 45))
    assert (top, bottom) == (0, 30)
    assert right - left == 20
    assert left == 12


@pytest.mark.parametrize("size", [(60, 90, 49), (12, 20, 13)])
def test_sincos_positions_are_those_of_the_patch_embedding(size):
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    height, width, frames = size
    embedding = CogVideoXPatchEmbed(embed_dim=48, text_embed_dim=8, use_learned_positional_embeddings=False)
    expected = embedding._get_positional_embeddings(height, width, frames)[0, 226:]
    table = sincos_table(((frames - 1) // 4 + 1, height // 2, width // 2), 48, 1.875, 1.0)
    assert torch.equal(table, expected)

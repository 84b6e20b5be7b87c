"""What follows from a model's sizes and from the config files of its folder."""

import pytest

from comfyui_psa.cogvideox.variant import find_variant

# The sizes of the released models, as ComfyUI reads them from the weights.
RELEASED = {
    "2B": ({"num_attention_heads": 30, "in_channels": 16}, ("1.0", False, False, 3.0, False)),
    "5B": ({"num_attention_heads": 48, "in_channels": 16}, ("1.0", True, False, 1.0, False)),
    "5B-I2V": (
        {"num_attention_heads": 48, "in_channels": 32, "use_learned_positional_embeddings": True},
        ("1.0", True, True, 1.0, False),
    ),
    "1.5-5B": ({"num_attention_heads": 48, "in_channels": 16, "patch_size_t": 2}, ("1.5", True, False, 1.0, False)),
    "1.5-5B-I2V": ({"num_attention_heads": 48, "in_channels": 32, "patch_size_t": 2}, ("1.5", True, False, 1.0, True)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_are_told_apart_by_their_sizes(name):
    config, expected = RELEASED[name]
    variant = find_variant(config)
    shift = variant.schedule["snr_shift_scale"]
    found = variant.version, variant.rotary, variant.learned_positions, shift, variant.inverted_image_scale
    assert found == expected


def test_config_files_go_before_the_rules():
    variant = find_variant(
        {"num_attention_heads": 1, "in_channels": 16},
        transformer={
            "use_rotary_positional_embeddings": False,
            "sample_height": 10,
            "spatial_interpolation_scale": 1.0,
        },
        scheduler={"snr_shift_scale": 2.0, "beta_end": 0.02, "timestep_spacing": "leading"},
        vae={"invert_scale_latents": True},
    )
    assert not variant.rotary
    assert (variant.sample_height, variant.sample_width, variant.spatial_scale) == (10, 90, 1.0)
    assert variant.schedule["snr_shift_scale"] == 2.0
    assert variant.schedule["beta_end"] == 0.02
    assert "timestep_spacing" not in variant.schedule
    assert variant.inverted_image_scale

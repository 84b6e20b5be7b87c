"""Our diffusion transformer gives ComfyUI's numbers on random weights."""

from __future__ import annotations

import pytest
import torch

from comfyui_psa.workshop.training.wan_dit import WanTransformer, rotary_table


def _random_model(seed: int) -> WanTransformer:
    generator = torch.Generator().manual_seed(seed)
    model = WanTransformer(width=256, hidden=384, layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.08, generator=generator)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def _comfy_model(model: WanTransformer) -> torch.nn.Module:
    import comfy.model_detection
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    state = model.state_dict()
    config = comfy.model_detection.detect_unet_config(state, "")
    assert config.pop("image_model") == "wan2.1"
    assert config["model_type"] == "t2v"
    theirs = WanModel(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@pytest.mark.parametrize("grid", [(3, 8, 6), (1, 4, 10)])
def test_equals_comfyui(comfyui, grid):
    ours = _random_model(1)
    theirs = _comfy_model(ours)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, *grid, generator=generator)
    context = torch.randn(2, 13, 4096, generator=generator)
    timestep = torch.tensor([17.0, 873.5])
    with torch.inference_mode():
        expected = theirs(x, timestep, context)
        got = ours(x, timestep, context)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_initial_model_predicts_zero_and_learns_everywhere():
    model = WanTransformer(width=128, hidden=128, layers=1)
    model.initialise(torch.Generator().manual_seed(0))
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    out = model(x, torch.tensor([500.0]), torch.ones(1, 3, 4096))
    assert out.abs().max() == 0
    out.sub(1.0).square().mean().backward()
    assert model.head.head.weight.grad.abs().sum() > 0


def test_spatial_step_covers_the_positions_of_the_full_grid():
    half, full = rotary_table((2, 3, 4), "cpu", spatial_step=2.0), rotary_table((2, 6, 8), "cpu")
    for a, b in zip(half, full, strict=True):
        torch.testing.assert_close(a.view(2, 3, 4, 64), b.view(2, 6, 8, 64)[:, ::2, ::2])

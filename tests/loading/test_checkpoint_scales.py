"""CogVideoX in 8-bit floats with scales: loaded with them, in whose names they ever are, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.checkpoint import load_checkpoint

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def weights(model_folders, tiny):
    """Those of a transformer, by diffusers' names, and by ComfyUI's."""
    tiny.write_folder(model_folders / "diffusers" / "scaled", "5b")
    (file,) = (model_folders / "diffusers" / "scaled" / "transformer").glob("*.safetensors")
    native = load_checkpoint("scaled").model.diffusion_model.state_dict()
    return {"diffusers": load_file(file), "native": {key: value.clone() for key, value in native.items()}}


def scaled(weights, ending):
    """The matrices of the blocks in 8 bits, each with a scale under this ending; and the layers that have one."""
    tensors, layers = dict(weights), []
    for name, value in weights.items():
        layer = name.removesuffix(".weight")
        if "blocks." in name and value.ndim == 2:
            scale = value.abs().max() / torch.finfo(FP8).max
            tensors |= {name: (value / scale).to(FP8), f"{layer}.{ending}": scale}
            layers.append(layer)
    return tensors, layers


def formats(layers):
    return {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}})}


def output(model, tiny):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    noise = torch.randn(1, 16, 4, 12, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.model.diffusion_model(noise, torch.tensor([500.0]), tiny.text())
    model.detach()
    return found


@pytest.mark.parametrize("names", ["native", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("mark", ["in the metadata", "as a tensor"])
def test_scales_count_under_any_names(weights, model_folders, tiny, names, prefix, mark):
    whole = {prefix + name: value for name, value in weights[names].items()}
    tensors, layers = scaled(whole, "weight_scale" if mark == "in the metadata" else "scale_weight")
    metadata = formats(layers) if mark == "in the metadata" else {}
    if mark == "as a tensor":
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=FP8)
    save_file(tensors, model_folders / "diffusion_models" / "scaled.safetensors", metadata)
    expected, found = (output(load_checkpoint(name), tiny) for name in ("scaled", "scaled.safetensors"))
    assert 0 < (found - expected).norm() / expected.norm() < 0.03  # without the scales it is more than 1


@pytest.mark.parametrize("ending", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("metadata", [None, formats([]), formats(["layers.0.of.others"])])
def test_scales_that_comfyui_would_not_use_are_refused(weights, model_folders, ending, metadata):
    tensors, _ = scaled(weights["diffusers"], ending)
    save_file(tensors, model_folders / "diffusion_models" / "unscaled.safetensors", metadata)
    with pytest.raises(InputError, match=r"does not use the scales of its weights.*Take a file in ComfyUI's own fp8"):
        load_checkpoint("unscaled.safetensors")

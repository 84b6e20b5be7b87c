"""LoRAs for the video families whose names ComfyUI knows: every weight is found in the names of every tool."""

import functools

import pytest
import torch

from comfyui_psa.loading.lora import patch_with_lora

KINDS = ["hunyuan", "hunyuan 1.5", "ltx 0.9", "kandinsky 5 lite", "cosmos", "mochi", "minimax h3"]
WRAPPERS = ["", "diffusion_model.", "transformer.", "base_model.model.", "pipe.dit.", "lora_unet_", "lora_transformer_",
            "lycoris_"]  # fmt: skip
OFFICIAL = (
    ("_mod.lin", "_mod.linear"), ("attn.qkv", "attn_qkv"), ("attn.proj", "attn_proj"), ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"), (".modulation.lin", ".modulation.linear"),
)  # fmt: skip
"""The ends of HunyuanVideo's names in ComfyUI and in its own repository, which trainers use."""


@pytest.fixture(scope="module")
def models(tiny_families):
    return functools.cache(tiny_families.load)


def official(name):
    return next((name.removesuffix(ours) + theirs for ours, theirs in OFFICIAL if name.endswith(ours)), name)


def as_it_is(name):
    return name


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(("kind", "named"), [("hunyuan", official), *((kind, as_it_is) for kind in KINDS)])
def test_every_layer_is_patched(models, kind, named, wrapper):
    model, tensors, products = models(kind), {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.model.diffusion_model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rows, columns = layer.weight.shape
            down, up = (torch.randn(size, generator=generator) for size in ((2, columns), (rows, 2)))
            written = wrapper + (named(name).replace(".", "_") if wrapper.endswith("_") else named(name))
            tensors |= {f"{written}.lora_down.weight": down, f"{written}.lora_up.weight": up}
            products[f"diffusion_model.{name}.weight"] = up @ down
    patched, summary = patch_with_lora(model, tensors, "x")
    assert summary == f"LoRA x: {len(products)} weights of the model patched, strength 1"
    for key in list(products)[:: len(products) // 3]:
        found = patched.patch_weight_to_device(key, return_weight=True)
        torch.testing.assert_close(found, model.model.state_dict()[key] + products[key], rtol=1e-4, atol=1e-4)

"""LoRAs for the video families whose names ComfyUI knows: every weight is found in the names of every tool."""

import dataclasses
import functools

import pytest
import torch

from comfyui_psa.choices.errors import InputError
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


WAN = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 128}
VARIANTS = {
    "t2v": ("WanTransformer3DModel", {}),
    "i2v": ("WanTransformer3DModel", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128}),
    "vace": ("WanVACETransformer3DModel", {"vace_layers": [0], "vace_in_channels": 96}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_of_diffusers_is_one_of_the_models(tiny_wan, variant):
    import diffusers

    from comfyui_psa.loading.lora_names import module_names, read_keys

    name, sizes = VARIANTS[variant]
    layers = {
        name: tuple(layer.weight.shape)
        for name, layer in getattr(diffusers, name)(**WAN, **sizes).named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv3d)
    }
    model = tiny_wan.load(variant)
    reading = read_keys([f"transformer.{name}.lora_A.weight" for name in layers], module_names(model))
    assert reading.unknown == []
    weights = model.model.state_dict()
    found = {key.module: tuple(weights[key.target].shape) for key in reading.keys.values()}
    assert len({key.target for key in reading.keys.values()}) == len(layers)
    assert found.keys() == layers.keys()
    assert {name: len(size) for name, size in found.items()} == {name: len(size) for name, size in layers.items()}


def patched_by(model, tensors, layers):
    patched, summary = patch_with_lora(model, tensors, "x")
    assert summary == f"LoRA x: {len(layers)} weights of the model patched, strength 1"
    return {
        name: patched.patch_weight_to_device(f"diffusion_model.{name}.weight", return_weight=True) for name in layers
    }


BY_HAND = {
    "single_blocks.{}.linear1": ("single_transformer_blocks.{}.", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    "txt_in.individual_token_refiner.blocks.{}.self_attn.qkv": (
        "context_embedder.token_refiner.refiner_blocks.{}.",
        ("attn.to_q", "attn.to_k", "attn.to_v"),
    ),
}
"""Layers that diffusers converts in the released size only, or wrongly (0.42.1 cuts the first matrix in three)."""


@pytest.mark.parametrize("kind", ["hunyuan", "hunyuan 1.5"])
def test_hunyuan_by_diffusers_is_hunyuan_by_its_own_names(models, kind):
    """diffusers itself makes the one out of the other."""
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

    model, generator = models(kind), torch.Generator().manual_seed(0)
    own, theirs, given, layers = {}, {}, {}, []
    for name, layer in model.model.diffusion_model.named_modules():
        if not (isinstance(layer, torch.nn.Linear) and name.startswith(("double", "single", "txt_in.individual"))):
            continue
        rows, columns = layer.weight.shape
        down, up = (torch.randn(size, generator=generator) for size in ((2, columns), (rows, 2)))
        written = official(name)
        tensors = {f"{written}.lora_A.weight": down, f"{written}.lora_B.weight": up}
        own |= tensors
        layers.append(name)
        number = next(part for part in name.split(".") if part.isdigit())
        place, parts = BY_HAND.get(name.replace(number, "{}", 1), ("", ()))
        given |= {} if parts else tensors
        sizes = [columns] * (len(parts) - 1) + [rows - columns * (len(parts) - 1)]
        for part, some in zip(parts, up.split(sizes) if parts else (), strict=True):
            written = f"transformer.{place.format(number)}{part}"
            theirs |= {f"{written}.lora_A.weight": down, f"{written}.lora_B.weight": some}
    theirs |= _convert_hunyuan_video_lora_to_diffusers(given)
    expected, found = patched_by(model, own, layers), patched_by(model, theirs, layers)
    for name in layers:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_parts_of_packed_weights_are_the_same_rows(models):
    """Four-bit weights have two numbers in a byte, and half as many columns."""
    from comfyui_psa.loading.fused_names import fused_names

    state = models("hunyuan").model.state_dict()
    sizes = {key.removeprefix("diffusion_model."): tuple(value.shape) for key, value in state.items()}
    packed = {name: (*size[:-1], size[-1] // 2) for name, size in sizes.items() if size}
    found = dict(fused_names("hunyuan_video", sizes))
    assert len(found) > 20
    assert dict(fused_names("hunyuan_video", packed)) == found


TWIN = [("double_blocks", "img_mod.lin", 19, 20), ("single_blocks", "modulation.lin", 38, 40)]
"""Where Flux has blocks as HunyuanVideo has them: a layer in them, and how many Flux and HunyuanVideo have."""


@pytest.fixture(scope="module")
def whole_hunyuan(tiny_families):
    """As many blocks as the real one has."""
    kind = tiny_families.KINDS["hunyuan"]
    sizes = kind.sizes | {"hidden_size": 64, "num_heads": 1, "axes_dim": [16, 24, 24], "depth": 20}
    whole = dataclasses.replace(kind, sizes=sizes | {"depth_single_blocks": 40})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_families.KINDS, "whole", whole)
        return tiny_families.load("whole")


def of_blocks(model, wrapper, numbers):
    weights, tensors = model.model.diffusion_model.state_dict(), {}
    for stack, layer, *_ in TWIN:
        for number in numbers.get(stack, ()):
            rows, columns = weights[f"{stack}.{number}.{layer}.weight"].shape
            name = wrapper + f"{stack}.{number}.{layer}".replace(".", "_" if wrapper.endswith("_") else ".")
            tensors |= {
                f"{name}.lora_down.weight": torch.ones(2, columns),
                f"{name}.lora_up.weight": torch.ones(rows, 2),
            }
    return tensors


@pytest.mark.parametrize("wrapper", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("stacks", [TWIN[:1], TWIN[1:], TWIN])
def test_a_flux_lora_is_told_from_one_for_hunyuan_video_by_its_blocks(whole_hunyuan, stacks, wrapper):
    flux = of_blocks(whole_hunyuan, wrapper, {stack: range(few) for stack, _, few, _ in stacks})
    with pytest.raises(InputError, match=r"for the blocks that Flux has, which are fewer.*Choose a LoRA that was made"):
        patch_with_lora(whole_hunyuan, flux, "x")
    ours = of_blocks(whole_hunyuan, wrapper, {stack: range(many) for stack, *_, many in stacks})
    assert f"{sum(many for *_, many in stacks)} weights" in patch_with_lora(whole_hunyuan, ours, "x")[1]
    some = of_blocks(whole_hunyuan, wrapper, {stack: range(few - 1) for stack, _, few, _ in stacks})
    assert "weights of the model patched" in patch_with_lora(whole_hunyuan, some, "x")[1]

"""LoRAs for another model are refused and recognised."""

import pytest

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import patch_with_lora

from .lora_tensors import DIM, KOHYA, changed, pair, random


@pytest.fixture(scope="module")
def vace(tiny_wan):
    return tiny_wan.load("vace")


# What the message says it is for, and a name as its trainers write it. Sizes are those of this Wan.
STRANGERS = {
    "SD, kohya": ("Stable Diffusion", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
    "SD, one block": ("Stable Diffusion", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
    "SD, diffusers": ("Stable Diffusion", "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
    "SDXL, original": ("Stable Diffusion", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
    "Flux, kohya": ("Flux", "lora_unet_single_blocks_0_linear1"),
    "Flux, diffusers": ("Flux", "transformer.single_transformer_blocks.0.attn.to_q"),
    "HunyuanVideo": ("HunyuanVideo", "lora_unet_double_blocks_0_img_attn_qkv"),
    "Qwen-Image": ("Qwen-Image", "transformer.transformer_blocks.0.img_mlp.net.2"),
    "Z-Image": ("Z-Image", "diffusion_model.layers.0.attention.to_q"),
    "CogVideoX": ("CogVideoX", "transformer.transformer_blocks.0.attn1.to_q"),
    "CogVideoX, kohya": ("CogVideoX", "lora_unet_transformer_blocks_0_attn1_to_q"),
    "CogVideoX, OneTrainer": ("CogVideoX", "lora_transformer_transformer_blocks_0_attn1_to_q"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_lora_for_another_model_is_refused_and_recognised(wan, stranger):
    words, name = STRANGERS[stranger]
    with pytest.raises(
        InputError, match=rf"none of its keys fits, .*; it looks like one for .*{words}.*\. Choose a LoRA"
    ):
        patch_with_lora(wan, pair(name), "x")


def test_a_lora_for_another_model_is_refused_although_a_layer_has_the_same_name_and_size(wan):
    tensors = pair("transformer.proj_out", rows=64)
    for block in range(4):
        tensors |= pair(f"transformer.single_transformer_blocks.{block}.attn.to_q")
    with pytest.raises(
        InputError, match=r"only 2 of 10 keys fit, the others do not, for example .*; it looks like one for Flux"
    ):
        patch_with_lora(wan, tensors, "x")


@pytest.mark.parametrize("wrapper", ["lora_unet_", "transformer.", "diffusion_model.", ""])
def test_blocks_of_another_variant_are_not_taken_for_the_models_own(wan, vace, wrapper):
    separator = "_" if wrapper.endswith("_") else "."
    names = [f"vace_blocks.0.{part}" for part in ("self_attn.q", "ffn.0")] + ["vace_patch_embedding"]
    tensors = {}
    for name in names[:2]:
        tensors |= pair(wrapper + name.replace(".", separator), **KOHYA)
    tensors[f"{wrapper}vace_patch_embedding.diff_b"] = random(DIM)
    with pytest.raises(InputError, match="none of its keys fits"):
        patch_with_lora(wan, tensors, "x")
    patched, _ = patch_with_lora(vace, tensors, "x")
    assert sorted(changed(vace, patched)) == [
        "vace_blocks.0.ffn.0.weight", "vace_blocks.0.self_attn.q.weight", "vace_patch_embedding.bias",
    ]  # fmt: skip


def test_a_whole_model_is_called_one(wan, tiny_wan):
    expected = r"none of its keys can be used here, .*; it is a Wan model\. Load it with Load Diffusion Model\.$"
    with pytest.raises(InputError, match=expected):
        patch_with_lora(wan, tiny_wan.state_dict("t2v"), "x")


@pytest.mark.parametrize("stranger", [name for name in STRANGERS if "CogVideoX" not in name])
def test_an_image_models_blocks_are_not_cogvideox_blocks(model_folders, tiny, stranger):
    from comfyui_psa.loading.checkpoint import load_checkpoint

    folder = model_folders / "diffusers" / "for strangers"
    if not folder.exists():
        tiny.write_folder(folder, "5b")
    words, name = STRANGERS[stranger]
    with pytest.raises(InputError, match=rf"none of its keys fits, .*; it looks like one for .*{words}"):
        patch_with_lora(load_checkpoint("for strangers"), pair(name, 64, 64), "x")

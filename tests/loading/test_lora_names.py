"""Names of every tool mean the same weights; of several LoRAs in a file one is used, and the others are named."""

import logging

import pytest
import torch

from comfyui_psa.loading.lora import patch_with_lora

from .lora_tensors import DIM, KOHYA, OUT, Q, changed, pair, product, random

DOTTED = {"down": "lora.down.weight", "up": "lora.up.weight"}
LINEAR = {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}
NAMES = {
    "DiffSynth": (f"pipe.dit.{Q}", {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}),
    "DiffSynth bare": (Q, {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}),
    "old diffusers": ("transformer.base_model.model.blocks.0.attn1.to_q", DOTTED),
    "old diffusers, joined": ("unet.blocks.0.attn1.to_q", LINEAR),
    "unet": (f"unet.{Q}", {}),
    "model": (f"model.{Q}", KOHYA),
    "model.diffusion_model": (f"model.diffusion_model.{Q}", KOHYA),
    "lightx2v": (f"diffusion_model.{Q}", KOHYA),
    "SimpleTuner": ("transformer.blocks.0.attn1.to_q", {}),
    "musubi": ("lora_unet_blocks_0_self_attn_q", KOHYA),
    "kohya, of an expert": ("lora_high_noise_model_blocks_0_self_attn_q", KOHYA),
    "Wan Fun": ("lora_unet__blocks_0_self_attn_q", KOHYA),
    "LyCORIS": ("lycoris_blocks_0_attn1_to_q", KOHYA),
    "compiled": (f"_orig_mod.{Q}", {}),
    "compiled blocks": ("transformer.blocks.0._orig_mod.attn1.to_q", {}),
    "compiled blocks, kohya": ("lora_unet_blocks_0__orig_mod_self_attn_q", KOHYA),
    "compiled, kohya": ("lora_unet__orig_mod_blocks_0_self_attn_q", KOHYA),
    "sharded": ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q", {}),
    "distributed": (f"module.{Q}", {}),
    "somebody's": (f"trainer.ema.net.{Q}", {"down": "lora_A.my-adapter.weight", "up": "lora_B.my-adapter.weight"}),
    "of parameters": (f"base_model.model.{Q}", {"down": "lora_A", "up": "lora_B"}),
}  # fmt: skip


@pytest.mark.parametrize("tool", NAMES)
def test_names_of_every_tool_mean_the_same_weight(wan, tool):
    name, pair_names = NAMES[tool]
    tensors = pair(name, **pair_names)
    patched, summary = patch_with_lora(wan, tensors, "x")
    assert summary == "LoRA x: 1 weights of the model patched, strength 1"
    ((weight, change),) = changed(wan, patched).items()
    assert weight == f"{Q}.weight"
    torch.testing.assert_close(change, product(tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "transformer_2.blocks.0.attn1.to_q",
        f"pipe.dit2.{Q}",
        f"low_noise_model.{Q}",
        f"unet2.{Q}",
        "lora_low_noise_model_blocks_0_self_attn_q",
    ],
)
def test_a_lora_of_the_second_expert_is_applied_and_says_so(wan, name):
    patched, summary = patch_with_lora(wan, pair(name), "x")
    assert summary.startswith("LoRA x: 1 weights of the model patched, strength 1; by its names (")
    assert summary.endswith("it is for the low-noise expert of Wan 2.2: wire it to that model")
    assert list(changed(wan, patched)) == [f"{Q}.weight"]


def test_of_a_file_for_both_experts_the_first_is_used_and_the_second_is_named(wan, caplog):
    first, second = pair("transformer.blocks.0.attn1.to_q"), pair("transformer_2.blocks.0.attn1.to_q", seed=5)
    with caplog.at_level(logging.INFO):
        patched, summary = patch_with_lora(wan, second | first, "x")
    assert "; 2 of 4 keys are for the low-noise expert and were left out" in summary
    torch.testing.assert_close(changed(wan, patched)[f"{Q}.weight"], product(first), rtol=1e-4, atol=1e-4)
    assert [record.levelno for record in caplog.records if "LoRA x" in record.message] == [logging.WARNING]


def test_of_two_adapters_in_a_file_the_larger_is_used_and_the_other_is_named(wan):
    names = {"down": "lora_A.student.weight", "up": "lora_B.student.weight"}
    student = pair(Q, **names) | pair(OUT, **names)
    critic = pair(Q, down="lora_A.critic.weight", up="lora_B.critic.weight", seed=3)
    patched, summary = patch_with_lora(wan, critic | student, "x")
    assert "2 weights of the model patched" in summary
    assert "; 2 of 6 keys were left out because they belong to another adapter" in summary
    change = changed(wan, patched)[f"{Q}.weight"]
    torch.testing.assert_close(change, product(pair(Q, **names)), rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_named_twice_is_patched_once(wan):
    twice = pair("transformer.blocks.0.attn1.to_q") | pair(f"transformer.{Q}", seed=4)
    patched, summary = patch_with_lora(wan, twice, "x")
    assert "1 weights of the model patched" in summary
    assert "; 2 of 4 keys were left out because the file has the same part of the weight under another name" in summary
    expected = product(pair("transformer.blocks.0.attn1.to_q"))
    torch.testing.assert_close(changed(wan, patched)[f"{Q}.weight"], expected, rtol=1e-4, atol=1e-4)


def test_a_product_and_a_difference_of_one_weight_are_both_applied(wan):
    tensors = pair(Q)
    patched, summary = patch_with_lora(wan, tensors | {f"{Q}.diff": random(DIM, DIM, seed=9)}, "x", 0.5)
    assert summary == "LoRA x: 1 weights of the model patched, strength 0.5"
    expected = 0.5 * (product(tensors) + random(DIM, DIM, seed=9))
    torch.testing.assert_close(changed(wan, patched)[f"{Q}.weight"], expected, rtol=1e-4, atol=1e-4)

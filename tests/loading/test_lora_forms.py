"""Every form of a LoRA: one of another size is refused or left out, and a part without use is named."""

import logging
import re

import pytest
import torch

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import patch_with_lora

from .lora_tensors import DIM, OUT, RANK, Q, changed, pair, random

WRONG = {
    "difference": {"patch_embedding.diff": random(DIM, 36, 1, 2, 2)},
    "whole weight": {"patch_embedding.set_weight": random(DIM, 36, 1, 2, 2)},
    "whole weight that would spread": {f"{Q}.set_weight": random(1, DIM)},
    "one number for all": {f"{Q}.set_weight": random(1)},
    "norm": {f"{Q}.w_norm": random(DIM)},
    "bias": {f"{Q}.diff_b": random(DIM + 1)},
    "product of as many numbers": pair(Q, DIM * 2, DIM // 2),
    "ranks that differ": {f"{Q}.lora_A.weight": random(3, DIM), f"{Q}.lora_B.weight": random(DIM, RANK)},
    "half": {f"{Q}.lora_B.weight": random(DIM, RANK)},
    "numbers alone": {f"{Q}.lora_A.weight": torch.tensor(0.1), f"{Q}.lora_B.weight": torch.tensor(0.1)},
    "loha": {f"{Q}.hada_{part}": random(*size) for part, size in {
        "w1_a": (DIM, 4), "w1_b": (4, DIM), "w2_a": (DIM, 4), "w2_b": (4, DIM + 8)}.items()},
    "loha of as many numbers": {f"{Q}.hada_{part}": random(*size) for part, size in {
        "w1_a": (DIM // 2, 4), "w1_b": (4, DIM * 2), "w2_a": (DIM // 2, 4), "w2_b": (4, DIM * 2)}.items()},
    "loha, half": {f"{Q}.hada_w1_a": random(DIM, 4), f"{Q}.hada_w1_b": random(4, DIM)},
    "lokr of as many numbers": {f"{Q}.lokr_w1": random(8, 2), f"{Q}.lokr_w2": random(DIM // 4, DIM // 4)},
    "lokr, half": {f"{Q}.lokr_w1": random(4, 4)},
    "lokr of a convolution": {f"patch_embedding.lokr_{part}": random(*size) for part, size in {
        "w1": (4, 4), "w2": (64, 4, 1, 2, 2)}.items()},
    "glora": {f"{Q}.{part}.weight": random(*size) for part, size in {
        "a1": (DIM, 4), "a2": (4, DIM), "b1": (DIM + 1, 4), "b2": (4, DIM)}.items()},
    "oft": {f"{Q}.oft_blocks": random(DIM // 8 + 1, 8, 8)},
    "boft": {f"{Q}.oft_blocks": random(2, DIM // 8 + 1, 8, 8), f"{Q}.alpha": torch.tensor(1.0)},
    "boft without its limit": {f"{Q}.oft_blocks": random(2, DIM // 8, 8, 8)},
    "dora": pair(Q) | {f"{Q}.dora_scale": random(DIM + 1, 1)},
    "dora that would spread": pair(Q) | {f"{Q}.dora_scale": random(DIM)},
    "dora of PEFT": pair(Q) | {f"{Q}.lora_magnitude_vector": random(DIM + 1)},
    "another size of the whole": pair(Q, 320, 320) | {f"{Q}.reshape_weight": torch.tensor([320, 320])},
    "convolution": {f"patch_embedding.lora_{part}.weight": random(*size) for part, size in {
        "down": (4, 36, 1, 2, 2), "up": (DIM, 4, 1, 1, 1)}.items()},
}  # fmt: skip


@pytest.mark.parametrize("form", WRONG)
def test_a_form_of_another_size_is_refused_in_our_own_words(wan, form, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(InputError) as refusal:
        patch_with_lora(wan, WRONG[form], "x")
    text = str(refusal.value)
    assert re.search(r"^PSA LoRA Loader, input lora_name: 'x.*a LoRA for this model \(wan2\.1\), which has 256", text)
    assert re.search(r"at (blocks\.0\.self_attn\.q|patch_embedding)\.(weight|bias)", text)
    assert text.endswith(". Choose a LoRA that was made for this size of wan2.1.")
    assert "Error" not in text
    assert caplog.text == "", "nothing of ComfyUI's trial reaches the log"


ADDED = ["difference", "whole weight", "norm", "bias"]


@pytest.mark.parametrize("form", ADDED)
def test_an_added_weight_of_another_size_is_left_out_and_named_when_others_fit(wan, form):
    patched, summary = patch_with_lora(wan, WRONG[form] | pair(OUT), "x")
    assert summary.startswith("LoRA x: 1 weights of the model patched, strength 1; 1 of 3 keys were left out for")
    assert re.search(
        r"left out for their size, for example \S+ \(\w+ [\dx]+; the model has [\dx]+ at [\w.]+\)$", summary
    )
    assert list(changed(wan, patched)) == [f"{OUT}.weight"]


def test_weights_that_are_packed_are_measured_by_their_layer(wan):
    packed = wan.clone()
    layer = packed.model.diffusion_model.blocks[0].self_attn.q
    whole = layer.weight
    try:
        layer.weight = torch.nn.Parameter(torch.zeros(DIM * DIM // 2, 1, dtype=torch.uint8), requires_grad=False)
        _, summary = patch_with_lora(packed, pair(Q), "x")
        assert summary == "LoRA x: 1 weights of the model patched, strength 1"
        with pytest.raises(
            InputError, match=r"made for 320x256'.*which has 256x256 at blocks\.0\.self_attn\.q\.weight"
        ):
            patch_with_lora(packed, pair(Q, 320), "x")
    finally:
        layer.weight = whole


@pytest.mark.parametrize(
    "stray",
    [
        {f"{OUT}.somebody_s_invention": random(3)},
        {f"{OUT}.rescale": random(DIM, 1)},
        {f"{OUT}.lora_magnitude_vector": random(DIM)} | {f"{OUT}.diff": random(DIM, DIM)},
        {f"{OUT}.alpha": torch.tensor(2.0)},
        {f"{OUT}.dora_scale": random(DIM, 1)},
        {f"{OUT}.b_norm": random(DIM)},
        {f"{OUT}.lora_A.bias": random(RANK)},
        {f"{OUT}.weight": random(DIM, DIM)},
        {f"{OUT}.norm_of_the_day.diff": random(DIM)},
        {"blocks.0.modulation.diff_b": random(DIM)},
        {f"{OUT}.oft_blocks": random(DIM // 8, 8, 8), f"{OUT}.rescale": random(DIM, 1)},
    ],
    ids=lambda stray: " ".join(key.removeprefix(f"{OUT}.") for key in stray),
)
def test_a_part_without_use_is_named(wan, stray):
    *_, unused = stray if "rescale" in list(stray)[-1] else reversed(stray)
    patched, summary = patch_with_lora(wan, pair(Q) | stray, "x")
    assert f"; 1 of {len(stray) + 2} keys " in summary
    assert summary.endswith(f"for example {unused}")
    assert f"{len(changed(wan, patched))} weights of the model patched" in summary


def test_a_magnitude_beside_a_dora_scale_is_named(wan):
    both = pair(Q) | {f"{Q}.dora_scale": random(DIM, 1), f"{Q}.lora_magnitude_vector": random(DIM)}
    patched, summary = patch_with_lora(wan, both, "x")
    assert "; 1 of 4 keys belong to weights of the model but were left out" in summary
    assert summary.endswith(f"{Q}.lora_magnitude_vector")
    assert list(changed(wan, patched)) == [f"{Q}.weight"]


def test_a_parameter_that_comfyui_never_patches_is_named(wan):
    modulation = {"diffusion_model.blocks.0.modulation.diff": random(1, 6, DIM)}
    patched, summary = patch_with_lora(wan, modulation | pair(f"diffusion_model.{Q}"), "x")
    assert (
        "LoRA x: 1 weights of the model patched, strength 1; 1 of 3 keys belong to weights of the model but" in summary
    )
    assert summary.endswith("for example diffusion_model.blocks.0.modulation.diff")
    assert list(changed(wan, patched)) == [f"{Q}.weight"]
    with pytest.raises(
        InputError, match=r"none of its keys can be used here, for example diffusion_model\.blocks\.0\.modulation"
    ):
        patch_with_lora(wan, modulation, "x")

"""LoRA files that fit the model and would change nothing: said, or refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import apply_lora

from .lora_tensors import DIM, OUT, RANK, Q, changed, pair, random

ZEROS = {
    "never trained": pair(Q) | {f"{Q}.lora_B.weight": torch.zeros(DIM, RANK)},
    "alpha of zero": pair(Q) | {f"{Q}.alpha": torch.zeros(())},
    "difference": {f"{Q}.diff": torch.zeros(DIM, DIM), f"{Q}.diff_b": torch.zeros(DIM)},
    "rotations by nothing": {f"{Q}.oft_blocks": torch.zeros(DIM // 8, 8, 8)},
}


@pytest.mark.parametrize("kind", ZEROS)
def test_a_file_that_adds_nothing_but_zeros_says_so(wan, model_folders, kind):
    save_file(ZEROS[kind], model_folders / "loras" / "zeros.safetensors")
    patched, summary = apply_lora(wan, "zeros.safetensors", 1.0)
    assert "zero everywhere, so nothing changes; choose a LoRA that has been trained" in summary
    assert not changed(wan, patched)


@pytest.mark.parametrize(
    "other",
    [
        pair(OUT),
        {f"{OUT}.lora_A.weight": random(RANK, DIM) * 1e-5, f"{OUT}.lora_B.weight": random(DIM, RANK) * 1e-5},
        {f"{OUT}.set_weight": torch.zeros(DIM, DIM)},
    ],
)
def test_one_weight_that_changes_is_enough(wan, model_folders, other):
    save_file(ZEROS["never trained"] | other, model_folders / "loras" / "some.safetensors")
    _, summary = apply_lora(wan, "some.safetensors", 1.0)
    assert "2 weights of the model patched" in summary
    assert "zero" not in summary


@pytest.mark.parametrize("kind", ["never trained", "alpha of zero", "rotations by nothing"])
def test_many_layers_of_one_kind_are_tried_once(wan, model_folders, monkeypatch, kind):
    """Of 400 layers of a large model it would take minutes."""
    import comfy.lora

    layers = {key.replace(Q, layer): value.clone() for layer in (Q, OUT) for key, value in ZEROS[kind].items()}
    save_file(layers, model_folders / "loras" / "zeros.safetensors")
    genuine, tried = comfy.lora.calculate_weight, []

    def calculate_weight(patches, weight, key):
        tried.extend([key] if weight.device.type == "cpu" else [])
        return genuine(patches, weight, key)

    monkeypatch.setattr(comfy.lora, "calculate_weight", calculate_weight)
    _, summary = apply_lora(wan, "zeros.safetensors", 1.0)
    assert "2 weights of the model patched" in summary
    assert "nothing changes" in summary
    assert len(tried) == 1


def test_a_rank_of_zero_is_refused(wan, model_folders):
    empty = {f"{Q}.lora_A.weight": torch.zeros(0, DIM), f"{Q}.lora_B.weight": torch.zeros(DIM, 0)}
    save_file(empty, model_folders / "loras" / "rank zero.safetensors")
    with pytest.raises(InputError, match=r"lora_down\.weight 0x\d+, lora_up\.weight \d+x0 that cannot be made"):
        apply_lora(wan, "rank zero.safetensors", 1.0)


@pytest.mark.parametrize("value", [7, {"a": "b"}, [1], True])
def test_metadata_that_is_no_text_is_what_is_wrong(wan, model_folders, value):
    header = {"__metadata__": {"rank": value, "format": "pt"}}
    header |= {f"{Q}.diff": {"dtype": "F32", "shape": [DIM, DIM], "data_offsets": [0, 4 * DIM * DIM]}}
    text = json.dumps(header).encode()
    path = model_folders / "loras" / "no text.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * DIM * DIM))
    with pytest.raises(InputError, match=r"its metadata must be text, and rank is not .*Save it again"):
        apply_lora(wan, path.name, 1.0)

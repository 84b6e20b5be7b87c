"""LoRA files as users have them: broken numbers, strengths, settings beside the weights, names of folders."""

import re

import pytest
import torch
from safetensors.torch import save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import apply_lora
from comfyui_psa.loading.menu import menu_name

from .lora_tensors import DIM, OUT, RANK, Q, changed, pair, product, random

BROKEN = {
    "NaN": pair(Q) | {f"{Q}.diff": torch.full((DIM, DIM), float("nan"))},
    "infinity": pair(Q) | {f"{Q}.lora_B.weight": torch.full((DIM, RANK), float("inf"))},
    "NaN in 16 bits": {f"{Q}.diff": torch.full((DIM, DIM), float("nan"), dtype=torch.bfloat16)},
    "NaN in 8 bits": {f"{Q}.diff": torch.full((DIM, DIM), float("nan")).to(torch.float8_e4m3fn)},
    "alpha": pair(Q) | {f"{Q}.alpha": torch.tensor(float("inf"))},
    "two alphas": pair(Q) | {f"{Q}.alpha": torch.tensor([1.0, 2.0])},
    "no alpha": pair(Q) | {f"{Q}.alpha": torch.zeros(0)},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_numbers_that_make_no_sense_are_refused_with_the_key(wan, model_folders, kind):
    save_file(BROKEN[kind], model_folders / "loras" / "broken numbers.safetensors")
    with pytest.raises(InputError, match=r"PSA LoRA Loader, input lora_name: .*blocks\.0\.self_attn\.q\.\w+"):
        apply_lora(wan, "broken numbers.safetensors", 1.0)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), 1e9, None, "much"])
def test_a_strength_that_is_no_number_is_refused(wan, model_folders, strength):
    save_file(pair(Q), model_folders / "loras" / "plain.safetensors")
    with pytest.raises(InputError, match=r"input strength: .* allowed: a number from -100 to 100"):
        apply_lora(wan, "plain.safetensors", strength)


@pytest.mark.parametrize("strength", [-1.0, 0.0, 20.0, -100.0])
def test_any_strength_multiplies(wan, model_folders, strength):
    save_file(pair(Q) | {f"{OUT}.set_weight": random(DIM, DIM)}, model_folders / "loras" / "plain.safetensors")
    patched, summary = apply_lora(wan, "plain.safetensors", strength)
    found = changed(wan, patched)
    if strength == 0:
        assert summary == "LoRA plain.safetensors: 2 weights fit; strength 0 leaves the model as it is"
        assert not found
    else:
        assert summary.endswith(f"strength {strength:g} (1 of them replaced as a whole, whatever the strength)")
        torch.testing.assert_close(found[f"{Q}.weight"], strength * product(pair(Q)), rtol=1e-4, atol=1e-3)


def test_the_summary_counts_the_keys_of_the_file_without_alphas_from_its_settings(wan, model_folders):
    tensors = pair(f"transformer.{Q}") | pair("text_encoder.layers.0.q")
    settings = '{"transformer.lora_alpha": 8.0, "transformer.r": 4}'
    save_file(tensors, model_folders / "loras" / "settings.safetensors", {"lora_adapter_metadata": settings})
    _, summary = apply_lora(wan, "settings.safetensors", 1.0)
    assert summary.endswith("; 2 of 4 keys match nothing in the model, for example "
                            "text_encoder.layers.0.q.lora_A.weight, "
                            "text_encoder.layers.0.q.lora_B.weight")  # fmt: skip


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "unet"])
def test_the_scale_in_the_settings_counts_for_every_part_of_a_pipeline(wan, model_folders, part):
    tensors = pair(f"{part}.{Q}")
    settings = f'{{"{part}.lora_alpha": 8.0, "text_encoder.lora_alpha": 99.0}}'
    save_file(tensors, model_folders / "loras" / "parts.safetensors", {"lora_adapter_metadata": settings})
    patched, _ = apply_lora(wan, "parts.safetensors", 1.0)
    torch.testing.assert_close(changed(wan, patched)[f"{Q}.weight"], 2 * product(tensors), rtol=1e-4, atol=1e-4)


def test_names_from_a_workflow_of_another_system_are_found(wan, model_folders):
    folder = model_folders / "loras" / "sub" / "deeper"
    folder.mkdir(parents=True)
    save_file(pair(Q), folder / "x.safetensors")
    _, summary = apply_lora(wan, "sub\\deeper\\x.safetensors", 1.0)
    assert "1 weights of the model patched" in summary
    for name in ("..\\x.safetensors", "sub\\deeper\\y.safetensors", "sub/deeper"):
        expected = (
            f"PSA LoRA Loader, input lora_name: {name!r} was given; allowed: a file that the menu lists. "
            "Press R to read the menu again, then choose from it."
        )
        with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
            apply_lora(wan, name, 1.0)


def test_a_name_is_looked_for_as_it_is_first():
    assert menu_name("a\\b", ["a/b", "a\\b"]) == "a\\b"
    assert menu_name("a/b", ["a\\b", "c"]) == "a\\b"
    assert menu_name("b", ["a/b"]) is None

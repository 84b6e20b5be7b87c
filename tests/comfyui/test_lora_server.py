"""PSA LoRA Loader on a real server: strengths, names that another system saved, files that cannot be used."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_psa.loading.safetensors_header import read_header
from comfyui_psa.workshop.tools.client import PromptFailed
from comfyui_psa.workshop.tools.paths import DEMO_WEIGHTS

MODULE = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def loras(server):
    """ComfyUI's folder for LoRAs, with one for the demo's model in `sub`."""
    header = read_header(DEMO_WEIGHTS / "diffusion_models" / "psa_demo_wan_dit.safetensors")
    ((_, (rows, columns)),) = [about for name, about in header.tensors.items() if name.endswith(f"{MODULE}.weight")]
    folder = server.home / "models" / "loras"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    tensors = {"lora_A.weight": torch.ones(2, columns), "lora_B.weight": torch.ones(rows, 2)}
    save_file({f"pipe.dit.{MODULE}.{part}": value for part, value in tensors.items()}, folder / "sub" / "x.safetensors")
    wide = {"lora_A.weight": torch.ones(2, columns + 8), "lora_B.weight": torch.ones(rows, 2)}
    save_file({f"{MODULE}.{part}": value for part, value in wide.items()}, folder / "sub" / "wide.safetensors")
    return folder


@pytest.fixture
def summary_of(client, loras):
    """summary_of(lora_name, strength) -> what the node says, from a prompt of the demo's model and the loader."""

    def run(name, strength):
        loader = {"unet_name": "psa_demo_wan_dit.safetensors", "weight_dtype": "default"}
        lora = {"model": ["1", 0], "lora_name": name, "strength": strength}
        prompt = {
            "1": {"class_type": "UNETLoader", "inputs": loader},
            "2": {"class_type": "PSALoraLoader", "inputs": lora},
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
        }
        for entry in prompt.values():
            entry["_meta"] = {"title": entry["class_type"]}
        return client.run(prompt).outputs["3"]["text"][0]

    return run


@pytest.mark.parametrize("strength", [-1, 0.5, 20, -100])
@pytest.mark.parametrize("name", ["sub/x.safetensors", "sub\\x.safetensors"])
def test_names_of_both_systems_and_every_strength_are_taken(summary_of, name, strength):
    assert summary_of(name, strength) == f"LoRA {name}: 1 weights of the model patched, strength {strength:g}"


def test_strength_0_is_none_of_it(summary_of):
    expected = "LoRA sub/x.safetensors: 1 weights fit; strength 0 leaves the model as it is"
    assert summary_of("sub/x.safetensors", 0) == expected


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 101, -1e9])
def test_a_strength_that_is_no_number_of_the_range_is_refused(summary_of, strength):
    with pytest.raises(PromptFailed, match=r"PSA LoRA Loader, input strength: .* allowed: -100 to 100"):
        summary_of("sub/x.safetensors", strength)


def test_a_file_for_another_size_is_refused_in_words(summary_of):
    with pytest.raises(
        PromptFailed, match=r"PSA LoRA Loader, input lora_name: 'sub.wide\.safetensors, made for .*which has"
    ):
        summary_of("sub/wide.safetensors", 1.0)

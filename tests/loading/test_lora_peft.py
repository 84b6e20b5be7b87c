"""Adapters that PEFT itself makes, saves and merges: the loader's weights are those of PEFT's merge."""

import json
import logging
import time

import peft
import pytest
import torch

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import apply_lora

MODULES = ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.2", "patch_embedding"]
RANK = 4


def weight(model, name):
    return model.model.state_dict()[f"diffusion_model.{name}"]


def twin(model):
    """A network of torch's own layers that has the model's names and weights at MODULES."""
    network = torch.nn.Module()
    for name in MODULES:
        *path, last = name.split(".")
        place = network
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        values = weight(model, f"{name}.weight")
        if values.ndim == 2:
            layer = torch.nn.Linear(values.shape[1], values.shape[0])
        else:
            layer = torch.nn.Conv3d(values.shape[1], values.shape[0], values.shape[2:], values.shape[2:])
        layer.weight.data, layer.bias.data = values.clone().float(), weight(model, f"{name}.bias").clone().float()
        place.add_module(last, layer)
    return network


def trained(model, folder, config, adapter="default"):
    """Save an adapter with random weights to `folder` as PEFT does; returns PEFT's merged weights by name."""
    tuned = peft.get_peft_model(twin(model), config, adapter_name=adapter)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if any(form in name for form in ("lora_", "hada_", "lokr_")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.3 * noise) if "magnitude" in name else 0.2 * noise
    tuned.save_pretrained(folder, selected_adapters=[adapter])
    merged = tuned.merge_and_unload()
    return {name: values for name, values in merged.state_dict().items() if name.endswith((".weight", ".bias"))}


def sampled_with(model, names):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    found = {name: weight(model, name).clone() for name in names}
    model.detach()
    return found


def lora(**more):
    return peft.LoraConfig(r=RANK, target_modules=MODULES, **more)


CONFIGS = {
    "lora": lambda: lora(lora_alpha=6),
    "rank-stabilised": lambda: lora(lora_alpha=6, use_rslora=True),
    "dora": lambda: lora(lora_alpha=6, use_dora=True),
    "bias of the second matrix": lambda: lora(lora_alpha=6, lora_bias=True),
    "alpha by module": lambda: lora(lora_alpha=6, alpha_pattern={"self_attn.q": 2, r"^blocks\.0\.ffn.2": 9}),
    "alpha by anchored part": lambda: lora(lora_alpha=6, alpha_pattern={"^ffn.2": 9, "^patch_embedding": 1, "q$": 3}),
    "loha": lambda: peft.LoHaConfig(r=RANK, alpha=6, target_modules=MODULES[:3]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=MODULES[:3], decompose_both=True),
    "lokr, one matrix whole": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=MODULES[:3]),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("adapter", ["default", "my-adapter"])
def test_weights_are_those_that_peft_merges(wan, model_folders, kind, adapter):
    folder = model_folders / "loras" / f"peft {kind} {adapter}"
    merged = trained(wan, folder, CONFIGS[kind](), adapter)
    inside = folder if adapter == "default" else folder / adapter
    name = (inside / "adapter_model.safetensors").relative_to(model_folders / "loras").as_posix()
    patched, summary = apply_lora(wan, name, 1.0)
    changed = {key for key, values in merged.items() if not torch.equal(values, weight(wan, key))}
    assert summary == f"LoRA {name}: {len(changed)} weights of the model patched, strength 1"
    assert len(changed) >= 3
    for key, found in sampled_with(patched, merged).items():
        torch.testing.assert_close(found, merged[key], rtol=1e-4, atol=1e-5)


def test_strength_leads_from_the_model_to_dora(wan, model_folders):
    folder = model_folders / "loras" / "dora"
    merged = trained(wan, folder, CONFIGS["dora"]())
    for strength in (-1.0, 0.0, 0.5, 20.0):
        patched, _ = apply_lora(wan, "dora/adapter_model.safetensors", strength)
        for key, found in sampled_with(patched, merged).items():
            expected = weight(wan, key) + strength * (merged[key] - weight(wan, key))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alpha_pattern": {r"(?:(?P<a>.+?)|(?P<b>..+?))+(?P=a)(?P=b).*[A-Z]": 1.0}}, "takes too long to match"),
        ({"alpha_pattern": {"(": 1.0}}, "is not a pattern"),
        ({"alpha_pattern": ["q"]}, "alpha_pattern must hold names and numbers"),
        ({"alpha_pattern": {"q": "much"}}, "q is 'much', not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
        ({"lora_alpha": 10**400}, "not a number"),
        ({"lora_alpha": [1, 2]}, r"lora_alpha is \[1, 2\], not a number"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_time(wan, model_folders, changes, expected):
    folder = model_folders / "loras" / "hostile"
    trained(wan, folder, CONFIGS["lora"]())
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes), encoding="utf-8")
    begin = time.process_time()
    with pytest.raises(InputError, match=f"PSA LoRA Loader, input lora_name: .*{expected}"):
        apply_lora(wan, "hostile/adapter_model.safetensors", 1.0)
    assert time.process_time() - begin < 60


@pytest.mark.parametrize("pattern", [r"(([a-z0-9_.])+.)+[A-Z]", r"(.*.*)*.*(.*.*)*[A-Z]{2}", r"([a-z0-9_.]+)+[A-Z]"])
def test_a_hostile_pattern_that_matches_nothing_costs_no_time(wan, model_folders, pattern):
    folder = model_folders / "loras" / "hostile"
    merged = trained(wan, folder, CONFIGS["lora"]())
    settings = folder / "adapter_config.json"
    hostile = json.loads(settings.read_text()) | {"alpha_pattern": {pattern: 99.0}}
    settings.write_text(json.dumps(hostile), encoding="utf-8")
    begin = time.process_time()
    patched, _ = apply_lora(wan, "hostile/adapter_model.safetensors", 1.0)
    assert time.process_time() - begin < 30
    for key, found in sampled_with(patched, merged).items():
        torch.testing.assert_close(found, merged[key], rtol=1e-4, atol=1e-5)


def test_settings_with_a_byte_order_mark_are_read(wan, model_folders):
    folder = model_folders / "loras" / "marked"
    merged = trained(wan, folder, CONFIGS["lora"]())
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text(), encoding="utf-8-sig")
    patched, _ = apply_lora(wan, "marked/adapter_model.safetensors", 1.0)
    for key, found in sampled_with(patched, merged).items():
        torch.testing.assert_close(found, merged[key], rtol=1e-4, atol=1e-5)


def test_whole_weights_that_peft_saved_beside_the_adapter_are_named(wan, model_folders, caplog):
    folder = model_folders / "loras" / "saved whole"
    trained(wan, folder, peft.LoraConfig(r=RANK, target_modules=MODULES[:2], modules_to_save=["patch_embedding"]))
    with caplog.at_level(logging.WARNING):
        _, summary = apply_lora(wan, "saved whole/adapter_model.safetensors", 1.0)
    assert "2 weights of the model patched" in summary
    assert "2 of 6 keys belong to weights of the model but were left out" in summary
    assert "patch_embedding.bias, base_model.model.patch_embedding.weight" in summary
    assert summary in caplog.text

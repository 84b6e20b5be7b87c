"""LoRAs under the names of every tool, for CogVideoX and Wan: what is patched, how strongly, and what is an error."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import apply_lora, patch_with_lora, with_alphas
from comfyui_psa.loading.names import COGVIDEOX, WAN, to_diffusers, to_native

RANK = 3


@pytest.fixture(scope="module")
def cogvideox(model_folders, tiny):
    from comfyui_psa.loading.checkpoint import load_checkpoint

    tiny.write_folder(model_folders / "diffusers" / "for loras", "5b")
    return load_checkpoint("for loras")


@pytest.fixture(scope="module")
def wan(comfyui):
    """Wan T2V, one layer, one head of 128, random weights."""
    import comfy.ldm.wan.model
    import comfy.ops
    import comfy.sd

    blank = comfy.ldm.wan.model.WanModel(
        dim=128, ffn_dim=128, num_heads=1, num_layers=1, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in blank.state_dict().items()}
    return comfy.sd.load_diffusion_model_state_dict(state)


@pytest.fixture
def model(request, cogvideox, wan):
    return {"cogvideox": cogvideox, "wan": wan}[request.param]


# Native module, and the diffusers name of the same one.
MODULES = {
    "cogvideox": {
        "blocks.1.q": "transformer_blocks.1.attn1.to_q",
        "blocks.0.attn_out": "transformer_blocks.0.attn1.to_out.0",
        "blocks.0.ff_proj": "transformer_blocks.0.ff.net.0.proj",
        "time_embedding_linear_2": "time_embedding.linear_2",
        "patch_embed.text_proj": "patch_embed.text_proj",
    },
    "wan": {
        "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
        "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
        "blocks.0.ffn.2": "blocks.0.ffn.net.2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    },
}
PAIRS = {"peft": ("lora_A.weight", "lora_B.weight"), "named": ("lora_A.psa.weight", "lora_B.psa.weight")}
PAIRS |= {"kohya": ("lora_down.weight", "lora_up.weight")}
# Style: (prefix, whose names, dots or underscores, names of the two matrices).
STYLES = {
    "diffusers": ("transformer.", "diffusers", ".", "peft"),
    "diffusers bare": ("", "diffusers", ".", "peft"),
    "peft": ("base_model.model.", "diffusers", ".", "peft"),
    "peft with an adapter name": ("base_model.model.", "diffusers", ".", "named"),
    "kohya": ("lora_unet_", "native", "_", "kohya"),
    "kohya of diffusers names": ("lora_unet_", "diffusers", "_", "kohya"),
    "musubi and onetrainer": ("lora_transformer_", "diffusers", "_", "kohya"),
    "lightx2v": ("diffusion_model.", "native", ".", "kohya"),
    "native": ("diffusion_model.", "native", ".", "peft"),
    "native bare": ("", "native", ".", "peft"),
}


def weight(model, module):
    return model.model.state_dict()[f"diffusion_model.{module}.weight"]


def lora(model, family, style="diffusers", seed=0, alpha=None):
    """Tensors of a LoRA in a style, and {native module: B A}."""
    prefix, names, separator, pair = STYLES[style]
    down_name, up_name = PAIRS[pair]
    generator = torch.Generator().manual_seed(seed)
    tensors, products = {}, {}
    for native, diffusers in MODULES[family].items():
        rows, columns = weight(model, native).shape
        down, up = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
        name = prefix + (native if names == "native" else diffusers).replace(".", separator)
        tensors |= {f"{name}.{down_name}": down, f"{name}.{up_name}": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        products[native] = up @ down
    return tensors, products


def patched_weights(model, modules):
    """The weights with which ComfyUI would sample, one by one: loads the model, copies, and unloads it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    found = {module: weight(model, module).clone() for module in modules}
    model.detach()
    return found


def both(test):
    return pytest.mark.parametrize(("model", "family"), [(f, f) for f in MODULES], indirect=["model"], ids=MODULES)(
        test
    )


@both
@pytest.mark.parametrize("style", STYLES)
def test_every_style_patches_the_same_weights(model, family, style):
    tensors, products = lora(model, family, style)
    before = {module: weight(model, module).clone() for module in products}
    patched, summary = patch_with_lora(model, with_alphas(tensors, {}), "x.safetensors", 0.5)
    assert summary == f"LoRA x.safetensors: {len(products)} weights of the model patched, strength 0.5"
    for module, found in patched_weights(patched, products).items():
        torch.testing.assert_close(found, before[module] + 0.5 * products[module], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(weight(model, module), before[module]) for module in products), "unloading restores all bits"


@both
@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"r": RANK, "lora_alpha": 12}, 12 / RANK),
        ({"r": 99, "lora_alpha": 12}, 12 / RANK),
        ({"r": RANK, "lora_alpha": 12, "use_rslora": True}, 12 / RANK**0.5),
    ],
)
def test_the_scale_comes_from_the_metadata(model, family, config, scale):
    tensors, products = lora(model, family)
    before = {module: weight(model, module).clone() for module in products}
    patched, _ = patch_with_lora(model, with_alphas(tensors, config), "x")
    for module, found in patched_weights(patched, products).items():
        torch.testing.assert_close(found, before[module] + scale * products[module], rtol=1e-4, atol=1e-4)


def test_alpha_tensors_go_before_the_metadata_and_patterns_before_its_default(cogvideox):
    tensors, products = lora(cogvideox, "cogvideox")
    tensors["transformer.transformer_blocks.1.attn1.to_q.alpha"] = torch.tensor(6.0)
    config = {"lora_alpha": 3.0, "alpha_pattern": {r"ff\.net\.0\.proj": 9.0, "not_there": 1.0}}
    before = {module: weight(cogvideox, module).clone() for module in products}
    patched, _ = patch_with_lora(cogvideox, with_alphas(tensors, config), "x")
    scales = dict.fromkeys(products, 1.0) | {"blocks.1.q": 2.0, "blocks.0.ff_proj": 3.0}
    for module, found in patched_weights(patched, products).items():
        torch.testing.assert_close(found, before[module] + scales[module] * products[module], rtol=1e-4, atol=1e-4)


def test_metadata_and_peft_config_are_read_from_the_file(cogvideox, model_folders):
    tensors, products = lora(cogvideox, "cogvideox")
    folder = model_folders / "loras" / "from tools"
    folder.mkdir()
    settings = json.dumps({"transformer.lora_alpha": 6.0, "transformer.r": RANK})
    save_file(tensors, folder / "diffusers.safetensors", {"format": "pt", "lora_adapter_metadata": settings})
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6.0, "r": RANK}), encoding="utf-8")
    save_file(tensors, folder / "broken.safetensors", {"lora_adapter_metadata": "{"})
    before = weight(cogvideox, "blocks.1.q").clone()
    for name in ("diffusers", "adapter_model"):
        patched, _ = apply_lora(cogvideox, f"from tools/{name}.safetensors", 1.0)
        (found,) = patched_weights(patched, ["blocks.1.q"]).values()
        torch.testing.assert_close(found, before + 2 * products["blocks.1.q"], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"lora_name: .*broken\.safetensors: its LoRA metadata cannot be read"):
        apply_lora(cogvideox, "from tools/broken.safetensors", 1.0)


def test_loras_stack_with_each_other_and_with_psa(cogvideox):
    from comfyui_psa.patching.patch import patch_model

    (first, one), (second, two) = lora(cogvideox, "cogvideox"), lora(cogvideox, "cogvideox", "kohya", seed=1)
    before = weight(cogvideox, "blocks.1.q").clone()
    psa = patch_model(cogvideox, sparsity=0.5, preset="auto", start_percent=0.0, end_percent=1.0)
    stacked, _ = patch_with_lora(patch_with_lora(psa, first, "first", 1.0)[0], second, "second", -2.0)
    (found,) = patched_weights(stacked, ["blocks.1.q"]).values()
    torch.testing.assert_close(found, before + one["blocks.1.q"] - 2 * two["blocks.1.q"], rtol=1e-4, atol=1e-4)
    assert stacked.get_attachment("psa") is not None


def test_keys_that_fit_nothing_are_counted_and_named(cogvideox, caplog):
    tensors, products = lora(cogvideox, "cogvideox")
    extra = {"text_encoder.layer.0.lora_A.weight": torch.zeros(1, 1), "transformer.lost.lora_B.weight": torch.zeros(1)}
    with caplog.at_level(logging.WARNING):
        _, summary = patch_with_lora(cogvideox, tensors | extra, "x")
    assert f"{len(products)} weights of the model patched" in summary
    assert (
        "2 of 12 keys match nothing in the model, for example text_encoder.layer.0.lora_A.weight, transformer.lost"
        in summary
    )
    assert summary in caplog.text


def test_a_lora_of_which_nothing_fits_is_an_error_with_examples(cogvideox, wan, model_folders):
    tensors, _ = lora(wan, "wan")
    save_file(tensors, model_folders / "loras" / "for wan.safetensors")
    expected = (
        "PSA LoRA Loader, input lora_name: 'for wan.safetensors' was given; allowed: a LoRA for this model "
        "(cogvideox); none of its keys fits, for example transformer.blocks.0.attn1.to_q.lora_A.weight"
    )
    with pytest.raises(InputError, match=re.escape(expected)):
        apply_lora(cogvideox, "for wan.safetensors", 1.0)


def test_a_lora_for_another_size_of_the_model_is_an_error(cogvideox):
    tensors, _ = lora(cogvideox, "cogvideox")
    key = "transformer.transformer_blocks.1.attn1.to_q.lora_A.weight"
    with pytest.raises(InputError, match=r"x, made for 64x80' was given; .* which has 64x64 at blocks\.1\.q\.weight"):
        patch_with_lora(cogvideox, tensors | {key: torch.zeros(RANK, 80)}, "x")


def test_a_name_that_the_menu_does_not_list_is_refused(cogvideox):
    with pytest.raises(InputError, match=r"PSA LoRA Loader, input lora_name: '\.\./x.safetensors' was given"):
        apply_lora(cogvideox, "../x.safetensors", 1.0)


@pytest.mark.parametrize("family", MODULES)
def test_names_translate_both_ways(family):
    table = {"cogvideox": COGVIDEOX, "wan": WAN}[family]
    for native, diffusers in MODULES[family].items():
        assert to_native(f"{diffusers}.weight", table) == f"{native}.weight"
        assert to_diffusers(native, table) == diffusers

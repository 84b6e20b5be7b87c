"""LoRA files as they are in the wild: names of every tool, files for another model, broken numbers, stray tensors."""

import logging
import re

import pytest
import torch
from safetensors.torch import save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import apply_lora, patch_with_lora
from comfyui_psa.loading.menu import menu_name

Q = "blocks.0.self_attn.q"
OUT = "blocks.1.cross_attn.o"
DIM, RANK = 256, 4


@pytest.fixture(scope="module")
def wan(tiny_wan):
    return tiny_wan.load("t2v")


@pytest.fixture(scope="module")
def vace(tiny_wan):
    return tiny_wan.load("vace")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def pair(name, rows=DIM, columns=DIM, down="lora_A.weight", up="lora_B.weight", seed=0):
    return {f"{name}.{down}": random(RANK, columns, seed=seed), f"{name}.{up}": random(rows, RANK, seed=seed + 1)}


def changed(before, after):
    """Names of the weights that ComfyUI samples with otherwise, and their changes."""
    import comfy.model_management

    old = {key: value.clone() for key, value in before.model.state_dict().items()}
    comfy.model_management.load_models_gpu([after])
    new = {key: value.clone() for key, value in after.model.state_dict().items()}
    after.detach()
    return {
        key.removeprefix("diffusion_model."): new[key] - old[key] for key in old if not torch.equal(new[key], old[key])
    }


def product(tensors):
    up, down = (next(value for key, value in tensors.items() if value.shape[0] == size) for size in (DIM, RANK))
    return up @ down


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
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
    "name", ["transformer_2.blocks.0.attn1.to_q", f"pipe.dit2.{Q}", f"low_noise_model.{Q}", f"unet2.{Q}"]
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


# What each of these is for, what its message says, and names as its trainers write them, sizes as this Wan has them.
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

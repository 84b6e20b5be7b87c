"""Files that went to the CogVideoX loader by mistake: names of real models, and the messages."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.checkpoint import check_checkpoint

# A few names of each kind of file, as their authors or ComfyUI's repackaged files have them.
FILES = {
    "an LTX-Video model. Load it with Load Diffusion Model": [
        ["patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias",
         "transformer_blocks.0.attn2.to_k.weight", "transformer_blocks.0.scale_shift_table"],
        ["model.diffusion_model.patchify_proj.weight", "model.diffusion_model.adaln_single.linear.weight",
         "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"],
        ["proj_in.weight", "scale_shift_table", "time_embed.emb.timestep_embedder.linear_1.weight",
         "transformer_blocks.0.attn1.to_q.weight"],
    ],
    "a Wan model. Load it with Load Diffusion Model": [
        ["head.modulation", "blocks.0.self_attn.q.weight", "patch_embedding.weight", "text_embedding.0.weight"],
        ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"],
    ],
    "a HunyuanVideo model. Load it with Load Diffusion Model": [
        ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn.qkv.weight"],
        ["context_embedder.token_refiner.refiner_blocks.0.norm1.weight", "transformer_blocks.0.attn.to_q.weight"],
    ],
    "a Flux model. Load it with Load Diffusion Model": [
        ["double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight", "img_in.weight"],
        ["single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.add_q_proj.weight"],
    ],
    "a Stable Diffusion model. Load it with Load Diffusion Model": [
        ["input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight", "output_blocks.0.0.in_layers.0.weight"],
        ["down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
    ],
    "a whole checkpoint (model, VAE and text encoder in one file). Load it with Load Checkpoint": [
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight",
         "cond_stage_model.transformer.text_model.embeddings.position_ids"],
        ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.weight"],
    ],
    "a VAE. Load it with Load VAE": [
        ["encoder.conv1.weight", "decoder.conv1.weight", "decoder.head.0.gamma"],
        ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"],
        ["decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"],
    ],
    "a CogVideoX VAE. Load it with Load VAE": [
        ["encoder.down_blocks.0.resnets.0.conv1.conv.weight", "decoder.up_blocks.0.resnets.0.conv1.conv.weight"],
    ],
    "a text encoder. Load it with Load CLIP": [
        ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
        ["text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"],
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
    ],
    "a LoRA. Load it with PSA LoRA Loader": [
        ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "transformer.x.lora_B.weight"],
        ["lora_unet_blocks_0_q.lora_down.weight", "lora_unet_blocks_0_q.lora_up.weight", "lora_unet_blocks_0_q.alpha"],
        ["diffusion_model.blocks.0.q.diff", "diffusion_model.blocks.0.q.diff_b"],
        ["lycoris_blocks_0_q.hada_w1_a", "lycoris_blocks_0_q.hada_w1_b", "lycoris_blocks_0_q.lokr_w1"],
    ],
    "a ControlNet. Load it with Load ControlNet Model": [["control_model.input_blocks.0.0.weight"]],
    "CogVideoX as its authors' own code saves it (SAT). Choose a CogVideoX transformer": [
        ["model.diffusion_model.mixins.patch_embed.proj.weight", "model.diffusion_model.transformer.layers.0.weight"],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("words", "names"), [(words, names) for words, rows in FILES.items() for names in rows])
def test_a_file_of_another_kind_is_named_with_its_loader(model_folders, words, names):
    path = model_folders / "diffusion_models" / "wrong.safetensors"
    save_file({name: torch.zeros(4, 4) for name in names}, path)
    with pytest.raises(InputError) as caught:
        check_checkpoint(path.name)
    assert f"allowed: a CogVideoX checkpoint; this one is {words}" in str(caught.value)
    path.unlink()


def test_a_model_that_comfyui_knows_by_its_weights_alone_is_named_as_comfyui_calls_it(model_folders):
    """Names and sizes of Kandinsky 5, which our own table does not know."""
    path = model_folders / "diffusion_models" / "wrong.safetensors"
    names = {"visual_embeddings.in_layer.bias": (1792,), "visual_embeddings.in_layer.weight": (1792, 132)}
    names |= {"visual_transformer_blocks.0.cross_attention.key_norm.weight": (64,)}
    names |= {"visual_transformer_blocks.0.feed_forward.in_layer.weight": (7168, 1792)}
    names |= {"text_embeddings.in_layer.weight": (1792, 3584), "time_embeddings.in_layer.bias": (512,)}
    save_file({name: torch.zeros(size) for name, size in names.items()}, path)
    with pytest.raises(InputError, match=r"this one is kandinsky5 \(as ComfyUI calls it\)\. Load it with"):
        check_checkpoint(path.name)
    path.unlink()


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\0\0\0" + bytes(100), "Name it .gguf and load it with Unet Loader (GGUF)"),
        (b"\xef\xbb\xbf\n <html>" + b" " * 100, "a web page"),
        (b"Entry not found", "text: 'Entry not found'"),
        (b'{"error": "Invalid credentials"}', "text: "),
        (bytes(5000), "nothing but zeros: the download did not finish"),
        (b"\x1f\x8b\x08" + bytes(100), "a gzip archive"),
        (header(b"[" * 100_000), "it is not a safetensors file"),
        (header(b'{"a":' * 50_000), "its header is damaged"),
        (struct.pack("<Q", 2**63) + b"{}", "it is not a safetensors file"),
        (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)), "its header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'), "its header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', bytes(4)), "header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}', bytes(4)), "its header is damaged"),
        (header(b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "the unknown type 'F31'"),
        (header(b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "its header is damaged"),
        (header(b'{"__metadata__": 7, "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4)), "damag"),
        (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(9)), "longer than its header"),
        (
            header(
                b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
                bytes(4),
            ),
            "its header is damaged",
        ),
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_said_to_be_what_it_is(model_folders, content, words):
    path = model_folders / "diffusion_models" / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_checkpoint(path.name)
    message = str(caught.value)
    assert words in message
    assert "bad.safetensors: " in message
    path.unlink()


def test_what_passes_here_the_formats_own_library_reads(tmp_path):
    """Bytes changed and cut at random; the library raises if it refuses a file that passed."""
    import random

    from safetensors import safe_open

    from comfyui_psa.loading.safetensors_header import safetensors_problem

    path, rng = tmp_path / "file.safetensors", random.Random(0)
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(0), "c": torch.zeros((), dtype=torch.bfloat16)}, path)
    good = path.read_bytes()
    assert safetensors_problem(path) is None
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([0, 0x22, 0x7B, 0x5B, 0x39, 0xFF, rng.randrange(256)])
        path.write_bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
        if safetensors_problem(path) is None:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    file.get_tensor(key)

"""CogVideoX checkpoints from folders and files, on tiny random models; and every way in which they can be broken."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading import checkpoint
from comfyui_psa.loading.checkpoint import list_checkpoints, load_checkpoint, read_checkpoint, weight_files


@pytest.fixture(scope="module")
def sharded(model_folders, tiny):
    """A pipeline's folder with the transformer in shards, and that transformer."""
    folder = model_folders / "diffusers" / "sharded"
    return folder, tiny.write_folder(folder, "5b", shards=True)


@pytest.fixture
def broken(sharded, model_folders):
    """A copy of that folder for a test to break."""
    folder = model_folders / "diffusers" / "broken"
    shutil.copytree(sharded[0], folder)
    yield folder
    shutil.rmtree(folder)


def raises_refusal(name, reason):
    """The error of a checkpoint that cannot be used: node, input, what was given, and what is wrong with which file."""
    start = rf"^PSA CogVideoX Loader, input checkpoint: '{name}' was given; allowed: a checkpoint that can be used; "
    return pytest.raises(InputError, match=f"{start}.*{reason}")


def weights(model):
    return {key.removeprefix("diffusion_model."): value for key, value in model.model.state_dict().items()}


def assert_same_weights(model, reference):
    """Every weight of the diffusers model is somewhere in the native one."""
    mine = sorted((tuple(value.shape), float(value.double().sum())) for value in weights(model).values())
    theirs = sorted((tuple(value.shape), float(value.double().sum())) for value in reference.state_dict().values())
    for (shape, total), (expected_shape, expected) in zip([row for row in mine if len(row[0])], theirs, strict=True):
        assert shape == expected_shape
        assert total == pytest.approx(expected)


def test_a_folder_in_shards_and_a_single_file_give_the_same_model(sharded, model_folders, tiny):
    folder, reference = sharded
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    tiny.write_folder(model_folders / "diffusers" / "whole", "5b")
    models = [load_checkpoint(name) for name in ("sharded", "whole")]
    first, second = (weights(model) for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    assert torch.equal(first["blocks.1.q.weight"], reference.transformer_blocks[1].attn1.to_q.weight)
    assert torch.equal(first["blocks.0.ff_out.bias"], reference.transformer_blocks[0].ff.net[2].bias)


def test_a_native_file_loads_and_is_corrected(sharded, model_folders):
    tensors, _ = read_checkpoint(sharded[0] / "transformer")
    path = model_folders / "diffusion_models" / "native.safetensors"
    save_file({f"model.diffusion_model.{key}": value.clone() for key, value in tensors.items()}, path)
    model = load_checkpoint("native.safetensors")
    assert torch.equal(weights(model)["blocks.1.k.weight"], tensors["blocks.1.k.weight"])
    assert "diffusion_model._get_rotary_emb" in model.object_patches


def test_the_menu_lists_files_and_folders_once(sharded, model_folders, tiny):
    models = model_folders / "diffusion_models"
    tiny.write_folder(models / "owner" / "CogVideoX-5b", "5b")
    tiny.transformer("5b").save_pretrained(models / "transformer only")
    (models / "other").mkdir()
    (models / "other" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}', encoding="utf-8")
    listed = list_checkpoints()
    assert {"sharded", "owner/CogVideoX-5b", "transformer only"} <= set(listed)
    assert "other" not in listed
    assert not any("diffusion_pytorch_model" in name for name in listed)
    load_checkpoint("transformer only")
    load_checkpoint("owner/CogVideoX-5b")


def test_renaming_copies_no_tensor(sharded, monkeypatch):
    read = {}

    def remember(path):
        tensors, metadata = real(path)
        read.update({tensor.data_ptr(): key for key, tensor in tensors.items()})
        return tensors, metadata

    real = checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", remember)
    tensors, _ = read_checkpoint(sharded[0] / "transformer")
    assert {tensor.data_ptr() for tensor in tensors.values()} == set(read)
    assert len(tensors) == len(read)


def test_the_schedule_comes_from_the_scheduler_config(broken):
    config = broken / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    plain = load_checkpoint("broken").get_model_object("model_sampling").sigmas
    config.write_text(json.dumps(settings | {"snr_shift_scale": 3.0}), encoding="utf-8")
    shifted = load_checkpoint("broken").get_model_object("model_sampling").sigmas
    assert shifted[500] / plain[500] > 1.5
    config.write_text(json.dumps(settings | {"prediction_type": "epsilon"}), encoding="utf-8")
    with raises_refusal("broken", "its scheduler config says 'epsilon'"):
        load_checkpoint("broken")
    config.write_text("{", encoding="utf-8")
    with raises_refusal("broken", r"scheduler_config\.json: it cannot be read"):
        load_checkpoint("broken")


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_weights_are_stored_in_fp8(sharded, weight_dtype):
    model = load_checkpoint("sharded", weight_dtype)
    assert weights(model)["blocks.0.q.weight"].dtype == getattr(torch, weight_dtype.replace("fp8", "float8"))


def test_a_missing_shard_is_named(broken):
    shard = sorted((broken / "transformer").glob("*.safetensors"))[-1]
    shard.unlink()
    with raises_refusal("broken", rf"{shard.name}: this shard is missing \(1 of \d+ are\)"):
        load_checkpoint("broken")


def test_a_missing_index_is_named(broken):
    (broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with raises_refusal("broken", r"index\.json: it is missing, and \d+ files are there"):
        load_checkpoint("broken")


def test_an_index_must_not_lead_out_of_its_folder(broken):
    index = broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}), encoding="utf-8")
    with raises_refusal("broken", "it must list files of its own folder"):
        load_checkpoint("broken")


def test_an_incomplete_shard_is_named(broken):
    shard = sorted((broken / "transformer").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with raises_refusal("broken", rf"{shard.name}: it ends too early"):
        load_checkpoint("broken")


def test_weights_that_no_file_holds_are_an_error_and_not_noise(broken):
    folder = broken / "transformer"
    files = weight_files(folder)
    tensors = {key: value for file in files for key, value in load_file(file).items()}
    del tensors["transformer_blocks.1.attn1.to_k.weight"]
    for file in [*files, folder / "diffusion_pytorch_model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    with raises_refusal("broken", r"1 of \d+ weights are missing, for example blocks\.1\.k\.weight"):
        load_checkpoint("broken")


def test_a_folder_of_pickles_is_refused(broken):
    for file in (broken / "transformer").glob("*.safetensors*"):
        file.unlink()
    (broken / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with raises_refusal("broken", r"holds no \.safetensors file"):
        load_checkpoint("broken")


@pytest.mark.parametrize("name", ["nowhere", "../sharded", "sharded/transformer", "/etc/passwd", ""])
def test_what_the_menu_does_not_list_is_refused(sharded, name):
    with pytest.raises(InputError, match=r"PSA CogVideoX Loader, input checkpoint: .* was given; allowed: "):
        load_checkpoint(name)


def test_another_model_is_refused_with_examples_of_its_keys(model_folders):
    path = model_folders / "diffusion_models" / "other.safetensors"
    save_file({"encoder.layer.weight": torch.zeros(4, 4), "head.weight": torch.zeros(4)}, path)
    with pytest.raises(InputError, match=r"a CogVideoX checkpoint; this one has encoder\.layer\.weight, head\.weight"):
        load_checkpoint("other.safetensors")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04" + bytes(100), "it is not a safetensors file but a zip archive"),
        (b"\x80\x02}q\x00." + bytes(100), "it is not a safetensors file but a pickle"),
        (b"<!DOCTYPE html>" + b" " * 100, "it is not a safetensors file but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a Git LFS pointer"),
        (b"something else altogether", "it is not a safetensors file"),
        (struct.pack("<Q", 500) + b'{"a":', "it ends too early"),
        (struct.pack("<Q", 6) + b'{"a":1', "its header is damaged"),
        (struct.pack("<Q", 2) + b"{}", "it holds no tensors"),
    ],
)
def test_files_that_are_not_safetensors_are_said_to_be_what_they_are(model_folders, content, reason):
    path = model_folders / "diffusion_models" / "bad.safetensors"
    path.write_bytes(content)
    with raises_refusal("bad.safetensors", rf"bad\.safetensors: .*{reason}"):
        load_checkpoint("bad.safetensors")
    path.unlink()


def test_comfyui_can_load_it_again_for_itself(sharded):
    model = load_checkpoint("sharded")
    load, arguments = model.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert torch.equal(weights(again)["blocks.0.q.weight"], weights(model)["blocks.0.q.weight"])
    assert again.object_patches.keys() == model.object_patches.keys()

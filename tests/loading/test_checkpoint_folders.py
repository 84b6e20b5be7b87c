"""Folders and files as people have them: several indexes, other encodings, half a download, broken and hostile text."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.checkpoint import list_checkpoints, load_checkpoint, read_checkpoint

NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def original(model_folders, tiny, tmp_path_factory):
    """A pipeline's folder in shards, outside of ComfyUI's folders."""
    folder = tmp_path_factory.mktemp("original") / "CogVideoX"
    tiny.write_folder(folder, "5b", shards=True)
    return folder


@pytest.fixture
def folder(original, model_folders):
    """A copy of it in `diffusers`, called `mine`, for a test to change."""
    place = model_folders / "diffusers" / "mine"
    shutil.copytree(original, place)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def tensors_in(folder):
    """All tensors of a folder's files, as diffusers names them."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.fixture
def whole(folder):
    """That folder with all weights in one file, which is not written yet: (folder of the transformer, tensors)."""
    inside = folder / "transformer"
    tensors = tensors_in(inside)
    for file in inside.glob("*.safetensors*"):
        file.unlink()
    return inside, tensors


def problem_of(name):
    with pytest.raises(InputError) as caught:
        load_checkpoint(name)
    message = str(caught.value)
    assert message.startswith(f"PSA CogVideoX Loader, input checkpoint: {name!r} was given; allowed: ")
    return message


def same_weights(model, tensors):
    found = model.model.diffusion_model.state_dict()
    return torch.equal(found["blocks.1.q.weight"], tensors["transformer_blocks.1.attn1.to_q.weight"])


@pytest.mark.parametrize("stray", [f"{NAME}.fp16.safetensors.index.json", "a.safetensors.index.json"])
def test_of_several_indexes_the_one_whose_files_are_there_counts(folder, stray):
    index = folder / "transformer" / f"{NAME}.safetensors.index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    gone = {key: name.replace(NAME, "gone") for key, name in entries["weight_map"].items()}
    tensors = tensors_in(folder / "transformer")
    (folder / "transformer" / stray).write_text(json.dumps({"weight_map": gone}), encoding="utf-8")
    assert same_weights(load_checkpoint("mine"), tensors)
    # The other way around: the usual index lists nothing that is there, the variant does.
    index.rename(folder / "transformer" / f"{NAME}.bf16.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": gone}), encoding="utf-8")
    assert same_weights(load_checkpoint("mine"), tensors)


@pytest.mark.parametrize("stray", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_broken_index_beside_a_good_one_or_a_whole_file_does_no_harm(folder, whole, stray):
    inside, tensors = whole
    (inside / f"{NAME}.fp16.safetensors.index.json").write_bytes(stray)
    save_file(tensors, inside / f"{NAME}.safetensors")
    assert same_weights(load_checkpoint("mine"), tensors)


@pytest.mark.parametrize(
    "name", [f"{NAME}-00001-of-00001.safetensors", f"{NAME}.fp16.safetensors", "model.SAFETENSORS"]
)
def test_a_lone_file_needs_no_index(whole, name):
    inside, tensors = whole
    save_file(tensors, inside / name)
    assert same_weights(load_checkpoint("mine"), tensors)


def test_of_two_whole_files_neither_is_taken_by_chance(whole):
    inside, tensors = whole
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, inside / name)
    message = problem_of("mine")
    assert "it holds 2 models (a.safetensors, b.safetensors)" in message
    assert message.endswith(f" Keep one, or name one {NAME}.safetensors, or choose another checkpoint.")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_files_are_read_as_editors_write_them(folder, encoding):
    for file in folder.rglob("*.json"):
        file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    assert "mine" in list_checkpoints()
    load_checkpoint("mine")


BROKEN = {
    "deep": b'{"a":' * 100_000,
    "deep list": b"[" * 100_000,
    "huge": b" " * 5_000_000,
    "latin": b'{"about": "\xe9"}',
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "list": b"[]",
    "text": b'"CogVideoXTransformer3DModel"',
    "empty": b"",
    "nul": bytes(100),
    "cut": b'{"_class_name": "CogVideoXTransf',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_config_is_named_and_spoils_no_other_folder(folder, original, model_folders, content):
    other = model_folders / "diffusers" / "other"
    shutil.copytree(original, other)
    try:
        (folder / "transformer" / "config.json").write_bytes(content)
        assert {"mine", "other"} <= set(list_checkpoints())
        load_checkpoint("other")
        message = problem_of("mine")
        assert "config.json: it " in message
        assert not any(word in message for word in ("Error", "Expecting", "codec", "recursion"))
    finally:
        shutil.rmtree(other)


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("transformer/config.json", {"sample_height": "60"}),
        ("transformer/config.json", {"sample_width": float("nan")}),
        ("transformer/config.json", {"sample_frames": 10**400}),
        ("transformer/config.json", {"spatial_interpolation_scale": 0}),
        ("transformer/config.json", {"use_rotary_positional_embeddings": "yes"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}),
        ("scheduler/scheduler_config.json", {"beta_end": float("inf")}),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": [3.0]}),
        ("vae/config.json", {"invert_scale_latents": 1}),
    ],
)
def test_an_impossible_value_of_a_config_is_named(folder, file, entry):
    config = json.loads((folder / file).read_text(encoding="utf-8")) | entry
    (folder / file).write_text(json.dumps(config), encoding="utf-8")
    ((name, _),) = entry.items()
    message = problem_of("mine")
    assert f" says {name}: " in message
    assert "; allowed: " in message.partition(" says ")[2]


def test_a_config_may_leave_out_what_it_wants(folder):
    (folder / "transformer" / "config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    assert "mine" in list_checkpoints()
    load_checkpoint("mine")


def lacking(folder, *names):
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "gone",
    [("transformer",), ("transformer", "scheduler", "vae"), ("transformer", "vae"), ("transformer", "scheduler")],
)
def test_a_folder_that_is_nearly_a_model_is_listed_and_says_what_it_lacks(folder, gone):
    lacking(folder, *gone)
    assert "mine" in list_checkpoints()
    message = problem_of("mine")
    assert "mine: the folder has no transformer/ in it" in message
    assert " Download transformer/ and scheduler/ of a CogVideoX model from its page, or choose" in message


@pytest.mark.parametrize(
    ("left", "words", "do"),
    [
        ("a.safetensors.incomplete", "; a.safetensors.incomplete did not finish", "Start that download again, or"),
        ("model.bin", "; model.bin is a pickle, which is not read", "Download the .safetensors files instead, or"),
        ("readme.md", "", "Download those of transformer/ from the model's page, or"),
    ],
)
def test_a_folder_without_weights_says_so(whole, left, words, do):
    inside, _ = whole
    (inside / left).write_bytes(b"x")
    assert "mine" in list_checkpoints()
    message = problem_of("mine")
    assert f"transformer: the folder holds no .safetensors file{words} (" in message
    assert do in message


def test_a_folder_of_another_model_is_named_as_what_it_is(model_folders):
    root = model_folders / "diffusers"
    cases = {"WanTransformer3DModel": "Wan", "LTXVideoTransformer3DModel": "LTX", "FluxTransformer2DModel": "Flux"}
    for number, (class_name, family) in enumerate(cases.items()):
        folder = root / f"wrong {number}" / "transformer"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": class_name}), encoding="utf-8-sig")
        assert folder.parent.name not in list_checkpoints(), "it is of no use here"
        message = problem_of(folder.parent.name)
        assert f"this folder is a {family} model's. Take ComfyUI's own file of it with Load Diffusion Model." in message
        shutil.rmtree(folder.parent)


def test_links_that_lead_in_circles_and_to_nowhere_end(folder, model_folders):
    root = model_folders / "diffusers"
    links = {"loop": root, "self": root / "self", "nowhere": root / "gone"}
    try:
        for name, target in links.items():
            (root / name).symlink_to(target, target_is_directory=True)
        (folder / "transformer" / "loop").symlink_to(folder, target_is_directory=True)
        assert [name for name in list_checkpoints() if name.endswith("mine")] == ["mine"]
        load_checkpoint("mine")
    finally:
        for name in links:
            (root / name).unlink()


def test_a_config_that_is_a_link_to_itself_or_a_folder_is_named(folder):
    config = folder / "transformer" / "config.json"
    config.unlink()
    config.symlink_to(config)
    assert "mine" in list_checkpoints()
    assert "config.json: it cannot be read" in problem_of("mine")
    config.unlink()
    config.mkdir()
    assert "config.json: it cannot be read: it is not a file" in problem_of("mine")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read everything")
def test_a_folder_that_may_not_be_read_is_named(folder):
    inside = folder / "transformer"
    inside.chmod(0)
    try:
        assert "mine" in list_checkpoints()
        assert "cannot be read" in problem_of("mine")
    finally:
        inside.chmod(0o755)


def test_the_hubs_cache_is_a_place_for_a_model(original, model_folders):
    place = model_folders / "diffusers" / "models--zai-org--CogVideoX-5b"
    (place / "refs").mkdir(parents=True)
    snapshot = place / "snapshots" / "8d6ea3f"
    shutil.copytree(original, place / "blobs")
    for source in [path for path in (place / "blobs").rglob("*") if path.is_file()]:
        link = snapshot / source.relative_to(place / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)
    shutil.move(place / "blobs", place / ".blobs")
    for link in [path for path in snapshot.rglob("*") if path.is_symlink()]:
        target = place / ".blobs" / link.relative_to(snapshot)
        link.unlink()
        link.symlink_to(target)
    name = f"{place.name}/snapshots/8d6ea3f"
    assert [listed for listed in list_checkpoints() if listed.startswith(place.name)] == [name]
    load_checkpoint(name)
    shutil.rmtree(place)


def test_names_of_workflows_that_were_saved_on_windows_are_found(original, model_folders):
    models = model_folders / "diffusion_models"
    shutil.copytree(original, models / "owner" / "model")
    tensors, _ = read_checkpoint(original / "transformer")
    save_file({key: value.clone() for key, value in tensors.items()}, models / "owner" / "one.safetensors")
    for name in ("owner\\model", "owner\\one.safetensors"):
        assert same_weights(load_checkpoint(name), tensors_in(original / "transformer")), name
    shutil.rmtree(models / "owner")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["back\\slash", "line\nbreak", "視频 %s{}", "x" * 200])
def test_folders_of_any_name_load(original, model_folders, name):
    place = model_folders / "diffusers" / name
    shutil.copytree(original, place)
    assert name in list_checkpoints()
    load_checkpoint(name)
    shutil.rmtree(place)


def test_files_beside_a_broken_config_stay_in_the_menu(original, model_folders):
    folder = model_folders / "diffusion_models" / "sorted"
    folder.mkdir()
    tensors, _ = read_checkpoint(original / "transformer")
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "one.safetensors")
    (folder / "config.json").write_bytes(b"{")
    assert {"sorted", "sorted/one.safetensors"} <= set(list_checkpoints())
    load_checkpoint("sorted/one.safetensors")
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "a.b."]
)
def test_names_may_have_anything_in_front_and_the_rest_of_a_file_is_named(original, model_folders, caplog, prefix):
    files = (original / "transformer").glob("*.safetensors")
    tensors = {key: value for file in files for key, value in load_file(file).items()}
    path = model_folders / "diffusion_models" / "prefixed.safetensors"
    save_file({prefix + key: value for key, value in tensors.items()} | {"extra.weight": torch.zeros(1)}, path)
    assert same_weights(load_checkpoint(path.name), tensors)
    notes = [record.message for record in caplog.records if "not used" in record.message]
    assert len(notes) == 1
    assert "1 tensors are not part of CogVideoX and not used, for example extra.weight" in notes[0]
    path.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(32, 64)}, "is 32x64, where this model has 64x64"),
        ({"proj_out.weight": torch.zeros(64)}, "is 64, where this model has 64x64"),
        ({"transformer_blocks.0.norm1.linear.weight": torch.zeros(5)}, "sizes that no CogVideoX model has"),
        ({"transformer_blocks.0.norm1.linear.weight": torch.zeros(0, 64)}, "sizes that no CogVideoX model has"),
        ({"patch_embed.proj.weight": torch.zeros(64, 16, 3)}, "where this model has"),
        ({"proj_out.bias": torch.zeros(64, dtype=torch.int64)}, "proj_out.bias holds numbers of type I64"),
        ({"proj_out.weight.absmax": torch.zeros(4)}, "compressed by bitsandbytes, which ComfyUI cannot use"),
    ],
)
def test_weights_that_fit_no_model_are_refused_before_they_are_read(whole, monkeypatch, change, words):
    from comfyui_psa.loading import checkpoint

    inside, tensors = whole
    save_file(tensors | change, inside / f"{NAME}.safetensors")
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: pytest.fail("a weight was read"))
    assert words in problem_of("mine")

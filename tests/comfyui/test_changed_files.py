"""A file that an input names has changed: ComfyUI runs the node again, and only then."""

import json
import os

import pytest
from safetensors.torch import save_file

SHAPE = {"mode": "topk", "shares": {"1": 0.1, "2": 0.1, "8": 0.2}}


@pytest.fixture
def presets(comfyui, tmp_path, monkeypatch):
    from comfyui_psa.choices import user_presets

    monkeypatch.setattr(user_presets, "folder", lambda: tmp_path)
    return tmp_path


def write(folder, **changes):
    path = folder / "mine.json"
    path.write_text(json.dumps(SHAPE | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["PSAPatch", "PSACalibrate"])
def test_a_preset_of_the_user_s(presets, name):
    from comfyui_psa.nodes.calibrate import PSACalibrate
    from comfyui_psa.nodes.patch import PSAPatch

    node = {"PSAPatch": PSAPatch, "PSACalibrate": PSACalibrate}[name]

    def now(preset="user/mine"):
        return node.fingerprint_inputs(preset=preset, sparsity=0.85)

    missing = now()
    path = write(presets)
    first = now()
    assert missing != first == now()
    write(presets, shares={"1": 0.2, "8": 0.2})
    assert now() != first
    write(presets, sparsity=0.8, about="Calibrated", made="PSA Calibrate: meets 0.15")
    assert now() == first, "what PSA Calibrate adds when it writes the preset that it has read changes no shape"
    path.write_text("{", encoding="utf-8")
    broken = now()
    assert broken != first
    path.unlink()
    assert now() == missing
    assert now("auto") == now("auto") != now("module-default")
    assert node.fingerprint_inputs() == node.fingerprint_inputs(preset="auto"), "a wire instead of a name"


def touch(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + len(content)))


def test_a_lora_and_its_configuration(model_folders):
    from comfyui_psa.nodes.lora import PSALoraLoader

    def now(name="sub/changing.safetensors"):
        return PSALoraLoader.fingerprint_inputs(lora_name=name, strength=1.0)

    missing = now()
    file = model_folders / "loras" / "sub" / "changing.safetensors"
    touch(file, b"one")
    seen = [missing, now()]
    assert now() == seen[-1]
    assert now("sub\\changing.safetensors") == seen[-1]
    touch(file, b"two")
    seen.append(now())
    touch(file.with_name("adapter_config.json"), b"{}")
    seen.append(now())
    assert len(set(map(repr, seen))) == 4
    assert PSALoraLoader.fingerprint_inputs(lora_name="a\0b") is not None
    assert PSALoraLoader.fingerprint_inputs() == PSALoraLoader.fingerprint_inputs(lora_name=""), "a wire"


def test_a_checkpoint_file_and_folder(model_folders):
    from comfyui_psa.nodes.cogvideox import PSACogVideoXLoader

    def now(name):
        return PSACogVideoXLoader.fingerprint_inputs(checkpoint=name, weight_dtype="default")

    touch(model_folders / "diffusion_models" / "cog.safetensors", b"one")
    first = now("cog.safetensors")
    touch(model_folders / "diffusion_models" / "cog.safetensors", b"two")
    assert now("cog.safetensors") != first
    folder = model_folders / "diffusers" / "changing"
    config = b'{"_class_name": "CogVideoXTransformer3DModel"}'
    touch(folder / "transformer" / "config.json", config)
    seen = []
    for name in ("transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"):
        for content in (config, config + b" "):
            touch(folder / name, content)
            seen.append(repr(now("changing")))
            assert repr(now("changing")) == seen[-1]
    touch(folder / "README.md", b"not read")
    assert repr(now("changing")) == seen[-1]
    assert len(set(seen)) >= 3


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.mark.slow
def test_a_real_server_runs_the_node_again_when_the_preset_was_edited(server, client, definitions, tiny_wan):
    from comfyui_psa.workshop.tools.workflow import default_value, inputs_of

    models = server.home / "models" / "diffusion_models"
    models.mkdir(exist_ok=True)
    save_file(tiny_wan.state_dict("t2v"), models / "tiny.safetensors")
    folder = server.home / "user" / "psa_presets"
    folder.mkdir(parents=True, exist_ok=True)

    def defaults(name):
        return {spec.name: default_value(spec) for spec in inputs_of(definitions[name]) if spec.is_widget}

    prompt = {
        "model": node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        "patch": node("PSAPatch", **defaults("PSAPatch") | {"preset": "user/mine"}, model=["model", 0]),
        "latent": node("EmptyHunyuanLatentVideo", width=256, height=256, length=9, batch_size=1),
        "report": node("PSAReport", **defaults("PSAReport"), model=["patch", 0], samples=["latent", 0]),
    }

    def runs():
        client.run(prompt)
        return server.log.read_text(encoding="utf-8").count("preset user/mine (topk")

    write(folder)
    assert [runs(), runs()] == [1, 1], "an untouched preset is answered from the cache"
    write(folder, shares={"1": 0.2, "8": 0.2})
    assert [runs(), runs()] == [2, 2]

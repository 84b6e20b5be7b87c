"""The CogVideoX workflows on a real server with tiny random weights, from the files to the video.

The prompt's text encoder, 10 GB, gives way to the demo's conditioning node; everything else is the committed workflow.
"""

import json
import shutil
import struct
import urllib.parse

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

from comfyui_psa.demo.scene import CONTEXT_WIDTH
from comfyui_psa.loading.own_folders import OWN_FOLDERS
from comfyui_psa.workshop.tools.client import PromptFailed, PromptInterrupted
from comfyui_psa.workshop.tools.figures import find_node
from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.workflow import graph_to_prompt, inputs_of, load_workflow

FOLDERS = {"CogVideoX-5b": "5b", "CogVideoX1.5-5B": "1.5", "CogVideoX1.5-5B-I2V": "1.5-i2v"}
LORA = "cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def models(server, tiny):
    """The folders that the workflows name, with tiny models in them, and the LoRA; returns ComfyUI's models folder."""
    models = server.home / "models"
    for name, kind in FOLDERS.items():
        tiny.write_folder(models / "diffusers" / name, kind, shards=True, text_width=CONTEXT_WIDTH)
    tiny.write_loras(models / "written", "5b")
    (models / "loras" / LORA).parent.mkdir(parents=True)
    shutil.move(models / "written" / "metadata" / "pytorch_lora_weights.safetensors", models / "loras" / LORA)
    Image.new("RGB", (64, 48), (200, 120, 40)).save(server.home / "input" / "example.png")
    return models


@pytest.fixture
def prompt_of(models, client):
    """prompt_of(workflow name) -> its prompt at a small size, with the demo's scene for a prompt."""

    def make(name):
        definitions = client.get("/object_info")
        prompt = graph_to_prompt(load_workflow(WORKFLOWS / f"{name}.json"), definitions)
        for node, entry in list(prompt.items()):
            inputs, kind = entry["inputs"], entry["class_type"]
            if kind == "CLIPLoader":
                del prompt[node]
            elif kind == "CLIPTextEncode":
                prompt[node] = {"class_type": "PSADemoScene", "inputs": {}, "_meta": {"title": kind}}
                specs = definitions["PSADemoScene"]["input"]["required"]
                prompt[node]["inputs"] = {name: options["default"] for name, (_, options) in specs.items()}
            elif kind == "VAELoader":
                inputs["vae_name"] = "psa_demo_wan_vae.safetensors"
            elif "length" in inputs:
                inputs |= {"width": 256, "height": 192, "length": 17}
            elif kind == "PSAPatch":
                inputs["min_tokens"] = 0
            elif kind == "PSACogVideoXSigmas":
                inputs["steps"] = min(inputs["steps"], 6)
        return prompt

    return make


def report_of(prompt, result):
    return json.loads(result.outputs[find_node(prompt, "PSAReport")]["text"][0])


def latent_of(client, prompt):
    """Run without decoding and return the sampled latent."""
    sampler = find_node(prompt, "SamplerCustom")
    kept = {node: entry for node, entry in prompt.items() if entry["class_type"] in KEPT}
    kept["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "test/cog"}}
    (entry,) = client.run(kept).outputs["save"]["latents"]
    return load(client.download("/view?" + urllib.parse.urlencode(entry)))["latent_tensor"]


KEPT = (
    "PSACogVideoXLoader", "PSALoraLoader", "PSADemoScene", "EmptyHunyuanLatentVideo", "PSAPatch", "PSACogVideoXSampler",
    "PSACogVideoXSigmas", "SamplerCustom",
)  # fmt: skip


@pytest.mark.slow
def test_the_4_step_workflow_makes_a_video(client, server, prompt_of):
    prompt = prompt_of("cogvideox5b_psa_4step_lora")
    result = client.run(prompt)
    report = report_of(prompt, result)
    assert report["fallbacks"] == []
    assert [step["sparse_calls"] for step in report["steps"]] == [2, 2, 2, 2], "no step is dense"
    assert report["correction"] is None
    assert report["grid"] == [5, 12, 16]
    (video,) = result.outputs[find_node(prompt, "SaveVideo")]["images"]
    assert len(client.download("/view?" + urllib.parse.urlencode(video))) > 1000
    steps = [(message.step, message.steps) for message in result.progress if message.class_type == "SamplerCustom"]
    assert steps[-1] == (4, 4), "progress is shown"
    log = server.log.read_text(encoding="utf-8")
    assert f"LoRA {LORA}: 13 weights of the model patched, strength 1" in log
    assert "lora key not loaded" not in log


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cogvideox5b_psa_50step", "cogvideox15_5b_psa", "cogvideox15_i2v_psa"])
def test_the_other_workflows_make_videos(client, prompt_of, name):
    prompt = prompt_of(name)
    result = client.run(prompt)
    report = report_of(prompt, result)
    dense = [step["sparsity"] is None for step in report["steps"]]
    assert dense == [True, True, False, False, False, False], "the first 30 % of the schedule stay dense"
    # 17 frames are 5 latent frames, of which 1.5 makes 6.
    assert report["grid"] == ([5, 12, 16] if "5b_psa_50" in name else [3, 12, 16])
    assert result.outputs[find_node(prompt, "SaveVideo")]["images"]


@pytest.mark.slow
def test_a_run_is_repeatable_also_after_an_interruption_and_bypassing_is_the_dense_model(client, prompt_of):
    prompt = prompt_of("cogvideox5b_psa_4step_lora")
    sampler = find_node(prompt, "SamplerCustom")
    before = latent_of(client, prompt)

    long = json.loads(json.dumps(prompt))
    long[find_node(prompt, "PSACogVideoXSigmas")]["inputs"]["steps"] = 1000

    def interrupt(progress):
        if progress.node == sampler and progress.step:
            client.interrupt()

    with pytest.raises(PromptInterrupted):
        client.run(long, interrupt)
    client.post("/free", {"unload_models": True, "free_memory": True})
    assert torch.equal(latent_of(client, prompt), before)

    stock = json.loads(json.dumps(prompt))
    patch = find_node(prompt, "PSAPatch")
    for entry in stock.values():
        inputs = entry["inputs"]
        inputs.update({name: stock[patch]["inputs"]["model"] for name, value in inputs.items() if value == [patch, 0]})
    del stock[patch]
    dense = latent_of(client, stock)
    assert not torch.equal(dense, before)
    prompt[patch]["inputs"]["sparsity"] = 0.0
    assert torch.equal(latent_of(client, prompt), dense)


@pytest.mark.slow
def test_bad_files_are_errors_in_words_and_the_server_goes_on(client, models, prompt_of):
    prompt = prompt_of("cogvideox5b_psa_4step_lora")
    good = latent_of(client, prompt)
    transformer = models / "diffusers" / "CogVideoX-5b" / "transformer"
    shard = sorted(transformer.glob("*.safetensors"))[1]
    whole = shard.read_bytes()

    def failure(node, **inputs):
        changed = json.loads(json.dumps(prompt))
        changed[find_node(prompt, node)]["inputs"] |= inputs
        with pytest.raises(PromptFailed) as caught:
            latent_of(client, changed)
        return str(caught.value)

    try:
        client.post("/free", {"unload_models": True, "free_memory": True})
        shard.write_bytes(whole[: len(whole) // 2])
        assert f"{shard.name}: it ends too early" in failure("PSACogVideoXLoader", weight_dtype="fp8_e5m2")
        shard.unlink()
        assert f"{shard.name}: this shard is missing" in failure("PSACogVideoXLoader", weight_dtype="fp8_e4m3fn")
    finally:
        shard.write_bytes(whole)
    loras = models / "loras"
    (loras / "pickle.safetensors").write_bytes(b"\x80\x05\x95" + bytes(100))
    message = failure("PSALoraLoader", lora_name="pickle.safetensors")
    assert "pickle.safetensors: it is not a safetensors file but a pickle" in message
    header = b'{"blocks.0.q.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (loras / "cut.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "cut.safetensors: it ends too early" in failure("PSALoraLoader", lora_name="cut.safetensors")
    assert "Set lora_name to one of them." in failure("PSALoraLoader", lora_name="../../secrets.safetensors")
    assert "a file or a folder that the menu lists. Press R" in failure(
        "PSACogVideoXLoader", checkpoint="../CogVideoX-5b"
    )
    assert "allowed: a .safetensors file" in download_failure(client, file="../../outside.safetensors")
    assert "allowed: a .safetensors file" in download_failure(client, file="model.bin")
    assert torch.equal(latent_of(client, prompt), good)


def download_failure(client, file):
    inputs = {"repository": "GYP666/BLADE", "file": file}
    with pytest.raises(PromptFailed) as caught:
        client.run({"1": {"class_type": "PSALoraDownload", "inputs": inputs}})
    return str(caught.value)


def test_what_is_downloaded_into_the_packs_own_weights_is_in_the_lora_menus(client):
    file = OWN_FOLDERS["loras"] / "test-of-the-menu" / "lora.safetensors"
    file.parent.mkdir()
    try:
        save_file({"weight": torch.zeros(1)}, file)
        for node in ("LoraLoaderModelOnly", "PSALoraLoader"):
            (spec,) = (s for s in inputs_of(client.get(f"/object_info/{node}")[node]) if s.name == "lora_name")
            assert "test-of-the-menu/lora.safetensors" in [name.replace("\\", "/") for name in spec.choices]
            assert not any("psa_demo" in name for name in spec.choices), "the demo's model is no LoRA"
    finally:
        shutil.rmtree(file.parent)

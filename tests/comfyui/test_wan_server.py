"""Wan on a real server as users wire it: a variant with a reference, and PSA in the middle of other nodes.

The weights of the variant are random and tiny; the demo's conditioning replaces a text encoder of 10 GB.
"""

import json

import pytest
from PIL import Image
from safetensors.torch import save_file

from comfyui_psa.workshop.tools.workflow import default_value, inputs_of

SAMPLING = {"seed": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


@pytest.fixture
def patch(definitions):
    """patch(model, ...) is an API entry of PSA Patch with its defaults and these values."""

    def make(model, **values):
        inputs = {spec.name: default_value(spec) for spec in inputs_of(definitions["PSAPatch"]) if spec.is_widget}
        return {"class_type": "PSAPatch", "inputs": inputs | {"min_tokens": 0, "model": model} | values}

    return make


@pytest.fixture
def scene(definitions):
    inputs = {spec.name: default_value(spec) for spec in inputs_of(definitions["PSADemoScene"])}
    return {"class_type": "PSADemoScene", "inputs": inputs}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def report(definitions, model, samples):
    widgets = {spec.name: default_value(spec) for spec in inputs_of(definitions["PSAReport"]) if spec.is_widget}
    return node("PSAReport", **widgets, model=model, samples=samples)


@pytest.mark.slow
def test_vace_with_a_reference_image(server, client, definitions, tiny_wan, patch, scene):
    folder = server.home / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file(tiny_wan.state_dict("vace"), folder / "tiny_vace.safetensors")
    Image.new("RGB", (256, 256), (200, 120, 40)).save(server.home / "input" / "reference.png")
    size = {"width": 192, "height": 192, "length": 9, "batch_size": 1}
    prompt = {
        "model": node("UNETLoader", unet_name="tiny_vace.safetensors", weight_dtype="default"),
        "vae": node("VAELoader", vae_name="psa_demo_wan_vae.safetensors"),
        "scene": scene,
        "image": node("LoadImage", image="reference.png"),
        "vace": node(
            "WanVaceToVideo", positive=["scene", 0], negative=["scene", 0], vae=["vae", 0], strength=1.0,
            reference_image=["image", 0], **size,
        ),
        "patch": patch(["model", 0], sparsity=0.5, start_percent=0.25),
        "sampler": node(
            "KSampler", model=["patch", 0], positive=["vace", 0], negative=["vace", 1], latent_image=["vace", 2],
            steps=4, **SAMPLING,
        ),
        "report": report(definitions, ["patch", 0], ["sampler", 0]),
        "trim": node("TrimVideoLatent", samples=["report", 0], trim_amount=["vace", 3]),
        "save": node("SaveLatent", samples=["trim", 0], filename_prefix="test/vace"),
    }  # fmt: skip
    result = client.run(prompt)
    told = json.loads(result.outputs["report"]["text"][0])
    assert told["grid"] == [3, 12, 12], "the reference frame stands before the grid"
    assert [step["sparse_calls"] for step in told["steps"]] == [0, 3, 3, 3]
    assert told["fallbacks"] == []


@pytest.mark.slow
def test_a_pair_of_samplers_with_a_cache_and_windows(client, definitions, patch, scene):
    specs = inputs_of(definitions["WanContextWindowsManual"])
    windows = {spec.name: default_value(spec) for spec in specs if spec.is_widget}
    windows |= {"model": ["shift", 0], "context_length": 9, "context_overlap": 5}
    prompt = {
        "model": node("UNETLoader", unet_name="psa_demo_wan_dit.safetensors", weight_dtype="default"),
        "shift": node("ModelSamplingSD3", model=["model", 0], shift=8.0),
        "windows": node("WanContextWindowsManual", **windows),
        "patch": patch(["windows", 0], preset="wan-4step-lora"),
        "cache": node(
            "EasyCache", model=["patch", 0], reuse_threshold=0.01, start_percent=0.15, end_percent=0.95, verbose=False
        ),
        "scene": scene,
        "latent": node("EmptyHunyuanLatentVideo", width=256, height=256, length=17, batch_size=1),
    }  # fmt: skip
    common = {"model": ["cache", 0], "positive": ["scene", 0], "negative": ["scene", 0], "noise_seed": 1, "steps": 4}
    common |= {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    halves = {
        "first": {"add_noise": "enable", "start_at_step": 0, "end_at_step": 2},
        "second": {"add_noise": "disable", "start_at_step": 2, "end_at_step": 4},
    }
    latent = ["latent", 0]
    for name, half in halves.items():
        left = "enable" if name == "first" else "disable"
        prompt[name] = node("KSamplerAdvanced", latent_image=latent, return_with_leftover_noise=left, **common, **half)
        prompt[f"report {name}"] = report(definitions, ["patch", 0], [name, 0])
        latent = [f"report {name}", 0]
    prompt["save"] = node("SaveLatent", samples=latent, filename_prefix="test/pair")
    result = client.run(prompt)
    first, second = (json.loads(result.outputs[f"report {name}"]["text"][0]) for name in halves)
    dense = [step["sparsity"] is None for step in first["steps"] + second["steps"]]
    assert dense == [True, False, False, False], "one dense step of four, in the first half alone"
    assert first["fallbacks"] == second["fallbacks"] == []
    assert first["grid"][0] < 5, "the windows are what PSA sees"

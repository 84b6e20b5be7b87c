"""A real server on a GPU, with what ComfyUI switches on there by itself: 16 bits, and weights that come when needed."""

import json
import time
import urllib.parse

import pytest
import torch
from safetensors.torch import load

from comfyui_psa.workshop.tools.workflow import default_value, inputs_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SAMPLING = {"seed": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "steps": 6}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture
def prompt(definitions):
    """prompt(weight_dtype): the demo's model, sampled dense and with PSA from 9216 tokens, both latents stored."""

    def widgets(name):
        return {spec.name: default_value(spec) for spec in inputs_of(definitions[name]) if spec.is_widget}

    def make(weight_dtype):
        common = {"positive": ["scene", 0], "negative": ["scene", 0], "latent_image": ["latent", 0], **SAMPLING}
        return {
            "model": node("UNETLoader", unet_name="psa_demo_wan_dit.safetensors", weight_dtype=weight_dtype),
            "shift": node("ModelSamplingSD3", model=["model", 0], shift=12.0),
            "scene": node("PSADemoScene", **widgets("PSADemoScene")),
            "latent": node("EmptyHunyuanLatentVideo", width=512, height=512, length=33, batch_size=1),
            "patch": node("PSAPatch", **widgets("PSAPatch") | {"model": ["shift", 0], "min_tokens": 0}),
            "dense": node("KSampler", model=["shift", 0], **common),
            "psa": node("KSampler", model=["patch", 0], **common),
            "report": node("PSAReport", **widgets("PSAReport"), model=["patch", 0], samples=["psa", 0]),
            "save dense": node("SaveLatent", samples=["dense", 0], filename_prefix="test/dense"),
            "save psa": node("SaveLatent", samples=["report", 0], filename_prefix="test/psa"),
        }

    return make


def latents(client, result):
    found = {}
    for name in ("dense", "psa"):
        (entry,) = result.outputs[f"save {name}"]["latents"]
        found[name] = load(client.download("/view?" + urllib.parse.urlencode(entry)))["latent_tensor"]
    return found


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast"])
def test_sparse_on_triton_and_bypassed_bit_for_bit(client, prompt, weight_dtype):
    wanted = prompt(weight_dtype)
    result = client.run(wanted)
    first, told = latents(client, result), json.loads(result.outputs["report"]["text"][0])
    assert told["backend"] == "triton"
    assert told["fallbacks"] == []
    assert told["grid"] == [9, 32, 32]
    dense_steps = [step["sparsity"] is None for step in told["steps"]]
    assert dense_steps == sorted(dense_steps, reverse=True)
    assert not dense_steps[-1]
    assert told["mean_sparsity"] == pytest.approx(0.85, abs=0.01)
    assert torch.isfinite(first["psa"]).all()
    assert 0.01 < (first["psa"] - first["dense"]).norm() / first["dense"].norm() < 0.5

    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)  # the server does it between two prompts
    wanted["psa"]["inputs"]["model"] = ["shift", 0]
    wanted["save psa"]["inputs"]["samples"] = ["psa", 0]
    bypassed = latents(client, client.run({k: v for k, v in wanted.items() if k not in ("patch", "report")}))
    assert torch.equal(bypassed["dense"], first["dense"])
    assert torch.equal(bypassed["psa"], first["dense"])


def test_its_memory_management_is_what_users_have(server, client, prompt):
    client.run(prompt("default"))
    assert "DynamicVRAM support detected and enabled" in server.log.read_text(encoding="utf-8")

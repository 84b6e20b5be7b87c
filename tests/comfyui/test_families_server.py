"""Every family besides Wan and CogVideoX on a real server, wired as users wire it: core's own loader and nodes, PSA
Patch and PSA Report.

Random and tiny weights, at a size that nothing divides. Where the tokens lie is checked by
tests/patching/test_families.py.
"""

import dataclasses
import json
import shutil
import urllib.parse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from comfyui_psa.workshop.tools.client import Client
from comfyui_psa.workshop.tools.paths import comfyui_folder
from comfyui_psa.workshop.tools.server import ComfyServer
from comfyui_psa.workshop.tools.workflow import default_value, inputs_of

TESTS = Path(__file__).parent
NODES = (TESTS / "tiny_nodes.py", TESTS.parent / "tiny_families.py")
FINE = {"width": 208, "height": 176, "length": 17}
COARSE = {"width": 416, "height": 352, "length": 33}
GRID = [5, 11, 13]
IMAGE = {"start_image": ["image", 0]}


@dataclasses.dataclass
class Case:
    """A kind of `tiny_families` and core's node that makes its latent, with inputs of this node.

    Attributes:
        size: of the video. beside: see `tiny_nodes`. calls: self-attention calls of a forward.
        sound: whether a latent of sound has to be joined to the video's.
    """

    kind: str
    latent: str
    inputs: dict = dataclasses.field(default_factory=dict)
    size: dict = dataclasses.field(default_factory=lambda: FINE)
    grid: list = dataclasses.field(default_factory=lambda: GRID)
    beside: str = ""
    calls: int = 2
    sound: bool = False


FROM_IMAGE = {"guidance_type": "v1 (concat)", **IMAGE}
CASES = {
    "HunyuanVideo 1.0": Case("hunyuan, a file", "EmptyHunyuanLatentVideo", calls=4),
    "HunyuanVideo 1.0 I2V": Case("hunyuan i2v, a file", "HunyuanImageToVideo", FROM_IMAGE, calls=4),
    "HunyuanVideo 1.0 with a reference image": Case(
        "hunyuan, a file", "HunyuanImageToVideo", FROM_IMAGE | {"guidance_type": "custom"}, calls=4
    ),
    "HunyuanVideo 1.5": Case("hunyuan 1.5, a file", "EmptyHunyuanVideo15Latent", calls=4),
    "HunyuanVideo 1.5 I2V": Case(
        "hunyuan 1.5, a file", "EmptyHunyuanVideo15Latent", beside="glyphs vision image", calls=4
    ),
    "HunyuanVideo 1.5 upscaling": Case(
        "hunyuan 1.5 sr, a file", "HunyuanVideo15SuperResolution", {"latent": ["small", 0]}, calls=4
    ),
    "LTX-Video 0.9": Case("ltx 0.9, a file", "EmptyLTXVLatentVideo", size=COARSE),
    "LTX-2": Case("ltx 2, a file", "EmptyLTXVLatentVideo", size=COARSE, sound=True),
    "Kandinsky 5": Case("kandinsky 5 lite, a file", "EmptyHunyuanLatentVideo"),
    "Kandinsky 5 I2V": Case("kandinsky 5 lite, a file", "Kandinsky5ImageToVideo", IMAGE),
    "Cosmos Predict 2": Case("cosmos", "CosmosPredict2ImageToVideoLatent"),
    "Cosmos Predict 2 I2V": Case("cosmos i2v", "CosmosPredict2ImageToVideoLatent", IMAGE),
    "Mochi": Case("mochi", "EmptyMochiLatentVideo", size=FINE | {"length": 25}),
    "MiniMax H3": Case("minimax h3, a file", "EmptyMiniMaxH3LatentAV", size=COARSE | {"length": 22}, grid=[7, 11, 13]),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of its own: it has nodes of the tests."""
    if not (comfyui_folder() / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {comfyui_folder()}; `python dev.py setup` brings one")
    folder = tmp_path_factory.mktemp("comfyui")
    pack = folder / "home" / "custom_nodes" / "tiny"
    pack.mkdir(parents=True)
    for source, name in zip(NODES, ("__init__.py", "tiny_families.py"), strict=True):
        shutil.copy(source, pack / name)
    with ComfyServer(comfyui_folder(), home=folder / "home", log=folder / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url)


@pytest.fixture(scope="module")
def definitions(client):
    return client.get("/object_info")


@pytest.fixture
def node(definitions):
    """node(class, ...) is an API entry with the node's defaults and these values."""

    def make(class_type, **values):
        specs = inputs_of(definitions[class_type])
        inputs = {spec.name: default_value(spec) for spec in specs if spec.is_widget}
        return {"class_type": class_type, "inputs": inputs | values}

    return make


def model_of(case, node, server, tiny_families):
    if not case.kind.endswith("a file"):
        return node("TinyModel", kind=case.kind)
    folder = server.home / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    if not (folder / f"{case.kind}.safetensors").exists():
        tiny_families.save(case.kind, folder / f"{case.kind}.safetensors")
    return node("UNETLoader", unet_name=f"{case.kind}.safetensors")


def wired(case, node, definitions):
    """The nodes that make prompts and latent, and where sampling gets them from."""
    prompts = {"positive": ["positive", 0], "negative": ["negative", 0]}
    specs = definitions[case.latent]["input"]["required"]
    takes = {name: link for name, link in (prompts | {"vae": ["vae", 0]}).items() if name in specs}
    nodes = {
        "positive": node("TinyConditioning", kind=case.kind, seed=2, beside=case.beside),
        "negative": node("TinyConditioning", kind=case.kind, seed=4, beside=case.beside),
        "vae": node("VAELoader", vae_name="psa_demo_wan_vae.safetensors"),
        "image": node("EmptyImage", width=64, height=64, color=0x904020),
        "small": node("EmptyHunyuanVideo15Latent", **FINE),
        "latent": node(case.latent, **{name: case.size[name] for name in case.size if name in specs}, **takes),
    }
    nodes["latent"]["inputs"] |= case.inputs
    outputs = [name.lower() for name in definitions[case.latent]["output_name"]]
    links = {name: ["latent", outputs.index(name)] for name in prompts if name in outputs}
    latent = ["latent", outputs.index("latent")]
    if case.sound:
        nodes["joined"] = node("TinySound", kind=case.kind, video=latent)
        latent = ["joined", 0]
    return nodes, prompts | links | {"latent_image": latent}


SAMPLING = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("name", CASES)
def test_dense_and_sparse_on_a_real_server(name, client, definitions, node, server, tiny_families):
    case = CASES[name]
    nodes, links = wired(case, node, definitions)
    nodes["model"] = model_of(case, node, server, tiny_families)
    has_sound = bool(tiny_families.KINDS[case.kind].audio)

    def run(sampler=("KSampler", {"seed": 1}), **patch):
        """The video, and the report if there is a PSA Patch."""
        model, samples = ["model", 0], ["sampler", 0]
        prompt = dict(nodes)
        if patch:
            prompt["patch"] = node("PSAPatch", model=model, start_percent=0.3, min_tokens=0, **patch)
            model = ["patch", 0]
        kind, values = sampler
        prompt["sampler"] = node(kind, model=model, **links, **SAMPLING, **values)
        if patch.get("sparsity"):
            prompt["report"] = node("PSAReport", model=model, samples=samples)
            samples = ["report", 0]
        if has_sound:
            prompt["video"] = node("LTXVSeparateAVLatent", av_latent=samples)
            samples = ["video", 0]
        prompt["save"] = node("SaveLatent", samples=samples, filename_prefix="test/families")
        outputs = client.run(prompt).outputs
        (entry,) = outputs["save"]["latents"]
        video = load(client.download("/view?" + urllib.parse.urlencode(entry)))["latent_tensor"]
        return video, json.loads(outputs["report"]["text"][0]) if "report" in outputs else None

    def error(video):
        return float((video - stock).norm() / stock.norm())

    stock, _ = run()
    sparse, told = run(sparsity=0.5)
    assert told["grid"] == case.grid
    assert [step["sparse_calls"] for step in told["steps"]] == [0, case.calls]
    assert told["mean_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert told["fallbacks"] == told["notes"] == []
    assert torch.isfinite(sparse).all()
    assert error(sparse) > 1e-5
    full, told = run(sparsity=0.01, pyramid="1: 1.0", mode="topk", correction="off")
    assert error(full) < 1e-5
    assert [step["sparse_calls"] for step in told["steps"]] == [0, case.calls]
    assert torch.equal(run(sparsity=0.0)[0], stock)
    # Another node that samples the same: the first one's result would come from ComfyUI's cache.
    again = "KSamplerAdvanced", {"noise_seed": 1, "start_at_step": 0, "end_at_step": 10000}
    assert torch.equal(run(again)[0], stock), "nothing of PSA is left on the model"

"""PSA Report, PSA Compare and PSA Calibrate on a real server, at a size of seconds."""

import io
import itertools
import json
import urllib.parse

import pytest
from PIL import Image

from comfyui_psa.workshop.tools.client import PromptFailed
from comfyui_psa.workshop.tools.figures import find_node
from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.workflow import MODE_BYPASSED, graph_to_prompt, load_workflow


@pytest.fixture
def workflow():
    """The demo workflow at a small size."""
    found = load_workflow(WORKFLOWS / "psa_demo.json")
    for node in found["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "EmptyHunyuanLatentVideo":
            values[:3] = [256, 256, 9]
        if node["type"] == "KSampler":
            values[0], values[2] = 5, 3
        if node["type"] == "PSAPatch":
            values[values.index(4096)] = 0
    return found


def picture(client, entry):
    with Image.open(io.BytesIO(client.download("/view?" + urllib.parse.urlencode(entry)))) as image:
        return image.size, image.info


@pytest.mark.slow
def test_report_and_compare_leave_their_pictures_and_figures(client, definitions, workflow):
    prompt = graph_to_prompt(workflow, definitions)
    prompt[find_node(prompt, "EmptyHunyuanLatentVideo")]["inputs"]["length"] = 5  # decoding takes most of the time
    result = client.run(prompt)
    told = result.outputs[find_node(prompt, "PSAReport")]
    report = json.loads(told["text"][0])
    assert report["mean_sparsity"] == pytest.approx(0.85, abs=0.03)
    size, info = picture(client, told["images"][0])
    assert size[0] == 1200
    carried = json.loads(info["prompt"])
    for node in carried.values():
        node.pop("is_changed", None)  # ComfyUI puts the fingerprint of a node beside its inputs
    assert carried == prompt, "the PNG carries its workflow, as ComfyUI's own do"

    figures = json.loads(result.outputs[find_node(prompt, "PSACompare")]["text"][0])
    assert 10 < figures["psnr"] < 100
    assert 0 < figures["ssim"] < 1
    assert len(figures["frames"]) == 5
    sizes = [picture(client, entry)[0] for output in result.outputs.values() for entry in output.get("images", [])]
    assert (3 * 256, 256 + 28) in sizes


@pytest.mark.slow
def test_a_bypassed_patch_stops_neither_report_nor_workflow(client, definitions, workflow):
    for node in workflow["nodes"]:
        if node["type"] == "PSAPatch":
            node["mode"] = MODE_BYPASSED
    prompt = graph_to_prompt(workflow, definitions)
    result = client.run(prompt)
    assert "bypassed" in json.loads(result.outputs[find_node(prompt, "PSAReport")]["text"][0])["note"]
    assert json.loads(result.outputs[find_node(prompt, "PSACompare")]["text"][0])["psnr"] is None, "the same video"


@pytest.mark.slow
def test_calibrate_proposes_and_stores_a_preset(client, server, definitions, workflow):
    prompt = graph_to_prompt(workflow, definitions)
    sampler = prompt[find_node(prompt, "KSampler", model=[find_node(prompt, "PSAPatch"), 0])]["inputs"]
    model = prompt[find_node(prompt, "PSAPatch")]["inputs"]["model"]
    wanted = {"UNETLoader", "ModelSamplingSD3", "PSADemoScene", "EmptyHunyuanLatentVideo"}
    short = {node: entry for node, entry in prompt.items() if entry["class_type"] in wanted}
    inputs = {"model": model, "positive": sampler["positive"], "negative": sampler["negative"]}
    inputs |= {"latent_image": sampler["latent_image"], "goal": "error", "target": 0.2, "preset": "auto", "seed": 1}
    inputs |= {
        "steps": 3,
        "cfg": 1.0,
        "start_percent": 0.25,
        "min_tokens": 0,
        "save_as": "tried",
        "filename_prefix": "",
    }
    short["calibrate"] = {"class_type": "PSACalibrate", "inputs": inputs}
    told = client.run(short).outputs["calibrate"]
    found = json.loads(told["text"][0])
    errors = [point["error"] for point in found["points"]]
    # Over three steps of one short clip, neighbours may cross by a hair; what is proposed stops at the first too large.
    assert all(later > 0.95 * sooner for sooner, later in itertools.pairwise(errors)), "more sparsity is more error"
    assert errors[-1] > 4 * errors[0]
    inside = [point for point in found["points"] if point["sparsity"] <= found["sparsity"]]
    assert found["reached"] == (errors[0] <= 0.2)
    assert not found["reached"] or max(point["error"] for point in inside) <= 0.2
    assert picture(client, told["images"][0])[0][0] == 1000

    stored = json.loads((server.home / "user" / "psa_presets" / "tried.json").read_text(encoding="utf-8"))
    assert stored["sparsity"] == found["sparsity"]
    choices = client.get("/object_info/PSAPatch")["PSAPatch"]["input"]["required"]["preset"][1]["options"]
    assert "user/tried" in choices


@pytest.mark.slow
def test_a_broken_preset_file_is_said_by_the_node_that_chose_it(client, server, definitions, workflow):
    folder = server.home / "user" / "psa_presets"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.json").write_text('{"shares": {"1": 2}}', encoding="utf-8")
    prompt = graph_to_prompt(workflow, definitions)
    patch = prompt[find_node(prompt, "PSAPatch")]
    patch["inputs"]["preset"] = "user/broken"
    loaders = {
        name: prompt[name] for name in prompt if prompt[name]["class_type"] in ("UNETLoader", "ModelSamplingSD3")
    }
    patched = {"patch": patch, "end": {"class_type": "PreviewAny", "inputs": {"source": ["patch", 0]}}}
    with pytest.raises(
        PromptFailed, match=r"refused.*PSAPatch.*input preset: 'user/broken'.*broken\.json: shares: .* was given"
    ):
        client.run(loaders | patched)

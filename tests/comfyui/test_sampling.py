"""The promises that need a sampling run on a real server, at a size that takes seconds: 9 frames of 384 x 384.

Not smaller: ComfyUI leaves out progress messages that follow each other within 0.1 s.

Latents are compared bit for bit; ComfyUI's node cache is emptied where a result must be computed again.
"""

import copy
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load

from comfyui_psa.workshop.tools import demo
from comfyui_psa.workshop.tools.client import PromptFailed, PromptInterrupted
from comfyui_psa.workshop.tools.figures import find_node
from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.workflow import MODE_BYPASSED, graph_to_prompt, load_workflow

STEPS = 4


@pytest.fixture
def workflow():
    """The demo workflow at a small size."""
    found = load_workflow(WORKFLOWS / "psa_demo.json")
    for node in found["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "EmptyHunyuanLatentVideo":
            values[:3] = [384, 384, 9]
        if node["type"] == "KSampler":
            values[2] = STEPS
        if node["type"] == "PSAPatch":
            values[values.index(4096)] = 0
    return found


def to_latents(prompt):
    """Store the samplers' latents and leave the decoding out."""
    prompt = {node: entry for node, entry in prompt.items() if entry["class_type"] not in ("VAEDecode", "VAELoader")}
    prompt = {n: entry for n, entry in prompt.items() if entry["class_type"] not in ("SaveAnimatedWEBP", "PSACompare")}
    for entry in prompt.values():
        if entry["class_type"] == "PSAReport":
            entry["inputs"].pop("images", None)
    for name, node in samplers(prompt).items():
        inputs = {"samples": [node, 0], "filename_prefix": f"test/{name}"}
        prompt[f"save {name}"] = {"class_type": "SaveLatent", "inputs": inputs}
    return prompt


def samplers(prompt):
    """Sampler ids by title, "dense" and "psa"."""
    titles = {"KSampler: dense": "dense", "KSampler: PSA": "psa"}
    return {
        titles[entry["_meta"]["title"]]: node for node, entry in prompt.items() if entry["class_type"] == "KSampler"
    }


def set_seed(prompt, seed):
    for node in samplers(prompt).values():
        prompt[node]["inputs"]["seed"] = seed


def latents(client, prompt, **options):
    """Run a prompt and return its latents under "dense" and "psa"."""
    result = client.run(prompt, **options)
    found = {}
    for name in samplers(prompt):
        (entry,) = result.outputs[f"save {name}"]["latents"]
        found[name] = load(client.download("/view?" + urllib.parse.urlencode(entry)))["latent_tensor"]
    return found


def forget_everything(client):
    """Empty the node cache and drop the loaded models."""
    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)  # the server does it between two prompts


@pytest.mark.slow(seconds=30)
def test_the_demo_runs_at_a_small_size(client, definitions, workflow, tmp_path):
    prompt = graph_to_prompt(workflow, definitions)
    prompt[find_node(prompt, "EmptyHunyuanLatentVideo")]["inputs"]["length"] = 5  # decoding takes most of the time
    tried = client.run(demo.warm_up(prompt))
    assert [len(tried.step_seconds(node)) for node in demo.samplers_of(prompt).values()] == [2, 2]
    result = client.run(prompt)
    report = demo.report_of(prompt, result)
    videos = demo.download_videos(client, prompt, result)
    figures = demo.write_results(tmp_path, videos, demo.samplers_of(prompt), result, report)

    assert report["grid"] == [2, 24, 24]
    assert report["backend"] == "torch"
    assert len(figures.sparsity) == len(figures.dense_seconds) == len(figures.psa_seconds) == STEPS
    # The steps at 0 and 25 % of the schedule lie before the demo's start_percent of 0.30.
    assert figures.sparsity[:2] == [None, None]
    assert figures.sparse_steps == [2, 3], "the others are sparse"
    for step in figures.sparse_steps:
        assert figures.sparsity[step] == pytest.approx(0.85, abs=0.01)
    assert 10 < figures.psnr < 100
    assert 0 < figures.ssim < 1

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in page.replace("http://www.w3.org", ""), "the page needs nothing from outside"
    assert f"{figures.psnr:.2f} dB" in page
    for name in ("dense.webp", "psa.webp", "side_by_side.mp4", "report.png", "figures.json"):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.slow
def test_the_page_hears_what_a_setting_means_while_the_server_samples(client, definitions, workflow):
    """The picture follows a slider that is dragged during a run: the server answers, and right, while it samples."""
    prompt = graph_to_prompt(workflow, definitions)
    (patch,) = (entry for entry in prompt.values() if entry["class_type"] == "PSAPatch")
    shown = {name: value for name, value in patch["inputs"].items() if not isinstance(value, list)}
    done, answers = threading.Event(), []

    def drag():
        while not done.wait(0.05):
            sparsity = 0.5 + 0.4 * (len(answers) % 10) / 10
            asked = {"node": "PSAPatch", "inputs": shown | {"sparsity": sparsity}, "linked": ["model"]}
            answers.append(client.post("/psa/check", asked))
            assert answers[-1]["figures"]["sparsity"] == pytest.approx(sparsity, abs=1e-3)

    with ThreadPoolExecutor(1) as page:
        dragging = page.submit(drag)
        try:
            client.run(to_latents(prompt))
        finally:
            done.set()
        dragging.result()
    assert len(answers) > 1, "the run did not hold the answers up until its end"


@pytest.mark.slow
def test_sparsity_0_is_the_stock_result_bit_for_bit(client, definitions, workflow):
    prompt = to_latents(graph_to_prompt(workflow, definitions))
    prompt[find_node(prompt, "PSAPatch")]["inputs"]["sparsity"] = 0.0
    found = latents(client, prompt)
    assert torch.equal(found["psa"], found["dense"])


@pytest.mark.slow
@pytest.mark.parametrize("bypassed", [["PSAPatch"], ["PSAPatch", "PSAReport"]], ids=["patch", "patch and report"])
def test_bypassed_is_the_stock_result_bit_for_bit(client, definitions, workflow, bypassed):
    sparse = to_latents(graph_to_prompt(workflow, definitions))
    before = latents(client, sparse)
    assert not torch.equal(before["psa"], before["dense"])

    for node in workflow["nodes"]:
        if node["type"] in bypassed:
            node["mode"] = MODE_BYPASSED
    prompt = to_latents(graph_to_prompt(workflow, definitions))
    assert "PSAPatch" not in [entry["class_type"] for entry in prompt.values()]
    # Without its cache the server samples both again, with a model that a patch has been hanging on.
    forget_everything(client)
    after = latents(client, prompt)
    assert torch.equal(after["psa"], before["dense"])
    assert torch.equal(after["dense"], before["dense"])


@pytest.mark.slow
def test_an_interrupted_run_leaves_the_next_one_right(client, definitions, workflow):
    prompt = to_latents(graph_to_prompt(workflow, definitions))
    set_seed(prompt, 7)
    sampler = samplers(prompt)["psa"]

    def interrupt_in_the_sparse_part(progress):
        if progress.node == sampler and progress.step >= STEPS - 2:
            client.interrupt()

    long = copy.deepcopy(prompt)
    long[sampler]["inputs"]["steps"] = 200
    (patch,) = (node for node in long.values() if node["class_type"] == "PSAPatch")
    patch["inputs"]["start_percent"] = 0.0  # of 200 steps, the first would otherwise all be dense
    with pytest.raises(PromptInterrupted):
        client.run(long, interrupt_in_the_sparse_part)
    after_interruption = latents(client, prompt)
    forget_everything(client)
    undisturbed = latents(client, prompt)
    assert torch.equal(after_interruption["psa"], undisturbed["psa"])
    assert torch.equal(after_interruption["dense"], undisturbed["dense"])


@pytest.mark.slow
def test_an_error_in_a_node_names_the_node(client, definitions, workflow):
    prompt = to_latents(graph_to_prompt(workflow, definitions))
    prompt[find_node(prompt, "PSAPatch")]["inputs"]["pyramid"] = "3: 0.5"
    with pytest.raises(PromptFailed, match=r"refused part of the prompt: node \S+ \(PSAPatch\): .*input pyramid: "):
        client.run(prompt)

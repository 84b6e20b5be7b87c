"""The pack in a real ComfyUI, driven over its API with the demo's trained model at a small size."""

import copy
import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def small_prompt(definitions, sparsity=0.5, bypass=False):
    """The demo workflow at 9 frames of 256x256 and 4 steps: 768 tokens."""
    from devtools.workflow import graph_to_prompt, load_workflow

    graph = load_workflow(ROOT / "workflows" / "psa_demo.json")
    for node in graph["nodes"]:
        if bypass and node["type"] == "PSAPatch":
            node["mode"] = 4
    prompt = graph_to_prompt(graph, definitions)
    for entry in prompt.values():
        inputs = entry["inputs"]
        if entry["class_type"] == "PSAPatch":
            inputs |= {"sparsity": sparsity, "min_tokens": 0, "start_percent": 0.1, "block_q": "32", "block_kv": "32"}
        if entry["class_type"] == "KSampler":
            inputs["steps"] = 4
        if entry["class_type"] == "EmptyHunyuanLatentVideo":
            inputs |= {"width": 256, "height": 256, "length": 9}
    return prompt


def without_report(prompt):
    """The prompt with PSA Report cut out: a stock model carries no report."""
    prompt = copy.deepcopy(prompt)
    (node,) = (node for node, entry in prompt.items() if entry["class_type"] == "PSAReport")
    samples = prompt.pop(node)["inputs"]["samples"]
    for entry in prompt.values():
        entry["inputs"] = {key: samples if value == [node, 0] else value for key, value in entry["inputs"].items()}
    return prompt


def videos(client, prompt):
    """Digest of the frames that the dense and the PSA branch saved, and the run's result."""
    from devtools import figures
    from devtools.demo import _download
    from devtools.pictures import read_frames

    result = client.run(prompt)
    digests = {}
    for name in ("dense", "psa"):
        node = figures.find_node(prompt, "SaveAnimatedWEBP", filename_prefix=f"psa_demo/{name}")
        digests[name] = hashlib.sha256(read_frames(_download(client, result, node)).tobytes()).hexdigest()
    return digests, result


def reseeded(prompt, seed):
    """The same prompt with another seed, so that the server's cache does not answer it."""
    prompt = copy.deepcopy(prompt)
    for entry in prompt.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"]["seed"] = seed
    return prompt


def test_importing_the_pack_is_light():
    script = f"""
import importlib.util, sys, time, torch
began = time.perf_counter()
spec = importlib.util.spec_from_file_location("psa", r"{ROOT / "__init__.py"}", submodule_search_locations=[r"{ROOT}"])
module = importlib.util.module_from_spec(spec); sys.modules["psa"] = module; spec.loader.exec_module(module)
import psa.kernels, psa.patching.patch
print(time.perf_counter() - began, [name for name in ("triton", "diffusers", "huggingface_hub") if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    seconds, heavy = out.split(maxsplit=1)
    # torch itself may bring triton; the pack must not bring anything.
    torch_alone = "import sys, torch; print('triton' in sys.modules)"
    brought = subprocess.run([sys.executable, "-c", torch_alone], capture_output=True, text=True, check=True).stdout
    assert float(seconds) < 1
    assert heavy.strip() == ("['triton']" if brought.strip() == "True" else "[]")


def test_nodes_are_listed_with_slider_and_tooltips(definitions):
    patch = definitions["PSAPatch"]
    assert patch["category"] == "model/patch"
    sparsity = patch["input"]["required"]["sparsity"][1]
    assert (sparsity["min"], sparsity["max"], sparsity["default"], sparsity["display"]) == (0.0, 0.97, 0.85, "slider")
    for name, spec in patch["input"]["required"].items():
        assert spec[1]["tooltip"], name
    assert {"PSAReport", "PSADemoScene"} <= set(definitions)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_servers_definitions(path, definitions):
    from devtools.workflow import find_problems, load_workflow

    assert find_problems(load_workflow(path), definitions) == []


def test_demo_workflow_meets_the_slider(client, definitions):
    digests, result = videos(client, small_prompt(definitions, 0.6))
    assert digests["dense"] != digests["psa"]
    (text,) = (output["text"][0] for output in result.outputs.values() if "text" in output)
    report = json.loads(text)
    sparse = [step["sparsity"] for step in report["steps"] if step["sparsity"] is not None]
    assert sparse == pytest.approx([0.6] * len(sparse), abs=0.01)
    assert len(sparse) >= 3
    assert report["grid"] == [3, 16, 16]
    assert len(report["level_map"]["token_levels"]) == 768


def test_sparsity_zero_and_bypass_are_stock_bit_for_bit(client, definitions):
    zero, _ = videos(client, small_prompt(definitions, 0.0))
    assert zero["psa"] == zero["dense"]
    bypassed, _ = videos(client, without_report(small_prompt(definitions, bypass=True)))
    assert bypassed["psa"] == bypassed["dense"] == zero["dense"]


def test_an_interrupted_run_leaves_the_next_one_right(client, definitions):
    from devtools.client import PromptInterrupted

    expected, _ = videos(client, reseeded(small_prompt(definitions), 7))
    stopped = threading.Event()

    def stop(progress):
        if progress.class_type == "KSampler" and progress.step == 2 and not stopped.is_set():
            stopped.set()
            client.interrupt()

    longer = reseeded(small_prompt(definitions), 8)
    for entry in longer.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"]["steps"] = 40
    with pytest.raises(PromptInterrupted):
        client.run(longer, stop)
    client.run(reseeded(small_prompt(definitions), 9))
    again = reseeded(small_prompt(definitions), 7)
    client.post("/free", {"unload_models": False, "free_memory": True})
    assert videos(client, again)[0] == expected


def test_bad_input_names_the_node_and_the_input(client, definitions):
    from devtools.client import PromptFailed

    prompt = small_prompt(definitions)
    for entry in prompt.values():
        if entry["class_type"] == "PSAPatch":
            entry["inputs"]["dense_blocks"] = "first"
    with pytest.raises(PromptFailed, match=r"PSA Patch, input dense_blocks: 'first' was given; allowed"):
        client.run(prompt)

"""Workflows that an earlier state of the pack saved, kept as they were: each value still belongs to its input."""

import json
import urllib.error
from pathlib import Path

import pytest

from comfyui_psa.workshop.tools.workflow import FILE_INPUTS, find_problems, graph_to_prompt, load_workflow

SAVED = Path(__file__).with_name("saved")
FILES = sorted(SAVED.glob("*/*.json"))
PATCH_INPUTS = {
    "0.1.0": [
        "sparsity", "preset", "start_percent", "end_percent", "mode", "pyramid", "tail", "order", "importance",
        "block_q", "block_kv", "dense_blocks", "min_tokens", "backend", "verbose", "precision",
    ],
}  # fmt: skip
"""The inputs of PSA Patch in the order in which that version saved them."""


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_an_earlier_workflow_loads_with_its_values(definitions, path):
    workflow = load_workflow(path)
    prompt = graph_to_prompt(workflow, definitions)
    saved = [node for node in workflow["nodes"] if node["type"] == "PSAPatch"]
    assert saved
    for node in saved:
        inputs = prompt[str(node["id"])]["inputs"]
        for name, value in zip(PATCH_INPUTS[path.parent.name], node["widgets_values"], strict=True):
            assert inputs[name] == value
    # Inputs that came later take their defaults: fewer saved values than a node has now are no problem.
    problems = [problem for problem in find_problems(workflow, definitions) if "PSA" in problem]
    assert [problem for problem in problems if "widget values, not" not in problem] == []


def test_a_prompt_of_an_earlier_version_has_all_that_is_required(definitions):
    """A prompt sent over the API names its inputs: one that came later and were required would refuse it."""
    required = set(definitions["PSAPatch"]["input"]["required"])
    assert required <= {"model", *PATCH_INPUTS["0.1.0"]}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_an_earlier_prompt_is_taken_by_a_real_server(client, definitions, path):
    """What the server refuses of it is the files that it does not have, and nothing else of the pack's own nodes."""
    prompt = graph_to_prompt(load_workflow(path), definitions)
    try:
        answer = client.post("/prompt", {"prompt": prompt, "client_id": client.client_id})
        client.post("/queue", {"delete": [answer["prompt_id"]]})
        client.post("/interrupt", {"prompt_id": answer["prompt_id"]})
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
        assert answer["error"]["type"] == "prompt_outputs_failed_validation"
    wrong = [
        (prompt[node]["class_type"], reason["details"])
        for node, found in answer["node_errors"].items()
        for reason in found["errors"]
        if prompt[node]["class_type"].startswith("PSA") and not any(name in reason["details"] for name in FILE_INPUTS)
    ]
    assert wrong == []


@pytest.mark.slow
def test_inputs_that_have_gone_are_named_in_the_log_of_a_real_server(server, client, definitions):
    """Sent over the API, one as a value and one over a link: both are named once, and the node does its work."""
    asked = definitions["PSAPyramid"]["input"]["required"]
    inputs = {name: options["default"] for name, (_, options) in asked.items()}
    gone = {"sixteenth": 0.1, "blok_q": ["text", 0]}
    prompt = {
        "text": {"class_type": "PrimitiveString", "inputs": {"value": "128"}},
        "node": {"class_type": "PSAPyramid", "inputs": inputs | gone},
        "out": {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}},
    }
    assert client.run(prompt, timeout=300).outputs["out"]["text"]
    log = server.log.read_text(encoding="utf-8")
    assert log.count("PSA Pyramid has no input 'sixteenth', and its value is not used; take it out; ") == 1
    assert log.count("PSA Pyramid has no input 'blok_q', and its value is not used; rename it to block_q if ") == 1

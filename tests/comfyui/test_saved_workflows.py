"""Workflows that an earlier state of the pack saved, kept as they were: each value still belongs to its input."""

from pathlib import Path

import pytest

from comfyui_psa.devtools.workflow import find_problems, graph_to_prompt, load_workflow

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

"""Workflow conversion and checking, on small graphs and hand-made definitions; no server."""

import pytest

from comfyui_psa.workshop.tools.canvas import Canvas
from comfyui_psa.workshop.tools.terminal import Failure
from comfyui_psa.workshop.tools.workflow import MODE_BYPASSED, MODE_MUTED, find_problems, graph_to_prompt, load_workflow

DEFINITIONS = {
    "Load": {
        "input": {"required": {"unet_name": [["there.safetensors"], {}]}},
        "output": ["MODEL", "VAE"],
    },
    "Patch": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "strength": ["FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0}],
                "mode": ["COMBO", {"options": ["a", "b"]}],
            }
        },
        "output": ["MODEL"],
    },
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20, "min": 1}],
            },
            "optional": {"vae": ["VAE", {}]},
        },
        "output": ["LATENT"],
    },
}


@pytest.fixture
def workflow(tmp_path):
    canvas = Canvas(DEFINITIONS)
    with canvas.group("All"):
        canvas.note("Read me", 80)
        loaded = canvas.add("Load", unet_name="missing.safetensors")
        patched = canvas.add("Patch", model=loaded)
        canvas.add("Sample", model=patched, seed=3, steps=8, vae=loaded)
    canvas.save(tmp_path / "workflow.json")
    return load_workflow(tmp_path / "workflow.json")


def node_of(workflow, kind):
    (found,) = (node for node in workflow["nodes"] if node["type"] == kind)
    return found


def test_conversion(workflow):
    prompt = graph_to_prompt(workflow, DEFINITIONS)
    inputs = {entry["class_type"]: entry["inputs"] for entry in prompt.values()}
    assert inputs == {
        "Load": {"unet_name": "missing.safetensors"},
        "Patch": {"model": ["2", 0], "strength": 0.5, "mode": "a"},
        "Sample": {"model": ["3", 0], "vae": ["2", 1], "seed": 3, "steps": 8},
    }


def test_the_seeds_companion_is_skipped(workflow):
    assert node_of(workflow, "Sample")["widgets_values"] == [3, "fixed", 8]


def test_a_bypassed_node_hands_its_input_on(workflow):
    node_of(workflow, "Patch")["mode"] = MODE_BYPASSED
    prompt = graph_to_prompt(workflow, DEFINITIONS)
    assert {entry["class_type"] for entry in prompt.values()} == {"Load", "Sample"}
    assert prompt["4"]["inputs"]["model"] == ["2", 0]


def test_a_muted_node_is_gone_with_its_links(workflow):
    node_of(workflow, "Patch")["mode"] = MODE_MUTED
    prompt = graph_to_prompt(workflow, DEFINITIONS)
    assert "model" not in prompt["4"]["inputs"]


def test_a_link_replaces_a_widget(workflow):
    sample = node_of(workflow, "Sample")
    sample["inputs"].append({"name": "steps", "type": "INT", "widget": {"name": "steps"}, "link": 9})
    workflow["links"].append([9, 2, 0, 4, 2, "INT"])
    assert graph_to_prompt(workflow, DEFINITIONS)["4"]["inputs"]["steps"] == ["2", 0]


def test_an_unknown_class_is_named(workflow):
    node_of(workflow, "Patch")["type"] = "Elsewhere"
    with pytest.raises(Failure, match="Elsewhere"):
        graph_to_prompt(workflow, DEFINITIONS)
    assert any("Elsewhere" in problem for problem in find_problems(workflow, DEFINITIONS))


def test_a_right_workflow_has_no_problems(workflow):
    assert find_problems(workflow, DEFINITIONS) == []


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        ("Patch", [1.5, "a"], "not between"),
        ("Patch", ["0.5", "a"], "not of type FLOAT"),
        ("Patch", [0.5, "c"], "not one of"),
        ("Patch", [0.5], "1 widget values, not 2"),
        ("Sample", [3, "fixed", True], "not of type INT"),
    ],
)
def test_wrong_widgets_are_found(workflow, kind, values, told):
    node_of(workflow, kind)["widgets_values"] = values
    assert any(told in problem for problem in find_problems(workflow, DEFINITIONS))


def test_wrong_links_are_found(workflow):
    workflow["links"][0][5] = "VAE"
    assert any("of type VAE" in problem for problem in find_problems(workflow, DEFINITIONS))
    node_of(workflow, "Sample")["inputs"][0]["link"] = None
    problems = find_problems(workflow, DEFINITIONS)
    assert any("required input is not connected" in problem for problem in problems)
    assert any("do not list it" in problem for problem in problems)


def test_a_widget_that_links_of_several_types_can_replace(tmp_path):
    rate = {"widgetType": "FLOAT", "default": 25.0, "min": 1.0}
    definitions = {
        "Count": {"input": {"required": {}}, "output": ["INT"]},
        "Film": {"input": {"required": {"rate": ["FLOAT,INT", rate]}}, "output": []},
    }
    canvas = Canvas(definitions)
    with canvas.group("All"):
        canvas.add("Film", rate=24.0)
        canvas.add("Count")
    canvas.save(tmp_path / "workflow.json")
    workflow = load_workflow(tmp_path / "workflow.json")
    film = node_of(workflow, "Film")
    assert find_problems(workflow, definitions) == []
    assert graph_to_prompt(workflow, definitions)["1"]["inputs"] == {"rate": 24.0}
    film["widgets_values"] = [0.5]
    assert any("not between" in problem for problem in find_problems(workflow, definitions))
    film["widgets_values"] = [24.0]
    film["inputs"].append({"name": "rate", "type": "FLOAT,INT", "widget": {"name": "rate"}, "link": 1})
    workflow["links"].append([1, 2, 0, 1, 0, "INT"])
    node_of(workflow, "Count")["outputs"][0]["links"] = [1]
    assert find_problems(workflow, definitions) == []

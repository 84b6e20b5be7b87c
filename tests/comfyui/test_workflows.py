"""The committed workflows fit the node definitions of a real server and are what `dev.py workflows` writes."""

import pytest
from PIL import Image

from comfyui_psa.workshop.tools.build_workflows import build_all
from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.workflow import NOTES, find_problems, graph_to_prompt, load_workflow

NAMES = [
    "cogvideox15_5b_psa",
    "cogvideox15_i2v_psa",
    "cogvideox5b_psa_4step_lora",
    "cogvideox5b_psa_50step",
    "psa_demo",
    "wan21_i2v_psa",
    "wan21_t2v_psa",
    "wan22_a14b_t2v_psa",
    "wan22_ti2v_5b_psa",
]


def test_every_workflow_is_checked_here():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_template_has_a_picture(name):
    with Image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.size == (512, 384)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_fits_the_servers_definitions(definitions, name):
    workflow = load_workflow(WORKFLOWS / f"{name}.json")
    assert find_problems(workflow, definitions) == []
    assert any(node["type"] in NOTES for node in workflow["nodes"]), "a note says which files to put where"
    classes = [entry["class_type"] for entry in graph_to_prompt(workflow, definitions).values()]
    assert classes.count("PSAPatch") == classes.count("PSAReport") == (2 if "a14b" in name else 1)


def test_the_files_are_what_the_generator_writes(definitions, tmp_path):
    for path in build_all(definitions, tmp_path):
        committed = (WORKFLOWS / path.name).read_text(encoding="utf-8")
        assert committed == path.read_text(encoding="utf-8"), "a schema has changed: run `python dev.py workflows`"


def test_only_the_sampler_behind_the_patch_takes_the_patched_model(definitions):
    prompt = graph_to_prompt(load_workflow(WORKFLOWS / "psa_demo.json"), definitions)
    models = [prompt[e["inputs"]["model"][0]]["class_type"] for e in prompt.values() if e["class_type"] == "KSampler"]
    assert sorted(models) == ["ModelSamplingSD3", "PSAPatch"]

"""The committed workflows fit the node definitions of a real server and are what `dev.py workflows` writes."""

import importlib.resources
import json
import re

import pytest
from PIL import Image

from comfyui_psa.loading.download import FILE, REPOSITORY
from comfyui_psa.workshop.tools.build_workflows import build_all
from comfyui_psa.workshop.tools.client import Progress, PromptResult
from comfyui_psa.workshop.tools.demo import most_seconds, phases_of, samplers_of, warm_up
from comfyui_psa.workshop.tools.notes_chinese import in_chinese
from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.workflow import NOTES, find_problems, graph_to_prompt, load_workflow

NAMES = [
    "cogvideox15_5b_psa",
    "cogvideox15_i2v_psa",
    "cogvideox5b_psa_4step_lora",
    "cogvideox5b_psa_50step",
    "hunyuanvideo15_t2v_psa",
    "ltx2_t2v_psa",
    "psa_demo",
    "wan21_i2v_psa",
    "wan21_t2v_psa",
    "wan22_a14b_i2v_psa",
    "wan22_a14b_t2v_psa",
    "wan22_a14b_t2v_psa_4step_lora",
    "wan22_ti2v_5b_psa",
]


CHINESE = "说明"
NEED_DOWNLOADS = [name for name in NAMES if name != "psa_demo"]
STOCK = importlib.resources.files("comfyui_workflow_templates_json") / "templates"
"""ComfyUI's own templates: which files there are, where, and how much they take together."""


def offered(workflow):
    """The files that a workflow offers to download, {(name, address, folder)}, also those of subgraphs."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    entries = [
        entry
        for graph in graphs
        for node in graph.get("nodes", ())
        for entry in node.get("properties", {}).get("models") or ()
    ]
    return {(entry["name"], entry["url"].split("?")[0], entry["directory"]) for entry in entries}


def note_of(workflow, title="Note"):
    """The text of its note; `title`: which one, by language."""
    notes = {node["title"]: node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES}
    assert set(notes) == {"Note", CHINESE}
    return notes[title]


def sizes_in(note):
    """{(folder, name): GB} of a note."""
    found = re.findall(r"^- `models/(\w+)/`: `(\S+)` \((\d+(?:\.\d+)?) GB\)$", note, re.MULTILINE)
    return {(folder, name): float(size) for folder, name, size in found}


@pytest.fixture(scope="module")
def stock():
    """Name of a template of ComfyUI's -> the files that it offers to download."""
    return {
        path.name.removesuffix(".json"): offered(json.loads(path.read_text(encoding="utf-8")))
        for path in STOCK.iterdir()
        if path.name.endswith(".json") and not path.name.startswith("index")
    }


def test_every_workflow_is_checked_here():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_template_has_a_picture(name):
    with Image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.size == (512, 384)
        if name in NEED_DOWNLOADS:
            assert picture.convert("L").crop((490, 0, 512, 384)).getextrema()[1] < 60, "its words run over the edge"


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


def test_the_terminal_says_of_which_video_each_phase_of_the_demo_is(definitions):
    titles = phases_of(graph_to_prompt(load_workflow(WORKFLOWS / "psa_demo.json"), definitions)).values()
    assert sorted(titles) == [
        *(f"{work}, {video}" for work in ("Decoding", "Sampling") for video in ("PSA", "dense")),
        *("Saving, PSA", "Saving, dense", "Saving, side by side"),
    ]


def test_both_samplers_of_the_demo_have_run_before_they_are_timed(definitions):
    prompt = graph_to_prompt(load_workflow(WORKFLOWS / "psa_demo.json"), definitions)
    short = warm_up(prompt)
    outputs = {entry["inputs"]["source"][0] for entry in short.values() if entry["class_type"] == "PreviewAny"}
    assert outputs == set(samplers_of(prompt).values())
    for node, entry in short.items():
        if node in prompt:
            changed = {"steps": 2} if entry["class_type"] == "KSampler" else {}
            assert entry["inputs"] == prompt[node]["inputs"] | changed, "the same work, and less of it"
    assert {entry["class_type"] for entry in short.values()} & {"VAEDecode", "SaveAnimatedWEBP"} == set()
    # What is told beforehand: 16 steps for each sampler, as long as the last dense one of the warm-up.
    dense = samplers_of(prompt)["dense"]
    tried = PromptResult("", progress=[Progress(dense, "KSampler", step, 2, (0, 9, 11)[step]) for step in range(3)])
    assert most_seconds(prompt, tried) == 2 * 16 * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_note_is_there_in_chinese_with_the_same_files_and_figures(name):
    workflow = load_workflow(WORKFLOWS / f"{name}.json")
    english, chinese = note_of(workflow), note_of(workflow, CHINESE)
    for same in (r"^## ", r"^- `\S+`", r"https://\S+", r"^    .+", r"\d+\.\d+", r"\d{2,}"):
        found, expected = (sorted(re.findall(same, text, re.MULTILINE)) for text in (chinese, english))
        assert found == expected, same
    words = re.sub(r"^    .+|`[^`]+`|https://\S+", "", chinese, flags=re.MULTILINE)
    assert not re.search(r"[A-Za-z]{2,}(?: [A-Za-z]{2,}){3,}", words), "no English sentence is left"


def test_a_paragraph_without_a_translation_is_named():
    with pytest.raises(LookupError, match="no translation of: Nobody has translated this"):
        in_chinese("## Wan 2.1 text to video, 1.3B\n\nNobody has\ntranslated this.")


@pytest.mark.parametrize("name", NEED_DOWNLOADS)
def test_every_file_to_download_is_one_that_comfyui_offers_itself(name, stock):
    files = offered(load_workflow(WORKFLOWS / f"{name}.json"))
    assert files
    if "cogvideox" in name:  # ComfyUI has no template of it
        files = {entry for entry in files if entry[2] == "text_encoders"}
    assert files <= set().union(*stock.values())


@pytest.mark.parametrize("name", [name for name in NEED_DOWNLOADS if "cogvideox" in name])
def test_a_cogvideox_file_is_downloaded_to_where_the_notes_commands_put_it(name):
    workflow = load_workflow(WORKFLOWS / f"{name}.json")
    note = note_of(workflow)
    lines = re.findall(r'hf download (\S+) (?:--include "(\w+)/\*"|(\S+)) --local-dir models/(\w+)/?(\S*)', note)
    put = {(repository, folder): f"{inside}/{part}/" if part else "" for repository, part, _, folder, inside in lines}
    files = offered(workflow)
    assert {folder for _, _, folder in files} == {"text_encoders", "vae"} | ({"loras"} if "4step" in name else set())
    for file, address, folder in files:
        repository, path = address.removeprefix("https://huggingface.co/").split("/resolve/main/")
        assert f"models/{folder}/{file}` (" in note or folder == "loras"
        if folder == "loras":  # fetched by PSA LoRA Download, which keeps the repository's folders
            assert (repository, path, file) == (REPOSITORY, FILE, FILE)
        else:
            assert file == put[repository, folder] + path.rsplit("/", 1)[-1]


@pytest.mark.parametrize("name", NEED_DOWNLOADS)
def test_every_file_in_a_widget_can_be_downloaded(name):
    for node in load_workflow(WORKFLOWS / f"{name}.json")["nodes"]:
        chosen = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        assert chosen == {entry["name"] for entry in node["properties"].get("models", ())}


@pytest.mark.parametrize("name", [name for name in NEED_DOWNLOADS if "cogvideox" not in name])
def test_files_in_the_note_and_to_download_are_the_same(name):
    workflow = load_workflow(WORKFLOWS / f"{name}.json")
    assert set(sizes_in(note_of(workflow))) == {(folder, name) for name, _, folder in offered(workflow)}


def test_sizes_in_the_notes_add_up_to_what_comfyui_says(stock):
    groups = json.loads((STOCK / "index.json").read_text(encoding="utf-8"))
    totals = {entry["name"]: entry.get("size", 0) / 1e9 for group in groups for entry in group["templates"]}
    compared = 0
    for name in NEED_DOWNLOADS:
        workflow = load_workflow(WORKFLOWS / f"{name}.json")
        names = {file for file, _, _ in offered(workflow)}
        for other, files in stock.items():
            if {file for file, _, _ in files} == names and totals.get(other):
                assert sum(sizes_in(note_of(workflow)).values()) == pytest.approx(totals[other], rel=0.01), other
                compared += 1
    assert compared


def test_either_expert_of_a_4_step_template_has_its_own_lora(definitions):
    prompt = graph_to_prompt(load_workflow(WORKFLOWS / "wan22_a14b_t2v_psa_4step_lora.json"), definitions)
    experts = []
    for sampler in (entry["inputs"] for entry in prompt.values() if entry["class_type"] == "KSamplerAdvanced"):
        assert (sampler["steps"], sampler["cfg"]) == (4, 1.0)
        patch = prompt[sampler["model"][0]]["inputs"]
        assert patch["preset"] == "wan-4step-lora"
        lora = prompt[prompt[patch["model"][0]]["inputs"]["model"][0]]["inputs"]
        model = prompt[lora["model"][0]]["inputs"]
        experts.append(
            (
                sampler["start_at_step"],
                *(re.findall("high|low", file)[0] for file in (lora["lora_name"], model["unet_name"])),
            )
        )
    assert sorted(experts) == [(0, "high", "high"), (2, "low", "low")]


def test_picture_and_sound_are_equally_long(definitions):
    prompt = graph_to_prompt(load_workflow(WORKFLOWS / "ltx2_t2v_psa.json"), definitions)
    inputs = {entry["class_type"]: entry["inputs"] for entry in prompt.values()}
    assert inputs["EmptyLTXVLatentVideo"]["length"] == inputs["LTXVEmptyLatentAudio"]["frames_number"]
    rates = {inputs["LTXVConditioning"]["frame_rate"], inputs["LTXVEmptyLatentAudio"]["frame_rate"]}
    assert rates == {inputs["CreateVideo"]["fps"]}


def test_templates_are_long_enough_to_be_sparse(definitions):
    """From what the models' VAEs make of a video, not from our own readers: LTX-2 32x32x8, HunyuanVideo 1.5 16x16x4."""
    for name, latent, space, time in (
        ("ltx2_t2v_psa", "EmptyLTXVLatentVideo", 32, 8),
        ("hunyuanvideo15_t2v_psa", "EmptyHunyuanVideo15Latent", 16, 4),
    ):
        prompt = graph_to_prompt(load_workflow(WORKFLOWS / f"{name}.json"), definitions)
        inputs = {entry["class_type"]: entry["inputs"] for entry in prompt.values()}
        size = inputs[latent]
        assert size["width"] % space == size["height"] % space == (size["length"] - 1) % time == 0
        tokens = (size["width"] // space) * (size["height"] // space) * ((size["length"] - 1) // time + 1)
        assert tokens > inputs["PSAPatch"]["min_tokens"]

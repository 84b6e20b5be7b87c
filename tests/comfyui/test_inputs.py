"""Wrong inputs of every node: refused before the run by the sentence that the node itself would end with, and whatever
is sent, the answer is a success, ComfyUI's own refusal, or a sentence of the pack.
"""

import asyncio
import fractions
import json
import re
import urllib.error

import numpy
import pytest
import torch

from comfyui_psa.choices.errors import InputError, NodeError
from comfyui_psa.choices.presets import load_presets

SENTENCE = re.compile(r"^PSA [A-Z][\w ]*, input [\w, ]+: .* was given; allowed: .*\. [A-Z].*\.$", re.DOTALL)
"""Node, input, what was given, what is allowed, and a last sentence that says what to do."""
BAD = [
    None, float("nan"), float("inf"), -float("inf"), 10**30, -(10**30), -1, 1e308, 0.5, True, "", "x" * 100_000,
    "\x00\x1b\n", "\ud800", "../../etc", "nan", [], {}, {"samples": 1}, torch.zeros(1), torch.zeros(2),
    torch.rand(2, 8, 8, 2), torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    torch.zeros(0), torch.zeros(0, 2, 2, 3), {"samples": torch.zeros(0, 16, 2, 4, 4)}, object(), b"x",
]  # fmt: skip
LEAKS = (
    "an error stopped the node",
    "Traceback",
    "comfyui_psa",
    "custom_nodes",
    "object at 0x",
    "InputError",
    "Error:",
    "NoneType",
    "tensor(",
)


@pytest.fixture(scope="module")
def nodes(comfyui):
    """All nodes of the pack by id, the demo's too."""
    from comfyui_psa.nodes import PSAExtension
    from comfyui_psa.nodes.demo import PSADemoScene

    found = {node.define_schema().node_id: node for node in asyncio.run(PSAExtension().get_node_list())}
    return found | {"PSADemoScene": PSADemoScene}


def defaults(node):
    return {spec.id: spec.default for spec in node.define_schema().inputs if hasattr(spec, "default")}


def said(node, inputs):
    """What a run of the node ends with, or None for a success."""
    try:
        node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**inputs)
    except NodeError as error:
        return str(error)
    return None


PATCH = [
    ({"start_percent": 1.0}, "start_percent"),
    ({"start_percent": 0.6, "end_percent": 0.5}, "start_percent"),
    ({"dense_blocks": "1-"}, "dense_blocks"),
    ({"dense_blocks": "١"}, "dense_blocks"),
    ({"pyramid": "half"}, "pyramid"),
    ({"pyramid": "3: 0.5"}, "pyramid"),
    ({"pyramid": "1: 0.9, 2: 0.9"}, "pyramid"),
    ({"pyramid": "64: 0.5", "block_kv": "32"}, "pyramid"),
    ({"order": "spiral"}, "order"),
    ({"mode": "most"}, "mode"),
    ({"block_q": "48"}, "block_q"),
    ({"preset": "user/gone"}, "preset"),
    ({"preset": "wan9"}, "preset"),
    ({"sparsity": float("nan")}, "sparsity"),
    ({"sparsity": float("inf")}, "sparsity"),
    ({"sparsity": 0.98}, "sparsity"),
    ({"end_percent": 1.5}, "end_percent"),
    ({"sparsity": 0.97, "block_kv": "32", "tail": "on"}, "sparsity"),
    ({"falling": 0.8, "sparsity": 0.2}, "falling"),
    ({"falling": 0.5, "preset": "wan2.1-14b (published)"}, "falling"),
    ({"reuse_steps": 2, "order": "semantic"}, "reuse_steps"),
    ({"reuse_steps": 0}, "reuse_steps"),
    ({"model": "a string"}, "model"),
    ({"psa_pyramid": {"a": 1}}, "psa_pyramid"),
]


@pytest.mark.parametrize(("changes", "field"), PATCH)
def test_the_patch_is_refused_before_the_model_is_loaded_by_the_sentence_of_the_run(nodes, changes, field):
    inputs = defaults(nodes["PSAPatch"]) | {"model": None} | changes
    refused = nodes["PSAPatch"].validate_inputs(**inputs)
    assert SENTENCE.match(str(refused)), refused
    assert refused.startswith(f"PSA Patch, input {field}: ")
    assert refused == said(nodes["PSAPatch"], inputs | {"model": inputs["model"] or model()})


@pytest.mark.parametrize("name", ["PSAPatch", "PSACalibrate"])
def test_a_preset_that_left_the_menu_is_taken_from_workflows_and_prompts(nodes, name):
    node = nodes[name]
    (menu,) = (spec.options for spec in node.define_schema().inputs if spec.id == "preset")
    assert len([entry for entry in menu if not entry.startswith("user/")]) <= 5
    meets_a_sparsity = {other for other, preset in load_presets().items() if preset.is_scaled}
    names = load_presets() if name == "PSAPatch" else meets_a_sparsity
    others = set(names) - set(menu)
    assert {"wan2.2-a14b", "cogvideox-5b", "module-default"} <= others
    for preset in [*others, *menu]:
        assert node.validate_inputs(**defaults(node) | {"preset": preset}) is True, preset
    wrong = defaults(node) | {"preset": "wan2.2-a14"}
    assert "'wan2.2-a14' was given; allowed: auto" in node.validate_inputs(**wrong)


def model():
    """Something that passes for a MODEL: the other inputs must be refused before it is used."""
    from types import SimpleNamespace

    return SimpleNamespace(model=None, model_options={}, clone=None, get_model_object=None)


def test_a_connected_pyramid_beside_a_preset_is_refused_though_its_value_is_not_known(nodes):
    inputs = defaults(nodes["PSAPatch"]) | {"model": None, "psa_pyramid": None}
    assert nodes["PSAPatch"].validate_inputs(**inputs) is True
    refused = nodes["PSAPatch"].validate_inputs(**inputs | {"preset": "wan2.1-14b"})
    assert refused.endswith("Set preset to auto or unplug PSA Pyramid.")
    pyramid = nodes["PSAPyramid"].execute(**defaults(nodes["PSAPyramid"])).result[0]
    connected = inputs | {"preset": "wan2.1-14b", "model": model(), "psa_pyramid": pyramid}
    assert refused == said(nodes["PSAPatch"], connected)
    beside = nodes["PSAPatch"].validate_inputs(**inputs | {"order": "tiles"})
    assert beside.startswith("PSA Patch, input order: 'tiles'")
    assert beside.endswith("Set order to preset here, or unplug PSA Pyramid.")


@pytest.mark.parametrize(
    ("node", "changes", "field"),
    [
        ("PSAPyramid", {"full": 0.9, "half": 0.3}, "full, half, quarter, eighth"),
        ("PSAPyramid", {"full": 0.0, "half": 0.0, "eighth": 0.0}, "full, half, quarter, eighth"),
        ("PSAPyramid", {"mode": "budget", "as_written": True}, "as_written"),
        ("PSAPyramid", {"similarity_eighth": 0.6, "eighth": 0.0}, "similarity_eighth"),
        ("PSAPyramid", {"save_as": "a/b"}, "save_as"),
        ("PSAPyramid", {"save_as": "NUL"}, "save_as"),
        ("PSACalibrate", {"preset": "wan2.1-14b (published)"}, "preset"),
        ("PSACalibrate", {"preset": "wan2.1-14b", "psa_pyramid": None}, "preset"),
        ("PSACalibrate", {"save_as": "../x"}, "save_as"),
        ("PSACalibrate", {"filename_prefix": "../x/y"}, "filename_prefix"),
        ("PSACalibrate", {"target": float("nan")}, "target"),
        ("PSAReport", {"filename_prefix": "/etc/x"}, "filename_prefix"),
        ("PSAReport", {"filename_prefix": "x" * 300}, "filename_prefix"),
        ("PSAReport", {"filename_prefix": "a\x00b"}, "filename_prefix"),
        ("PSALoraDownload", {"repository": "https://huggingface.co/a/b"}, "repository"),
        ("PSALoraDownload", {"file": "../x.safetensors"}, "file"),
        ("PSALoraDownload", {"file": "x.ckpt"}, "file"),
        ("PSALoraLoader", {"lora_name": "gone.safetensors", "model": None}, "lora_name"),
        ("PSACogVideoXSampler", {"solver": "euler"}, "solver"),
    ],
)
def test_other_nodes_are_refused_before_the_run_too(nodes, node, changes, field):
    inputs = defaults(nodes[node]) | changes
    refused = nodes[node].validate_inputs(**inputs)
    assert SENTENCE.match(str(refused)), refused
    assert f", input {field}: " in refused


def test_what_comes_over_a_link_is_not_judged_before_the_run(nodes):
    for node in nodes.values():
        specs = node.define_schema().inputs
        assert node.validate_inputs(**{spec.id: None for spec in specs}) is True
        for spec in specs:
            only = defaults(node) | {spec.id: None}
            refused = node.validate_inputs(**only)
            assert refused is True or f"input {spec.id}:" not in refused, (node, spec.id, refused)


@pytest.fixture(scope="module")
def linked(tiny_wan):
    """What a node gets over its links, by node: a real model, real latents and pictures."""
    model, conds = tiny_wan.load("t2v"), tiny_wan.conditioning()
    values = {"MODEL": model, "LATENT": {"samples": torch.zeros(1, 16, 2, 4, 4)}, "IMAGE": torch.zeros(2, 16, 16, 3)}
    values |= {"CONDITIONING": conds, "VAE": Encoder()}

    def of(node):
        specs = [spec for spec in node.define_schema().inputs if not hasattr(spec, "default")]
        return {spec.id: values.get(spec.get_io_type()) for spec in specs}

    return of


class Encoder:
    def encode(self, pixels):
        return torch.zeros(1, 16, 1, pixels.shape[1] // 8, pixels.shape[2] // 8)


def test_every_node_answers_every_value_in_words(nodes, linked, tmp_path, monkeypatch):
    import folder_paths

    for folder in ("user", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"get_{folder}_directory", lambda folder=folder: str(tmp_path / folder))
    wrong = []
    for name, node in nodes.items():
        if name == "PSALoraDownload":  # the values that pass would go to the network
            monkeypatch.setattr("comfyui_psa.nodes.lora.download_into_loras", lambda *_: "x")
        if name == "PSACalibrate":  # and here they would sample for minutes
            monkeypatch.setattr("comfyui_psa.nodes.calibrate.sampler", lambda *_, **__: lambda _: None)
        for spec in node.define_schema().inputs:
            for value in BAD:
                inputs = defaults(node) | {spec.id: value}
                for answer in (node.validate_inputs(**inputs), said(node, linked(node) | inputs)):
                    if answer not in (True, None) and not (SENTENCE.match(answer) and not leaks(answer)):
                        wrong.append((name, spec.id, repr(value)[:40], answer[:300]))
    assert not wrong, "\n".join(map(str, wrong[:20]))


def leaks(text):
    return any(leak in text for leak in LEAKS)


def test_an_error_that_nobody_foresaw_becomes_a_sentence_and_keeps_its_cause(nodes, monkeypatch):
    node = nodes["PSACogVideoXSampler"]
    for error in (
        OSError(13, "Permission denied", "/home/somebody/dpm"),
        KeyError("dpm"),
        RuntimeError("shape [1, 2]"),
    ):

        def fails(_, error=error):
            raise error

        monkeypatch.setattr("comfyui_psa.nodes.cogvideox.make_sampler", fails)
        with pytest.raises(InputError) as caught:
            node.execute(solver="dpm")
        assert SENTENCE.match(str(caught.value))
        assert str(caught.value).startswith("PSA CogVideoX Sampler, input solver: 'dpm' was given")
        assert "shape [1, 2]" not in str(caught.value)
        assert caught.value.__cause__ is error


def test_interrupts_and_a_full_memory_stay_what_they_are(nodes, monkeypatch):
    import comfy.model_management

    kinds = [comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION, MemoryError]
    for kind in kinds:

        def fails(_, kind=kind):
            raise kind("stop")

        monkeypatch.setattr("comfyui_psa.nodes.cogvideox.make_sampler", fails)
        with pytest.raises(kind):
            nodes["PSACogVideoXSampler"].execute(solver="dpm")


NUMPY = {
    int: (numpy.int32, numpy.int64),
    float: (numpy.float32, numpy.float64, numpy.longdouble, fractions.Fraction),
    bool: (numpy.bool_,),
    str: (numpy.str_,),
}


@pytest.mark.parametrize("number", range(4))
def test_numbers_of_other_libraries_reach_a_node_as_python_s_own(nodes, linked, monkeypatch, number):
    """ComfyUI ends with a message to the page that is no JSON. What the nodes make of numbers is in such messages."""
    for node in nodes.values():
        given, found = {}, {}
        for name, value in defaults(node).items():
            if value is not None:
                kinds = NUMPY[type(value)]
                given[name] = kinds[number % len(kinds)](value)
        monkeypatch.setattr(node, "run", classmethod(lambda cls, found=found, **inputs: found.update(inputs)))
        node.execute(**linked(node) | given)
        for name in given:
            assert type(found[name]) in (bool, int, float, str), (node, name)
            assert found[name] == given[name]


def test_a_patch_with_a_slider_of_numpy_tells_the_page_in_json(nodes, linked):
    node = nodes["PSAPatch"]
    inputs = linked(node) | defaults(node) | {"sparsity": numpy.float32(0.6), "min_tokens": numpy.int32(0)}
    shown = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**inputs).ui
    assert json.loads(json.dumps(shown))["psa_sparsity"] == [pytest.approx(0.6)]


def test_no_node_goes_round_the_judge(nodes):
    for node in nodes.values():
        assert "run" in node.__dict__
        assert "execute" not in node.__dict__
        assert "validate_inputs" not in node.__dict__


def test_every_node_is_given_what_it_does_not_know(nodes):
    """ComfyUI drops other inputs of a prompt before a node could name them."""
    assert [name for name, node in nodes.items() if not node.ACCEPT_ALL_INPUTS] == []


@pytest.mark.parametrize(
    ("given", "do"),
    [
        ("similarity_haf", "rename it to similarity_half if that is meant, or take it out"),
        ("Quarter", "rename it to quarter if that is meant, or take it out"),
        ("block_size_q", "rename it to block_q if that is meant, or take it out"),
        ("zzz", "take it out"),
        ("cls", "take it out"),
        ("", "take it out"),
        ("x" * 100_000, "take it out"),
    ],
)
def test_an_input_that_a_node_does_not_have_is_named_and_stops_nothing(nodes, given, do, caplog):
    node = nodes["PSAPyramid"]
    inputs = defaults(node)
    assert node.validate_inputs(**inputs, **{given: 1}) is True
    assert node.execute(**inputs, **{given: 1}).result == node.execute(**inputs).result
    (line,) = [line for line in caplog.messages if "has no input" in line]
    assert line.startswith(f"PSA: {node.define_schema().display_name} has no input {given[:60]!r}"[:60])
    assert f", and its value is not used; {do}; the node has " in line
    assert len(line) < 600


def post(client, prompt):
    try:
        client.post("/prompt", {"prompt": prompt, "client_id": client.client_id})
    except urllib.error.HTTPError as error:
        return json.loads(error.read())
    return None


@pytest.mark.slow
def test_a_real_server_refuses_the_prompt_before_it_loads_anything(client):
    """Also through the page's route, with the same words."""
    pyramid = {"class_type": "PSAPyramid", "inputs": {"full": 0.9, "half": 0.9}}
    definitions = client.get("/object_info/PSAPyramid")["PSAPyramid"]["input"]["required"]
    for name, (_, options) in definitions.items():
        pyramid["inputs"].setdefault(name, options.get("default"))
    prompt = {"1": pyramid, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    answer = post(client, prompt)
    (errors,) = (found["errors"] for found in answer["node_errors"].values())
    refused = "PSA Pyramid, input full, half, quarter, eighth: '2.00 in sum' was given; allowed: "
    assert [error["details"] for error in errors if refused not in error["details"]] == []
    assert "custom_nodes" not in json.dumps(errors)
    told = client.post("/psa/check", {"node": "PSAPyramid", "inputs": pyramid["inputs"]})
    assert told["refused"] == errors[0]["details"].partition(" - ")[2]
    assert client.post("/psa/check", {"node": "KSampler", "inputs": {}}) == {"refused": None, "figures": None}

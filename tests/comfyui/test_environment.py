"""A server on a machine as some users have it: a console that is not UTF-8, no home folder that can be written, caches
that cannot be used, and the pack in a folder with spaces, letters of other alphabets and a long path.
"""

import json
import shutil

import pytest

from comfyui_psa.workshop.tools.client import Client, PromptFailed
from comfyui_psa.workshop.tools.figures import find_node
from comfyui_psa.workshop.tools.paths import ROOT, WORKFLOWS, comfyui_folder
from comfyui_psa.workshop.tools.server import NOT_THE_PACK, ComfyServer
from comfyui_psa.workshop.tools.workflow import graph_to_prompt, load_workflow

CONSOLE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "gbk"}
"""As on a Chinese Windows, and names of files are ASCII on top."""
ALPHABETS = "my nodes 视频 üé"
UNUSABLE = "a folder that cannot be made"
TROUBLE = ("Traceback", "Logging error", "UnicodeEncodeError", "UnicodeDecodeError", "IMPORT FAILED", "PSA failed")


CASES = {
    "console": ("my nodes (2)", CONSOLE | {"HOME": None}),
    "alphabets": (ALPHABETS, {"HOME": UNUSABLE}),
}
"""Name of the folder around the pack and the base folder, and the variables. The two are apart because core's own log
breaks on a folder's name that its console cannot show."""


@pytest.fixture(params=CASES)
def server(request, tmp_path):
    """Not the one of the other tests; its pack is a copy, more than 200 characters deep.

    A file stands where folders should be: that stops root too.
    """
    comfyui = comfyui_folder()
    if not (comfyui / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {comfyui}; `python dev.py setup` brings one")
    name, variables = CASES[request.param]
    folder = tmp_path / name
    while len(str(folder)) < 200:
        folder /= name
    pack = folder / "ComfyUI PSA"
    shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(*NOT_THE_PACK, "tests", "docs"))
    (tmp_path / "file").touch()
    variables = variables | {"XDG_CACHE_HOME": UNUSABLE, "TRITON_CACHE_DIR": UNUSABLE}
    variables = {key: str(tmp_path / "file" / "x") if value == UNUSABLE else value for key, value in variables.items()}
    with ComfyServer(comfyui, folder, tmp_path / "server.log", environment=variables, pack=pack) as server:
        yield server


@pytest.mark.slow
def test_the_demo_runs_there_and_a_preset_is_kept(server):
    client = Client(server.url)
    definitions = client.get("/object_info")
    workflow = load_workflow(WORKFLOWS / "psa_demo.json")
    for node in workflow["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "EmptyHunyuanLatentVideo":
            values[:3] = [256, 256, 9]
        if node["type"] == "KSampler":
            values[2] = 3
        if node["type"] == "PSAPatch":
            values[values.index(4096)] = 0
    prompt = graph_to_prompt(workflow, definitions)
    decoding = ("VAELoader", "VAEDecode", "SaveAnimatedWEBP", "PSACompare")
    prompt = {name: node for name, node in prompt.items() if node["class_type"] not in decoding}
    prompt[find_node(prompt, "PSAReport")]["inputs"].pop("images", None)
    result = client.run(prompt, timeout=300)

    report = json.loads(result.outputs[find_node(prompt, "PSAReport")]["text"][0])
    assert report["mean_sparsity"] == pytest.approx(0.85, abs=0.03)
    assert trouble(server) == []
    pyramid = {
        name: options["default"] for name, (_, options) in definitions["PSAPyramid"]["input"]["required"].items()
    }
    if server.environment.get("LC_ALL") == "C":  # no file can have such a name there
        with pytest.raises(PromptFailed, match=rf"PSA Pyramid, input save_as: '{ALPHABETS}' was given; .*\.$"):
            client.run(saving(pyramid, ALPHABETS), timeout=300)
    else:
        client.run(saving(pyramid, ALPHABETS), timeout=300)
    client.run(saving(pyramid, "plain"), timeout=300)
    offered = client.get("/object_info/PSAPatch")["PSAPatch"]["input"]["required"]["preset"][1]["options"]
    assert "user/plain" in offered


def saving(inputs, name):
    node = {"class_type": "PSAPyramid", "inputs": inputs | {"save_as": name}}
    return {"node": node, "out": {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}}


def trouble(server):
    log = server.log.read_bytes().decode("utf-8", errors="replace")
    return [words for words in TROUBLE if words in log]

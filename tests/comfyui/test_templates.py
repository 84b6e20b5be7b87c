"""What ComfyUI offers by itself once the pack is in `custom_nodes`: templates with pictures, and a demo that runs.

The server of these tests is started as a user starts it: the pack is a link in `custom_nodes`, and nothing else is set.
"""

import io

import pytest
from PIL import Image

from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.server import PACK
from comfyui_psa.workshop.tools.workflow import graph_to_prompt, inputs_of

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
ADDRESS = f"/api/workflow_templates/{PACK}"
MODEL, VAE = "psa_demo_wan_dit.safetensors", "psa_demo_wan_vae.safetensors"


def choices(definitions, node, name):
    """What a menu of a node offers."""
    (spec,) = (spec for spec in inputs_of(definitions[node]) if spec.name == name)
    return spec.choices


def test_the_server_was_started_as_a_user_starts_it(server, client):
    command = client.get("/system_stats")["system"]["argv"]
    assert not any("extra-model-paths" in word for word in command)
    assert sorted(path.name for path in (server.home / "custom_nodes").iterdir()) == [PACK]


def test_every_template_is_listed(client):
    assert sorted(client.get("/workflow_templates")[PACK]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_template_comes_with_its_picture(client, name):
    assert client.download(f"{ADDRESS}/{name}.json") == (WORKFLOWS / f"{name}.json").read_bytes()
    with Image.open(io.BytesIO(client.download(f"{ADDRESS}/{name}.jpg"))) as picture:
        assert picture.size == (512, 384)


def test_the_demos_files_are_in_the_menus_of_their_kind_and_in_no_other(definitions):
    assert choices(definitions, "UNETLoader", "unet_name") == [MODEL]
    assert VAE in choices(definitions, "VAELoader", "vae_name")
    listed = {
        (node, spec.name)
        for node, definition in definitions.items()
        for spec in inputs_of(definition)
        if any(str(choice).replace("\\", "/").split("/")[-1] in (MODEL, VAE) for choice in spec.choices or ())
    }
    # "checkpoint" is our own loader's menu of diffusion models.
    assert {name for _, name in listed} == {"unet_name", "vae_name", "checkpoint"}
    assert MODEL not in choices(definitions, "VAELoader", "vae_name")


def test_the_demos_node_is_always_there_in_a_category_of_its_own(definitions):
    node = definitions["PSADemoScene"]
    assert [name for name, other in definitions.items() if other["category"] == node["category"]] == ["PSADemoScene"]
    assert node["dev_only"], "search and menus leave it out"


@pytest.mark.slow(seconds=30)
def test_the_demo_template_gives_a_video(client, definitions):
    prompt = graph_to_prompt(client.get(f"{ADDRESS}/psa_demo.json"), definitions)
    for entry in prompt.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"]["steps"] = 2
        if entry["class_type"] == "EmptyHunyuanLatentVideo":
            entry["inputs"] |= {"width": 192, "height": 192, "length": 5}
        if entry["class_type"] == "PSAPatch":
            entry["inputs"]["min_tokens"] = 0
    result = client.run(prompt)
    films = [image["filename"] for output in result.outputs.values() for image in output.get("images", ())]
    assert sum(name.endswith(".webp") for name in films) == 3

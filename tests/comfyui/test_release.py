"""A release to ComfyUI's registry: the product, small, and complete. A server runs a copy of nothing else."""

import shutil

import pytest

from comfyui_psa.workshop.tools.client import Client
from comfyui_psa.workshop.tools.paths import ROOT, WORKFLOWS, comfyui_folder
from comfyui_psa.workshop.tools.release import released_files, tracked_files
from comfyui_psa.workshop.tools.server import PACK, ComfyServer
from comfyui_psa.workshop.tools.workflow import inputs_of

WEIGHTS = "demo/weights/"
NOT_PRODUCT = {
    "workshop", "tests", ".ci", ".github", "dev.py", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", ".gitignore",
    ".comfyignore",
}  # fmt: skip


@pytest.fixture(scope="module")
def files():
    return released_files(ROOT)


def test_nothing_of_the_workshop_is_in_it(files):
    assert {name.split("/")[0] for name in files} & {*NOT_PRODUCT, ".pre-commit-config.yaml"} == set()


def test_every_code_file_of_the_product_is_in_it(files):
    code = {name for name in tracked_files(ROOT) if name.endswith((".py", ".js", ".json", ".safetensors"))}
    assert {name for name in code if name.split("/")[0] not in NOT_PRODUCT} <= set(files)
    assert {"README.md", "LICENSE", "pyproject.toml", "requirements.txt"} <= set(files)


def test_it_is_small(files):
    sizes = [(ROOT / name).stat().st_size for name in files if not name.startswith(WEIGHTS)]
    assert sum(sizes) < 2_000_000
    beside = [name for name in files if name.startswith(WEIGHTS) and not name.endswith(".safetensors")]
    assert sum((ROOT / name).stat().st_size for name in beside) < 10_000


@pytest.fixture(scope="module")
def released(files, tmp_path_factory):
    """A server with a copy of the released files, under another name than the repository's."""
    comfyui = comfyui_folder()
    if not (comfyui / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {comfyui}; `python dev.py setup` brings one")
    folder = tmp_path_factory.mktemp("release")
    for name in files:
        (folder / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "pack" / name)
    with ComfyServer(comfyui, home=folder / "home", log=folder / "server.log", pack=folder / "pack") as server:
        yield server


@pytest.mark.slow
def test_a_server_offers_all_of_it(released, files):
    client = Client(released.url)
    definitions = client.get("/object_info")
    known = {name.split("/")[2].removesuffix(".md") for name in files if name.startswith("web/docs/PSA")}
    assert known == {name for name in definitions if name.startswith("PSA")}
    assert sorted(client.get("/workflow_templates")[PACK]) == sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    menus = {choice for spec in inputs_of(definitions["UNETLoader"]) for choice in spec.choices or ()}
    assert "psa_demo_wan_dit.safetensors" in menus
    scripts = [name for name in files if name.startswith("web/") and name.endswith(".js")]
    for name in scripts:
        assert client.download(f"/extensions/{PACK}/{name.removeprefix('web/')}") == (ROOT / name).read_bytes()
    assert "IMPORT FAILED" not in released.log.read_text(encoding="utf-8")

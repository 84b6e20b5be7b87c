"""One real ComfyUI server for all tests of this folder, with the pack linked into its custom_nodes."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    from devtools.server import ComfyServer

    folder = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "ComfyUI")
    if not (folder / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {folder}; `python dev.py setup` brings one")
    base = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(folder, home=base / "home", log=base / "server.log") as running:
        yield running


@pytest.fixture
def client(server):
    from devtools.client import Client

    return Client(server.url)


@pytest.fixture(scope="session")
def definitions(server):
    from devtools.client import Client

    return Client(server.url).get("/object_info")

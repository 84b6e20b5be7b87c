"""One real ComfyUI server for all tests of this folder, started as a user starts it, stopped at the end."""

import os
from pathlib import Path

import pytest

from comfyui_psa.devtools.client import Client
from comfyui_psa.devtools.paths import COMFYUI
from comfyui_psa.devtools.server import ComfyServer


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running `ComfyServer` with an empty base directory of its own."""
    comfyui = Path(os.environ.get("COMFYUI_PATH") or COMFYUI)
    if not (comfyui / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {comfyui}; `python dev.py setup` brings one")
    folder = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(comfyui, home=folder / "home", log=folder / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    """A client of the server."""
    return Client(server.url)


@pytest.fixture(scope="session")
def definitions(client):
    """The node definitions that the frontend sees."""
    return client.get("/object_info")

"""Starts ComfyUI with the pack and the example workflows, for use by hand, until Ctrl-C.

Also starts one briefly to regenerate `workflows/`.
"""

from __future__ import annotations

import shutil
import time
import webbrowser
from contextlib import contextmanager
from pathlib import Path

from .build_workflows import build_all
from .client import Client
from .locales import write_english
from .paths import HOME, LOCALES, SERVER_LOG, WORKFLOWS
from .server import ComfyServer
from .terminal import Phase, is_interactive
from .thumbnails import write_cards


@contextmanager
def running_server(comfyui: Path, port: int = 0, home: Path = HOME):
    """A server with the pack and the base directory `home`; its start is shown as a phase."""
    with Phase("Starting ComfyUI"):
        server = ComfyServer(comfyui, home, port=port).start()
    with server:
        yield server


def serve(comfyui: Path, port: int, open_browser: bool) -> None:
    """Start ComfyUI, open its page and keep it running until Ctrl-C."""
    library = HOME / "user" / "default" / "workflows"
    library.mkdir(parents=True, exist_ok=True)
    for workflow in WORKFLOWS.glob("*.json"):
        shutil.copy(workflow, library)
    with running_server(comfyui, port) as server:
        print(f"ComfyUI is at {server.url}; the example workflows are in its Workflows panel.")
        print(f"Log file: {SERVER_LOG}\nPress Ctrl-C to stop.", flush=True)
        if open_browser and is_interactive():
            webbrowser.open(server.url)
        while True:
            server.check_alive()
            time.sleep(1)


def rebuild_workflows(comfyui: Path) -> None:
    """Write `workflows/*.json` and the English names and tooltips from a running server's node definitions."""
    with running_server(comfyui) as server:
        definitions = Client(server.url).get("/object_info")
    for path in [*build_all(definitions, WORKFLOWS), write_english(definitions, LOCALES), *write_cards(WORKFLOWS)]:
        print(path)

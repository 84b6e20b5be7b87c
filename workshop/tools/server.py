"""A ComfyUI server with this pack, on a free loopback port, for the duration of a `with` block.

The ComfyUI folder is left untouched: models, nodes and results go into a separate base directory, with the pack linked
into its `custom_nodes` the way a user installs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .paths import COMFYUI, HOME, ROOT, SERVER_LOG
from .terminal import Failure

PACK = "ComfyUI-PSA"
HOME_FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
NOT_THE_PACK = (".*", "output", "__pycache__")
START_SECONDS = 180


class ComfyServer:
    """Context manager. `with ComfyServer() as server: ...` gives a server that answers at `server.url`.

    Args:
        comfyui: ComfyUI's folder.
        home: its base directory, created if missing.
        log: file for the server's output.
        port: 0 picks a free one.
        environment: variables to set for the server; None removes one.
        pack: folder of the pack to link into it.
        frontend: folder of a frontend's files; None for the one that the core pins.

    Raises:
        Failure: on entry, if the server dies or does not respond; includes the last lines of the log.
    """

    def __init__(
        self,
        comfyui: Path = COMFYUI,
        home: Path = HOME,
        log: Path = SERVER_LOG,
        port: int = 0,
        *,
        environment: Mapping[str, str | None] = MappingProxyType({}),
        pack: Path = ROOT,
        frontend: Path | None = None,
    ) -> None:
        self.comfyui, self.home, self.log = comfyui, home, log
        self.environment, self.pack, self.frontend = environment, pack, frontend
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyServer:
        if self._process is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> ComfyServer:
        """Start and wait until it responds. Without a `with` block, the caller must call `stop`."""
        prepare_home(self.home, self.pack)
        try:
            self._launch()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _launch(self) -> None:
        # No PYTHONPATH: neither the user's folders nor the repository root may be on the server's sys.path.
        variables = {**os.environ, "PYTHONPATH": None, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        variables.update(self.environment)
        environment = {name: value for name, value in variables.items() if value is not None}
        if os.name == "nt":
            own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        else:
            own_group = {"start_new_session": True, "preexec_fn": _end_with_parent}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self.comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT, **own_group
            )

    def _command(self) -> list[str]:
        command = [sys.executable, str(self.comfyui / "main.py"), "--listen=127.0.0.1", f"--port={self.port}"]
        command += [f"--base-directory={self.home}", f"--database-url=sqlite:///{self.home / 'user' / 'comfyui.db'}"]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--preview-method=none"]
        command += [f"--front-end-root={self.frontend}"] if self.frontend else []
        # Without the second option, ComfyUI uses chunked attention on a CPU, three times slower than torch's.
        return command if _has_cuda() else [*command, "--cpu", "--use-pytorch-cross-attention"]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/system_stats", timeout=5).close()
                return
            time.sleep(0.2)
        raise Failure(f"ComfyUI did not respond within {START_SECONDS} s.\n{self.log_tail()}")

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return self._process.pid

    def check_alive(self) -> None:
        """Raise `Failure` with the last lines of the log if the server has exited."""
        code = self._process.poll()
        if code is not None:
            raise Failure(f"ComfyUI exited with code {code}; the last lines of {self.log}:\n{self.log_tail()}")

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of the server's output, indented."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join("    " + line for line in text.splitlines()[-lines:])

    def stop(self) -> None:
        """Stop the server and everything it started; safe to call twice."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        _end_group(process, gently=True)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            _end_group(process, gently=False)
            process.wait()


def prepare_home(home: Path, pack: Path = ROOT) -> None:
    """Create the base directory: its folders, and the pack in `custom_nodes`."""
    for name in HOME_FOLDERS:
        (home / name).mkdir(parents=True, exist_ok=True)
    link_pack(home / "custom_nodes" / PACK, pack)


def link_pack(link: Path, pack: Path) -> None:
    """Make `link` point to the pack in `pack`, replacing whatever was there; copies it if links are not possible."""
    if link.exists() and link.resolve() == pack:
        return
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows without developer mode: try a junction, then copy
        junction = ["cmd", "/c", "mklink", "/J", str(link), str(pack)]
        if os.name != "nt" or subprocess.run(junction, capture_output=True).returncode:
            shutil.copytree(pack, link, ignore=shutil.ignore_patterns(*NOT_THE_PACK))


def _end_group(process: subprocess.Popen, gently: bool) -> None:
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM if gently else signal.SIGKILL)


def _end_with_parent() -> None:
    """Runs in the child: have Linux end it if its parent is killed and cannot clean up."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_cuda() -> bool:
    import torch  # takes a second to import, and only starting a server needs it

    return torch.cuda.is_available()

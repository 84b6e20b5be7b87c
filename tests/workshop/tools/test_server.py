"""The server's life with a stand-in for ComfyUI: it starts, it is stopped, and a death is explained."""

import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from comfyui_psa.workshop.tools.paths import ROOT
from comfyui_psa.workshop.tools.server import PACK, ComfyServer, prepare_home
from comfyui_psa.workshop.tools.terminal import Failure

ANSWERS = """
import http.server, sys
port = int(next(word.split("=")[1] for word in sys.argv if word.startswith("--port=")))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from workshop.tools.server import ComfyServer
folder = Path(sys.argv[2])
with ComfyServer(folder / "ComfyUI", home=folder / "home", log=folder / "server.log") as server:
    print(server.url, flush=True)
    time.sleep(60)
"""
DIES = "print('no such thing as a model'); raise SystemExit(3)"


def make_server(tmp_path, script):
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").write_text(script)
    return ComfyServer(tmp_path / "ComfyUI", home=tmp_path / "home", log=tmp_path / "server.log")


def test_it_is_stopped_when_the_block_ends(tmp_path):
    server = make_server(tmp_path, ANSWERS)
    with pytest.raises(ZeroDivisionError), server:
        assert urllib.request.urlopen(server.url + "/system_stats").status == 200
        raise ZeroDivisionError
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url + "/system_stats", timeout=1)


def test_a_death_is_told_with_the_last_lines_of_the_log(tmp_path):
    with (
        pytest.raises(Failure, match=r"exited with code 3(.|\n)*no such thing as a model"),
        make_server(tmp_path, DIES),
    ):
        pass


def test_the_pack_is_linked_like_a_users(tmp_path):
    prepare_home(tmp_path)
    prepare_home(tmp_path)  # a second time changes nothing
    assert (tmp_path / "custom_nodes" / PACK).resolve() == ROOT
    assert (tmp_path / "custom_nodes" / PACK / "__init__.py").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only a clean end stops the server")
def test_it_ends_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").write_text(ANSWERS)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    url = parent.stdout.readline().strip()
    assert urllib.request.urlopen(url).status == 200
    parent.kill()
    parent.wait()
    for _ in range(50):
        try:
            urllib.request.urlopen(url, timeout=1)
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent")

"""Folders, homes and consoles as they are on some users' machines: the pack is imported and samples in each of them.

Each is a process of its own. It samples a tiny Wan model in ComfyUI, calls the Triton kernels once in the interpreter
(which looks for and writes to Triton's cache), and prints every log line.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib.util, logging, runpy, sys, torch
root, comfyui, tests = sys.argv[1:4]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing(False)
import comfy.cli_args
comfy.cli_args.args.cpu = True
runpy.run_path(root + "/workshop/pack.py")["load_pack"]()

class Printed(logging.StreamHandler):
    def handleError(self, record):
        raise

logger = logging.getLogger("ComfyUI-PSA")
logger.addHandler(Printed(sys.stdout))
logger.setLevel(logging.DEBUG)
spec = importlib.util.spec_from_file_location("tiny_wan", tests + "/tiny_wan.py")
tiny_wan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_wan)

from comfyui_psa.patching.patch import KEY, patch_model
psa = patch_model(tiny_wan.load("t2v"), sparsity=0.6, preset="auto", min_tokens=0, start_percent=0.4, end_percent=1.0)
assert tiny_wan.sample(psa, steps=4, size=(1, 16, 2, 32, 16)).isfinite().all()
print("sparse calls:", sum(step["sparse_calls"] for step in psa.get_attachment(KEY).report["steps"]))

from comfyui_psa.kernels import PyramidConfig, pyramid_sparse_attention
q = torch.randn(3, 1, 1, 64, 16).unbind()
config = PyramidConfig(mode="topk", sparsity=0.5, block_q=32, block_kv=32)
call = lambda name: pyramid_sparse_attention(*q, config, backend=name).output
assert (call("triton") - call("torch")).abs().max() < 1e-4
print("done")
"""


@pytest.fixture
def run(comfyui, tmp_path):
    """run(**environment): what a process prints that imports the pack and samples; a value of None removes it."""

    def run(**changes):
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= changes
        environment = {name: value for name, value in environment.items() if value is not None}
        command = [sys.executable, "-c", SCRIPT, str(ROOT), str(comfyui), str(ROOT / "tests")]
        found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
        assert found.returncode == 0, found.stderr.decode(errors="replace")[-3000:]
        printed = found.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8"))
        assert "PSA: Wan t2v" in printed
        assert "kernels checked" in printed
        assert int(printed.split("sparse calls: ")[1].split()[0]) > 0
        assert printed.endswith("done\n")
        assert "Traceback" not in printed
        return printed

    return run


def checks_kept(folder):
    return list(folder.rglob("comfyui_psa_check.json"))


CONSOLES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None},
    "gbk": {"PYTHONIOENCODING": "gbk"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "ours": {},
}


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize(
    ("where", "console"),
    [("missing", "C"), ("over 200 letters", "gbk"), ("unwritable", "ascii"), ("a name that is too long", "ours")],
)
def test_cache_folders_and_consoles(run, tmp_path, where, console):
    """Each folder with another console: to start a process takes much longer than what is tried in it."""
    (tmp_path / "file").write_text("")
    folder = {
        "missing": tmp_path / "not" / "there",
        "over 200 letters": tmp_path.joinpath(*["a folder with a long name"] * 9),
        "unwritable": tmp_path / "file" / "cache",
        "a name that is too long": tmp_path / ("x" * 300),
    }[where]
    printed = run(**CONSOLES[console], TRITON_CACHE_DIR=str(folder))
    kept = where in ("missing", "over 200 letters")
    assert len(checks_kept(tmp_path)) == kept
    assert ("PSA could not keep comfyui_psa_check.json" in printed) != kept, "a line for developers only"


@pytest.mark.slow(seconds=10)
@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is read-only to this user")
def test_a_read_only_cache_folder(run, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    run(TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert checks_kept(tmp_path) == []


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize("home", [None, "not/there", "file"])
def test_no_home(run, tmp_path, home):
    (tmp_path / "file").write_text("")
    homes = dict.fromkeys(("HOME", "USERPROFILE"), None if home is None else str(tmp_path / home))
    cache = str(tmp_path / "cache") if home is None else None  # without a home Triton asks the system for one
    run(**homes, TRITON_CACHE_DIR=cache, MPLCONFIGDIR=str(tmp_path))
    assert len(checks_kept(tmp_path)) == (home != "file"), "a folder cannot be made in a file"


def test_every_message_can_be_printed_on_any_console():
    """All that the product says itself; names of files and prompts are the user's."""
    from workshop.tools.messages import UNKNOWN, Product

    texts = [message.text.replace(UNKNOWN, "") for message in Product(ROOT).messages()]
    assert len(texts) > 100
    assert [text for text in texts if not text.isascii()] == []

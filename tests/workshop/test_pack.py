"""A script that is started by its path gets the pack, and ComfyUI's modules keep their names."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["quality/run.py", "benchmarks/run.py", "training/train_demo.py"]

PROBE = """
import runpy, sys
from pathlib import Path
pack = runpy.run_path({file!r})["load_pack"]()
assert sys.modules["comfyui_psa"] is pack, "under its own name"
from comfyui_psa.workshop import table
assert Path(table.__file__).parents[1] == Path({root!r})
assert Path({root!r}) not in [Path(entry or ".").resolve() for entry in sys.path]
try:
    import nodes
except ImportError:
    print("no module nodes")
"""


def test_the_pack_is_imported_without_its_folder_on_the_path(tmp_path):
    probe = PROBE.format(file=str(ROOT / "workshop" / "pack.py"), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (0, "no module nodes\n"), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_from_anywhere(tmp_path, script):
    command = [sys.executable, str(ROOT / "workshop" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout

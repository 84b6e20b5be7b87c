"""dev.py from outside: failures are one sentence and an exit code, and what must agree does agree."""

import re
import subprocess
import sys
from pathlib import Path

from comfyui_psa.devtools.paths import ROOT


def dev(*words):
    return subprocess.run([sys.executable, ROOT / "dev.py", *words], capture_output=True, text=True, timeout=60)


def test_a_folder_without_comfyui_is_refused(tmp_path):
    found = dev("demo", "--comfyui", str(tmp_path))
    assert found.returncode == 1
    assert f"There is no ComfyUI in {tmp_path.resolve()}" in found.stderr
    assert "Traceback" not in found.stderr


def test_an_unknown_option_is_refused():
    assert dev("demo", "--colour").returncode == 2


def test_requirements_and_pyproject_agree():
    listed = [line for line in _lines(ROOT / "requirements.txt") if line]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE).group(1)
    declared = [text.replace('\\"', '"') for text in re.findall(r'^\s*"((?:[^"\\]|\\.)*)",$', block, re.MULTILINE)]
    assert declared == listed


def test_the_users_torch_is_never_pinned():
    for line in _lines(ROOT / "requirements.txt"):
        assert "==" not in line.split(";")[0], "an exact version would replace what a user's ComfyUI has"


def _lines(path: Path) -> list[str]:
    return [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]

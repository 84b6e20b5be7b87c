"""dev.py from outside: failures are one sentence and an exit code, and what must agree does agree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_psa.workshop.tools.paths import ROOT, VENV_PYTHON, comfyui_folder


def dev(*words):
    return subprocess.run([sys.executable, ROOT / "dev.py", *words], capture_output=True, text=True, timeout=300)


def test_a_folder_without_comfyui_is_refused(tmp_path):
    found = dev("demo", "--comfyui", str(tmp_path))
    assert found.returncode == 1
    assert f"There is no ComfyUI in {tmp_path.resolve()}" in found.stderr
    assert "Traceback" not in found.stderr


def another_core(folder):
    """A folder that says it is ComfyUI 9.9.9 and requires what the one under test requires."""
    folder.mkdir()
    (folder / "main.py").write_text("")
    (folder / "requirements.txt").write_bytes((comfyui_folder() / "requirements.txt").read_bytes())
    (folder / "comfyui_version.py").write_text('__version__ = "9.9.9"\n')
    return folder


@pytest.mark.parametrize("way", ["environment", "option"])
def test_another_core_is_the_one_that_is_tested(tmp_path, monkeypatch, way):
    if not (VENV_PYTHON.exists() and (comfyui_folder() / "requirements.txt").exists()):
        pytest.skip("`python dev.py setup` has not been run here")
    core = another_core(tmp_path / "core")
    monkeypatch.setenv("COMFYUI_PATH", str(core if way == "environment" else tmp_path / "other"))
    options = ["--comfyui", str(core)] if way == "option" else []
    found = dev("test", *options, "--collect-only", str(Path(__file__).with_name("test_workflow.py")))
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"ComfyUI 9.9.9 in {core}" in found.stdout


def test_a_core_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    by_dev = dev("test", "--collect-only")
    command = [sys.executable, "-m", "pytest", "--collect-only", f"--rootdir={ROOT}"]
    by_pytest = subprocess.run(
        [*command, ROOT / "tests" / "workshop" / "tools"], capture_output=True, text=True, timeout=300
    )
    for found in (by_dev, by_pytest):
        assert found.returncode != 0
        assert f"here is no ComfyUI in {tmp_path.resolve()}" in found.stderr


def test_what_the_commands_import_can_be_imported():
    """For the tests the workshop is a part of the pack; for dev.py it is not, and an import out of it fails there."""
    tree = ast.parse((ROOT / "dev.py").read_text("utf-8"))
    late = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.col_offset]
    assert len(late) > 5
    program = "; ".join(["from workshop.pack import load_pack", "load_pack()", *late])
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr


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

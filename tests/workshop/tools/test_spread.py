"""`dev.py test` spreads the files over worker processes, and does not where that would be in the way."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comfyui_psa.workshop.tools.paths import ROOT, VENV_PYTHON

FILES = [ROOT / "tests" / "choices" / f"{name}.py" for name in ("test_expectation", "test_pyramid")]


@pytest.fixture
def hooks(request):
    """The hooks in tests/conftest.py."""
    path = str(ROOT / "tests" / "conftest.py")
    return next(plugin for plugin in request.config.pluginmanager.get_plugins() if plugin_file(plugin) == path)


def plugin_file(plugin):
    return getattr(plugin, "__file__", None)


def outside(**variables):
    """The environment of a shell: nothing of the pytest that is running, nothing that tests/conftest.py sets."""
    ours = ("PYTEST_", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables


def dev_test(*words):
    if not VENV_PYTHON.exists():
        pytest.skip("`python dev.py setup` has not been run here")
    command = [sys.executable, ROOT / "dev.py", "test", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=outside())


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests that share a GPU take turns")
def test_two_files_are_shared_by_workers_unless_the_user_says_otherwise():
    spread = dev_test(*FILES, "-v")
    assert spread.returncode == 0, spread.stdout
    for file in FILES:
        assert len(set(re.findall(rf"\[(gw\d+)\] .* PASSED \S*{file.name}", spread.stdout))) == 1
    alone = dev_test(*FILES, "-v", "-p", "no:xdist")
    assert alone.returncode == 0, alone.stdout
    assert "PASSED" in alone.stdout
    assert "[gw0]" not in alone.stdout


@pytest.mark.parametrize(
    ("arguments", "capture", "gpu", "alone"),
    [
        (["tests"], "fd", False, False),
        (["tests/choices/test_pyramid.py", "tests/kernels"], "fd", False, False),
        (["tests/choices/test_pyramid.py"], "fd", False, True),
        (["tests/choices/test_pyramid.py::test_a", "tests/choices/test_pyramid.py::test_b"], "fd", False, True),
        (["tests"], "no", False, True),
        (["tests"], "fd", True, True),
    ],
)
def test_a_file_alone_output_that_is_wanted_and_a_gpu_take_one_process(
    hooks, monkeypatch, arguments, capture, gpu, alone
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = SimpleNamespace(args=arguments, option=SimpleNamespace(capture=capture))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    workers = hooks.pytest_xdist_auto_num_workers(config)
    assert workers == (0 if alone else 2)


def test_files_with_much_to_do_come_first_and_stay_together(hooks, monkeypatch):
    def item(file, *seconds):
        marks = [SimpleNamespace(kwargs={"seconds": s} if s else {}) for s in seconds]
        return SimpleNamespace(path=Path(file), marks=marks, iter_markers=lambda name: marks)

    items = [item("a"), item("b", 0), item("b", 0), item("a"), item("c", 60), item("d", 15), item("d")]
    given = list(items)
    monkeypatch.setattr(hooks, "IS_WORKER", False)
    hooks.pytest_collection_modifyitems(items)
    assert items == given
    monkeypatch.setattr(hooks, "IS_WORKER", True)
    hooks.pytest_collection_modifyitems(items)
    assert [str(found.path) for found in items] == ["c", "b", "b", "d", "d", "a", "a"]


def test_nothing_is_written_into_the_users_home(tmp_path):
    """The caches of Triton and matplotlib are in .dev/."""
    home = tmp_path / "home"
    home.mkdir()
    files = [ROOT / "tests" / name for name in ("kernels/test_compile.py", "workshop/benchmarks/test_bench.py")]
    command = [sys.executable, "-m", "pytest", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    command += ["-p", "no:cacheprovider", *files, "-k", "careful or pictures"]
    environment = outside(HOME=str(home), USERPROFILE=str(home))
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, env=environment)
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout
    assert list(home.iterdir()) == []

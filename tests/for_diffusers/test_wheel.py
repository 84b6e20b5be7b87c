"""`pip wheel .`: what `apply_psa` needs and nothing else, in an environment that has never heard of ComfyUI."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import grimp
import pytest

from comfyui_psa.workshop.tools.check import linked_as_package
from comfyui_psa.workshop.tools.paths import ROOT
from comfyui_psa.workshop.tools.release import tracked_files

USE = """
import sys, torch
from comfyui_psa.for_diffusers import apply_psa
from comfyui_psa.kernels import PyramidConfig, pyramid_sparse_attention
from comfyui_psa.choices.presets import load_presets

assert not [name for name in sys.modules if name.startswith(("comfyui_psa.kernels.gpu", "triton", "diffusers"))]
q, k, v = torch.randn(3, 1, 2, 256, 64).unbind(0)
everything = PyramidConfig(shares={1: 1.0}, sparsity=0.0, block_q=64)
out = pyramid_sparse_attention(q, k, v, everything).output
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)
print(sys.modules["comfyui_psa"].__file__, len(load_presets()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git tracks: a build leaves files behind, and takes up those of an earlier one."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files(ROOT):
        if name.endswith((".py", ".json", ".toml", ".md", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    ran = subprocess.run([*command, f"--wheel-dir={target}", source], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (path,) = target.glob("*.whl")
    return path


def names_in(wheel):
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]


def test_it_holds_the_face_and_what_the_entry_for_diffusers_imports(wheel):
    """As the import graph has it; whole packages, so that no file can be forgotten."""
    with linked_as_package(ROOT) as folder:
        graph = grimp_graph(folder)
    needed = graph.find_upstream_modules("comfyui_psa.for_diffusers", as_package=True)
    needed |= {"comfyui_psa.for_diffusers", "comfyui_psa.sampling"}
    layers = {name.split(".")[1] for name in needed if "." in name}
    packed = {name.split("/")[1] for name in names_in(wheel)}
    assert packed == {"__init__.py", *layers}
    expected = {
        name
        for name in tracked_files(ROOT)
        if name.split("/")[0] in layers and name.endswith((".py", ".json")) and "/examples/" not in name
    }
    assert set(names_in(wheel)) == {"comfyui_psa/__init__.py", *(f"comfyui_psa/{name}" for name in expected)}


def grimp_graph(folder):
    sys.path.insert(0, str(folder))
    try:
        return grimp.build_graph("comfyui_psa", cache_dir=None)
    finally:
        sys.path.remove(str(folder))


def environment(folder, wheel, *distributions):
    """A virtual environment with these installed distributions, what they require, and the wheel; nothing else."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in closure(distributions):
        found = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in found.files or () if ".." not in file.parts}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    zipfile.ZipFile(wheel).extractall(site)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def closure(names):
    """These distributions and their requirements, as far as they are installed."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [re.match(r"[\w.-]+", text).group() for text in requires if "extra ==" not in text]
    return found


def run(python, code, folder):
    ran = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def required(wheel):
    """The distributions that the wheel says it requires."""
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    return re.findall(r"^Requires-Dist: ([\w.-]+)", text, re.MULTILINE)


def test_it_works_with_torch_and_numpy_alone(wheel, tmp_path):
    assert {"torch", "numpy"} <= set(required(wheel))
    python = environment(tmp_path / "venv", wheel, "torch", "numpy")
    assert str(tmp_path / "venv") in run(python, USE, tmp_path)


def test_every_module_can_be_imported_without_comfyui(wheel, tmp_path):
    python = environment(tmp_path / "venv", wheel, *required(wheel))
    files = [name.removesuffix(".py") for name in names_in(wheel) if name.endswith(".py")]
    modules = [name.removesuffix("/__init__").replace("/", ".") for name in files]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print([name for name in ('comfy', 'nodes', 'folder_paths') if name in sys.modules])"
    assert run(python, code, tmp_path).strip() == "[]"


def test_everything_that_it_imports_is_required(wheel):
    """Not only installed because something else happens to need it."""
    archive, imported = zipfile.ZipFile(wheel), set()
    for name in names_in(wheel):
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.split(".")[0])
    # folder_paths: inside a function that only ComfyUI's nodes call.
    assert imported - sys.stdlib_module_names - {"comfyui_psa", "folder_paths"} <= set(required(wheel))

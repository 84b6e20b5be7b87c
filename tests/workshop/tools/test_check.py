"""The contract about layers: this tree keeps it, and a copy with a forbidden import does not."""

import shutil

import pytest

from comfyui_psa.workshop.tools.check import run_checks
from comfyui_psa.workshop.tools.paths import ROOT
from comfyui_psa.workshop.tools.release import tracked_files


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "any name"
    for name in tracked_files(ROOT):
        if name.endswith(".py") or name == "pyproject.toml":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_the_tree_keeps_the_contract(copy, capfd):
    assert run_checks(["layers"], copy), capfd.readouterr().out


FORBIDDEN = {
    "product, workshop": ("choices/presets.py", "from ..workshop.tools import paths", "choices.presets -> "),
    "product, workshop, inside a function": (
        "nodes/base.py",
        "def tool():\n    from ..workshop.tools.paths import ROOT\n    return ROOT",
        "nodes.base -> comfyui_psa.workshop",
    ),
    "up": ("kernels/order.py", "from ..choices import presets", "kernels.order -> comfyui_psa.choices"),
    "up by the full name": ("sampling/clock.py", "import comfyui_psa.patching.core", "sampling.clock -> "),
    "siblings": ("patching/core.py", "from ..for_diffusers import apply", "patching.core -> comfyui_psa.for_diffusers"),
    "the demo": ("demo/scene.py", "from ..kernels.order import TokenOrder", "demo.scene -> comfyui_psa.kernels.order"),
    "triton": ("kernels/attention.py", "from .gpu import tiles", "kernels.attention -> comfyui_psa.kernels.gpu"),
    "triton, from above": ("patching/override.py", "from ..kernels.gpu import tiles", "patching.override -> "),
    "circle": ("kernels/order.py", "from .attention import AttentionResult", "No cycles are allowed"),
    "a folder without a place": ("extras/__init__.py", "", "extras"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_forbidden_import_breaks_it(copy, capfd, case):
    name, lines, said = FORBIDDEN[case]
    file = copy / name
    before = file.read_text(encoding="utf-8") if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    file.write_text((before or "") + "\n" + lines + "\n", encoding="utf-8")
    try:
        assert not run_checks(["layers"], copy)
    finally:
        if before is None:
            shutil.rmtree(file.parent)
        else:
            file.write_text(before, encoding="utf-8")
    assert said in " ".join(capfd.readouterr().out.split())

"""The benchmark of all families runs, tiny on a CPU: every family has a row, and every row was sparse."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_psa.patching.family import families

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow(seconds=25)
def test_every_family_is_timed(comfyui, tmp_path):
    file = tmp_path / "rows" / "families.csv"
    command = [sys.executable, str(ROOT / "workshop" / "benchmarks" / "families.py"), f"--csv={file}", "--device=cpu"]
    command += ["--heads=2", "--latent", "3", "24", "28", "--steps=1", "--sparsity=0.6"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with file.open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    assert {row["family"] for row in rows} == {family.name for family in families()}
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["dense_ms"]) / float(row["sparse_ms"]), rel=1e-3)
        assert float(row["sparsity"]) == pytest.approx(0.6, abs=0.06)
        assert int(row["tokens"]) in (3 * 12 * 14, 3 * 24 * 28)
        assert row["heads"] == "2"
        assert row["gpu"] == "CPU"


@pytest.mark.slow(seconds=10)
def test_a_model_that_cannot_be_measured_does_not_end_the_others(comfyui, tmp_path):
    file = tmp_path / "families.csv"
    command = [sys.executable, str(ROOT / "workshop" / "benchmarks" / "families.py"), "Wan", "LTX-2"]
    # 9 x 16 tokens are too few for the first of them, 18 x 32 enough for the other.
    command += [f"--csv={file}", "--device=cpu", "--heads=2", "--latent", "1", "18", "32", "--steps=1"]
    done = subprocess.run([*command, "--sparsity=0.5"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert "Wan 2.1 14B, 1280x720x81 was not measured:" in done.stdout
    assert "are fewer than two query blocks" in done.stdout
    assert [line.split(",")[:1] for line in file.read_text(encoding="utf-8").splitlines()[1:]] == [['"LTX-Video']]


def test_an_unknown_model_is_named(tmp_path):
    command = [sys.executable, str(ROOT / "workshop" / "benchmarks" / "families.py"), "Vidu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2
    assert "no model begins like Vidu; there are Wan 2.1 14B" in done.stderr

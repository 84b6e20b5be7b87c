"""The benchmark's own arithmetic: what errors are taken against, what stands in the table, what is drawn."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COLUMNS = "gpu,date,torch,triton,shape,method,precision,density,ms,dense_ms,speedup,rel_l1,extra_mb"


def load(name):
    spec = importlib.util.spec_from_file_location(f"psa_benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("length", [700, 512, 100, 64])
def test_the_truth_is_dense_attention_on_rows_of_every_head(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, 3, length, 16, generator=generator) for _ in range(3))
    truth = load("truth").exact_rows(q, k, v)
    dense = torch.softmax(q.double() @ k.double().mT / 4, -1) @ v.double()
    assert truth.output.dtype == torch.float64
    assert truth.error(dense) < 1e-12
    assert truth.error(dense * 1.25) == pytest.approx(0.25)
    # What is wrong in one row alone is seen where that row is looked at, and weighs as one row.
    row = int(truth.rows[1, 5])
    wrong = dense.clone()
    wrong[0, 1, row] += 1
    seen = int((truth.rows[1] == row).sum())
    expected = seen / truth.rows.numel() / truth.output.abs().mean()
    assert truth.error(wrong) == pytest.approx(float(expected))
    assert len({tuple(rows.tolist()) for rows in truth.rows}) == (3 if length > 64 else len(truth.rows))


@pytest.mark.slow
def test_a_run_on_a_cpu_writes_the_table(tmp_path):
    """Two methods, one run each; what a run measures replaces the rows of its shape alone."""
    path = tmp_path / "attention-cpu.csv"
    path.write_text(f"{COLUMNS},setting\n" + "x,,,,demo,psa,,,,,,,,\n" + "x,,,,synthetic,psa,,,,,,,,\n")
    command = [sys.executable, BENCHMARKS / "run.py", "--shape", "synthetic", "--runs", "1", "--out", tmp_path]
    subprocess.run([*map(str, command), "--only", "topk 10/5/0/20 at 0.95*"], check=True, capture_output=True)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert path.read_text().startswith(COLUMNS)
    assert [(row["shape"], row["method"]) for row in rows] == [
        ("demo", "psa"),
        ("synthetic", "sdpa"),
        ("synthetic", "psa"),
    ]
    assert float(rows[1]["rel_l1"]) < 1e-5
    assert 0.05 < float(rows[2]["rel_l1"]) < 0.5
    assert float(rows[2]["density"]) == pytest.approx(0.05, abs=0.01)


def test_pictures_of_errors_and_of_lengths(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [f"{COLUMNS},setting"]
    for shape in ("demo", "length-4096", "length-8192"):
        for method, ms, error in (("sdpa-cudnn", 4, 0.001), ("psa", 1, 0.1), ("psa", 2, 0.2), ("sol-attn", 1, "")):
            lines.append(f"gpu,2026,2,3,{shape},{method},bf16,1,{ms},4,1,{error},,setting {ms}")
    (tmp_path / "attention-gpu.csv").write_text("\n".join(lines))
    assert load("plot").draw(tmp_path) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"error-demo.png", "length.png"}


def test_the_front_is_what_no_faster_point_beats():
    front = load("plot")._front([(1.0, 0.5), (2.0, 0.6), (3.0, 0.1), (4.0, 0.1)])
    assert front == [(1.0, 0.5), (3.0, 0.1)]

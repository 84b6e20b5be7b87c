"""The benchmark's own arithmetic: what errors are measured against, what is in the table, what is drawn."""

import csv
import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "workshop" / "benchmarks"
PARTS = ("compile_ahead", "crossover", "methods", "captured", "synthetic", "timing", "truth")
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
    """Two methods, one run each; a run only replaces the rows of its own shape."""
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


@pytest.fixture
def measured(monkeypatch):
    """The modules `run` and `methods`, which look for the others next to them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in PARTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    run = load("run")
    yield run, run.methods
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("speedups", "tokens"),
    [
        ([(1024, 0.5), (2048, 1.2), (4096, 2.0)], 2048),
        ([(4096, 2.0), (1024, 1.1), (2048, 0.9)], 4096),
        ([(1024, 1.5), (2048, 2.0)], 1024),
        ([(1024, 1.5), (2048, 1.0)], None),
    ],
    ids=["rising", "not rising all along", "from the first on", "never in the end"],
)
def test_sparse_calls_overtake_where_no_longer_call_is_slower(measured, speedups, tokens):
    run, _ = measured
    assert run.crossover.overtakes(speedups) == tokens


def test_the_crossover_compares_dense_calls_with_those_of_a_corrected_run(measured):
    run, methods = measured
    for dim in (64, 128):
        chosen = run.crossover.crossover_methods(dim, cuda=True)
        assert [(m.name, m.precision) for m in chosen] == [
            ("sdpa-cudnn", "bfloat16"), ("psa", "bfloat16"), ("psa-corrected", "bfloat16"),
        ]  # fmt: skip
        assert [m.setting for m in chosen][1] == methods.AUTO


def test_float16_is_measured_beside_bfloat16_on_a_gpu(measured):
    _, methods = measured
    rows = [(m.name, m.setting) for m in methods.methods(128, cuda=True, full=False) if m.precision == "float16"]
    assert rows == [("sdpa-cudnn", "dense"), ("psa", methods.AUTO)]
    others = {(m.name, m.setting) for m in methods.methods(128, cuda=True, full=False) if m.precision == "bfloat16"}
    assert set(rows) <= others
    assert not [m for m in methods.methods(128, cuda=False, full=True) if m.dtype is not None]
    assert not [m for m in methods.length_methods(128, cuda=True) if m.dtype is not None]


@pytest.mark.parametrize("only", [None, "psa", "sol-attn", "nothing"])
def test_dense_attention_of_every_type_is_always_measured(measured, monkeypatch, only):
    run, _ = measured
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    arguments = run.argparse.Namespace(lengths=False, full=False, crossover=False, only=only)
    chosen = run._chosen(128, arguments)
    dense = [m.precision for m in chosen if m.name == "sdpa-cudnn"]
    assert dense == ["bfloat16", "float16"]
    assert all(m.name == only for m in chosen if m.name != "sdpa-cudnn" and only)


def test_a_type_is_compared_with_dense_attention_in_itself(measured, capsys):
    """On a CPU, where float32 is the usual type: what reaches a float16 row, its times and its error."""
    run, methods = measured
    seen = []

    def watched(method):
        def make(q, k, v, grid):
            seen.append((method.name, {x.dtype for x in (q, k, v)}))
            return method.make(q, k, v, grid)

        return dataclasses.replace(method, make=make)

    half = [m for m in methods.methods(64, cuda=True, full=False) if m.dtype == torch.float16]
    half[0] = dataclasses.replace(half[0], make=methods.dense(methods.SDPBackend.MATH))  # cuDNN is not on a CPU
    usual = [dataclasses.replace(m, precision="float32", dtype=None) for m in half]
    rows, _ = run._measure("small", (2, (4, 16, 16), 64), 1, [watched(m) for m in usual + half], stages=False)
    assert seen == [(name, {dtype}) for dtype in (torch.float32, torch.float16) for name in ("sdpa-cudnn", "psa")]
    assert [row["precision"] for row in rows] == ["float32"] * 2 + ["float16"] * 2
    for dense, psa in (rows[:2], rows[2:]):
        assert dense["speedup"] == 1
        assert psa["dense_ms"] == dense["ms"]
        assert psa["speedup"] == pytest.approx(dense["ms"] / psa["ms"], rel=0.05)
        assert psa["density"] == pytest.approx(0.15, abs=0.03)
    assert rows[0]["rel_l1"] < 1e-5 < rows[2]["rel_l1"] < 1e-2
    assert rows[3]["rel_l1"] == pytest.approx(rows[1]["rel_l1"], rel=0.05)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("  ", 1)[1].split()[0] for line in lines[2:]] == ["float16/float32"] * 2
    assert float(lines[3].split()[-1]) == pytest.approx(rows[3]["ms"] / rows[1]["ms"], abs=0.01)


MODEL_STEP = [sys.executable, BENCHMARKS / "model_step.py", "wan1.3b", "--layers", "1", "--heads", "2"]
MODEL_STEP += ["--latent", "4", "24", "32", "--device", "cpu", "--steps", "2", "--runs", "1", "--sparsity", "0.85"]


@pytest.mark.slow(seconds=30)
def test_a_whole_model_is_timed_in_both_types_and_on_two_gpus(comfyui, tmp_path):
    """With two prompts a step, as ComfyUI's MultiGPU CFG Split shares them; a CPU is two devices here."""
    from comfyui_psa.workshop.tools.paths import comfyui_folder

    path = tmp_path / "two-prompts.csv"
    command = [*MODEL_STEP, "--gpus", "1", "2", "--guidance", "5", "--csv", path]
    environment = os.environ | {"COMFYUI_PATH": str(comfyui_folder())}
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, env=environment)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    methods = ["dense", "auto 0.85, auto"]
    assert [(row["dtype"], row["gpus"], row["method"]) for row in rows] == [
        (dtype, gpus, method) for dtype in ("bfloat16", "float16") for gpus in ("1", "2") for method in methods
    ]
    assert {(row["prompts"], row["video_tokens"]) for row in rows} == {("2", "768")}
    for row, line in zip(rows, [line for line in done.stdout.splitlines() if "float16" in line], strict=True):
        assert float(row["sparsity"]) == pytest.approx(0 if row["method"] == "dense" else 0.85, abs=0.02)
        assert line.split()[-6:-1] == [
            *(f"{float(row[name]):.3f}" for name in ("seconds_per_step", "best", "first_step")),
            f"{float(row['speedup']):.2f}",
            f"{float(row['sparsity']):.3f}",
        ]
    for start in (0, 4):
        dense, *others = rows[start : start + 4]
        assert float(dense["speedup"]) == 1
        for row in others:
            seconds = float(dense["seconds_per_step"]) / float(row["seconds_per_step"])
            assert float(row["speedup"]) == pytest.approx(seconds, rel=1e-3)
    assert "stayed dense" not in done.stdout


def test_two_gpus_need_two_prompts():
    done = subprocess.run([*map(str, MODEL_STEP), "--gpus", "2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "two GPUs need two prompts a step; pass --guidance, above 1" in done.stderr


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
    front = load("plot")._pareto_front([(1.0, 0.5), (2.0, 0.6), (3.0, 0.1), (4.0, 0.1)])
    assert front == [(1.0, 0.5), (3.0, 0.1)]

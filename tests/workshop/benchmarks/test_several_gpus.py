"""The benchmark of several GPUs, with two processes on a CPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "workshop" / "benchmarks" / "several_gpus.py"


@pytest.mark.slow(seconds=30)
def test_two_processes_write_the_table(tmp_path):
    path = tmp_path / "several-gpus.csv"
    small = ["--models", "wan1.3b", "--layers", "1", "--heads", "2", "--latent", "2", "32", "32", "--steps", "4"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        SCRIPT,
        "--device",
        "cpu",
        *small,
    ]
    subprocess.run([*command, "--min_tokens", "0", "--csv", path], check=True, capture_output=True, timeout=300)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [("dense", "1"), ("psa", "1"), ("dense", "2"), ("psa", "2")]
    assert [(row["method"], row["ranks"]) for row in rows] == expected
    assert [row["difference"] for row in rows] == ["0"] * 4, "two processes make what one makes"
    assert [float(row["exchange"]) > 0 for row in rows] == [False, False, True, True]
    for one, two in zip(rows[:2], rows[2:], strict=True):
        assert float(two["efficiency"]) == pytest.approx(float(one["seconds"]) / 2 / float(two["seconds"]), abs=0.02)
    # Four tensors of 2 heads of 128 in two bytes for 512 tokens: half of them stay, and each of two ranks sends half.
    assert float(rows[2]["sent_gb"]) == pytest.approx(4 * 2 * 128 * 2 * 512 / 4 / 1e9, rel=0.01)
    assert rows[1]["correction"] == rows[3]["correction"] == "full"
    assert {row["layers"] for row in rows} == {"1"}

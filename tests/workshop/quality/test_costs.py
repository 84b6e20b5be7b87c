"""What settings cost and keep: seconds of a whole run against sums done by hand, and the tables of the page."""

import csv

import pytest

from comfyui_psa.workshop.quality.report import corrections, rivals
from comfyui_psa.workshop.quality.results import RunRow, Writer
from comfyui_psa.workshop.quality.seconds import CALLS, SIZES, STEPS, read_times

KEPT = "topk 10/5/0/20 at 0.85, curve, levels kept, no tail"
AUTO = "topk 10/5/0/20 at {}, curve, pooled, no tail"


@pytest.fixture
def folder(tmp_path):
    """Times that are easily added up: PSA takes 2 ms and 40 ms per unit of density, 1 ms more with its correction."""
    shape, model, _ = SIZES["Wan 1.3B"]
    rows = [
        ("sdpa-cudnn", "bfloat16", 1, 50, "dense"),
        ("sdpa-flash", "bfloat16", 1, 80, "dense"),
        ("kitchen-int8", "int8", 1, 10, "dense"),
        *(("psa", "bfloat16", 1 - s, 2 + 40 * (1 - s), AUTO.format(s)) for s in (0.85, 0.9, 0.95)),
        ("psa", "int8", 0.15, 99, AUTO.format(0.85)),
        ("psa-corrected", "bfloat16", 0.15, 9, f"{KEPT}, correction full"),
        ("psa-learning", "bfloat16", 0.15, 12, f"{AUTO.format(0.85)}, measures its correction; without the dense call"),
        ("sol-attn", "int8", 0.1, 9, "tau 1.5"),
        ("sol-attn", "int8", 0.3, 25, "tau 0.5"),
    ]
    with (tmp_path / CALLS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "method", "precision", "density", "ms", "setting"])
        writer.writerows([shape, *row] for row in rows)
        writer.writerow(["another", "psa", "bfloat16", 0.15, 1, AUTO.format(0.85)])
    with (tmp_path / STEPS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "dtype", "method", "sparsity", "seconds_per_step"])
        writer.writerow([model, "bfloat16", "dense", 0, 9])
        writer.writerow([model, "bfloat16", "psa", 0.85, 5])
        writer.writerow([model, "bfloat16", "psa", 0.85, 0.44])  # 30 calls of 8 ms, and the rest of the model
        writer.writerow([model, "float16", "psa", 0.85, 7])
    return tmp_path


def row(setting="{}", **counts):
    return RunRow("name", "rivals", "clip", psnr=30.0, ssim=0.9, steps=10, settings=setting, **counts)


def test_a_run_takes_what_its_calls_and_the_rest_of_the_model_take(folder):
    times = read_times("Wan 1.3B", folder)
    assert times.rest == pytest.approx(0.2)
    dense = row(forwards=1.0, compute=1.0, dense_calls=1.0, sparse_calls=0.0, learning_calls=0.0)
    assert times.run(dense) == pytest.approx(10 * (0.2 + 30 * 0.050))
    fewer = row(forwards=0.4, compute=0.4, dense_calls=0.4, sparse_calls=0.0, learning_calls=0.0)
    assert times.run(fewer) == pytest.approx(4 * (0.2 + 30 * 0.050))
    # Two dense steps of 10, the others at a density of .25, or of .2 and a learning call in one dense step.
    plain = row(forwards=1.0, compute=0.2 + 0.8 * 0.25, dense_calls=0.2, sparse_calls=0.8, learning_calls=0.0)
    assert times.run(plain) == pytest.approx(10 * 0.2 + 30 * (2 * 0.050 + 8 * 0.012))
    counts = {"dense_calls": 0.2, "sparse_calls": 0.8, "learning_calls": 0.1}
    corrected = row('{"node": {"correction": "full"}}', forwards=1.0, compute=0.2 + 0.9 * 0.2, **counts)
    assert times.run(corrected) == pytest.approx(10 * 0.2 + 30 * (2 * 0.050 + 8 * 0.011 + 0.014))
    sol = row('{"prototype": {"sol": 1.0}}', forwards=1.0, compute=0.2 + 0.8 * 0.2, dense_calls=0.2, sparse_calls=0.8)
    assert times.run(sol) == pytest.approx(10 * 0.2 + 30 * (2 * 0.050 + 8 * 0.017))


def test_the_rest_of_the_model_is_what_a_steps_own_calls_leave(folder):
    with (folder / STEPS).open("a", newline="") as file:
        model = SIZES["Wan 1.3B"][1]
        csv.writer(file).writerow([model, "bfloat16", "psa-corrected", 0.851, 0.57])  # 30 calls of 9 ms
        csv.writer(file).writerow([model, "bfloat16", "psa-learning", 0.85, 9])
    assert read_times("Wan 1.3B", folder).rest == pytest.approx(0.3)


def test_what_was_not_measured_has_no_seconds(folder):
    times = read_times("Wan 1.3B", folder)
    eighth = '{"node": {"correction": "eighth"}}'
    assert (
        times.run(row(eighth, forwards=1.0, compute=0.4, dense_calls=0.2, sparse_calls=0.8, learning_calls=0.1)) is None
    )
    assert times.run(row(compute=0.4)) is None  # a file from before calls were counted
    assert read_times("Wan 14B", folder) is None


def test_the_page_shows_models_side_by_side_with_their_spread(folder, monkeypatch):
    for module in (corrections, rivals):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(rivals, "read_times", lambda size: read_times(size, folder))
    assert "Not measured yet" in corrections.corrections_section()
    rows = []
    for model, precision, gain in (
        ("psa_demo", "bf16, triton", 8),
        ("psa_large", "bf16, triton", 5),
        ("psa_demo", "fp16, triton", 8.5),
    ):
        for name, psnr in (("uncorrected", 28), ("default", 28 + gain), ("gamma 0.8", 30)):
            rows += [
                RunRow(f"{name} @ 0.438", "correction", f"clip {i}", compute=0.4375, psnr=psnr + i, ssim=0.98,
                       model=model, precision=precision, steps=20)
                for i in range(3)
            ]  # fmt: skip
    Writer(folder).add(rows)
    (folder / "runs.csv").rename(folder / "quality-corrections-both-gpu.csv")
    text = corrections.corrections_section()
    assert "| psa_demo, bf16, 20 steps, 3 clips | 0.438 |" in text
    assert "| our default | 37.0 ± 1.0, worst 36.0 |" in text
    assert "| our default | 34.0 ± 1.0, worst 33.0 |" in text
    assert "| gamma 0.8 | 31.0, worst 30.0 |" in text
    assert "(psa_demo): +0.50 dB at 0.438" in text


def test_tries_are_compared_with_the_default_clip_by_clip(folder, monkeypatch):
    monkeypatch.setattr(corrections, "RESULTS", folder)
    rows = [
        RunRow(
            f"{name} @ 0.438", "tries", f"clip {i}", psnr=psnr, ssim=0.9, model="psa_demo", precision="bf16", steps=20
        )
        for name, values in (("default", (30, 40)), ("by mass", (29, 37)))
        for i, psnr in enumerate(values)
    ]
    Writer(folder).add(rows)
    (folder / "runs.csv").rename(folder / "quality-tries-gpu.csv")
    assert "| by mass | -2.00 ± 1.00, worst -1.0 |" in corrections.tries_section()


def test_every_rival_has_its_costs_and_its_curve(folder, monkeypatch, tmp_path):
    for module in (corrections, rivals):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(rivals, "PICTURES", tmp_path)
    monkeypatch.setattr(rivals, "read_times", lambda size: read_times(size, folder))
    found = [
        row(compute=0.4, forwards=0.4, dense_calls=0.4, sparse_calls=0.0, learning_calls=0.0),
        row(compute=0.5, forwards=0.5, dense_calls=0.5, sparse_calls=0.0, learning_calls=0.0),
        row(compute=0.5, forwards=0.5, dense_calls=0.5, sparse_calls=0.0, learning_calls=0.0),
    ]
    for each, name in zip(found, ("40% of the steps", "EasyCache, 0.1", "Sol-Attn, curve, tau 0.5"), strict=True):
        each.setting, each.model, each.precision = name, "psa_demo", "bf16, triton"
    Writer(folder).add(found)
    (folder / "runs.csv").rename(folder / "quality-rivals-gpu.csv")
    text = rivals.rivals_section()
    assert "| 40% of the steps | 0.400 | 30.0, 30.0 | 0.9000 | 7 s |  |" in text
    assert "| EasyCache, 0.1 | 0.500 | 30.0, 30.0 | 0.9000 | 8 s |  |" in text  # 8.5 is rounded to even
    assert "curve" not in text.split("|---")[1]  # a question about Sol-Attn, not a rival
    assert "No step of Wan 14B" in text
    rivals.plot_rivals()
    rivals.write_seconds()
    assert (tmp_path / "rivals-psa-demo-bf16-10.png").stat().st_size > 10_000
    assert len((folder / rivals.SECONDS).read_text().splitlines()) == 3

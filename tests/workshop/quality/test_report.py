"""What follows from measured rows: the quick run's line and exit code, verdicts, and the page that is committed."""

import math

import pytest

from comfyui_psa.workshop.quality.claims import Claim, choice_claims, claims
from comfyui_psa.workshop.quality.command import exit_code
from comfyui_psa.workshop.quality.matrix import settings_of
from comfyui_psa.workshop.quality.report import page
from comfyui_psa.workshop.quality.report.choice import density_at
from comfyui_psa.workshop.quality.report.parts import PAGE, PICTURES
from comfyui_psa.workshop.quality.report.verdicts import verdict
from comfyui_psa.workshop.quality.results import RunRow, Writer, read_runs
from comfyui_psa.workshop.quality.summary import Difference, quick_line


def rows_of(psnr):
    """psnr: setting -> PSNR of each clip."""
    return [
        RunRow(setting, "published", f"clip {i}", compute=0.4, psnr=value, ssim=0.9)
        for setting, values in psnr.items()
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(("ours", "code"), [(28.5, 0), (27.5, 1), (28.0, 1)])
def test_the_quick_run_ends_with_the_margin_to_the_best_published_setting(tmp_path, ours, code):
    rows = rows_of({
        "weak (published)": [20.0, 22.0], "default = weak": [25.0, 25.0],
        "strong (published)": [27.0, 29.0], "default = strong": [ours, ours],
    })  # fmt: skip
    Writer(tmp_path).add(rows)
    margin, line = quick_line(read_runs(tmp_path))
    assert margin == pytest.approx(ours - 28)
    assert exit_code(margin) == code
    assert f"{ours - 28:+.2f} dB" in line
    assert "strong (published)" in line


def test_a_quick_run_in_which_nothing_could_be_compared_fails():
    margin, line = quick_line(rows_of({"strong (published)": [27.0]}))
    assert exit_code(margin) == 1
    assert "Nothing was compared" in line


@pytest.mark.parametrize(
    ("psnr", "equal", "expected"),
    [
        ([(1.0, 0.2)], False, "holds"),
        ([(-1.0, 0.2)], False, "does not hold"),
        ([(1.0, 0.6)], False, "not decided"),
        ([(1.0, 0.2), (-1.0, 0.2)], False, "mixed"),
        ([(1.0, 0.2), (1.0, 0.6)], False, "not decided, leans to yes"),
        ([(0.1, 0.2)], True, "not refuted"),
        ([(-1.0, 0.2)], True, "does not hold"),
    ],
)
def test_verdicts_need_two_standard_errors(psnr, equal, expected):
    differences = [Difference("a", "b", 4, value, error, 0.0, (0.4, 0.4)) for value, error in psnr]
    assert verdict(Claim("", "", "a", "b", equal=equal), differences) == expected


def test_one_clip_decides_nothing():
    assert Difference("a", "b", 1, 3.0, math.inf, 0.0, (0.4, 0.4)).verdict == "no difference"


def test_the_committed_page_is_what_the_committed_results_say():
    assert PAGE.read_text(encoding="utf-8") == page.page_text()
    for name in ("compute.png", "time.png"):
        assert (PICTURES / name).stat().st_size < 300_000


def test_equal_time_is_the_density_that_takes_it():
    # 10 ms at a density of 0.15 and 7.5 at 0.10: 12 ms pay for 0.19.
    assert density_at(12.0, 10.0, 7.5) == pytest.approx(0.19)
    assert density_at(7.5, 10.0, 7.5) == pytest.approx(0.10)


def test_every_candidate_that_is_asked_about_is_in_the_list():
    names = {setting.name for setting in settings_of("candidates")}
    for claim in choice_claims():
        for compute in claim.compute:
            assert {f"{claim.first} @{compute:.2f}", f"{claim.second} @{compute:.2f}"} <= names


def test_every_claim_is_about_settings_of_the_list():
    names = {setting.name for setting in settings_of("full")}
    for claim in claims():
        suffixes = [f" @{compute:.2f}" for compute in claim.compute] or [""]
        assert {name + suffix for name in (claim.first, claim.second) for suffix in suffixes} <= names

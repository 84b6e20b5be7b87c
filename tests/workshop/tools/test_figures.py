"""The demo's figures: what its page says first, and when its seconds cannot be compared."""

import numpy as np
import pytest
from PIL import Image

from comfyui_psa.workshop.tools.figures import Figures
from comfyui_psa.workshop.tools.report import write_report


def figures(dense, warm_up, sparse=0.5):
    """A run of six steps, three of them sparse. The first of each run loads the model and takes nine seconds."""
    seconds = [9.0, *[warm_up] * 2, *[sparse] * 3]
    sparsity = [None, None, None, 0.85, 0.85, 0.85]
    return Figures(31.24, 0.98641, [9.0, *[dense] * 5], seconds, sparsity, {})


@pytest.mark.parametrize(("dense", "warm_up"), [(2.0, 2.0), (2.0, 2.6), (2.6, 2.0)])
def test_seconds_of_a_quiet_machine_are_told_without_a_warning(dense, warm_up):
    found = figures(dense, warm_up)
    assert found.warning is None
    assert found.headline() == (
        f"Sampling took {9 + 2 * warm_up + 1.5:.1f} s with PSA and {9 + 5 * dense:.1f} s without; "
        f"a sparse step 0.50 s, a dense one {dense:.2f} s; PSNR 31.2 dB, SSIM 0.986."
    )


@pytest.mark.parametrize(("dense", "warm_up"), [(20.16, 5.47), (2.0, 2.7), (2.7, 2.0)])
def test_dense_steps_that_differ_by_a_third_are_a_warning(dense, warm_up):
    found = figures(dense, warm_up)
    assert f"dense steps took {dense:.2f} s in one run and {warm_up:.2f} s in the other" in found.warning
    assert found.headline().endswith(found.warning)


def test_without_a_dense_step_there_is_nothing_to_compare():
    assert Figures(31.0, 0.9, [9.0, 2.0], [9.0, 0.5], [0.85, 0.85], {}).warning is None


def test_the_page_begins_with_it(tmp_path):
    page = tmp_path / "report.html"
    found = figures(20.16, 5.47)
    write_report(page, found, "a <model>", b"", Image.new("RGB", (8, 8)), np.zeros((1, 8, 8, 3), np.uint8))
    text = page.read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    order = [body.index(words) for words in (found.headline(), "a &lt;model&gt;", "What next: ", "<table>")]
    assert order == sorted(order)

"""The README's picture: its words are those of the demo's run, and its seconds the newest that were measured."""

import json
import re

import numpy as np
from PIL import Image

from comfyui_psa.workshop.table import read_rows
from comfyui_psa.workshop.tools import hero
from comfyui_psa.workshop.tools.film import FOOT, GAP, HEAD, description_of
from comfyui_psa.workshop.tools.paths import ROOT

MOST_BYTES = 1_000_000


def test_both_videos_are_below_their_figures(tmp_path):
    videos = [np.full((2, 32, 32, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200))]
    report = {"target_sparsity": 0.85, "saved": 0.5749}
    hero.write_hero(tmp_path / "hero.webp", *videos, 37.849, report)
    with Image.open(tmp_path / "hero.webp") as picture:
        assert picture.n_frames == 1  # equal frames are one
        assert picture.size == (2 * hero.SIDE + GAP, HEAD + hero.SIDE + 2 * FOOT)
        shown = np.asarray(picture.convert("RGB"))[HEAD + hero.SIDE // 2]
    np.testing.assert_allclose(shown[hero.SIDE // 2], (200, 0, 0), atol=12)
    np.testing.assert_allclose(shown[hero.SIDE + GAP + hero.SIDE // 2], (0, 0, 200), atol=12)
    assert "PSA 0.85: 43 % of the attention, 37.8 dB" in description_of(tmp_path / "hero.webp")


def test_the_seconds_are_the_newest_that_were_measured():
    rows = [r for r in read_rows(ROOT / "workshop/results/model-gpu.csv") if r["dtype"] == "bfloat16"]
    wan = [r for r in rows if r["model"] == "wan2.1-1.3b"]
    wan = [r for r in wan if r["date"] == max(row["date"] for row in wan)]
    dense, sparse = re.findall(r"(\d+\.\d+) s", hero.speed()[0])
    assert dense == f"{float([r for r in wan if r['method'] == 'dense'][-1]['seconds_per_step']):.2f}"
    assert sparse == f"{float([r for r in wan if r['method'] == 'psa-corrected'][-1]['seconds_per_step']):.2f}"


def test_the_committed_picture_shows_the_committed_figures():
    run = json.loads((ROOT / "workshop" / "results" / "demo.json").read_text(encoding="utf-8"))
    path = ROOT / "docs" / "hero.webp"
    assert description_of(path) == hero.words(run["psnr_db"], run["report"])
    assert path.stat().st_size < MOST_BYTES

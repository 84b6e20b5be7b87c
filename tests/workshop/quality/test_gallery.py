"""The gallery: what its pictures show, what is burnt into them, and that the committed ones are of the same run."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from comfyui_psa.workshop.quality import gallery
from comfyui_psa.workshop.quality.demo_model import Clip
from comfyui_psa.workshop.quality.matrix import settings_of
from comfyui_psa.workshop.quality.report import gallery as page
from comfyui_psa.workshop.quality.results import RunRow, Writer, read_runs
from comfyui_psa.workshop.table import read_records
from comfyui_psa.workshop.tools.film import FOOT, GAP, HEAD, Tile, description_of, film, save, stacked

MOST_BYTES = 3_000_000
COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))


def flat(*colours, size=(20, 40)):
    """A video [n, H, W, 3], one colour for each frame."""
    return np.stack([np.full((*size, 3), colour, np.uint8) for colour in colours])


def test_every_tile_of_every_frame_is_at_its_place_below_its_words():
    videos = [flat(*(COLOURS[(i + frame) % 3] for frame in range(2))) for i in range(3)]
    tiles = [Tile(f"name {i}", "figures", video) for i, video in enumerate(videos)]
    pictures = film(tiles, columns=2, side=80, footer=["below"])
    assert len(pictures) == 2
    assert pictures[0].size == (2 * 80 + GAP, 2 * (HEAD + 40) + GAP + FOOT)
    for frame, picture in enumerate(pictures):
        shown = np.asarray(picture)
        for i in range(3):
            x, y = i % 2 * (80 + GAP), i // 2 * (HEAD + 40 + GAP)
            assert tuple(shown[y + HEAD + 20, x + 40]) == COLOURS[(i + frame) % 3]
            assert shown[y : y + HEAD, x : x + 80].max() > 150, "words are written"
        assert shown[-FOOT:].max() > 150


def test_words_that_are_too_wide_become_smaller_and_stay_inside():
    wide = film([Tile("a name that is far too long for its tile", "1", flat(COLOURS[0]))], columns=1, side=200)
    shown = np.asarray(wide[0])[:HEAD]
    assert shown.max() > 150
    assert shown[:, -4:].max() < 60


def test_a_still_shows_the_middle_frame_above_four_times_its_error():
    dense, video = flat(*[(100, 100, 100)] * 3), flat((0, 0, 0), (110, 90, 100), (0, 0, 0))
    (found,) = stacked(video, dense)
    assert found.shape == (40, 40, 3)
    assert found[10, 10].tolist() == [110, 90, 100]
    assert found[30, 10].tolist() == [40, 40, 0]


def test_a_saved_film_loops_and_keeps_its_words(tmp_path):
    path = tmp_path / "a.webp"
    save(path, [Image.fromarray(frame) for frame in flat(*COLOURS)], "dense: 100 %; PSA: 36 %")
    assert description_of(path) == "dense: 100 %; PSA: 36 %"
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        means = [np.asarray(frame.convert("RGB")).mean((0, 1)) for frame in ImageSequence.Iterator(picture)]
    np.testing.assert_allclose(means, COLOURS, atol=12)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (RunRow("dense", "dense", "a", compute=1.0), "100 % of the attention"),
        (RunRow("PSA", "", "a", compute=0.3625, psnr=33.06, forwards=1.0), "36 % of the attention, 33.1 dB"),
        (RunRow("fewer", "", "a", compute=0.35, psnr=24.0, forwards=0.35), "35 % of the model calls, 24.0 dB"),
        (RunRow("same", "", "a", compute=0.92, psnr=float("inf"), forwards=1.0), "92 % of the attention, equal"),
    ],
)
def test_figures(row, text):
    assert gallery.figures(row) == text


def test_every_picture_shows_settings_of_the_list_and_every_setting_is_shown():
    shown = {name for picture in gallery.PICTURES for name in picture.tiles.values()}
    assert shown == {gallery.DENSE, *(setting.name for setting in settings_of("gallery"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a run of two of the settings, on two clips of two frames, leaves it."""
    folder = tmp_path_factory.mktemp("gallery")
    clips = [Clip(None, 42, f"scene {number}, seed 42") for number in (1, 2)]
    sheet = gallery.Gallery(folder, "demo")
    rows = [RunRow("dense", "dense", clip.name, 1.0, steps=4, machine="a CPU") for clip in clips]
    for setting, compute in ((gallery.CACHE, 0.46), (gallery.STEPS_LEFT, 0.35)):
        rows += [
            RunRow(setting, "rivals", clip.name, compute, psnr=20 + number, forwards=compute, steps=4)
            for number, clip in enumerate(clips)
        ]
    Writer(folder).add(rows)
    for number, name in enumerate(dict.fromkeys(row.setting for row in rows)):
        videos = np.stack([flat(COLOURS[number], COLOURS[clip], size=(64, 64)) for clip in range(2)])
        sheet.add(name, torch.from_numpy(videos).permute(0, 4, 1, 2, 3))
    sheet.write(clips, str)
    return folder


def test_a_run_draws_every_clip_and_leaves_out_what_was_not_measured(run):
    rows = read_runs(run)
    for number in (1, 2):
        found = description_of(run / f"demo-{number}-rivals.webp").split("; ")
        own = {row.setting: row for row in rows if row.clip == f"scene {number}, seed 42"}
        names = [gallery.DENSE, gallery.CACHE, gallery.STEPS_LEFT]
        assert found == [f"{name}: {gallery.figures(own[name])}" for name in names]
        assert f", {19 + number}.0 dB" in found[1]
        with Image.open(run / f"demo-{number}-rivals.webp") as picture:
            assert picture.n_frames == 2
            assert picture.size == (3 * (240 + GAP) - GAP, HEAD + 240)
            picture.seek(1)
            shown = np.asarray(picture.convert("RGB"))[HEAD + 120, 120 :: 240 + GAP]
        np.testing.assert_allclose(shown, [COLOURS[number - 1]] * 3, atol=12)


def test_a_run_is_published_with_its_figures(run, tmp_path, monkeypatch):
    for name, place in (("RESULTS", tmp_path), ("FOLDER", tmp_path / "gallery"), ("PAGE", tmp_path / "gallery.md")):
        monkeypatch.setattr(page, name, place)
    page.publish(run, "demo")
    text = (tmp_path / "gallery.md").read_text()
    assert read_records(tmp_path / "gallery-demo.csv", RunRow) == read_runs(run)
    found = re.findall(r"!\[(.*?)\]\(gallery/(.*?)\)", text)
    assert {name for _, name in found} == {path.name for path in (tmp_path / "gallery").iterdir()}
    for words, name in found:
        assert description_of(tmp_path / "gallery" / name) == words
    assert "35 % of the model calls | 20.0 dB | 21.0 dB |" in text


def test_a_failed_setting_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    rows = [
        RunRow("dense", "dense", "a", compute=1.0, steps=4),
        RunRow("PSA 0.85", "gallery", "", error="out of memory"),
        RunRow("PSA 0.70", "gallery", "a", compute=0.5, psnr=40.0, forwards=1.0, steps=4),
    ]
    Writer(tmp_path).add(rows)
    (tmp_path / "results").mkdir()
    (tmp_path / "runs.csv").rename(tmp_path / "results" / "gallery-other.csv")
    text = page.page_text()
    assert "## other" in text
    assert "| PSA 0.70 |" in text
    assert "| PSA 0.85 |" not in text


def test_the_committed_page_is_what_the_committed_figures_say():
    assert {"demo", "large"} <= set(page.published())
    assert page.PAGE.read_text(encoding="utf-8") == page.page_text()


@pytest.mark.parametrize("model", page.published())
def test_the_committed_pictures_show_the_committed_figures(model):
    for _, name, words in page.shown(model):
        path = page.FOLDER / name
        assert description_of(path) == words
        assert path.stat().st_size < MOST_BYTES

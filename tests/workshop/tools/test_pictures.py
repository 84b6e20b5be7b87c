"""Contact sheets and maps of the workshop: every picture is at its row and column, in the nodes' colours."""

import numpy as np
import pytest
import torch

from comfyui_psa.demo.scene import Background, Scene, SceneObject, describe
from comfyui_psa.reports.paint import LEVELS, UNSEEN
from comfyui_psa.workshop.quality.sheet import Sheet
from comfyui_psa.workshop.tools import pictures, thumbnails


def flat(*colours, size=(40, 80)):
    """Pictures [n, H, W, 3], one colour each."""
    return np.stack([np.full((*size, 3), colour, np.uint8) for colour in colours])


def middles(sheet, columns, side, tops, tall):
    """The colour in the middle of every picture, by row and column."""
    table = np.asarray(sheet)
    return [[table[top + tall // 2, column * (side + 4) + side // 2].tolist() for column in columns] for top in tops]


RED, GREEN, BLUE = [200, 0, 0], [0, 200, 0], [0, 0, 200]


def test_rows_and_columns_of_a_contact_sheet():
    rows = [("first", flat(RED, GREEN, BLUE)), ("second", flat(BLUE))]
    sheet = pictures.contact_sheet(rows, side=60, title="a title", captions=["1", "2", "3"])
    assert sheet.width == 3 * 64 - 4
    found = middles(sheet, range(3), 60, (40 + 24, 40 + 24 + 30 + 4 + 24), 30)
    assert found == [[RED, GREEN, BLUE], [BLUE, [255] * 3, [255] * 3]]
    for top, bottom in ((0, 40), (40, 64), (sheet.height - 24, sheet.height)):
        assert np.asarray(sheet)[top:bottom].min() < 200, "words are written"


def test_a_sheet_without_words_holds_pictures_alone():
    sheet = pictures.contact_sheet([("", flat(RED)), ("", flat(GREEN))], side=80)
    assert sheet.size == (80, 2 * 40 + 4)


def test_a_strip_shows_dense_psa_and_their_difference():
    dense, psa = flat(*[[10, 10, 10]] * 9), flat(*[[10, 30, 0]] * 9)
    strip = pictures.contact_strip(dense, psa, "title", columns=3, side=80)
    tops = [40 + 24 + row * 68 for row in range(3)]
    assert middles(strip, range(3), 80, tops, 40) == [[[10] * 3] * 3, [[10, 30, 0]] * 3, [[0, 80, 40]] * 3]


def test_the_sheet_of_a_quality_run_has_errors_beside_all_but_dense(tmp_path):
    class Clip:
        scene = Scene(
            SceneObject("star", "yellow", "large", "plain", "right"),
            SceneObject("ring", "magenta", "medium", "plain", "up"),
            Background("clouds", "navy", "left"),
        )

    videos = torch.full((1, 3, 5, 32, 32), 100, dtype=torch.uint8)
    sheet = Sheet(tmp_path)
    sheet.add("dense", videos)
    sheet.add("half", videos + 20)
    sheet.write([Clip()], describe)
    (file,) = tmp_path.iterdir()
    with pictures.Image.open(file) as picture:
        found = middles(picture.convert("RGB"), range(6), 150, (64, 64 + 178), 150)
    expected = [[100] * 3 + [255] * 3, [120] * 3 + [80] * 3]
    assert [[pixel[0] for pixel in row] for row in found] == [pytest.approx(row, abs=3) for row in expected]


def test_levels_have_the_colours_of_the_nodes():
    table = np.asarray(pictures.level_map([[1, 2, 0], [8, 4, 16]], width=6))
    expected = [[LEVELS[1], LEVELS[2], UNSEEN], [LEVELS[8], LEVELS[4], LEVELS[16]]]
    assert table[::2, ::2].tolist() == [[list(colour) for colour in row] for row in expected]


def test_maps_over_a_video_are_one_a_latent_frame_in_rows_of_five():
    frames = flat(*[[0, 0, 0]] * 25, size=(32, 46))
    levels = np.repeat(np.linspace(0, 1, 7), 4)  # grid 7 x 2 x 2: lighter from frame to frame
    sheet = pictures.attention_over_video(frames, levels.tolist(), (7, 2, 2))
    assert sheet.size == (5 * 234 - 4, 2 * 164 - 4)
    light = [sum(pixel) for row in middles(sheet, range(5), 230, (0, 164), 160) for pixel in row][:7]
    assert light == sorted(light)
    assert light[0] < light[-1]


@pytest.mark.parametrize(
    ("sparsity", "preset", "shares"),
    [(0.85, "auto", (0.10, 0.05, 0, 0.20)), (0.84375, "cogvideox-5b-4step", (0.05, 0.10, 0.10, 0.25))],
)
def test_a_templates_card_shows_its_own_pyramid(sparsity, preset, shares):
    bar = np.asarray(thumbnails.card("A model, a task", sparsity, preset))[287, 32:480]
    found = [(bar == LEVELS[factor]).all(-1).mean() for factor in (1, 2, 4, 8)]
    assert found == pytest.approx(shares, abs=0.005)
    assert (bar == UNSEEN).all(-1).mean() == pytest.approx(1 - sum(shares), abs=0.005)

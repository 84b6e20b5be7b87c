"""The pictures' colours."""

import re

from PIL import ImageColor

from comfyui_psa.reports.paint import level_colour
from comfyui_psa.workshop.tools.paths import ROOT


def test_a_level_has_the_same_colour_in_the_node_and_in_every_picture():
    script = (ROOT / "web" / "picture.js").read_text(encoding="utf-8")
    table = re.search(r"^const COLOURS = \{(.+)\};$", script, re.MULTILINE)[1]
    in_the_node = {int(factor): colour for factor, colour in re.findall(r'(\d+): "(#\w{6})"', table)}
    assert set(in_the_node) >= {1, 2, 4, 8, 16, 32}
    in_the_node[64] = re.search(r'^const COARSE = "(#\w{6})";$', script, re.MULTILINE)[1]
    assert {factor: level_colour(factor) for factor in in_the_node} == {
        factor: ImageColor.getrgb(colour) for factor, colour in in_the_node.items()
    }

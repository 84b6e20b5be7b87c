"""The table of models in docs/compatibility.md is what the files of the families say."""

import dataclasses

import pytest

from comfyui_psa.patching.family import families
from comfyui_psa.patching.support import Variant
from comfyui_psa.workshop.tools.models_table import PAGE, page, rows
from comfyui_psa.workshop.tools.paths import ROOT


def test_the_page_is_up_to_date():
    assert page(ROOT) == (ROOT / PAGE).read_text(encoding="utf-8"), "run `python dev.py docs`"


def test_the_files_say_the_same_when_they_are_run():
    order = ("name", "heads", "before", "grid", "after", "psa")
    assert {field.name for field in dataclasses.fields(Variant)} == set(order)
    found = [
        (family.name, *(getattr(one, field) for field in order)) for family in families() for one in family.variants
    ]
    assert list(rows(ROOT)) == found


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text("nothing")
    with pytest.raises(LookupError, match="needs the line"):
        page(tmp_path)


def test_a_row_without_a_test_is_refused(tmp_path):
    for folder in ("docs", "patching/families", "tests/patching"):
        (tmp_path / folder).mkdir(parents=True)
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    (tmp_path / PAGE).write_text(text, encoding="utf-8")
    family = "FAMILY = Family('Toy', ('toy',), _support, (Variant('wood'), Variant('tin')))\n"
    (tmp_path / "patching/families/toy.py").write_text(family)
    test = tmp_path / "tests/patching/test_toys.py"
    test.write_text("CASES = [Case('wood')]\nOTHERS = ['tin']\n")
    with pytest.raises(LookupError, match=r"^tin: no test"):
        page(tmp_path)
    test.write_text("CASES = [Case('wood')]\nDENSE = {'tin': 'why'}\n")
    assert "| Toy | tin | 128 | - | T x H x W | - | sparse | `test_toys.py` |" in page(tmp_path)

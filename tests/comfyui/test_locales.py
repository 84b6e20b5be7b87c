"""Names and tooltips in every language: English matches the schemas, and no other language lacks anything."""

import json
import re

import pytest

from comfyui_psa.workshop.tools.locales import english
from comfyui_psa.workshop.tools.paths import LOCALES, ROOT
from comfyui_psa.workshop.tools.server import PACK

LONGEST_TOOLTIP = 160
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir())


def read(language):
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(value, path=()):
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from leaves(inner, (*path, key))


def test_both_languages_are_there():
    assert LANGUAGES == ["en", "zh"]


def test_english_is_what_the_schemas_say(definitions):
    assert read("en") == english(definitions), "a schema has changed: run `python dev.py workflows`"


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_or_left_over(definitions, language):
    expected, found = dict(leaves(english(definitions))), dict(leaves(read(language)))
    assert set(found) == set(expected)
    assert [path for path, text in found.items() if not text.strip()] == []


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_tooltips_are_translated_and_keep_their_numbers(definitions, language):
    expected, found = dict(leaves(english(definitions))), dict(leaves(read(language)))
    for path, text in expected.items():
        if path[-1] != "tooltip":
            continue
        assert found[path] != text, path
        # Numbers with a decimal point are figures that were measured or defaults: they are the same in every language.
        numbers = set(re.findall(r"\d+\.\d+", text))
        assert numbers == set(re.findall(r"\d+\.\d+", found[path])), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_tooltips_are_short_enough_to_be_read_while_pointing(language):
    long = {path: len(text) for path, text in leaves(read(language)) if path[-1] == "tooltip"}
    assert {path: length for path, length in long.items() if length > LONGEST_TOOLTIP} == {}


HELP = ROOT / "web" / "docs"


@pytest.mark.parametrize("page", sorted(HELP.glob("*.md")), ids=lambda page: page.stem)
def test_every_help_page_is_there_in_chinese_with_the_same_figures(client, page):
    """ComfyUI asks for NODE/zh.md first. Pictures are looked up from the folder of the English pages in both."""
    english, chinese = (path.read_text(encoding="utf-8") for path in (page, HELP / page.stem / "zh.md"))
    for same in (r"^#+ ", r"!\[.*?\](\(.*?\))", r"\d+\.\d+", r"\d{2,}", r"^- "):
        found = (sorted(re.findall(same, text, re.MULTILINE)) for text in (english, chinese))
        assert len(set(map(tuple, found))) == 1, same
    assert re.search("[\u4e00-\u9fff]", chinese.splitlines()[0]) or "Sigmas" in chinese.splitlines()[0]
    assert client.download(f"/extensions/{PACK}/docs/{page.stem}/zh.md").decode() == chinese


def test_the_server_hands_them_out(client):
    told = client.get("/i18n")
    for language in LANGUAGES:
        assert told[language]["nodeDefs"]["PSAPatch"] == read(language)["PSAPatch"]

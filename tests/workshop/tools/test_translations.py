"""web/messages/*.json translate what the product can say on ComfyUI's page: all of it, and nothing else."""

import json
import re
import shutil

import pytest

from comfyui_psa.workshop.tools.alternatives import UNKNOWN, cases, either, join, perhaps, shown
from comfyui_psa.workshop.tools.messages import FOLDERS, LOG_ONLY, Product
from comfyui_psa.workshop.tools.paths import LOCALES, ROOT

TABLES = sorted((ROOT / "web" / "messages").glob("*.json"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def inputs_and_titles(language):
    """{input: all its labels}, and {id: title} of the nodes."""
    nodes = read(LOCALES / language / "nodeDefs.json")
    labels = {}
    for node in nodes.values():
        for name, words in node["inputs"].items():
            labels.setdefault(name, set()).add(words["name"])
    return labels, {name: node["display_name"] for name, node in nodes.items()}


@pytest.fixture(scope="module")
def templates():
    return Product(ROOT).templates()


@pytest.fixture(params=TABLES, ids=lambda path: path.stem)
def language(request):
    return request.param.stem


@pytest.fixture
def table(language):
    return read(ROOT / "web" / "messages" / f"{language}.json")


def test_there_is_a_table_for_every_language_but_english():
    assert [path.stem for path in TABLES] == sorted(folder.name for folder in LOCALES.iterdir() if folder.name != "en")


def test_every_message_is_translated_and_nothing_is_left_over(templates, table):
    _, titles = inputs_and_titles("en")
    wanted = {*templates, *titles.values()}
    assert sorted(wanted - set(table)) == [], "the code says it: translate it"
    assert sorted(set(table) - wanted) == [], "the code does not say it any more: take it out"


def test_everything_that_is_only_known_when_shown_is_in_the_translation(table):
    for english, words in table.items():
        expected = [str(number + 1) for number in range(english.count(UNKNOWN))]
        assert sorted(re.findall(r"\{(\d+)\}", words)) == expected, english
        assert UNKNOWN not in words, english


def test_a_translation_has_the_same_figures(table):
    for english, words in table.items():
        found = re.findall(r"\d+(?:\.\d+)?", re.sub(r"\{\d+\}", "", words))
        assert sorted(found) == sorted(re.findall(r"\d+(?:\.\d+)?", english)), english


def test_inputs_and_nodes_are_called_what_the_page_calls_them(language, table):
    labels, titles = inputs_and_titles(language)
    _, english_titles = inputs_and_titles("en")
    for english, words in table.items():
        for name in re.findall(r"[a-z]+(?:_[a-z]+)+", english):
            assert any(label in words for label in labels.get(name, {name})), (english, name)
        for node, title in english_titles.items():
            if re.search(rf"\b{re.escape(title)}\b", english):
                assert titles[node] in words, english


def test_a_sentence_in_other_words_needs_another_translation(tmp_path, templates):
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in (
        ("sampling/findings.py", "a cache answered all {", "the memory of a node answered {"),
        ("choices/settings.py", "lower start_percent or raise", "take a lower start_percent or raise"),
        ("reports/show.py", "the model has not sampled yet", "the model still has to sample"),
    ):
        path = tmp_path / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
    changed = Product(tmp_path).templates()
    assert len(set(templates) - set(changed)) == len(set(changed) - set(templates)) == 3


def test_what_only_the_log_says_is_still_in_the_code():
    assert set(Product(ROOT).places()) >= LOG_ONLY


def test_alternatives_are_shown_and_taken_apart():
    one = f"a {either(['dog', 'cat'])}{perhaps(' of ' + either(['mine', 'yours', 'hers', 'theirs']))}"
    assert shown(one) == "a (dog / cat)[ of …]"
    assert cases(one) == ["a dog", "a dog of …", "mine", "yours", "hers", "theirs", "a cat", "a cat of …"]
    assert shown(join("; ", ["first", perhaps("; second"), "third"])) == "first[; second]; third"
    assert shown(either(["", "only"])) == "[only]"
    assert either(["same", "same"]) == "same"

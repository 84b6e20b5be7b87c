"""Preset files of the user: what is right is read, what is wrong is a sentence, and nothing ever breaks the pack."""

import contextlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyui_psa.choices.errors import InputError
from comfyui_psa.choices.presets import load_presets
from comfyui_psa.choices.user_presets import (
    PresetError,
    find_preset,
    parse_preset,
    preset_menu,
    preset_names,
    read_preset,
    usable_presets,
    write_preset,
)

GOOD = {"about": "Mine", "mode": "topk", "shares": {"1": 0.05, "4": 0.3}, "sparsity": 0.9, "block_kv": 32, "tail": True}


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_a_good_file_is_listed_and_used(tmp_path):
    put(tmp_path, "mine.json", GOOD)
    assert sorted(preset_names(tmp_path)) == sorted([*load_presets(), "user/mine", "paper: module-default"])
    preset = find_preset("user/mine", tmp_path)
    config = preset.config(0.8)
    assert (config.shares, config.block_kv, config.tail, config.sparsity) == ({1: 0.05, 4: 0.3}, 32, True, 0.8)
    assert (config.order, config.importance) == ("curve", "pooled")
    assert preset.sparsity == 0.9


def test_the_menu_is_short_with_the_users_own_before_the_papers(tmp_path):
    put(tmp_path, "mine.json", GOOD)
    few = ["wan-4step-lora", "cogvideox-5b-4step", "generic", "user/mine", "paper: module-default"]
    assert preset_menu(tmp_path) == few
    assert preset_names(tmp_path)[: len(few)] == few


@pytest.mark.parametrize("name", load_presets())
def test_a_preset_that_is_not_in_the_menu_is_found_all_the_same(tmp_path, name):
    assert find_preset(name, tmp_path) == load_presets()[name]
    paper = f"paper: {name.removesuffix(' (published)')}"
    if name.endswith("(published)"):
        assert find_preset(paper, tmp_path) == load_presets()[name]
    for wrong in (f"{name} ", f"paper: {name}x", f"user/{name}"):
        with pytest.raises(InputError, match=r"allowed: auto, wan-4step-lora, .*Set preset to one of them\."):
            find_preset(wrong, tmp_path)


@pytest.mark.parametrize("name", [name for name, preset in load_presets().items() if not preset.as_written])
def test_a_preset_that_is_written_reads_the_same(tmp_path, name):
    preset = load_presets()[name]
    write_preset("copy", preset, where=tmp_path)
    copy = find_preset("user/copy", tmp_path)
    sparsity = None if preset.settings["mode"] == "threshold" else 0.8
    assert copy.config(sparsity) == preset.config(sparsity)
    assert copy.dense_steps == preset.dense_steps


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b'{"shares": {"1": ' + b"9" * 4000 + b"}}", "shares"),
        (b'{"shares": {"1": NaN}}', "shares: .* was given"),
        (b" " * 70000, "larger than 64 kB"),
        ([1, 2], "must hold a JSON object"),
        (None, "must hold a JSON object"),
        ({}, "shares is missing"),
        ({"shares": {}}, "at least one pooling factor"),
        ({"shares": {"one": 1}}, "shares: .* allowed: pooling factors"),
        ({"shares": {"1": True}}, "shares"),
        ({"shares": {"1": 0.8, "2": 0.8}}, "add up to at most 1"),
        ({"shares": {"3": 0.5}}, "pooling factors"),
        ({"shares": {"1": 0.5}, "mode": ["topk"]}, "mode: .* allowed: budget, topk, threshold"),
        ({"shares": {"1": 0.5}, "block_kv": 48}, "block_kv: 48 was given"),
        ({"shares": {"1": 0.5}, "block_kv": "64"}, "block_kv: '64' was given; allowed: a whole number"),
        ({"shares": {"1": 0.5}, "tail": "on"}, "tail: 'on' was given; allowed: true or false"),
        ({"shares": {"1": 0.5}, "sparsity": 1}, "sparsity: 1 was given"),
        ({"shares": {"8": 0.5}, "sparsity": 0.5}, "sparsity: 0.5 was given; allowed: 0.875"),
        ({"shares": {"1": 0.5}, "command": "rm"}, "'command' is no field of a preset"),
        ({"shares": {"1": 0.5}, "mode": "budget", "as_written": True}, "as_written"),
        ({"shares": {"1": 0.5}, "about": "x" * 2000}, "about"),
        ({"shares": {"1": 0.5}, "dense_steps": -1}, "dense_steps: -1 was given; allowed: 0 to 1000"),
        ({"shares": {"1": 0.5}, "dense_steps": 1.5}, "dense_steps: 1.5 was given; allowed: a whole number"),
        ({"shares": {"1": 0.5}, "sample_share": 0}, "sample_share: 0 was given"),
        ({"shares": {"1": 0.5}, "reduction": "sum"}, "reduction: 'sum' was given; allowed: max, mean"),
    ],
)
def test_what_is_wrong_is_said_when_the_file_is_chosen(tmp_path, content, words):
    put(tmp_path, "bad.json", content)
    put(tmp_path, "good.json", GOOD)
    with pytest.raises(InputError, match=rf"(?s)PSA Patch, input preset: 'user/bad'.*bad\.json: .*{words}"):
        find_preset("user/bad", tmp_path)
    # The others are still there, and so is the bad one, so that choosing it can say why.
    assert [name for name in preset_menu(tmp_path) if name.startswith("user/")] == ["user/bad", "user/good"]
    assert "user/good" in usable_presets(tmp_path)
    assert "user/bad" not in usable_presets(tmp_path)


def test_strange_names_and_folders_are_left_out(tmp_path):
    for name in ("..json", "<img src=x>.json", "a\nb.json", "x" * 80 + ".json", "notes.txt"):
        put(tmp_path, name, GOOD)
    (tmp_path / "folder.json").mkdir()
    assert [name for name in preset_menu(tmp_path) if name.startswith("user/")] == ["user/folder"]
    with pytest.raises(InputError, match="cannot be read"):
        find_preset("user/folder", tmp_path)
    with pytest.raises(InputError, match=r"preset: 'user/\.\./x'"):
        find_preset("user/../x", tmp_path)
    assert not any(name.startswith("user/") for name in preset_names(tmp_path / "missing"))


@pytest.mark.skipif(os.name == "nt", reason="named pipes are files on Unix only")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(PresetError):
        read_preset(tmp_path / "pipe.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from(["about", "mode", "shares", "tail", "block_q", "similarity_cap", "sparsity", "as_written"])


# A busy machine is slow at making the content, which says nothing about the code.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(fields, json_values | st.dictionaries(st.sampled_from("1248"), st.floats(0, 1)), max_size=5))
def test_any_content_is_a_preset_or_a_sentence(entry):
    with contextlib.suppress(PresetError):
        assert parse_preset("x", entry).settings["shares"]


def test_a_link_instead_of_the_partial_file_is_refused(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "presets"
    folder.mkdir()
    victim.write_text("precious")
    link = folder / "mine.json.part"
    link.symlink_to(victim)
    preset = next(iter(load_presets().values()))
    with pytest.raises(PresetError, match=r"mine\.json\.part is a link, which is not followed; delete it"):
        write_preset("mine", preset, where=folder)
    assert victim.read_text() == "precious"
    link.unlink()
    link.write_text("left by a full disk")
    assert write_preset("mine", preset, where=folder) == folder / "mine.json"
    assert [path.name for path in folder.iterdir()] == ["mine.json"]

"""The sliders of PSA Pyramid become a configuration, or an error that explains; the node takes the preset's place."""

import json

import pytest

from comfyui_psa.choices.errors import InputError
from comfyui_psa.choices.levels import make_pyramid
from comfyui_psa.choices.settings import make_settings
from comfyui_psa.choices.user_presets import find_preset

SLIDERS = {
    "full": 0.1,
    "half": 0.05,
    "quarter": 0.0,
    "eighth": 0.2,
    "tail": False,
    "mode": "topk",
    "as_written": False,
    "block_q": "128",
    "block_kv": "64",
    "similarity_half": 0.0,
    "similarity_quarter": 0.0,
    "similarity_eighth": 0.0,
    "order": "curve",
    "importance": "pooled",
    "precision": "auto",
}
PATCH = {"sparsity": 0.85, "preset": "auto", "start_percent": 0.25, "end_percent": 1.0}


def config_of(**changes):
    return make_settings(**PATCH, psa_pyramid=make_pyramid(**SLIDERS | changes)).config


def test_the_defaults_are_the_preset_that_auto_takes():
    default = make_settings(**PATCH | {"preset": "module-default"}).config
    assert config_of() == default


def test_the_slider_scales_the_levels_unless_they_are_taken_as_written():
    assert config_of().sparsity == 0.85
    assert config_of(as_written=True).sparsity is None
    assert config_of(mode="threshold").sparsity is None
    assert config_of(quarter=0.3).shares == {1: 0.1, 2: 0.05, 4: 0.3, 8: 0.2}


def test_a_similarity_slider_at_0_sets_no_limit_to_its_level():
    assert config_of(similarity_half=0.7).similarity_cap == {2: 0.7, 4: -1.0, 8: -1.0}
    assert config_of(similarity_half=0.7, eighth=0.0).similarity_cap == {2: 0.7}
    assert config_of().similarity_cap == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"full": 0.0, "half": 0.0, "eighth": 0.0}, "full, half, quarter, eighth: 0 was given; .*at least one"),
        ({"full": 0.9, "half": 0.3}, "full, half, quarter, eighth: '1.40 in sum' was given; .*at most 1"),
        ({"mode": "budget", "as_written": True}, "as_written: True was given; allowed: off in budget mode"),
        ({"similarity_eighth": 0.6, "eighth": 0.0}, "similarity_eighth: 0.6 was given; allowed: 0 while no level"),
        ({"save_as": "../../etc/x"}, "save_as: .* cannot name a preset"),
    ],
)
def test_impossible_mixes_are_explained(changes, words):
    with pytest.raises(InputError, match=rf"^PSA Pyramid, input {words}"):
        make_pyramid(**SLIDERS | changes)


@pytest.mark.parametrize(("field", "value"), [("mode", "budget"), ("pyramid", "1: 0.5"), ("precision", "int8")])
def test_two_places_that_set_the_same_thing_are_an_error(field, value):
    with pytest.raises(InputError, match=f"PSA Patch, input {field}: .* while PSA Pyramid is connected"):
        make_settings(**PATCH | {field: value}, psa_pyramid=make_pyramid(**SLIDERS))


def test_a_saved_pyramid_is_a_preset_that_computes_the_same(tmp_path, monkeypatch):
    from comfyui_psa.choices import user_presets

    monkeypatch.setattr(user_presets, "folder", lambda: tmp_path / "psa_presets")
    changes = {"full": 0.2, "similarity_half": 0.7, "block_kv": "32", "mode": "budget", "precision": "int8"}
    saved = config_of(**changes, save_as="my look")
    assert json.loads((tmp_path / "psa_presets" / "my look.json").read_text())["shares"] == {
        "1": 0.2,
        "2": 0.05,
        "8": 0.2,
    }
    assert find_preset("user/my look").config(0.85) == saved
    assert [path.name for path in (tmp_path / "psa_presets").iterdir()] == ["my look.json"]

"""Node inputs become settings, or an error that names the node, the input, what was given and what is allowed."""

import dataclasses
import inspect

import pytest

from comfyui_psa.choices import settings as choices
from comfyui_psa.choices.settings import InputError, PatchInputs, make_settings, parse_blocks, parse_pyramid

GOOD = {"sparsity": 0.85, "preset": "wan2.1-14b", "start_percent": 0.25, "end_percent": 1.0}


def test_inputs_reach_the_configuration():
    settings = make_settings(**GOOD, mode="topk", tail="off", order="curve", block_kv="32", pyramid="8: 0.2, 1: 0.1")
    config = settings.config
    assert (config.mode, config.tail, config.order, config.block_kv) == ("topk", False, "curve", 32)
    assert config.shares == {1: 0.1, 8: 0.2}
    assert config.sparsity == 0.85


def test_published_preset_is_unchanged_and_ignores_the_slider():
    config = make_settings(**GOOD | {"preset": "wan2.1-14b (published)"}).config
    assert (config.mode, config.tail, config.importance, config.order) == ("threshold", False, "sampled", "curve")
    assert config.bounds == pytest.approx((0.4, 0.5, 0.6, 0.8))
    assert config.sparsity is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"start_percent": 1.0}, "start_percent"),
        ({"preset": "none such"}, "preset"),
        ({"pyramid": "half"}, "pyramid"),
        ({"pyramid": "1: 0.1, 1: 0.2"}, "pyramid"),
        ({"pyramid": "3: 0.5"}, "pyramid"),
        ({"pyramid": "1: 0.9, 2: 0.9"}, "pyramid"),
        ({"dense_blocks": "1-"}, "dense_blocks"),
        ({"dense_blocks": "5-3"}, "dense_blocks"),
        ({"dense_blocks": "30", "blocks": 30}, "dense_blocks"),
        ({"backend": "cuda"}, "backend"),
        ({"reuse_steps": 0}, "reuse_steps"),
        ({"reuse_steps": 2, "order": "semantic"}, "reuse_steps"),
        ({"falling": 0.9}, "falling"),
        ({"falling": 0.5, "sparsity": 0.2}, "falling"),
        ({"sparsity": 0.97, "block_kv": "32", "tail": "on"}, "sparsity"),
    ],
)
def test_errors_name_node_input_given_and_allowed(changes, field):
    with pytest.raises(InputError, match=rf"PSA Patch, input {field}: .* was given; allowed: "):
        make_settings(**GOOD | changes)


def test_budget_mode_on_a_preset_as_written_is_about_the_mode(tmp_path, monkeypatch):
    from comfyui_psa.choices import user_presets

    monkeypatch.setattr(user_presets, "folder", lambda: tmp_path)
    (tmp_path / "mine.json").write_text('{"shares": {"1": 0.3}, "as_written": true}')
    assert make_settings(preset="user/mine").config.sparsity is None
    assert make_settings(preset="user/mine", mode="threshold").config.sparsity is None
    with pytest.raises(InputError, match="PSA Patch, input mode: 'budget' was given; allowed: topk or threshold"):
        make_settings(preset="user/mine", mode="budget")


def test_lists_of_blocks():
    assert parse_blocks(" 0, 1, 38-39 ", 40) == {0, 1, 38, 39}
    assert parse_blocks("") == frozenset()
    assert parse_pyramid("1: .5, 64: 0.5") == {1: 0.5, 64: 0.5}


def test_node_and_settings_have_the_same_inputs_with_the_same_defaults(comfyui):
    from comfyui_psa.nodes.patch import PSAPatch

    of_node = {spec.id: getattr(spec, "default", None) for spec in PSAPatch.define_schema().inputs}
    of_node.pop("model")
    assert of_node == {field.name: field.default for field in dataclasses.fields(PatchInputs)}
    assert make_settings() == make_settings(**of_node)


def test_apply_psa_has_the_defaults_of_the_node():
    pytest.importorskip("diffusers")
    from comfyui_psa.for_diffusers import apply_psa

    named = {name: parameter.default for name, parameter in inspect.signature(apply_psa).parameters.items()}
    for name in ("sparsity", "preset", "min_tokens", "backend", "falling"):
        assert named[name] == getattr(PatchInputs, name)
    assert named["warm_up"] == PatchInputs.start_percent


@pytest.fixture
def node_with(comfyui, tiny_wan, monkeypatch):
    """Runs PSA Patch on a tiny model; returns its output and how often each thing was judged."""
    from types import SimpleNamespace

    from comfyui_psa.nodes.patch import PSAPatch

    judged = {"make_config": 0, "check_window": 0, "check_one_pyramid": 0, "parse_blocks": 0}

    def counted(name):
        genuine = getattr(choices, name)

        def count(*args, **kwargs):
            judged[name] += 1
            return genuine(*args, **kwargs)

        return count

    for name in judged:
        monkeypatch.setattr(choices, name, counted(name))

    class Node(PSAPatch):
        hidden = SimpleNamespace(prompt=None, unique_id=None)

    return lambda **inputs: (Node.execute(model=tiny_wan.load("t2v"), **inputs), judged)


def test_a_run_judges_the_settings_once(node_with):
    _, judged = node_with(**GOOD)
    assert set(judged.values()) == {1}, judged


@pytest.mark.parametrize("changes", [{"start_percent": 1.0}, {"pyramid": "3: 0.5"}, {"dense_blocks": "5-3"}])
def test_what_came_over_a_wire_is_judged_when_the_node_runs(node_with, changes):
    (field,) = changes
    with pytest.raises(InputError, match=rf"PSA Patch, input {field}: .* was given; allowed: "):
        node_with(**GOOD | changes)


@pytest.mark.parametrize("changes", [{"order": "semantic", "reuse_steps": 2}, {"falling": 0.6, "mode": "threshold"}])
def test_an_input_that_an_old_prompt_leaves_out_does_not_keep_the_others_from_being_judged(comfyui, changes):
    from comfyui_psa.nodes.patch import PSAPatch

    required = {spec.id: spec.default for spec in PSAPatch.define_schema().inputs if spec.id in _OLD}
    assert PSAPatch.validate_inputs(model=None, **required) is True
    assert " was given; allowed: " in PSAPatch.validate_inputs(model=None, **required | changes)


_OLD = (
    *("sparsity", "preset", "start_percent", "end_percent", "mode", "pyramid", "tail", "order", "importance"),
    *("block_q", "block_kv", "dense_blocks", "min_tokens", "backend", "verbose"),
)

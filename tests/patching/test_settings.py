"""Node inputs become settings, or an error that names the node, the input, what was given and what is allowed."""

import pytest

from comfyui_psa.choices.settings import InputError, make_settings, parse_blocks, parse_pyramid

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


def test_lists_of_blocks():
    assert parse_blocks(" 0, 1, 38-39 ", 40) == {0, 1, 38, 39}
    assert parse_blocks("") == frozenset()
    assert parse_pyramid("1: .5, 64: 0.5") == {1: 0.5, 64: 0.5}

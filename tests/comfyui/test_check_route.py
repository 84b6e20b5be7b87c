"""The page's answer about a node's inputs: the figures of the configuration that a run would have, or the refusal."""

import pytest

from comfyui_psa.choices.expectation import expect
from comfyui_psa.choices.presets import load_presets
from comfyui_psa.kernels.config import PyramidConfig

NOTHING = {"refused": None, "figures": None}


@pytest.fixture
def ask(comfyui):
    """Asks as the page does: `ask(node, changes, **context)`, the other inputs as a new node has them."""
    from comfyui_psa.nodes.check_route import answer
    from comfyui_psa.nodes.patch import PSAPatch
    from comfyui_psa.nodes.pyramid import PSAPyramid

    nodes = {"PSAPatch": PSAPatch, "PSAPyramid": PSAPyramid}

    def question(node, changes=None, linked=(), **context):
        specs = [spec for spec in nodes[node].define_schema().inputs if hasattr(spec, "default")]
        shown = {spec.id: spec.default for spec in specs} | (changes or {})
        shown.pop("psa_pyramid", None)
        return {"node": node, "inputs": shown, "linked": list(linked), **context}

    def ask(*args, **kwargs):
        return answer(nodes, question(*args, **kwargs))

    ask.question = question
    ask.raw = lambda asked: answer(nodes, asked)
    return ask


def check_figures(figures, config):
    expected = expect(config)
    assert figures["sparsity"] == expected.sparsity
    assert figures["coverage"] == expected.coverage
    assert figures["speedup"] == expected.speedup
    assert figures["target"] == config.sparsity
    assert sum(figures["shares"].values()) == pytest.approx(1)
    if expected.shares is not None:
        assert figures["shares"] == {str(factor): share for factor, share in expected.shares.items()}
    assert figures["of_mass"] == (expected.shares is None)


@pytest.mark.parametrize("sparsity", [0.5, 0.85, 0.95])
@pytest.mark.parametrize("name", load_presets())
def test_the_figures_are_those_of_the_configuration_that_runs(ask, name, sparsity):
    told = ask("PSAPatch", {"preset": name, "sparsity": sparsity})
    assert told["refused"] is None
    check_figures(told["figures"], load_presets()[name].config(sparsity))


def test_what_the_node_changes_is_in_the_figures(ask):
    changes = {"mode": "topk", "pyramid": "2: 0.3, 8: 0.3", "tail": "on", "block_kv": "32", "importance": "sampled"}
    preset = load_presets()["module-default"]
    config = preset.config(0.7, mode="topk", shares={2: 0.3, 8: 0.3}, tail=True, block_kv=32, importance="sampled")
    told = ask("PSAPatch", changes | {"sparsity": 0.7})
    check_figures(told["figures"], config)
    assert told["figures"]["tail"] == 32


def test_auto_is_the_preset_that_a_run_told_of(ask):
    told = ask("PSAPatch", {}, auto="wan2.1-14b")
    check_figures(told["figures"], load_presets()["wan2.1-14b"].config(0.85))
    assert told["figures"]["of_mass"]


def test_a_pyramid_is_as_written_alone_and_scaled_to_the_patch_that_it_feeds(ask):
    shape = {"full": 0.3, "half": 0.0, "eighth": 0.0}
    alone = PyramidConfig({1: 0.3}, "topk", None, tail=False, order="curve", reduction="mean")
    check_figures(ask("PSAPyramid", shape)["figures"], alone)
    scaled = PyramidConfig({1: 0.3}, "topk", 0.8, tail=False, order="curve", reduction="mean")
    check_figures(ask("PSAPyramid", shape, sparsity=0.8)["figures"], scaled)
    check_figures(ask("PSAPyramid", shape | {"as_written": True}, sparsity=0.8)["figures"], alone)
    pyramid = ask.question("PSAPyramid", shape)
    told = ask("PSAPatch", {"sparsity": 0.8}, linked=["model", "psa_pyramid"], pyramid=pyramid)
    check_figures(told["figures"], scaled)


def test_budget_without_a_target_shows_the_mass_alone(ask):
    figures = ask("PSAPyramid", {"mode": "budget"})["figures"]
    assert (figures["sparsity"], figures["of_mass"]) == (None, True)
    assert figures["shares"] == pytest.approx({"1": 0.1, "2": 0.05, "8": 0.2, "0": 0.65})


@pytest.mark.parametrize(
    ("node", "changes", "words"),
    [
        ("PSAPatch", {"pyramid": "3: 0.5"}, "PSA Patch, input pyramid: "),
        ("PSAPatch", {"pyramid": "2: 0.5", "sparsity": 0.3}, "PSA Patch, input sparsity: 0.3 was given"),
        ("PSAPatch", {"preset": "user/gone"}, "PSA Patch, input preset: 'user/gone'"),
        ("PSAPyramid", {"full": 0.9, "half": 0.4}, "PSA Pyramid, input full, half, quarter, eighth: "),
        ("PSAPyramid", {"mode": "budget", "as_written": True}, "PSA Pyramid, input as_written: True"),
    ],
)
def test_a_refusal_has_no_figures(ask, node, changes, words):
    told = ask(node, changes)
    assert told["figures"] is None
    assert told["refused"].startswith(words)


def test_a_pyramid_that_is_refused_refuses_the_patch_that_it_feeds(ask):
    pyramid = ask.question("PSAPyramid", {"full": 0.0, "half": 0.0, "eighth": 0.0})
    told = ask("PSAPatch", {}, linked=["psa_pyramid"], pyramid=pyramid)
    assert told["refused"].startswith("PSA Pyramid, input full, half, quarter, eighth: ")
    out_of_reach = ask("PSAPyramid", {"full": 0.0}, sparsity=0.3)
    assert out_of_reach["refused"].startswith("PSA Patch, input sparsity: 0.3 was given; allowed: 0.500")


def test_what_comes_over_a_wire_is_drawn_as_shown_and_never_refused(ask):
    told = ask("PSAPatch", {"sparsity": 0.7}, linked=["sparsity"])
    assert told["figures"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert ask("PSAPatch", {"sparsity": 0.3, "pyramid": "2: 0.5"}, linked=["sparsity"]) == NOTHING
    assert ask("PSAPatch", {}, linked=["psa_pyramid"]) == NOTHING, "another node's pyramid is not known"


@pytest.mark.parametrize(
    "asked",
    [
        None,
        [],
        {},
        {"node": "PSAPatch"},
        {"node": "None", "inputs": {}},
        {"node": "PSAPatch", "inputs": None},
        {"node": "PSAPatch", "inputs": {}, "linked": 5},
        {"node": "PSAPatch", "inputs": {}, "pyramid": 5},
        {"node": "PSAPyramid", "inputs": {"full": 0.5}, "sparsity": "x"},
    ],
)
def test_what_no_page_of_ours_asks_is_answered_with_nothing(ask, asked):
    assert ask.raw(asked) == NOTHING


def test_the_server_answers(client):
    assert client.post("/psa/check", {"node": "PSAPyramid", "inputs": {}}) == NOTHING

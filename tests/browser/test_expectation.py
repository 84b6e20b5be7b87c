"""The page's figures of a setting are those of Python: one table of cases, computed in both."""

import itertools

import pytest

from comfyui_psa.choices.expectation import expect
from comfyui_psa.choices.presets import load_presets
from comfyui_psa.kernels.config import ConfigError, PyramidConfig

SHARES = [{1: 0.1, 2: 0.05, 8: 0.2}, {1: 0.02, 4: 0.5}, {2: 0.3, 8: 0.3}, {1: 1.0}, {1: 0.6, 2: 0.6}, {}, {64: 0.5}]
MODULE = "/extensions/ComfyUI-PSA/"


def cases():
    for shares, mode, tail, sparsity, block_kv, importance in itertools.product(
        SHARES,
        ("topk", "budget", "threshold"),
        (False, True),
        (None, 0.3, 0.7, 0.85, 0.97),
        (32, 64),
        ("pooled", "sampled"),
    ):
        yield {
            "shape": {
                "shares": {str(factor): share for factor, share in shares.items()},
                "mode": mode,
                "tail": tail,
                "block_kv": block_kv,
                "importance": importance,
                "as_written": False,
                "capped": False,
            },
            "sparsity": sparsity,
        }


def in_python(case):
    """Figures, or None where the setting is impossible."""
    shape = case["shape"]
    try:
        config = PyramidConfig(
            shares={int(factor): share for factor, share in shape["shares"].items()},
            mode=shape["mode"],
            sparsity=None if shape["mode"] == "threshold" else case["sparsity"],
            tail=shape["tail"],
            block_kv=shape["block_kv"],
            importance=shape["importance"],
        )
    except ConfigError:
        return None
    found = expect(config)
    shares = None if found.shares is None else {str(factor): share for factor, share in found.shares.items()}
    return {"shares": shares, "sparsity": found.sparsity, "coverage": found.coverage, "speedup": found.speedup}


def test_the_page_and_python_agree(pages):
    table = [case for case in cases() if not (case["shape"]["mode"] == "budget" and case["sparsity"] is None)]
    answers = pages().page.evaluate(
        """async ([module, table]) => {
            const { expect, problemOf } = await import(module);
            return table.map(({ shape, sparsity }) => problemOf(shape, sparsity) ? null : expect(shape, sparsity));
        }""",
        [MODULE + "expectation.js", table],
    )
    impossible = 0
    for case, found in zip(table, answers, strict=True):
        expected = in_python(case)
        if expected is None:
            assert found is None, case
            impossible += 1
            continue
        assert found is not None, case
        assert (found["shares"] is None) == (expected["shares"] is None)
        if expected["shares"] is not None:
            assert found["shares"] == pytest.approx(expected["shares"], abs=1e-12), case
        for name in ("sparsity", "coverage"):
            assert found[name] == (expected[name] and pytest.approx(expected[name], abs=1e-12)), case
        if expected["speedup"] is not None:
            assert found["speedup"] == pytest.approx(expected["speedup"], abs=1e-9), case
    assert 100 < impossible < len(table) / 2


def test_every_preset_is_drawn_with_its_own_figures(pages, definitions):
    frontend = pages()
    node = frontend.add("PSAPatch")
    choices = definitions["PSAPatch"]["input"]["required"]["preset"][1]["options"]
    for name in choices:
        frontend.choose(node, "preset", name)
        preset = load_presets()["module-default" if name == "auto" else name]
        expected = expect(preset.config(0.85))
        seen = frontend.picture(node)
        assert not seen["problem"], name
        assert seen["sparsity"] == pytest.approx(expected.sparsity or 0, abs=1e-4), name
        if expected.shares is not None:
            drawn = {str(f): share for f, share in expected.shares.items() if share > 0}
            assert seen["bar"] == pytest.approx(drawn, abs=1e-4), name


def test_auto_is_drawn_as_the_preset_that_the_model_was_given(pages):
    frontend = pages()
    node = frontend.add("PSAPatch")
    frontend.page.evaluate(
        "(id) => app.canvas.graph.getNodeById(id).onExecuted({ psa: ['', 'wan2.1-1.3b-topk'] })", node
    )
    expected = expect(load_presets()["wan2.1-1.3b-topk"].config(0.85)).shares
    drawn = {str(factor): share for factor, share in expected.items() if share > 0}
    assert frontend.picture(node)["bar"] == pytest.approx(drawn, abs=1e-4)


def test_the_words_are_complete_in_both_languages(pages):
    missing = pages().page.evaluate("async (m) => (await import(m)).missingWords()", MODULE + "words.js")
    assert missing == []

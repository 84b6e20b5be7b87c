"""The page draws the figures that Python computes, at the pace of a slider, and stays useful where no answer comes."""

import threading

import pytest

from comfyui_psa.choices.expectation import expect
from comfyui_psa.choices.presets import load_presets
from comfyui_psa.choices.user_presets import find_preset, preset_names

MODULE = "/extensions/ComfyUI-PSA/"
ROUTE = "**/psa/check"


def test_every_preset_is_drawn_with_its_own_figures(pages):
    frontend = pages()
    node = frontend.add("PSAPatch")
    for name in ("auto", *preset_names()):
        frontend.choose(node, "preset", name)
        preset = find_preset("module-default" if name == "auto" else name)
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
    frontend.settle()
    expected = expect(load_presets()["wan2.1-1.3b-topk"].config(0.85)).shares
    drawn = {str(factor): share for factor, share in expected.items() if share > 0}
    assert frontend.picture(node)["bar"] == pytest.approx(drawn, abs=1e-4)


def test_the_words_are_complete_in_both_languages(pages):
    missing = pages().page.evaluate("async (m) => (await import(m)).missingWords()", MODULE + "words.js")
    assert missing == []


def test_a_server_that_does_not_know_the_question_leaves_a_sentence(make_frontend):
    frontend = make_frontend("classic", {ROUTE: lambda route: route.fulfill(status=404, body="404: Not Found")})
    for kind in ("PSAPatch", "PSAPyramid"):
        seen = frontend.picture(frontend.add(kind))
        assert "The server is not answering; the figures will appear during the run." in seen["text"]
        assert (seen["problem"], seen["bar"]) == (False, {})
    patch = frontend.add("PSAPatch")
    frontend.choose(patch, "sparsity", 0.0)
    assert frontend.picture(patch)["headline"].startswith("Stays dense: sparsity is 0.")


def test_it_asks_again_when_the_server_is_back(make_frontend):
    away = threading.Event()
    away.set()
    frontend = make_frontend("classic", {ROUTE: lambda route: route.abort() if away.is_set() else route.continue_()})
    node = frontend.add("PSAPatch")
    assert frontend.picture(node)["bar"] == {}
    away.clear()
    frontend.page.evaluate("() => app.api.dispatchCustomEvent('reconnected')")
    frontend.settle()
    assert frontend.picture(node)["sparsity"] == pytest.approx(0.85, abs=1e-3)
    assert "is not answering" not in frontend.picture(node)["text"]


def test_a_slow_server_is_asked_one_thing_at_a_time_and_the_last_one_is_drawn(make_frontend):
    held = []
    frontend = make_frontend("classic", {ROUTE: lambda route: held.append(route)})
    node = frontend.page.evaluate(
        "() => { const node = LiteGraph.createNode('PSAPatch'); app.canvas.graph.add(node); return node.id; }"
    )

    def move(sparsity):
        frontend.page.evaluate(
            """([id, value]) => {
                const widget = app.canvas.graph.getNodeById(id).widgets.find((w) => w.name === "sparsity");
                widget.value = value;
                widget.callback?.(value);
            }""",
            [node, sparsity],
        )
        frontend.page.wait_for_timeout(50)

    def wait_for_question():
        frontend.page.wait_for_function("!!document.querySelector('.psa-waiting')")
        for _ in range(200):
            if held:
                break
            frontend.page.wait_for_timeout(50)

    wait_for_question()
    for sparsity in (0.8, 0.7, 0.6, 0.5):
        move(sparsity)
    assert len(held) == 1, "the first question, that of the new node, is not answered yet"
    held.pop().continue_()
    wait_for_question()
    frontend.page.wait_for_timeout(200)  # no second one comes
    assert [route.request.post_data_json["inputs"]["sparsity"] for route in held] == [0.5]
    assert frontend.page.locator(".psa-waiting").count() == 1, "what is drawn is not what the slider shows"
    held.pop().continue_()
    frontend.settle()
    assert held == []
    assert frontend.picture(node)["sparsity"] == pytest.approx(0.5, abs=1e-3)

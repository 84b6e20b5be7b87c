"""What a run shows in the nodes, in both renderers: its figures, why it stayed dense, and where an error came from."""

import json
import re

import pytest

from comfyui_psa.workshop.tools.workflow import MODE_BYPASSED

STEPS = 4


@pytest.fixture
def demo(demo_workflow):
    """The PSA half of the demo workflow at a size of seconds, without the video."""
    return demo_workflow.small_demo()


def find(workflow, kind):
    """The one node of a class."""
    (node,) = (node for node in workflow["nodes"] if node["type"] == kind)
    return node


@pytest.mark.slow
def test_the_demo_runs_from_the_page_and_the_line_moves(frontend, demo):
    frontend.load(demo)
    node = find(demo, "PSAPatch")["id"]
    assert "No run yet" in frontend.picture(node)["sentence"]
    frontend.page.evaluate(
        """() => {
            window.psaSteps = [];
            app.api.addEventListener("psa.step", ({ detail }) => window.psaSteps.push(detail));
        }"""
    )
    kind, detail = frontend.run()
    assert kind == "execution_success", detail
    told = frontend.page.evaluate("() => window.psaSteps")
    assert [figures["step"] for figures in told] == list(range(STEPS)), "once a step"
    assert {figures["node"] for figures in told} == {str(node)}
    seen = frontend.picture(node)
    assert (seen["steps"], seen["points"]) == (STEPS, STEPS)
    assert f"step {STEPS} of {STEPS}: measured sparsity {told[-1]['sparsity']:.3f}" in seen["text"]
    assert seen["sentence"] == ""
    # In bold are the figures of the run: every step has as many calls. Those of a dense one save nothing, and those of
    # the last one before the sparse steps also cost a sparse call each, which measures what is lost.
    sparse = [figures["sparsity"] for figures in told if figures["sparsity"] is not None]
    assert 0 < len(sparse) < STEPS
    saved = 100 * (sum(sparse) - (1 - sparse[0])) / STEPS
    ran = f"This run: {len(sparse)} of {STEPS} steps sparse, {saved:.0f} % of the attention saved"
    assert seen["headline"] == ran
    assert re.search(r"sparse steps [\d.]+ s, dense steps [\d.]+ s", seen["text"])
    # Another setting has not run yet: what is expected of it in bold, and the run is the last one.
    frontend.choose(node, "sparsity", 0.5)
    moved = frontend.picture(node)
    assert moved["headline"] == "50 % of the attention work saved in the sparse steps"
    assert moved["sentence"].startswith(f"Last run, with other inputs: {ran.removeprefix('This run: ')}; sparse steps")
    assert f"last run, step {STEPS} of {STEPS}" in moved["text"]
    frontend.choose(node, "sparsity", 0.85)
    assert frontend.picture(node) == seen
    # The report's picture is in its node, and the same figures as words.
    report = find(demo, "PSAReport")["id"]
    words = "(id) => app.rootGraph.getNodeById(id).widgets.find((w) => w.name === 'psa_line').element.textContent"
    assert frontend.page.evaluate(words, report).startswith(ran.removeprefix("This run: ") + "; sparse steps")
    size = frontend.page.evaluate(
        """async (id) => {
            const node = app.rootGraph.getNodeById(id);
            const found = app.nodeOutputs?.[id]?.images?.[0] ?? node.images?.[0];
            const image = new Image();
            image.src = app.api.apiURL(`/view?${new URLSearchParams(found)}`);
            await image.decode();
            return image.naturalWidth;
        }""",
        report,
    )
    assert size == 1200


@pytest.mark.slow
def test_what_stays_dense_is_said_in_the_node(pages, demo):
    frontend = pages()
    for node in demo["nodes"]:
        if node["type"] == "PSAPatch":
            node["widgets_values"][node["widgets_values"].index(0)] = 100000
    frontend.load(demo)
    node = find(demo, "PSAPatch")["id"]
    frontend.choose(node, "sparsity", 0.8)
    kind, detail = frontend.run()
    assert kind == "execution_success", detail
    seen = frontend.picture(node)
    assert re.match(r"Stayed dense: 768 tokens .* are fewer than min_tokens 100000", seen["headline"])
    assert "Set min_tokens to 768 or less" in seen["headline"]
    assert seen["problem"]
    assert seen["bar"] == {}, "nothing is drawn that did not happen"
    frontend.choose(node, "sparsity", 0.0)
    assert frontend.run()[0] == "execution_success"
    assert frontend.picture(node)["headline"] == "Stays dense: sparsity is 0. Move the slider up to save work."
    frontend.choose(node, "sparsity", 0.5)
    seen = frontend.picture(node)
    assert seen["headline"] == "50 % of the attention work saved in the sparse steps"
    assert seen["sentence"] == "No run yet: measurements will appear here.", "the model is not at fault"
    assert frontend.errors == []


@pytest.mark.slow
def test_in_a_subgraph_the_line_reaches_its_node(pages, demo):
    frontend = pages()
    frontend.load(demo)
    inner = find(demo, "PSAPatch")["id"]
    outer = frontend.page.evaluate(
        """(id) => {
            const graph = app.rootGraph;
            return graph.convertToSubgraph(new Set([graph.getNodeById(id)])).node.id;
        }""",
        inner,
    )
    frontend.settle()
    kind, detail = frontend.run()
    assert kind == "execution_success", detail
    assert frontend.page.evaluate("(id) => !!app.rootGraph.getNodeById(id).subgraph", outer)
    assert frontend.picture("PSAPatch")["points"] == STEPS
    assert frontend.errors == []


@pytest.mark.slow
def test_a_bypassed_patch_is_left_out_of_the_prompt(pages, demo_workflow):
    frontend = pages()
    demo = demo_workflow.small_demo(128, film=True)
    find(demo, "PSAPatch")["mode"] = MODE_BYPASSED
    find(demo, "PSAReport")["mode"] = MODE_BYPASSED
    frontend.load(demo)
    prompt = frontend.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert "PSAPatch" not in [entry["class_type"] for entry in prompt.values()]
    kind, detail = frontend.run()
    assert kind == "execution_success", detail
    seen = frontend.picture(find(demo, "PSAPatch")["id"])
    assert seen["steps"] == 0
    assert seen["headline"] == "Muted or bypassed: it has no effect."
    assert seen["bar"] == {}
    assert frontend.errors == []


@pytest.mark.slow
def test_an_error_shows_on_the_node_that_made_it(frontend, demo, client):
    frontend.load(demo)
    patch = find(demo, "PSAPatch")["id"]
    pyramid = frontend.add("PSAPyramid", -400, 200)
    frontend.choose(pyramid, "full", 0.9)
    frontend.choose(pyramid, "half", 0.3)
    frontend.connect(pyramid, 0, patch, "psa_pyramid")
    assert frontend.picture(pyramid)["problem"]
    frontend.page.keyboard.press("Control+Enter")
    frontend.page.wait_for_function("() => Object.keys(app.lastNodeErrors ?? {}).length > 0")
    errors = frontend.page.evaluate("() => app.lastNodeErrors")
    client.interrupt()  # the branch without PSA is queued all the same
    assert list(errors) == [str(pyramid)]
    sentence = "PSA Pyramid, input full, half, quarter, eighth: '1.40 in sum' was given; allowed: levels that add up"
    assert all(sentence in error["details"] for error in errors[str(pyramid)]["errors"])
    frontend.page.keyboard.press("Escape")


@pytest.mark.slow
def test_a_pyramid_that_was_changed_makes_a_run_the_last_one(pages, demo):
    frontend = pages()
    frontend.load(demo)
    patch = find(demo, "PSAPatch")["id"]
    pyramid = frontend.add("PSAPyramid", -400, 200)
    frontend.choose(pyramid, "half", 0.0)
    frontend.connect(pyramid, 0, patch, "psa_pyramid")
    kind, detail = frontend.run()
    assert kind == "execution_success", detail
    ran = frontend.picture(patch)["headline"]
    assert ran.startswith("This run: ")
    frontend.choose(pyramid, "half", 0.11)
    assert "saved in the sparse steps" in frontend.picture(patch)["headline"]
    assert frontend.picture(patch)["sentence"].startswith("Last run")
    frontend.page.evaluate("(id) => { app.canvas.graph.getNodeById(id).mode = 4; }", pyramid)
    assert frontend.run()[0] == "execution_success"
    seen = frontend.picture(patch)
    assert seen["headline"].startswith("This run: "), "a pyramid that is bypassed is none"
    assert "2" in seen["bar"], "the levels are those of the preset"
    assert frontend.picture(pyramid)["headline"] == "Muted or bypassed: it has no effect."
    frontend.page.evaluate("(id) => { app.canvas.graph.getNodeById(id).mode = 4; }", patch)
    assert frontend.run()[0] == "execution_success"
    assert frontend.picture(patch)["headline"] == "Muted or bypassed: it has no effect."
    assert frontend.picture(patch)["sentence"].startswith("Last run")
    frontend.page.evaluate("(id) => { app.canvas.graph.getNodeById(id).mode = 0; }", patch)
    frontend.choose(patch, "preset", "wan-4step-lora")
    assert not frontend.picture(patch)["problem"]
    assert frontend.errors == []


def test_what_the_server_tells_of_other_ends_is_in_bold(pages):
    """A model that PSA does not support, a run that was stopped, and a patch that another one replaces."""
    frontend = pages()
    node = frontend.add("PSAPatch")

    def headline(script):
        frontend.page.evaluate(
            "([id, script]) => new Function('node', 'tell', script)("
            " app.canvas.graph.getNodeById(id), (name, detail) => app.api.dispatchCustomEvent(name, detail))",
            [node, script],
        )
        frontend.settle()
        return frontend.picture(node)["headline"]

    unserved = headline("node.onExecuted({ psa: ['this model is of another kind', ''], psa_asked: [{}] })")
    assert unserved.startswith("Stays dense: this model is of another kind. Load another model")
    assert "saved" in headline("node.onExecuted({ psa: ['', 'module-default'] })")
    run = {"node": str(node), "run": 1.0, "completed": False, "steps": 16, "kinds": {"dense": 1, "sparse": 2}}
    run |= {"saved": 0.5, "seconds": {"dense": 2.04, "sparse": 0.512}, "reasons": {}, "notes": [], "dense": None}
    run["kinds"]["interrupted"] = 1
    told = f"tell('psa.run', {json.dumps(run)})"
    assert headline(told) == ("This run: stopped after 3 of 16 steps, 2 of them sparse, 50 % of the attention saved")
    assert "sparse steps 0.51 s, dense steps 2.0 s" in frontend.picture(node)["text"]
    assert "times as fast" not in frontend.picture(node)["text"]
    for why, words in (
        (None, "dense steps 2.0 s. A sparse step is 4.0 times as fast"),
        ("the video is short; sample more", "is 3.98 times as fast: the video is short. Sample more"),
    ):
        run["pays"] = {"dense": 2.04, "sparse": 0.512, "times": 3.98, "why": why}
        headline(f"tell('psa.run', {json.dumps(run)})")
        assert words in frontend.picture(node)["text"]
    replaced = headline(f"tell('psa.replaced', {{ node: '{node}', by: '10' }})")
    assert replaced.startswith("Has no effect: PSA Patch #10 comes after it")
    assert frontend.errors == []

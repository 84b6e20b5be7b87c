"""Advanced inputs in the classic renderer, the line of figures in the nodes that measure, and the contrast of text."""

import json
from pathlib import Path

import pytest

SAVED = Path(__file__).parents[1] / "comfyui" / "saved" / "0.1.0" / "wan21_t2v_psa.json"
EVERYDAY = ["sparsity", "preset", "start_percent", "end_percent"]
READABLE = 4.5
"""The least contrast of text, by WCAG 2, level AA."""

VISIBLE = """(id) => {
    const node = app.canvas.graph.getNodeById(id);
    const visible = node.isWidgetRowVisible ?? node.isWidgetVisible; // newer frontends draw a row for a wire
    return node.widgets.filter((widget) => visible.call(node, widget)).map((widget) => widget.name);
}"""
SIZE = "(id) => [...app.canvas.graph.getNodeById(id).size]"


def press(frontend, node, name):
    """Click the middle of a canvas widget with the mouse."""
    x, y = frontend.page.evaluate(
        """([id, name]) => {
            const node = app.canvas.graph.getNodeById(id);
            const widget = node.widgets.find((found) => found.name === name);
            const { ds, canvas } = app.canvas;
            const place = canvas.getBoundingClientRect();
            const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
            return [place.left + (at[0] + ds.offset[0]) * ds.scale, place.top + (at[1] + ds.offset[1]) * ds.scale];
        }""",
        [node, name],
    )
    frontend.page.mouse.click(x, y)
    frontend.settle()


def test_the_classic_renderer_folds_the_advanced_inputs_away(pages):
    frontend = pages("classic")
    node = frontend.add("PSAPatch")
    folded = frontend.page.evaluate(VISIBLE, node)
    assert folded == [*EVERYDAY, "psa_more", "psa_picture"]
    assert frontend.page.evaluate(SIZE, node)[1] < 420
    frontend.choose(node, "min_tokens", 777)
    for _ in range(2):
        press(frontend, node, "psa_more")
        unfolded = frontend.page.evaluate(VISIBLE, node)
        assert len(unfolded) == 19 + 2
        assert "min_tokens" in unfolded
        press(frontend, node, "psa_more")
        assert frontend.page.evaluate(VISIBLE, node) == folded
    assert frontend.picture(node)["shown"]
    # What is folded away is saved and sent all the same.
    (saved,) = frontend.serialized()["nodes"]
    assert len(saved["widgets_values"]) == 19
    assert 777 in saved["widgets_values"]
    prompt = frontend.page.evaluate("async () => (await app.graphToPrompt()).output")
    inputs = prompt[str(node)]["inputs"]
    assert inputs["min_tokens"] == 777
    assert len(inputs) == 19
    assert frontend.errors == []


def test_a_workflow_that_was_saved_with_all_inputs_shown_is_folded_too(pages):
    frontend = pages("classic")
    workflow = json.loads(SAVED.read_text(encoding="utf-8"))
    (saved,) = (node for node in workflow["nodes"] if node["type"] == "PSAPatch")
    frontend.load(workflow)
    node = saved["id"]
    assert frontend.page.evaluate(VISIBLE, node) == [*EVERYDAY, "psa_more", "psa_picture"]
    assert frontend.page.evaluate(SIZE, node)[1] < 420
    (again,) = (found for found in frontend.serialized()["nodes"] if found["id"] == node)
    assert again["widgets_values"][: len(saved["widgets_values"])] == saved["widgets_values"]


def test_an_input_with_a_wire_is_never_hidden(pages):
    frontend = pages("classic")
    number, node = frontend.add("PrimitiveInt", 60), frontend.add("PSAPatch", 500)
    assert "min_tokens" not in frontend.page.evaluate(VISIBLE, node)
    frontend.connect(number, 0, node, "min_tokens")
    assert "min_tokens" in frontend.page.evaluate(VISIBLE, node)
    frontend.load(frontend.serialized())
    assert "min_tokens" in frontend.page.evaluate(VISIBLE, node)
    assert frontend.errors == []


def test_no_input_is_lost_if_the_renderer_changes(pages):
    frontend = pages("classic")
    node = frontend.add("PSAPatch")
    folded = frontend.page.evaluate(VISIBLE, node)
    hidden = "(id) => app.canvas.graph.getNodeById(id).widgets.filter((w) => w.hidden).map((w) => w.name)"
    change = "(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    assert len(frontend.page.evaluate(hidden, node)) == 15
    try:
        frontend.page.evaluate(change, True)
        frontend.page.wait_for_timeout(300)
        assert frontend.page.evaluate(hidden, node) == []
    finally:
        frontend.page.evaluate(change, False)
    frontend.page.wait_for_timeout(300)
    assert frontend.page.evaluate(VISIBLE, node) == folded
    assert frontend.errors == []


def test_nodes_2_has_no_button_of_ours(pages):
    frontend = pages("nodes2")
    node = frontend.add("PSAPatch")
    assert "more inputs" not in frontend.page.locator(f'[data-node-id="{node}"]').inner_text()


@pytest.mark.slow
def test_a_sparsity_that_came_over_a_wire_is_the_one_that_is_shown(pages, demo_workflow):
    frontend = pages("classic")
    demo = demo_workflow.small_demo()
    frontend.load(demo)
    (patch,) = (node["id"] for node in demo["nodes"] if node["type"] == "PSAPatch")
    number = frontend.add("PrimitiveFloat", -400, 300)
    frontend.choose(number, "value", 0.6)
    frontend.connect(number, 0, patch, "sparsity")
    before = frontend.picture(patch)
    assert "sparsity is wired; the picture shows 0.85." in before["text"]
    assert frontend.run()[0] == "execution_success"
    after = frontend.picture(patch)
    assert "sparsity is wired; the last run got 0.60." in after["text"]
    assert after["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert after["headline"].startswith("This run: ")
    frontend.choose(number, "value", 0.0)
    assert frontend.run()[0] == "execution_success"
    assert frontend.picture(patch)["headline"].startswith("Stays dense: sparsity is 0.")
    assert "the last run got 0.00." in frontend.picture(patch)["text"]
    assert frontend.errors == []


def test_of_a_list_of_sparsities_the_last_one_is_shown(pages):
    """The node then runs once for each of them, and ComfyUI puts what it tells in one list."""
    frontend = pages()
    patch, number = frontend.add("PSAPatch", 300), frontend.add("PrimitiveFloat", -400)
    frontend.connect(number, 0, patch, "sparsity")
    frontend.page.evaluate(
        """(id) => app.canvas.graph.getNodeById(id).onExecuted({
            psa: ["", "module-default", "no video model", ""], psa_sparsity: [0.5, 0.8], psa_asked: [{}, {}],
        })""",
        patch,
    )
    frontend.settle()
    seen = frontend.picture(patch)
    assert "the last run got 0.80." in seen["text"]
    assert seen["headline"].startswith("Stays dense: no video model.")
    assert frontend.errors == []


BOTTOMS = """([id, name]) => {
    const node = app.canvas.graph.getNodeById(id);
    const { element } = node.widgets.find((widget) => widget.name === name);
    const place = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect();
    const { ds, canvas } = app.canvas;
    const top = canvas.getBoundingClientRect().top;
    const bottom = top + (node.pos[1] + node.size[1] + ds.offset[1]) * ds.scale;
    const words = element.firstChild.getBoundingClientRect().bottom;
    return [words, element.getBoundingClientRect().bottom, place?.bottom ?? bottom];
}"""
"""Where a widget's words, the widget and its node end on the screen."""


def nothing_is_cut_off(frontend, node, name):
    words, widget, whole = frontend.page.evaluate(BOTTOMS, [node, name])
    return words <= widget <= whole


@pytest.mark.parametrize("mode", ["topk", "budget", "threshold"])
def test_no_word_of_the_pyramids_picture_is_cut_off(frontend, mode):
    pyramid, patch = frontend.add("PSAPyramid", 60), frontend.add("PSAPatch", 600)
    frontend.connect(pyramid, 0, patch, "psa_pyramid")
    frontend.choose(pyramid, "mode", mode)
    frontend.choose(pyramid, "tail", True)
    assert nothing_is_cut_off(frontend, pyramid, "psa_picture")


@pytest.mark.parametrize("width", [220, 340])
def test_no_word_is_cut_off_however_narrow_the_node_is(frontend, width):
    patch, calibrate = frontend.add("PSAPatch"), frontend.add("PSACalibrate", 700)
    for node in (patch, calibrate):
        frontend.page.evaluate(
            "([id, width]) => { const node = app.canvas.graph.getNodeById(id); node.setSize([width, node.size[1]]); }",
            [node, width],
        )
    steps = {"node": str(patch), "run": 1.0, "steps": 2, "seconds": 1.0, "asked": None}
    reason = "self-attention is over 4096 tokens and not 4095, which is a sentence long enough to need several lines"
    for step in range(2):
        told = {**steps, "step": step, "sparsity": 0.8, "kind": "sparse", "reasons": {reason: 3}}
        frontend.page.evaluate("(detail) => app.api.dispatchCustomEvent('psa.step', detail)", told)
    line(frontend, calibrate, {**FOUND, "reached": False})
    frontend.page.wait_for_timeout(200)
    frontend.settle()
    assert reason in frontend.picture(patch)["sentence"]
    assert nothing_is_cut_off(frontend, patch, "psa_picture")
    assert nothing_is_cut_off(frontend, calibrate, "psa_line")


def test_the_lines_of_a_run_have_a_scale(pages):
    frontend = pages("classic")
    node = frontend.add("PSAPatch")
    for step, seconds in enumerate((9.0, 2.0, 0.5)):  # the first one loads the model
        told = {"node": str(node), "run": 1.0, "steps": 3, "step": step, "seconds": seconds, "reasons": {}}
        told |= {"sparsity": None if step < 2 else 0.8, "kind": "dense" if step < 2 else "sparse", "asked": None}
        frontend.page.evaluate("(detail) => app.api.dispatchCustomEvent('psa.step', detail)", told)
    frontend.settle()
    assert "(lines go from 0 to 1 and to 2.00 s)" in frontend.picture(node)["text"]


def line(frontend, node, figures=None):
    """The line of a node, after it was given figures as the server gives them."""
    text = figures if isinstance(figures, str) else json.dumps(figures)
    found = frontend.page.evaluate(
        """([id, text]) => {
            const node = app.canvas.graph.getNodeById(id);
            if (text !== "null") node.onExecuted({ text: [text] });
            const { element } = node.widgets.find((widget) => widget.name === "psa_line");
            return [element.textContent, element.isConnected && element.getBoundingClientRect().height > 20];
        }""",
        [node, text],
    )
    assert found[1], "it is on the page"
    return found[0]


STEP = {"kind": "dense", "seconds": 2.0}
SPARSE = {"kind": "sparse", "seconds": 0.5}
RUN = {"steps": [STEP, STEP, SPARSE, SPARSE], "saved": 0.4, "pays": None, "dense": None}
POINTS = [{"sparsity": 0.5, "error": 0.04, "seconds": 0.9}, {"sparsity": 0.8, "error": 0.1421, "seconds": 0.4}]
FOUND = {"goal": "error", "target": 0.15, "sparsity": 0.81, "reached": True, "dense_seconds": 1.0, "points": POINTS}


@pytest.mark.parametrize(
    ("kind", "figures", "words"),
    [
        ("PSAReport", RUN, "2 of 4 steps sparse, 40 % of the attention saved; sparse steps 0.50 s, dense steps 2.0 s"),
        (
            "PSAReport",
            {**RUN, "steps": [STEP], "dense": "too short; sample more"},
            "Stayed dense: too short. Sample more.",
        ),
        ("PSAReport", {**RUN, "steps": [], "dense": "a cache answered"}, "Nothing to show: a cache answered."),
        ("PSAReport", {"note": "the model has not sampled yet"}, "Nothing to show: the model has not sampled yet."),
        ("PSACompare", {"psnr": 31.246, "ssim": 0.98764, "lpips": None}, "PSNR 31.25 dB, SSIM 0.9876"),
        ("PSACompare", {"psnr": 31.2, "ssim": 0.9, "lpips": 0.0312}, "PSNR 31.20 dB, SSIM 0.9000, LPIPS 0.0312"),
        ("PSACompare", {"psnr": None, "ssim": 1.0, "lpips": None}, "The two are equal: SSIM 1.0000"),
        (
            "PSACalibrate",
            FOUND,
            "Sparsity 0.81 meets the target, error 0.15. Measured at 0.80: error 0.142, 2.50 times as fast as dense.",
        ),
        ("PSACalibrate", {**FOUND, "reached": False}, "The target, error 0.15, is out of reach here; sparsity 0.81"),
        ("PSACompare", '{"psnr": NaN}', "The figures cannot be shown here"),
    ],
)
def test_what_a_node_measured_stands_in_it_as_text(pages, kind, figures, words):
    frontend = pages("classic")
    node = frontend.add(kind)
    assert line(frontend, node) == "No run yet: measurements will appear here."
    assert line(frontend, node, figures).startswith(words)
    assert frontend.errors == []


@pytest.mark.parametrize(("language", "words"), [("en", "PSNR 31.25 dB"), ("zh", "PSNR 31.25 dB，SSIM")])
def test_the_line_is_there_in_the_other_renderer_and_language(pages, language, words):
    frontend = pages("nodes2", language)
    node = frontend.add("PSACompare")
    assert words in line(frontend, node, {"psnr": 31.246, "ssim": 0.98764, "lpips": None})
    assert frontend.errors == []


CONTRAST = """(id) => {
    const node = app.canvas.graph.getNodeById(id);
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const parse = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
    const light = (colour) => {
        const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = colour.map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    // The classic renderer draws the node below the text, Nodes 2.0 has it as an element around it.
    const paperBelow = (element) => {
        if (!LiteGraph.vueNodesMode) return parse(LiteGraph.NODE_DEFAULT_BGCOLOR).slice(0, 3);
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            layers.push(parse(getComputedStyle(e).backgroundColor));
            if (layers.at(-1)[3] === 1) break;
        }
        return layers.reverse().reduce((below, layer) => over(layer, below), [0, 0, 0]);
    };
    const found = {};
    for (const widget of node.widgets.filter((w) => w.name.startsWith("psa_") && w.element)) {
        const paper = paperBelow(widget.element);
        for (const element of [widget.element, ...widget.element.querySelectorAll("*")]) {
            const own = [...element.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
            if (!own) continue;
            const colour = parse(getComputedStyle(element).color);
            let opacity = colour[3];
            for (let e = element; e && e !== widget.element.parentElement; e = e.parentElement) {
                opacity *= Number(getComputedStyle(e).opacity);
            }
            const [a, b] = [light(over([...colour.slice(0, 3), opacity], paper)), light(paper)];
            found[element.textContent.trim()] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }
    }
    return found;
}"""


PALETTES = {
    "dark": "#ddd",
    "light": "#222",
    "solarized": "#93a1a1",
    "arc": "#ddd",
    "nord": "#bcc2c8",
    "github": "#bcc2c8",
}
"""The core's own, with the colour of their text."""


@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
def test_all_text_can_be_read_in_every_palette(pages, renderer):
    frontend = pages(renderer)
    patch, compare = frontend.add("PSAPatch"), frontend.add("PSACompare", 600)
    wrong = frontend.add("PSAPatch", 1100)
    frontend.choose(wrong, "end_percent", 0.1)
    # A run with other inputs is drawn in another way, and so is a mistake.
    steps = {"node": str(patch), "run": 1.0, "steps": 4, "seconds": 1.0, "reasons": {}, "asked": {"sparsity": 0.2}}
    for step in range(2):
        told = {**steps, "step": step, "sparsity": 0.8, "kind": "sparse"}
        frontend.page.evaluate("(detail) => app.api.dispatchCustomEvent('psa.step', detail)", told)
    frontend.settle()
    try:
        for palette, text in PALETTES.items():
            frontend.page.evaluate("(id) => app.extensionManager.setting.set('Comfy.ColorPalette', id)", palette)
            frontend.page.wait_for_function(
                "(text) => getComputedStyle(document.body).getPropertyValue('--input-text').trim() === text", arg=text
            )
            frontend.settle()
            found = {}
            for node in (patch, compare, wrong):
                found |= frontend.page.evaluate(CONTRAST, node)
            assert any(words.startswith("last run, step") for words in found)
            assert any("Lower start_percent" in words for words in found)
            assert {words: ratio for words, ratio in found.items() if ratio < READABLE} == {}, palette
    finally:
        frontend.page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")

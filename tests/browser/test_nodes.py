"""What a user does with the nodes in the page, in both renderers: the picture follows, and nothing is lost."""

import pytest


def test_dragging_the_sparsity_slider_moves_the_bar(frontend):
    node = frontend.add("PSAPatch")
    before = frontend.picture(node)
    assert before["shown"]
    assert before["headline"] == "85 % of the attention work saved in the sparse steps"
    assert before["bar"] == pytest.approx({"1": 0.1, "2": 0.05, "8": 0.2, "0": 0.65}, abs=0.01)

    while_dragging = frontend.drag(node, "sparsity", 0.5)
    sparsity = frontend.value(node, "sparsity")
    assert 0.4 < sparsity < 0.6
    assert while_dragging["sparsity"] == pytest.approx(sparsity, abs=0.02), "it follows before the button is released"
    after = frontend.picture(node)
    assert after["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    assert after["bar"]["1"] > 2 * before["bar"]["1"]
    assert "not at all" not in after["text"] or after["bar"]["0"] < before["bar"]["0"]


def test_the_picture_says_for_three_settings_what_is_saved_and_what_is_left_out(frontend):
    node = frontend.add("PSAPatch")
    for sparsity, saved, unseen in ((0.7, "70 %", 0.3), (0.85, "85 %", 0.65), (0.95, "95 %", 0.88)):
        frontend.choose(node, "sparsity", sparsity)
        seen = frontend.picture(node)
        assert seen["headline"] == f"{saved} of the attention work saved in the sparse steps"
        assert seen["bar"]["0"] == pytest.approx(unseen, abs=0.01)
        assert "H100" not in seen["text"], "this machine is none"
        for words in ("seen in full", "at 1/2", "at 1/8", "not at all"):
            assert words in seen["text"]
    frontend.choose(node, "sparsity", 0.0)
    assert frontend.picture(node)["headline"] == "Stays dense: sparsity is 0. Move the slider up to save work."


def test_what_was_measured_on_an_h100_is_told_where_the_machine_is_one(make_frontend):
    def stats(route):
        answer = route.fetch().json()
        answer["devices"][0]["name"] = "cuda:0 NVIDIA H100 80GB HBM3 : cudaMallocAsync"
        route.fulfill(json=answer)

    frontend = make_frontend("classic", {"**/system_stats": stats})
    node = frontend.add("PSAPatch")
    assert "times faster (H100)" in frontend.picture(node)["text"]


def test_a_pyramid_shapes_the_picture_of_the_patch_it_feeds(frontend):
    pyramid, patch = frontend.add("PSAPyramid", 60), frontend.add("PSAPatch", 500)
    frontend.choose(pyramid, "full", 0.3)
    alone = frontend.picture(pyramid)
    assert alone["sparsity"] == pytest.approx(1 - (0.3 + 0.05 / 2 + 0.2 / 8), abs=1e-3)
    assert "used as written" in alone["text"]

    frontend.connect(pyramid, 0, patch, "psa_pyramid")
    assert frontend.picture(patch)["bar"] == pytest.approx(frontend.picture(pyramid)["bar"])
    assert frontend.picture(pyramid)["sparsity"] == pytest.approx(0.85, abs=1e-3)
    frontend.choose(patch, "sparsity", 0.7)
    assert frontend.picture(pyramid)["sparsity"] == pytest.approx(0.7, abs=1e-3)
    frontend.choose(pyramid, "as_written", True)
    assert frontend.picture(patch)["sparsity"] == pytest.approx(alone["sparsity"], abs=1e-3)

    frontend.choose(pyramid, "half", 0.9)
    for node in (pyramid, patch):
        assert frontend.picture(node)["problem"]
        assert (
            "'1.40 in sum' was given; allowed: levels that add up to at most 1." in frontend.picture(node)["headline"]
        )


def test_saving_and_loading_loses_nothing(frontend):
    pyramid, patch = frontend.add("PSAPyramid", 60), frontend.add("PSAPatch", 500)
    frontend.connect(pyramid, 0, patch, "psa_pyramid")
    for node, name, value in ((pyramid, "eighth", 0.33), (pyramid, "mode", "budget"), (patch, "sparsity", 0.6)):
        frontend.choose(node, name, value)
    saved = frontend.serialized()
    seen = frontend.picture(patch)
    by_type = {node["type"]: node for node in saved["nodes"]}
    assert len(by_type["PSAPatch"]["widgets_values"]) == 19, "the picture is not saved"
    assert len(by_type["PSAPyramid"]["widgets_values"]) == 16

    frontend.clear()
    frontend.load(saved)
    again = {node["type"]: node for node in frontend.serialized()["nodes"]}
    for kind, node in by_type.items():
        assert again[kind]["widgets_values"] == node["widgets_values"]
        assert [slot["link"] for slot in again[kind]["inputs"]] == [slot["link"] for slot in node["inputs"]]
        if frontend.renderer == "classic":  # Nodes 2.0 makes room for the folded inputs of any node that it loads
            assert again[kind]["size"] == pytest.approx(node["size"], abs=2)
    assert frontend.picture(patch) == seen


def test_undo_brings_value_and_picture_back(frontend):
    node = frontend.add("PSAPatch")
    frontend.page.mouse.click(1200, 800)
    frontend.drag(node, "sparsity", 0.3)
    frontend.page.wait_for_timeout(300)
    moved = frontend.value(node, "sparsity")
    assert moved < 0.5
    frontend.page.mouse.click(1200, 800)
    frontend.page.keyboard.press("Control+z")
    frontend.page.wait_for_function(
        "([id, old]) => app.canvas.graph.getNodeById(id)?.widgets.find((w) => w.name === 'sparsity').value !== old",
        arg=[node, moved],
    )
    frontend.settle()
    assert frontend.value(node, "sparsity") == pytest.approx(0.85)
    assert frontend.picture(node)["sparsity"] == pytest.approx(0.85, abs=1e-3)


def test_the_everyday_inputs_alone_are_shown_by_the_new_renderer(pages):
    frontend = pages("nodes2")
    node = frontend.add("PSAPatch")
    rows = frontend.page.locator(f'[data-node-id="{node}"] [data-testid="node-widget"]')
    shown = [text.split("\n")[0] for text in rows.all_inner_texts()]
    assert shown[:4] == ["sparsity", "preset", "start_percent", "end_percent"]
    assert len(shown) == 5, "the fifth is the picture"


def test_in_chinese_names_and_picture_are_chinese(pages):
    frontend = pages(locale="zh")
    node = frontend.add("PSAPatch")
    assert frontend.picture(node)["headline"] == "稀疏步中节省 85 % 的注意力计算"
    title, label = frontend.page.evaluate(
        """(id) => {
            const node = app.canvas.graph.getNodeById(id);
            return [node.title, node.widgets.find((w) => w.name === "sparsity").label];
        }""",
        node,
    )
    assert (title, label) == ("PSA 补丁", "稀疏度")
    assert frontend.errors == []


def test_choosing_a_preset_of_the_user_moves_the_slider(pages, server):
    folder = server.home / "user" / "psa_presets"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "look.json").write_text('{"shares": {"1": 0.2, "4": 0.4}, "sparsity": 0.6}', encoding="utf-8")
    (folder / "broken.json").write_text("{", encoding="utf-8")
    try:
        frontend = pages()
        node = frontend.add("PSAPatch")
        frontend.page.evaluate("() => app.refreshComboInNodes()")
        frontend.page.wait_for_function(
            "(id) => app.canvas.graph.getNodeById(id).widgets[1].options.values.includes('user/look')", arg=node
        )
        frontend.choose(node, "preset", "user/look")
        assert frontend.value(node, "sparsity") == 0.6
        seen = frontend.picture(node)
        assert seen["sparsity"] == pytest.approx(0.6, abs=1e-3)
        assert set(seen["bar"]) == {"1", "4", "0"}
        frontend.choose(node, "preset", "user/broken")
        assert frontend.picture(node)["headline"].startswith(
            "PSA Patch, input preset: 'user/broken' was given; allowed: "
        )
        assert frontend.errors == []
    finally:
        for name in ("look", "broken"):
            (folder / f"{name}.json").unlink()


MENU = """(id) => {
    const { options } = app.canvas.graph.getNodeById(id).widgets.find((widget) => widget.name === "preset");
    return options.values.filter((name) => !name.startsWith("user/")); // another test's files
}"""


@pytest.mark.parametrize("kind", ["PSAPatch", "PSACalibrate"])
def test_a_preset_that_left_the_menu_stays_in_a_workflow_that_has_it(frontend, kind):
    node = frontend.add(kind)
    short = frontend.page.evaluate(MENU, node)
    assert short == ["auto", "wan-4step-lora", "cogvideox-5b-4step", "generic", "paper: module-default"]
    frontend.choose(node, "preset", "wan2.2-a14b")
    saved = frontend.serialized()
    frontend.clear()
    frontend.load(saved)
    assert frontend.value(node, "preset") == "wan2.2-a14b"
    assert frontend.page.evaluate(MENU, node) == [*short, "wan2.2-a14b"]
    frontend.page.evaluate("() => app.refreshComboInNodes()")
    frontend.page.wait_for_timeout(500)
    assert frontend.page.evaluate(MENU, node) == [*short, "wan2.2-a14b"]
    assert frontend.page.evaluate(MENU, frontend.add(kind, 700)) == short
    prompt = frontend.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert prompt[str(node)]["inputs"]["preset"] == "wan2.2-a14b"
    assert frontend.page.locator(f'[data-node-id="{node}"] [aria-invalid="true"]').count() == 0
    if kind == "PSAPatch":
        seen = frontend.picture(node)
        assert not seen["problem"]
        assert seen["headline"] == "85 % of the attention work saved in the sparse steps"


def test_a_mistake_is_told_in_the_node_before_a_run_in_the_words_of_the_run(frontend):
    patch = frontend.add("PSAPatch")
    frontend.choose(patch, "end_percent", 0.2)
    sentence = (
        "PSA Patch, input start_percent: 0.25 was given; allowed: less than end_percent, which is 0.2. "
        "Lower start_percent or raise end_percent."
    )
    headline = "() => [...document.querySelectorAll('.psa-headline.psa-problem')].map((found) => found.textContent)"
    frontend.page.wait_for_function(f"(words) => ({headline})().includes(words)", arg=sentence)
    frontend.choose(patch, "end_percent", 1.0)
    frontend.page.wait_for_function(f"() => ({headline})().length === 0")
    assert frontend.errors == []


WIDTH = """(id) => {
    const { element } = app.canvas.graph.getNodeById(id).widgets.find((widget) => widget.name === "psa_picture");
    return Math.round(element.getBoundingClientRect().width);
}"""


def test_the_properties_panel_has_no_row_for_the_picture(frontend):
    node = frontend.add("PSAPatch")
    width = frontend.page.evaluate(WIDTH, node)
    panel = frontend.page.get_by_test_id("properties-panel")
    toggle = frontend.page.get_by_role("button", name="Toggle properties panel").first
    if not panel.is_visible():
        toggle.click()
    try:
        frontend.page.evaluate("(id) => app.canvas.selectNode(app.canvas.graph.getNodeById(id))", node)
        panel.get_by_text("start_percent").first.wait_for()
        assert "psa_picture" not in panel.inner_text()
        assert frontend.page.evaluate(WIDTH, node) == width
    finally:
        panel.get_by_role("button", name="Toggle properties panel").or_(toggle).first.click()


def test_a_node_outside_of_a_graph_asks_for_no_neighbours(pages):
    """As a newer frontend has it: nodes are configured before they are in a graph, where asking is an error."""
    frontend = pages()
    pyramid, patch = frontend.add("PSAPyramid", 60), frontend.add("PSAPatch", 500)
    frontend.connect(pyramid, 0, patch, "psa_pyramid")
    for node in (pyramid, patch):
        frontend.page.evaluate(
            """(id) => {
                const saved = app.canvas.graph.getNodeById(id).serialize();
                const copy = LiteGraph.createNode(saved.type);
                for (const name of ["getInputNode", "getOutputNodes", "getInputLink"]) {
                    const ask = copy[name];
                    copy[name] = function (...args) {
                        if (!this.graph) throw new Error(`${name} without a graph`);
                        return ask?.apply(this, args);
                    };
                }
                copy.configure(saved);
                copy.widgets[0].callback?.(copy.widgets[0].value, app.canvas, copy);
            }""",
            node,
        )
    assert frontend.errors == []

"""The template browser of a user who has installed the pack and nothing else, and what a search for nodes finds."""

import pytest

from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.server import PACK
from comfyui_psa.workshop.tools.workflow import load_workflow

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
SMALL = [
    ("KSampler", "steps", 2),
    ("EmptyHunyuanLatentVideo", "width", 192),
    ("EmptyHunyuanLatentVideo", "height", 192),
    ("EmptyHunyuanLatentVideo", "length", 5),
    ("PSAPatch", "min_tokens", 0),
]
"""What makes the demo a matter of seconds: class, input, value."""


def browse(frontend):
    """Open the template browser at the pack's own templates."""
    frontend.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    frontend.page.get_by_role("dialog").get_by_text(PACK, exact=True).first.click(timeout=20_000)
    frontend.page.get_by_test_id(f"template-workflow-{NAMES[0]}").wait_for()


def open_template(frontend, name):
    """Click a template's card, which is shown, and wait until its workflow is the one on the page."""
    frontend.page.get_by_test_id(f"template-workflow-{name}").click()
    nodes = len(load_workflow(WORKFLOWS / f"{name}.json")["nodes"])
    frontend.page.wait_for_function("(nodes) => app.rootGraph.nodes.length === nodes", arg=nodes)
    frontend.settle()


def search(frontend, words, expected=None):
    """The names that the search box for nodes finds; `expected` is waited for."""
    frontend.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = frontend.page.get_by_role("dialog")
    box.get_by_role("textbox").or_(box.get_by_role("combobox")).first.fill(words)
    if expected is None:
        frontend.page.wait_for_timeout(500)
    else:
        box.get_by_text(expected).first.wait_for()
    found = box.inner_text()
    frontend.page.keyboard.press("Escape")
    frontend.settle()
    return found


@pytest.mark.slow
def test_every_template_has_its_picture(pages):
    frontend = pages()
    browse(frontend)
    for name in NAMES:
        card = frontend.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()  # before that it need not have a picture
        picture = card.locator("img").first
        frontend.page.wait_for_function("(image) => image.naturalWidth === 512", arg=picture.element_handle())
    frontend.page.keyboard.press("Escape")
    assert frontend.errors == []


@pytest.mark.parametrize("name", NAMES)
def test_every_template_opens(pages, name):
    """What a click on its card brings; that a card can be clicked, the demo's own test tries."""
    frontend = pages()
    frontend.page.evaluate(
        """async ([pack, name]) => {
            const answer = await app.api.fetchApi(`/workflow_templates/${pack}/${name}.json`);
            await app.loadGraphData(await answer.json(), true, true, name, { openSource: "template" });
        }""",
        [PACK, name],
    )
    frontend.settle()
    known = frontend.page.evaluate(
        "() => app.rootGraph.nodes.map((node) => [node.type, !!LiteGraph.registered_node_types[node.type]])"
    )
    assert len(known) == len(load_workflow(WORKFLOWS / f"{name}.json")["nodes"])
    assert "PSAPatch" in dict(known)
    assert [kind for kind, registered in known if not registered] == []
    assert frontend.errors == []


@pytest.mark.parametrize("name", ["psa_demo", "wan21_t2v_psa"])
def test_a_templates_nodes_have_no_empty_room(frontend, name):
    frontend.load(load_workflow(WORKFLOWS / f"{name}.json"))
    frontend.page.wait_for_timeout(300)
    empty = frontend.page.evaluate(
        """() => {
            const { ds } = app.canvas;
            const node = app.rootGraph.nodes.find((found) => found.type === "PSAPatch");
            const { element } = node.widgets.find((widget) => widget.name === "psa_picture");
            const place = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
            const top = app.canvas.canvas.getBoundingClientRect().top;
            const bottom = top + (node.pos[1] + node.size[1] + ds.offset[1]) * ds.scale;
            return ((place?.bottom ?? bottom) - element.getBoundingClientRect().bottom) / ds.scale;
        }"""
    )
    assert empty <= 70, "a button for the other inputs has room there, and nothing else"


@pytest.mark.parametrize("name", ["wan21_t2v_psa", "cogvideox5b_psa_4step_lora"])
def test_every_missing_file_has_its_download_button(pages, name):
    frontend = pages()
    workflow = load_workflow(WORKFLOWS / f"{name}.json")
    files = [entry["name"] for node in workflow["nodes"] for entry in node["properties"].get("models", ())]
    assert len(files) == 3
    frontend.load(workflow)
    frontend.page.get_by_test_id("error-overlay-see-errors").click()
    try:
        buttons = frontend.page.get_by_test_id("missing-model-download")
        buttons.first.wait_for()
        labels = [button.get_attribute("aria-label") for button in buttons.all()]
        assert [sum(file in label for label in labels) for file in files] == [1, 1, 1]
    finally:
        frontend.page.get_by_role("button", name="Toggle properties panel").first.click()


@pytest.mark.slow(seconds=30)
def test_the_demo_runs_at_once(pages):
    frontend = pages("nodes2")
    browse(frontend)
    open_template(frontend, "psa_demo")
    frontend.page.wait_for_timeout(1000)
    assert not frontend.page.get_by_test_id("error-overlay").is_visible(), "neither a node nor a file is missing"
    for kind, name, value in SMALL:
        for node in frontend.page.evaluate(
            "(kind) => app.rootGraph.nodes.filter((n) => n.type === kind).map((n) => n.id)", kind
        ):
            frontend.choose(node, name, value)
    kind, detail = frontend.run(300)
    assert kind == "execution_success", detail
    films = frontend.page.evaluate(
        "() => Object.values(app.nodeOutputs).flatMap((output) => (output.images ?? []).map((image) => image.filename))"
    )
    assert sum(film.endswith(".webp") for film in films) == 3
    assert frontend.errors == []


def test_a_search_for_scene_does_not_find_the_demos_node(pages):
    frontend = pages()
    assert "PSA Patch" in search(frontend, "psa patch", "PSA Patch")
    for words in ("scene", "demo", "PSADemoScene"):
        assert "PSA Demo" not in search(frontend, words)


@pytest.mark.parametrize(
    ("words", "node"),
    [
        *((words, "PSA Patch") for words in ("wan faster", "accelerate", "optimize", "sage attention", "稀疏", "加速")),
        *((words, "PSA LoRA Loader") for words in ("lightx2v", "wan lora")),
        ("video quality", "PSA Compare"),
    ],
)
def test_a_search_for_what_is_wanted_finds_the_node(pages, words, node):
    assert node in search(pages(), words, node)

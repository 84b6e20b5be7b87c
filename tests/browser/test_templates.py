"""The template browser of a user who has installed the pack and nothing else, and what a search for nodes finds."""

import pytest

from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.server import PACK
from comfyui_psa.workshop.tools.workflow import load_workflow

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
SMALL = [
    ("KSampler", "steps", 2),
    ("EmptyHunyuanLatentVideo", "width", 256),
    ("EmptyHunyuanLatentVideo", "height", 256),
    ("EmptyHunyuanLatentVideo", "length", 9),
    ("PSAPatch", "min_tokens", 0),
]
"""What makes the demo a matter of seconds: class, input, value."""


def browse(frontend):
    """Open the template browser at the pack's own templates."""
    frontend.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    frontend.page.get_by_role("dialog").get_by_text(PACK, exact=True).first.click(timeout=20_000)
    frontend.page.get_by_test_id(f"template-workflow-{NAMES[0]}").wait_for()


def open_template(frontend, name):
    """Click a template's card and wait until its workflow is the one that is shown."""
    browse(frontend)
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
@pytest.mark.parametrize("name", NAMES)
def test_every_template_has_its_picture_and_opens(pages, name):
    frontend = pages()
    browse(frontend)
    card = frontend.page.get_by_test_id(f"template-workflow-{name}")
    card.scroll_into_view_if_needed()  # before that it need not have a picture
    picture = card.locator("img").first
    frontend.page.wait_for_function("(image) => image.naturalWidth === 512", arg=picture.element_handle())
    frontend.page.keyboard.press("Escape")
    frontend.settle()
    open_template(frontend, name)
    known = frontend.page.evaluate(
        "() => app.rootGraph.nodes.map((node) => [node.type, !!LiteGraph.registered_node_types[node.type]])"
    )
    assert "PSAPatch" in dict(known)
    assert [kind for kind, registered in known if not registered] == []
    assert frontend.errors == []


@pytest.mark.slow(seconds=30)
def test_the_demo_runs_at_once(frontend):
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


def test_a_search_for_scene_does_not_find_the_demos_node(pages):
    frontend = pages()
    assert "PSA Patch" in search(frontend, "psa patch", "PSA Patch")
    for words in ("scene", "demo", "PSADemoScene"):
        assert "PSA Demo" not in search(frontend, words)

"""A real Chromium on the real frontend of the real server. Nothing is reached that is not on this machine."""

import importlib
import os
import shutil
from pathlib import Path

import pytest

from comfyui_psa.workshop.tools.client import Client
from comfyui_psa.workshop.tools.paths import FRONTEND, comfyui_folder
from comfyui_psa.workshop.tools.server import ComfyServer

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
# What is not on this machine is not found.
ONLY_HERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
RENDERERS = ("classic", "nodes2")
READY = "!!window.app?.canvas?.graph && !!window.LiteGraph?.registered_node_types?.PSAPatch"
# Settings of a user who has seen the first-run dialogs.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.47.12", "Comfy.Minimap.Visible": False}


def pytest_collection_modifyitems(config, items):
    """In the newest frontend the nodes are tried, in its own renderer, and the demo's template; the rest in the core's
    own alone: to try everything twice takes many minutes, and what a new frontend breaks are nodes and their widgets.
    """
    in_both = ("test_nodes.py", "test_node_runs.py", "test_the_demo_runs_at_once")
    left_out = [
        item
        for item in items
        if item.path.parent == Path(__file__).parent
        and "newest frontend" in item.name
        and ("classic" in item.callspec.params.values() or not any(name in item.nodeid for name in in_both))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def newest_server(tmp_path_factory):
    """A server with the newest frontend, which users' frontends become by themselves."""
    files = FRONTEND / "comfyui_frontend_package" / "static"
    if not files.is_dir():
        reason = f"no frontend in {FRONTEND}; `python dev.py setup` brings the newest"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("newest")
    home, log = folder / "home", folder / "server.log"
    with ComfyServer(comfyui_folder(), home=home, log=log, frontend=files) as server:
        yield server


@pytest.fixture(scope="session", params=["pinned frontend", "newest frontend"])
def server(request, server):
    """The server with the core's own frontend, then the newest one."""
    # Asked for here, it stays when the parameter changes; every file of these tests changes it.
    return server if request.param == "pinned frontend" else request.getfixturevalue("newest_server")


@pytest.fixture(scope="session")
def client(server):
    """A client of that server."""
    return Client(server.url)


@pytest.fixture(scope="module")  # its event loop must not be there while other tests run theirs
def chromium(tmp_path_factory):
    """A browser. Without one on this machine the tests are skipped, except where CI must run them."""
    path = os.environ.get("PSA_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        reason = f"no browser: none of {', '.join(CHROMIUMS)} is installed (on Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    playwright = pytest.importorskip("playwright.sync_api")
    home = str(tmp_path_factory.mktemp("chromium"))  # not the user's, where it would leave settings and reports
    homes = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), home)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=[*OPTIONS, ONLY_HERE], env={**os.environ, **homes})
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def demo_workflow():
    """The module `demo_workflow.py` next to this file."""
    return importlib.import_module(".demo_workflow", __package__)


@pytest.fixture(scope="module")
def pages(chromium, server, client):
    """Opens the frontend in a renderer and language: `pages(renderer, locale)` gives a `Frontend`.

    Where the renderer does not matter: the classic one of the core's frontend, the new one of the newest.
    """
    opened = {}
    usual = "classic" if server.frontend is None else "nodes2"

    def open_page(renderer=usual, locale="en"):
        if (renderer, locale) not in opened:
            for name, value in SETTINGS.items():
                client.post(f"/settings/{name}", value)
            client.post("/settings/Comfy.VueNodes.Enabled", renderer == "nodes2")
            client.post("/settings/Comfy.Locale", locale)
            opened[renderer, locale] = Frontend(chromium, server.url, renderer)
        frontend = opened[renderer, locale]
        frontend.clear()
        return frontend

    yield open_page
    for frontend in opened.values():
        frontend.page.context.close()


@pytest.fixture
def make_frontend(chromium, server, client):
    """A page for which the test answers some addresses: `make_frontend(renderer, {address: answer})`."""
    opened = []

    def make(renderer, routes):
        for name, value in {**SETTINGS, "Comfy.VueNodes.Enabled": renderer == "nodes2", "Comfy.Locale": "en"}.items():
            client.post(f"/settings/{name}", value)
        opened.append(Frontend(chromium, server.url, renderer, routes))
        opened[-1].clear()
        return opened[-1]

    yield make
    for frontend in opened:
        frontend.page.context.close()


@pytest.fixture(params=RENDERERS)
def frontend(request, pages):
    """The page in one renderer, with an empty graph; at the end no error of ours may have been printed."""
    frontend = pages(request.param)
    yield frontend
    assert frontend.errors == []


class Frontend:
    """The page: what a user does with it, and what they see."""

    def __init__(self, browser, url, renderer, routes=None):
        self.renderer = renderer
        self.errors = []
        context = browser.new_context(viewport={"width": 1500, "height": 1000})
        self.page = page = context.new_page()
        page.set_default_timeout(60_000)
        for address, answer in (routes or {}).items():
            page.route(address, answer)
        page.on("pageerror", lambda error: self.errors.append(f"page error: {error}"))
        page.on("console", self._console)
        page.goto(url)
        page.wait_for_function(READY)
        page.wait_for_function("app.canvas.graph.nodes.length > 0")  # the workflow that a new user is shown
        self.settle()
        page.evaluate("() => app.extensionManager.setting.set('Comfy.Graph.CanvasInfo', false)")

    def _console(self, message):
        ours = "ComfyUI-PSA" in message.text or "ComfyUI-PSA" in (message.location or {}).get("url", "")
        if message.type in ("error", "warning") and ours:
            self.errors.append(message.text)

    def clear(self):
        """An empty graph at full scale."""
        self.page.keyboard.press("Escape")
        self.page.evaluate(
            """async () => {
                await app.loadGraphData({nodes: [], links: [], version: 0.4});
                app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true);
            }"""
        )
        self.errors.clear()

    def add(self, kind, x=120, y=120):
        """Add a node as the search box does and return its id."""
        node = self.page.evaluate(
            """([kind, x, y]) => {
                const node = LiteGraph.createNode(kind);
                node.pos = [x, y];
                app.canvas.graph.add(node);
                return node.id;
            }""",
            [kind, x, y],
        )
        self.settle()
        return node

    def settle(self):
        """Wait two frames and for the server's answers, so that every change is drawn."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_timeout(100)
        self.page.wait_for_function("!document.querySelector('.psa-waiting')")

    def load(self, workflow):
        """Open a workflow."""
        self.page.evaluate("async (workflow) => { await app.loadGraphData(workflow); }", workflow)
        self.settle()

    def connect(self, source, slot, target, name):
        """A wire from output `slot` to the input `name`."""
        self.page.evaluate(
            """([source, slot, target, name]) => {
                const graph = app.canvas.graph;
                graph.getNodeById(source).connect(slot, graph.getNodeById(target), name);
            }""",
            [source, slot, target, name],
        )
        self.settle()

    def serialized(self):
        """The workflow as it would be saved."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.rootGraph.serialize()))")

    def value(self, node, name):
        """Value of a widget."""
        return self.page.evaluate(
            "([node, name]) => app.canvas.graph.getNodeById(node).widgets.find((w) => w.name === name).value",
            [node, name],
        )

    def choose(self, node, name, value):
        """Set a widget as its own control does: value, then callback."""
        self.page.evaluate(
            """([id, name, value]) => {
                const node = app.canvas.graph.getNodeById(id);
                const widget = node.widgets.find((w) => w.name === name);
                widget.value = value;
                widget.callback?.(value, app.canvas, node);
            }""",
            [node, name, value],
        )
        self.settle()

    def drag(self, node, name, share):
        """Drag a slider with the mouse to `share` of its range."""
        if self.renderer == "nodes2":
            row = self.page.locator(f'[data-node-id="{node}"] [data-testid="node-widget"]').filter(
                has=self.page.get_by_text(name, exact=True)
            )
            track = row.locator('[data-slot="slider"], [role="slider"]').first.bounding_box()
            thumb = row.locator('[role="slider"]').bounding_box()
            left, width, y = track["x"], track["width"], thumb["y"] + thumb["height"] / 2
            start = thumb["x"] + thumb["width"] / 2
        else:
            left, width, y, start = self.page.evaluate(
                """([id, name]) => {
                    const node = app.canvas.graph.getNodeById(id);
                    const widget = node.widgets.find((w) => w.name === name);
                    const { ds, canvas } = app.canvas;
                    const place = canvas.getBoundingClientRect();
                    const x = (value) => place.left + (value + ds.offset[0]) * ds.scale;
                    const share = (widget.value - widget.options.min) / (widget.options.max - widget.options.min);
                    const [left, width] = [node.pos[0] + 15, node.size[0] - 30];
                    const y = place.top + (node.pos[1] + widget.y + 10 + ds.offset[1]) * ds.scale;
                    return [x(left), width * ds.scale, y, x(left + width * share)];
                }""",
                [node, name],
            )
        mouse = self.page.mouse
        mouse.move(start, y)
        mouse.down()
        for part in range(1, 6):
            mouse.move(start + (left + width * share - start) * part / 5, y)
        self.settle()
        seen = self.picture(node)
        mouse.up()
        self.settle()
        return seen

    def shot(self, node):
        """A picture of one node, PNG, with a little of the canvas around it."""
        self.page.evaluate(
            """(id) => {
                const node = app.canvas.graph.getNodeById(id);
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [300 - node.pos[0], 150 - node.pos[1]];
                app.canvas.deselectAll?.();
                app.canvas.setDirty(true, true);
            }""",
            node,
        )
        self.page.mouse.move(1490, 500)
        self.settle()
        box = self.page.locator(f'[data-node-id="{node}"]').bounding_box()
        edge = 10
        clip = {"x": box["x"] - edge, "y": box["y"] - edge, "width": box["width"] + 2 * edge}
        return self.page.screenshot(clip={**clip, "height": box["height"] + 2 * edge})

    def picture(self, node):
        """What a picture shows: words, bar (factor -> share), sparsity. `node`: an id, or a class in a subgraph."""
        return self.page.evaluate(
            """(id) => {
                const all = (graph) => graph.nodes.flatMap((n) => [n, ...(n.subgraph ? all(n.subgraph) : [])]);
                const node = app.canvas.graph.getNodeById(id) ?? all(app.rootGraph).find((n) => n.comfyClass === id);
                const element = node.widgets.find((w) => w.name === "psa_picture").element;
                const bar = [...element.querySelectorAll(".psa-seen div")];
                return {
                    headline: element.querySelector(".psa-headline").textContent,
                    problem: element.querySelector(".psa-headline").classList.contains("psa-problem"),
                    text: element.textContent,
                    sentence: element.querySelector(".psa-sentence")?.textContent ?? "",
                    bar: Object.fromEntries(bar.map((d) => [d.dataset.factor, parseFloat(d.style.width) / 100])),
                    sparsity: Number(element.dataset.sparsity),
                    steps: Number(element.dataset.steps ?? 0),
                    points: element.querySelector(".psa-sparsity")?.getAttribute("points")?.split(" ").length ?? 0,
                    shown: element.isConnected && element.getBoundingClientRect().height > 50,
                };
            }""",
            node,
        )

    def run(self, timeout=300):
        """Press Ctrl+Enter and wait until the queue is empty; returns the server's answer: "success" or the error."""
        self.page.evaluate(
            """() => {
                const names = ["execution_success", "execution_error", "execution_interrupted"];
                window.psaOutcome = new Promise((done) => {
                    for (const name of names) {
                        app.api.addEventListener(name, ({ detail }) => done([name, detail]), { once: true });
                    }
                });
            }"""
        )
        self.page.keyboard.press("Control+Enter")
        kind, detail = self.page.evaluate(
            """(seconds) => Promise.race([
                window.psaOutcome,
                new Promise((done) => setTimeout(() => done(["timeout", null]), seconds * 1000)),
            ])""",
            timeout,
        )
        self.settle()
        return kind, detail

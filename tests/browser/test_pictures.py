"""A picture of every node for README and help pages, as a newcomer sees it: PSA_WRITE_PICTURES=1 writes them again."""

import io
import os
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

from comfyui_psa.workshop.tools.paths import ROOT

PICTURES = ROOT / "web" / "docs" / "pictures"
SHEETS = ROOT / "docs" / "pictures" / "nodes"
WRITE = os.environ.get("PSA_WRITE_PICTURES") == "1"
PLAIN = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md") if path.stem not in ("PSAPatch", "PSAReport"))


def keep(name, png, width=None):
    """Store a picture where it belongs, small; without PSA_WRITE_PICTURES it is only checked."""
    with Image.open(io.BytesIO(png)) as picture:
        picture = picture.convert("RGB")
        assert len(picture.getcolors(1 << 24)) > 20, "something is drawn"
        if width is not None:
            picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        if WRITE:
            PICTURES.mkdir(exist_ok=True)
            picture.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)
    assert (PICTURES / f"{name}.png").stat().st_size < 120_000


def keep_sheet(name, png, dark):
    """The same for a picture of all nodes, which is for the page about them."""
    with Image.open(io.BytesIO(png)) as picture:
        picture = picture.convert("RGB")
        brightness = sum(picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) / 3
        assert brightness < 100 if dark else brightness > 150
        if WRITE:
            SHEETS.mkdir(exist_ok=True)
            picture.save(SHEETS / f"{name}.webp", quality=80, method=6)
    assert (SHEETS / f"{name}.webp").stat().st_size < 100_000


def beside(*pngs):
    """Pictures in a row."""
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    sheet = Image.new(
        "RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), pictures[0].getpixel((2, 2))
    )
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", PLAIN)
def test_a_picture_of_the_node(pages, name):
    frontend = pages("nodes2")
    node = frontend.add(name)
    frontend.page.wait_for_timeout(300)
    keep(name, frontend.shot(node))
    help_page = f"/extensions/ComfyUI-PSA/docs/{name}.md"
    found = frontend.page.evaluate(
        "async ([page, picture]) => Promise.all([page, picture].map(async (path) => (await fetch(path)).status))",
        [help_page, help_page.replace(f"{name}.md", f"pictures/{name}.png")],
    )
    assert found == [200, 200]
    assert frontend.errors == []


COLUMNS = (
    ("PSAPatch", "PSAPyramid"),
    ("PSACalibrate", "PSACompare", "PSALoraDownload"),
    ("PSAReport", "PSALoraLoader", "PSACogVideoXLoader", "PSACogVideoXFix", "PSADemoScene"),
    ("PSACogVideoXImageToVideo", "PSACogVideoXSampler", "PSACogVideoXSigmas"),
)
ADD_ALL = """async (columns) => {
    const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    let [x, width, height] = [0, 0, 0];
    for (const column of columns) {
        const placed = [];
        let y = 0;
        for (const kind of column) {
            const node = LiteGraph.createNode(kind);
            node.pos = [x, y];
            app.canvas.graph.add(node);
            await frame();
            await frame();
            placed.push(node);
            const element = document.querySelector(`[data-node-id="${node.id}"]`);
            y += (element?.offsetHeight ?? node.size[1] + LiteGraph.NODE_TITLE_HEIGHT) + 30;
        }
        const wide = Math.max(...placed.map((node) => node.size[0]));
        x += wide + 30;
        [width, height] = [x, Math.max(height, y)];
    }
    app.canvas.deselectAll?.();
    const place = app.canvas.canvas.getBoundingClientRect();
    app.canvas.ds.offset = [100, 180];
    app.canvas.setDirty(true, true);
    return [place.left + 100, place.top + 180 - LiteGraph.NODE_TITLE_HEIGHT, width, height];
}"""


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
def test_a_picture_of_all_nodes_in_every_look(pages, renderer, theme):
    frontend = pages(renderer)
    before = frontend.page.viewport_size
    frontend.page.evaluate("(id) => app.extensionManager.setting.set('Comfy.ColorPalette', id)", theme)
    frontend.page.set_viewport_size({"width": 2100, "height": 1500})
    try:
        x, y, width, height = frontend.page.evaluate(ADD_ALL, COLUMNS)
        frontend.page.mouse.move(2090, 1400)
        frontend.settle()
        edge = 30 if renderer == "classic" else 15  # classic nodes have their pack's name above them
        clip = {"x": x - 15, "y": y - edge, "width": width, "height": height + edge - 15}
        keep_sheet(f"{renderer}-{theme}", frontend.page.screenshot(clip=clip), dark=theme == "dark")
    finally:
        frontend.page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
        frontend.page.set_viewport_size(before)
    assert frontend.errors == []


@pytest.mark.slow
def test_pictures_of_patch_and_report_after_a_run(pages, demo_workflow, client):
    frontend = pages("nodes2")
    # The demo's own size takes a minute or more, and is taken only for the README.
    demo = demo_workflow.small_demo(*((512, 33, 16) if WRITE else ()), film=True)
    ids = {node["type"]: node["id"] for node in demo["nodes"]}
    frontend.load(demo)
    assert frontend.run(900)[0] == "execution_success"
    frontend.page.evaluate("(id) => app.rootGraph.getNodeById(id).setSize([340, 0])", ids["PSAPatch"])
    frontend.settle()
    (image,) = frontend.page.evaluate("(id) => app.nodeOutputs[id].images", ids["PSAReport"])
    keep("PSAReport", client.download("/view?" + urllib.parse.urlencode(image)), 860)
    patch = frontend.shot(ids["PSAPatch"])
    keep("PSAPatch", patch)
    frontend.clear()
    keep("overview", beside(patch, frontend.shot(frontend.add("PSAPyramid"))))


def test_there_is_no_picture_without_a_node():
    names = {path.stem for path in Path(ROOT / "web" / "docs").glob("*.md")}
    assert {path.stem for path in PICTURES.glob("*.png")} == names | {"overview"}

"""A picture of every node for README and help pages, as a newcomer sees it: PSA_WRITE_PICTURES=1 writes them again."""

import io
import os
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

from comfyui_psa.workshop.tools.paths import ROOT

PICTURES = ROOT / "web" / "docs" / "pictures"
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


@pytest.mark.slow
def test_pictures_of_patch_and_report_after_a_run(pages, demo_workflow, client):
    frontend = pages("nodes2")
    # The demo's own size takes a minute or more, and is taken only for the README.
    demo = demo_workflow.small_demo(512, 33, 16) if WRITE else demo_workflow.small_demo()
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

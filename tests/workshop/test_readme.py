"""The pages: the README is short, its figures come from workshop/results, and every link leads somewhere."""

import itertools
import json
import math
import re
import statistics

import pytest
import yaml

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.choices.settings import PatchInputs
from comfyui_psa.workshop.table import read_rows
from comfyui_psa.workshop.tools.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
MOST_LINES = 130
NUMBER = r"\d+(?:\.\d+)?"
MODELS = {"Wan 2.1 14B": "wan2.1-14b", "Wan 2.1 1.3B": "wan2.1-1.3b", "CogVideoX-5B": "cogvideox-5b"}
SETTINGS = {"0.86": "default @ 0.362", "0.76": "default @ 0.438"}
"""Slider of the demo model's runs with a quarter of the steps dense -> the setting's name, which has its compute."""


def section(title):
    return re.search(rf"^## {title}\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]


def table(title):
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def shown(text, value):
    """Whether a number of the page is `value`, rounded to the digits that the page shows."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9


def step_times(model):
    rows = read_rows(ROOT / "workshop" / "results" / "model-gpu.csv")
    return [row for row in rows if row["model"] == model and row["dtype"] == "bfloat16"]


def quality(setting):
    rows = read_rows(ROOT / "workshop" / "results" / "quality-corrections-gpu.csv")
    return [row for row in rows if row["setting"] == setting and row["psnr"]]


def check_times(name, gpu, dense, sparse):
    model = next(MODELS[part] for part in MODELS if name.startswith(part))
    rows = step_times(model)
    latest = max((row["date"] for row in rows), default="")
    by_method = {row["method"]: row for row in rows if row["date"] == latest and row["sparsity"] in ("0", "0.850")}
    assert all(gpu in row["gpu"] for row in by_method.values())
    seconds, factor = re.fullmatch(rf"({NUMBER}) \(({NUMBER})x\)", sparse).groups()
    assert shown(dense, float(by_method["dense"]["seconds_per_step"]))
    psa = by_method.get("psa-corrected", by_method["psa"])
    assert shown(seconds, float(psa["seconds_per_step"]))
    assert shown(factor, float(psa["speedup"]))


def check_quality(name, gpu, psnr):
    rows = quality(SETTINGS[re.search(rf"at ({NUMBER})$", name)[1]])
    assert rows
    assert all(gpu in row["machine"] for row in rows)
    assert shown(re.fullmatch(rf"({NUMBER}) dB", psnr)[1], statistics.mean(float(row["psnr"]) for row in rows))


@pytest.mark.parametrize("row", table("What you get"), ids=lambda row: row[0])
def test_every_figure_of_the_readme_was_measured(row):
    name, gpu, dense, sparse, psnr = row
    measured = 0
    if re.search(r"\d", dense + sparse):
        check_times(name, gpu, dense, sparse)
        measured += 1
    if re.search(r"\d", psnr):
        check_quality(name, gpu, psnr)
        measured += 1
    assert measured


def page_table(page, title):
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"## {title}\n")[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def several_gpus(model, method, ranks):
    rows = read_rows(ROOT / "workshop" / "results" / "several-gpus.csv")
    return [row for row in rows if (row["model"], row["method"], row["ranks"]) == (model, method, str(ranks))]


def check_several(text, rows):
    seconds, _, efficiency = re.fullmatch(rf"({NUMBER})( \((\d+) %\))?", text).groups()
    found = [row for row in rows if shown(seconds, float(row["seconds"]))]
    assert found
    assert efficiency is None or any(shown(efficiency, 100 * float(row["efficiency"])) for row in found)


@pytest.mark.parametrize("row", page_table("several-gpus.md", "Measured"), ids=lambda row: row[0])
def test_the_seconds_on_several_gpus_were_measured(row):
    name, *seconds, memory = row
    model, method = name.lower().replace(" ", "", 1).split(", ")
    peaks = re.findall(NUMBER, memory)
    for ranks, text, peak in zip((1, 2, 4), seconds, peaks, strict=True):
        rows = several_gpus(model, method, ranks)
        check_several(text, rows)
        assert {row["peak_gb"] for row in rows} == {peak}
        assert {row["difference"] for row in rows} == {"0"}, "equal to one GPU to the last bit"


def test_the_sentence_about_several_gpus_is_their_table():
    sentence = re.search(
        rf"takes ({NUMBER}) s dense on one H100,\n({NUMBER}) with PSA, ({NUMBER}) on two and ({NUMBER}) on four", README
    )
    settings = ("dense", 1), ("psa", 1), ("psa", 2), ("psa", 4)
    for text, (method, ranks) in zip(sentence.groups(), settings, strict=True):
        check_several(text, several_gpus("wan14b", method, ranks))


def test_the_other_families_were_measured():
    measured = {row["model"]: row for row in read_rows(ROOT / "workshop" / "results" / "families-gpu.csv")}
    rows = page_table("performance.md", "Other models")
    assert [name for name, *_ in rows] == list(measured)
    for name, tokens, dense, sparse in rows:
        found = measured[name]
        assert tokens.replace(",", "") == found["tokens"]
        milliseconds, factor = re.fullmatch(rf"({NUMBER}) ms \(({NUMBER})x\)", sparse).groups()
        assert shown(dense.removesuffix(" ms"), float(found["dense_ms"]))
        assert shown(milliseconds, float(found["sparse_ms"]))
        assert shown(factor, float(found["ratio"]))
    least, most = re.search(rf"other families gains ({NUMBER})x to ({NUMBER})x", README).groups()
    others = [float(row["ratio"]) for row in measured.values() if not row["family"].startswith(("Wan", "CogVideoX"))]
    assert shown(least, min(others))
    assert shown(most, max(others))


def test_the_steps_on_an_h200_were_measured():
    rows = read_rows(ROOT / "workshop" / "results" / "h200-gpu.csv")
    assert {row["gpu"] for row in rows} == {"NVIDIA H200"}
    table_rows = page_table("performance.md", "On an H200")
    assert len(table_rows) == len({row["model"] for row in rows})
    for name, dense, learning, sparse in table_rows:
        model = re.match(r"(?:Wan 2\.1 )?(\S+),", name)[1].lower()
        of = {row["method"]: row for row in rows if row["model"].removeprefix("wan") == model}
        seconds, factor = re.fullmatch(rf"({NUMBER}) \(({NUMBER})x\)", sparse).groups()
        corrected = of["auto 0.85, full"]
        assert shown(dense, float(of["dense"]["seconds_per_step"]))
        assert shown(learning, float(corrected["first_step"]))
        assert shown(seconds, float(corrected["seconds_per_step"]))
        assert shown(factor, float(corrected["speedup"]))


@pytest.mark.parametrize("row", page_table("performance.md", "The attention call"), ids=lambda row: row[0])
def test_the_attention_call_was_measured(row):
    name, dates, dense, *factors = row
    shape = name.partition(",")[0].lower().replace(" ", "", 1).replace(" ", "-")
    rows = [row for row in read_rows(ROOT / "workshop" / "results" / "attention-gpu.csv") if row["shape"] == shape]
    found = {row["setting"]: row for row in rows if row["precision"] == "bfloat16" and row["method"] != "sdpa-flash"}
    assert shown(dense.removesuffix(" ms"), float(found["dense"]["ms"]))
    for sparsity, factor in zip((0.85, 0.9, 0.95), factors, strict=True):
        measured = found[f"topk 10/5/0/20 at {sparsity}, curve, pooled, no tail"]
        assert shown(factor.removesuffix("x"), float(measured["speedup"]))
        assert measured["date"].removeprefix("2026-11-") in dates


def test_min_tokens_is_where_most_calls_are_faster():
    rows = read_rows(ROOT / "workshop" / "results" / "crossover-gpu.csv")
    known = [row for row in rows if int(row["tokens"]) >= PatchInputs().min_tokens]
    assert all(float(row["kept_speedup"]) > 1 for row in known)
    slower = [row for row in rows if int(row["tokens"]) < PatchInputs().min_tokens]
    assert any(float(row["kept_speedup"]) < 1 for row in slower if int(row["tokens"]) >= 8192)


@pytest.mark.parametrize(
    ("text", "value", "same"), [("0.71", 0.710, True), ("0.71", 0.716, False), ("3.7", 3.66, True)]
)
def test_rounding(text, value, same):
    assert shown(text, value) is same


def test_factors_in_sentences_are_those_of_the_table():
    sentences = re.findall(rf"({NUMBER}) times as fast", README)
    assert sentences
    assert set(sentences) <= set(re.findall(rf"\(({NUMBER})x\)", section("What you get")))


def test_the_captions_figures_are_those_of_the_picture():
    assert '<img src="docs/hero.webp"' in README
    run = json.loads((ROOT / "workshop" / "results" / "demo.json").read_text(encoding="utf-8"))
    near, share = re.search(rf"({NUMBER}) dB apart, with (\d+) % of the attention", README).groups()
    assert shown(near, run["psnr_db"])
    assert shown(share, 100 * (1 - run["report"]["saved"]))


def test_most_of_a_wan_steps_time_is_attention():
    """A step that is over twice as fast, with nothing but its attention changed, was attention for the most part."""
    for model in ("wan2.1-14b", "wan2.1-1.3b"):
        assert max(float(row["speedup"] or 0) for row in step_times(model)) > 2


@pytest.mark.parametrize("compute", ["0.362", "0.438", "0.500", "0.667"])
def test_the_correction_gives_most_of_the_loss_back(compute):
    ours, without = (
        statistics.mean(float(row["psnr"]) for row in quality(f"{setting} @ {compute}"))
        for setting in ("default", "uncorrected")
    )
    assert 10 ** (-(ours - without) / 10) < 0.5, "what is left of the squared difference from dense"


@pytest.mark.parametrize(
    "row", [row for row in table("What you get") if re.search(r"\d", row[2])], ids=lambda row: row[0]
)
def test_a_models_seconds_are_of_the_size_that_is_named(row):
    width, height, frames = map(int, re.search(r"(\d+)x(\d+), (\d+) frames", row[0]).groups())
    model = next(MODELS[part] for part in MODELS if row[0].startswith(part))
    tokens = ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
    assert {int(found["video_tokens"]) for found in step_times(model)} == {tokens}


def test_what_is_said_below_the_table_is_so():
    said = section("What you get")
    rows = {model: step_times(model) for model in MODELS.values()}
    assert "in bf16, corrected;" in said
    assert all(any(row["method"] == "psa-corrected" for row in rows[model]) for model in rows)
    assert "Cards other than H100 and H200 are not measured yet" in said
    gpus = {row["gpu"] for row in read_rows(ROOT / "workshop" / "results" / "model-gpu.csv")}
    assert all(gpu.startswith("NVIDIA H100") for gpu in gpus)
    assert "the first quarter of a run stays dense" in said
    assert PatchInputs().start_percent == 0.25


def test_the_first_runs_values_are_the_nodes_own():
    assert f"Leave `sparsity` at {PatchInputs().sparsity}: it saves 85 % of" in section("Your first run")


def test_versions_and_licence_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    comfyui, python = re.search(r"ComfyUI \((\S+) or newer\)[^¶]*?Python (\S+) or newer", README, re.DOTALL).groups()
    assert f'requires-comfyui = ">={comfyui}.0"' in project
    assert f'requires-python = ">={python}"' in project
    licence, authors = re.search(r"^## Licence\n\n(\S+)\. The method is by (.+) \(arXiv", README, re.MULTILINE).groups()
    assert f'license = {{ text = "{licence}" }}' in project
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]["authors"]
    assert authors.replace(" and ", ", ").split(", ") == [f"{a['given-names']} {a['family-names']}" for a in cited]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_pages_is_one(page):
    known = re.findall(r'^    "(\w+)": _', (ROOT / "dev.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(known) > 10
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"python dev\.py (\w+)", text)) <= set(known)
    for script in re.findall(r"(?<![\w/])(?:for_diffusers|workshop)/\S+\.py", text):
        assert (ROOT / script).is_file(), script


def test_every_model_is_in_the_table_of_variants():
    compatibility = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    lines = [line for line in compatibility.splitlines() if line.startswith("| ") and "`test_" in line]
    known = " ".join(cell.strip().lower() for line in lines for cell in line.split("|")[1:3])
    families = {row[0]: row[1] for row in table("Models")}
    named = families["Wan variants"].split(", ")
    named += next(family for family in families if family.startswith("HunyuanVideo")).split(", ")
    assert [name for name in named if name.lower() not in known] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_every_node_is_listed():
    known = {path.stem for path in (ROOT / "web" / "docs").glob("PSA*.md")}
    titles = {(ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8").split("\n")[0][2:] for name in known}
    assert {row[0].strip("*") for row in table("Nodes")} == titles


def test_the_page_of_the_nodes_links_every_help_page_and_has_their_pictures():
    page = (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8")
    known = {path.name for path in (ROOT / "web" / "docs").glob("PSA*.md")}
    assert set(re.findall(r"\(\.\./web/docs/(\w+\.md)\)", page)) == known
    sheets = {f"{renderer}-{theme}.webp" for renderer in ("nodes2", "classic") for theme in ("dark", "light")}
    assert set(re.findall(r"\(pictures/nodes/(\S+)\)", page)) == sheets


def test_every_template_is_named():
    known = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    quick_start = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", quick_start, re.MULTILINE)) == known
    assert known <= set(re.findall(r"`(\w+)`", README))


def test_the_quick_starts_tokens_add_up():
    text = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    least = PatchInputs().min_tokens
    assert f"below about {round(least, -3):,} tokens stay dense" in text
    width, height, frames, tokens = re.search(r"(\d+)x(\d+) with (\d+) frames are (\d+,\d+)", text).groups()
    # LTX's VAE takes 32 x 32 pixels and 8 frames together, and the model one place at a time.
    grid = [(int(frames) - 1) // 8 + 1, int(height) // 32, int(width) // 32]
    assert math.prod(grid) == int(tokens.replace(",", "")) > least
    assert grid[0] * (int(height) // 64) * (int(width) // 64) < least, "the first stage is at half the width and height"
    longer = int(re.search(r"`ltx2_t2v_psa` samples (\d+) frames", text)[1])
    template = json.loads((ROOT / "workflows" / "ltx2_t2v_psa.json").read_text(encoding="utf-8"))
    (latent,) = (node for node in template["nodes"] if node["type"] == "EmptyLTXVLatentVideo")
    assert latent["widgets_values"][:3] == [int(width), int(height), longer]


def test_the_preset_for_4_step_loras_keeps_what_the_quick_start_says():
    text = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    assert "`wan-4step-lora`. It keeps the first step dense" in text
    assert load_presets()["wan-4step-lora"].dense_steps == 1


def anchors(text):
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target, _, anchor = (link[0] or link[1]).partition("#")
        if target.startswith("https://"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_issue_forms_and_citation_can_be_read():
    for form in ("bug", "feature"):
        read = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))
        assert read["name"]
        assert read["description"]
        assert all(part["type"] in ("markdown", "textarea", "input") for part in read["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["url"].endswith("2512.04025")

"""A release: one version everywhere, a changelog in its form, and metadata that ComfyUI's registry accepts."""

import datetime
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from comfyui_psa.workshop.tools.paths import ROOT
from comfyui_psa.workshop.tools.registry import PAGES, UNKNOWN, complete, completed
from comfyui_psa.workshop.tools.release import tracked_files

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
KEPT = tomllib.loads(TEXT)
VERSION = KEPT["project"]["version"]
ADDRESS = "https://forge.example/someone/ComfyUI-PSA"
# The systems that the registry knows; one other classifier under the same heading would empty its list.
SYSTEMS = {
    "Operating System :: OS Independent",
    "Operating System :: Microsoft :: Windows",
    "Operating System :: POSIX :: Linux",
    "Operating System :: MacOS",
}
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def released():
    """pyproject.toml as it goes to the registry."""
    return tomllib.loads(completed(TEXT, ADDRESS, f"v{VERSION}"))


def versions():
    """Version and date of every release in the changelog, in its order."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    return [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", heading).groups() for heading in headings[1:]]


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest, day = versions()[0]
    assert (VERSION, VERSION, day) == (newest, citation["version"], str(citation["date-released"]))


def test_the_changelog_has_its_form():
    found = versions()
    numbers = [tuple(map(int, version.split("."))) for version, _ in found]
    days = [datetime.date.fromisoformat(day) for _, day in found]
    assert numbers == sorted(set(numbers), reverse=True), "newest first"
    assert days == sorted(days, reverse=True)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert kinds == sorted(set(kinds), key=KINDS.index)
        assert kinds or section.startswith("[Unreleased]")


def test_the_registry_takes_the_metadata():
    project, comfy = released()["project"], released()["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z]([-_.]?[A-Za-z0-9]){1,98}", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert set(project["license"]) <= {"text", "file"}
    assert project["description"]
    assert (ROOT / project["readme"]).is_file()
    assert {line for line in project["classifiers"] if line.startswith(("Operating System", "Environment"))} <= SYSTEMS
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    # The scripts of the page are given to ComfyUI by __init__.py, and must not be given twice.
    assert "web" not in comfy


def test_only_addresses_are_added():
    found = released()
    urls = found["project"].pop("urls")
    icon = found["tool"]["comfy"].pop("Icon")
    assert found == KEPT
    assert urls["Repository"] == ADDRESS
    for url, head in ((icon, "raw"), (urls["Documentation"], "blob")):
        assert url.startswith(f"{ADDRESS}/{head}/v{VERSION}/")
        assert url.removeprefix(f"{ADDRESS}/{head}/v{VERSION}/") in tracked_files(ROOT)


def test_the_pages_of_a_release_say_what_to_clone(tmp_path):
    for name in ("pyproject.toml", *PAGES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    complete(tmp_path, f"{ADDRESS}.git", f"v{VERSION}")
    for name in PAGES:
        released = (tmp_path / name).read_text(encoding="utf-8")
        assert f"git clone {ADDRESS} " in released
        assert released == (ROOT / name).read_text(encoding="utf-8").replace(UNKNOWN, ADDRESS)
    kept = [path for path in tracked_files(ROOT) if path.endswith(".md")]
    assert {path for path in kept if UNKNOWN in (ROOT / path).read_text(encoding="utf-8")} == set(PAGES)


def test_the_icon_is_a_small_drawing_of_a_size_that_is_allowed():
    path = ROOT / "docs" / "pictures" / "icon.svg"
    drawing = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    width, height = (float(drawing.get(side)) for side in ("width", "height"))
    assert 0 < width == height <= 400
    assert path.stat().st_size < 10_000
    assert "script" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("address", "tag", "words"),
    [
        (ADDRESS, "v0.0.9", f"tag it v{VERSION}"),
        (ADDRESS, VERSION, f"tag it v{VERSION}"),
        ("https://forge.example/someone", f"v{VERSION}", "--address"),
        ('https://forge.example/a/b"\nname = "c', f"v{VERSION}", "--address"),
        ("", f"v{VERSION}", "--address"),
    ],
)
def test_a_wrong_tag_or_address_is_refused(address, tag, words):
    with pytest.raises(LookupError, match=re.escape(words)):
        completed(TEXT, address, tag)


def test_it_is_not_completed_twice():
    with pytest.raises(LookupError, match="complete already"):
        completed(completed(TEXT, f"{ADDRESS}.git", f"v{VERSION}"), ADDRESS, f"v{VERSION}")


def test_a_refusal_is_one_sentence_and_writes_nothing():
    command = [sys.executable, ROOT / "dev.py", "registry", "--address", ADDRESS, "--tag", "v0.0.9"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert f"tag it v{VERSION}" in found.stderr
    assert "Traceback" not in found.stderr
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8") == TEXT


def test_a_tag_publishes_what_the_command_completed():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}, "YAML reads `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["publish"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    completing, publishing = (
        next(number for number, command in enumerate(commands) if words in command)
        for words in ("dev.py registry", "node publish")
    )
    assert completing < publishing
    # A checkout in between would bring back the file without addresses.
    assert [step["uses"].split("@")[0] for step in steps if "uses" in step] == [
        "actions/checkout",
        "actions/setup-python",
    ]
    assert "secrets" not in " ".join(commands), "a token belongs into the environment of its step"

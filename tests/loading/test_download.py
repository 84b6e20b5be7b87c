"""Downloads through huggingface-hub from a local server: complete, broken off, resumed, refused, within the folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from comfyui_psa.loading.download import FILE, DownloadError, download_lora
from comfyui_psa.workshop.tools.paths import ROOT

from .hub import Hub

# huggingface-hub keeps whole pieces of 10 MB of a download that breaks off.
CONTENT = save({"blocks.0.q.lora_A.weight": torch.arange(6_000_000, dtype=torch.float32)})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub(CONTENT) as hub:
        yield hub


def visible(folder):
    """Files that ComfyUI's menus could list."""
    return [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".sft", ".pt", ".bin")]


def test_the_file_arrives_under_its_own_path_and_is_not_fetched_twice(hub, tmp_path):
    path = download_lora(tmp_path, endpoint=hub.url)
    assert path == tmp_path / FILE
    assert load_file(path)["blocks.0.q.lora_A.weight"][-1] == 5_999_999
    assert [method for method, _ in hub.requests].count("GET") == 1
    hub.requests.clear()
    assert download_lora(tmp_path, endpoint=hub.url) == path
    assert hub.requests == [], "what is there needs no network"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(FILE).name]


def test_progress_reaches_the_bar_that_was_given(hub, tmp_path):
    from tqdm import tqdm

    seen = []

    class Bar(tqdm):
        def update(self, n=1):
            seen.append(n)
            return super().update(n)

    download_lora(tmp_path, endpoint=hub.url, progress=Bar)
    assert sum(seen) == len(CONTENT)


def test_a_broken_download_never_looks_complete_and_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    hub.budget = 15_000_000
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface-hub waits between its own attempts
    with pytest.raises(DownloadError, match=r"GYP666/BLADE/cogvideox-5b-psa-lora/.* was not downloaded: "):
        download_lora(tmp_path, endpoint=hub.url)
    assert visible(tmp_path) == []
    hub.budget = None
    hub.requests.clear()
    path = download_lora(tmp_path, endpoint=hub.url)
    assert path.read_bytes() == CONTENT
    (begin,) = [begin for method, begin in hub.requests if method == "GET"]
    assert begin >= 10_000_000


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, "GatedRepo", "its owner must grant access"),
        (401, "RepoNotFound", "no such repository, or it is private"),
        (404, "EntryNotFound", "the repository has no such file"),
        (403, "", "refuses access"),
        (500, "", "answered with status 500"),
    ],
)
def test_refusals_are_said_in_words(hub, tmp_path, monkeypatch, status, error, words):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status, hub.error = status, error
    with pytest.raises(DownloadError, match=words):
        download_lora(tmp_path, endpoint=hub.url)
    assert visible(tmp_path) == []


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(DownloadError, match="the server cannot be reached"):
        download_lora(tmp_path, endpoint="http://127.0.0.1:9")
    assert visible(tmp_path) == []


def test_a_file_that_arrives_damaged_is_not_kept(hub, tmp_path):
    hub.etag = "0" * 64
    with pytest.raises(DownloadError, match="arrived damaged"):
        download_lora(tmp_path, endpoint=hub.url)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_not_safetensors_is_removed(hub, tmp_path):
    hub.content = b"<html>please sign in</html>"
    with pytest.raises(DownloadError, match="a web page: the download was refused"):
        download_lora(tmp_path, endpoint=hub.url)
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "a\\..\\x.safetensors", "c:x.safetensors", "x.bin"],
)
def test_names_that_leave_the_folder_or_are_not_safetensors_are_refused(hub, tmp_path, file):
    with pytest.raises(DownloadError, match=r"allowed is a \.safetensors file of the repository"):
        download_lora(tmp_path, "owner/name", file, endpoint=hub.url)
    assert hub.requests == []


def test_a_repository_must_be_owner_and_name(hub, tmp_path):
    with pytest.raises(DownloadError, match="allowed is owner/name"):
        download_lora(tmp_path, "https://example.org/x", FILE, endpoint=hub.url)
    assert hub.requests == []


def test_a_link_out_of_the_folder_is_refused(hub, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "loras"
    outside.mkdir()
    folder.mkdir()
    (folder / "cogvideox-5b-psa-lora").symlink_to(outside, target_is_directory=True)
    with pytest.raises(DownloadError, match="would lie outside"):
        download_lora(folder, endpoint=hub.url)
    assert hub.requests == []


def dev_weights(folder, hub, limit=None, **environment):
    """Run `python dev.py weights`, with a limit on the size of a file instead of a full disk."""

    def limited():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, ROOT / "dev.py", "weights", "--to", folder]
    run = limited if limit else None
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=run, timeout=120)


@pytest.mark.skipif(os.name == "nt", reason="limits of a process are POSIX")
def test_the_command_line_downloads_goes_on_after_a_full_disk_and_says_when_it_is_offline(hub, tmp_path):
    offline = dev_weights(tmp_path, hub, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    full = dev_weights(tmp_path, hub, limit=12_000_000)
    assert full.returncode == 1
    assert f"there is no room in {tmp_path}" in full.stderr
    assert "Traceback" not in full.stderr
    assert visible(tmp_path) == []
    done = dev_weights(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / FILE).read_bytes() == CONTENT
    missing = dev_weights(tmp_path / "nowhere", hub)
    assert missing.returncode == 1
    assert "There is no folder" in missing.stderr


def test_a_link_instead_of_the_partial_file_is_refused(hub, tmp_path, monkeypatch):
    hub.budget = 15_000_000
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(DownloadError):
        download_lora(tmp_path, endpoint=hub.url)
    (partial,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    victim = tmp_path / "victim"
    victim.write_text("precious")
    partial.unlink()
    partial.symlink_to(victim)
    hub.budget = None
    with pytest.raises(DownloadError, match=r"\.incomplete is a link, which a download does not follow; delete it"):
        download_lora(tmp_path, endpoint=hub.url)
    assert victim.read_text() == "precious"
    assert visible(tmp_path) == []

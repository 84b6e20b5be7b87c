"""The large model: its size, its clips and prompts, its training by several processes, and how its files travel."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from comfyui_psa.workshop.training import dit, files, parcel, settings
from comfyui_psa.workshop.training.dit import Data
from comfyui_psa.workshop.training.flow import guided
from comfyui_psa.workshop.training.latents import LatentBasis
from comfyui_psa.workshop.training.settings import LARGE, SIZES, tiny
from comfyui_psa.workshop.training.wan_dit import HEAD_WIDTH, WanTransformer
from comfyui_psa.workshop.training.worlds import WORLDS

RICH = WORLDS["rich"]


def _parameters(width: int, hidden: int, layers: int, text: int = 4096) -> int:
    """Counted by hand from the Wan report's description: the weights and biases of every layer."""
    attention = 4 * (width * width + width) + 2 * width
    block = 2 * attention + 2 * width + 2 * width * hidden + hidden + width + 6 * width
    embeddings = (16 * 4 + 1) * width + (text + 1) * width + (256 + 1) * width + 2 * (width + 1) * width
    return layers * block + embeddings + (width + 1) * 6 * width + (width + 1) * 64 + 2 * width


@pytest.mark.parametrize(("name", "expected"), [("demo", 8_004_416), ("large", 79_150_912)])
def test_sizes(name, expected):
    size = SIZES[name]
    with torch.device("meta"):
        model = WanTransformer(size.width, size.hidden, size.layers)
    assert sum(p.numel() for p in model.parameters()) == expected == _parameters(size.width, size.hidden, size.layers)


def test_the_large_model_has_the_heads_that_psa_serves():
    assert LARGE.layers * LARGE.width // HEAD_WIDTH >= 12 * 6
    assert HEAD_WIDTH in (64, 128)


def _data(dropout: float) -> Data:
    chosen = tiny(LARGE)
    chosen = settings.replace(chosen, prompt_dropout=dropout, dit_stages=(settings.DitStage(16, 200, 1.0, 3.0, 1.0),))
    basis = LatentBasis(torch.zeros(768), torch.randn(768, 16, generator=torch.Generator().manual_seed(0)) / 28)
    return Data(chosen.dit_stages[0], chosen, basis, torch.device("cpu"))


def test_prompts_are_dropped():
    assert LARGE.prompt_dropout == 0.1
    _, context = _data(0.1).draw(torch.Generator().manual_seed(3))
    _, whole = _data(0.0).draw(torch.Generator().manual_seed(3))
    empty = (context == 0).flatten(1).all(1)
    assert 8 <= int(empty.sum()) <= 36, "a tenth of 200"
    torch.testing.assert_close(context[~empty], whole[~empty])
    assert (whole.count_nonzero((1, 2)) == len(RICH.vocabulary)).all(), "one value a token"


def test_guidance_is_that_of_its_paper():
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    timestep = torch.tensor([100.0, 900.0])
    batches = []

    def model(x, timestep, context):
        batches.append(len(x))
        return x * timestep[:, None] + context.sum(1)

    expected = x * timestep[:, None] + 3.5 * context.sum(1)
    torch.testing.assert_close(guided(model, x, timestep, context, 3.5), expected)
    torch.testing.assert_close(guided(model, x, timestep, context, 1.0), model(x, timestep, context))
    assert batches == [4, 2, 2], "prompt and empty prompt in one call; without guidance one prompt alone"


def _clip(parameters, frame: int, side: int = 96):
    first = torch.full((len(parameters["shape"]),), float(frame))
    return RICH.render(parameters, 1, side, side, first_frame=first)[:, :, 0]


def _scene(**words):
    """Parameters of one scene in which every word is the first of its list but those given."""
    indices = torch.zeros(1, len(RICH.vocabulary), dtype=torch.long)
    for column, (slot, name, known) in enumerate(RICH.vocabulary):
        if f"{slot}_{name}" in words:
            indices[0, column] = known.index(words[f"{slot}_{name}"])
    return RICH.sample(indices, torch.Generator().manual_seed(5))


def test_every_word_is_seen():
    """Two scenes that differ in one word differ in the picture: a prompt says nothing that is not shown."""
    shown = {f"{slot}_shape": "square" for slot in ("first", "second", "third", "fourth")}
    shown |= {f"{slot}_texture": "striped" for slot in ("first", "second", "third", "fourth")} | {"view_ridge": "hills"}
    usual = _clip(_scene(**shown), 24)
    for slot, name, words in RICH.vocabulary:
        for word in words:
            if word == shown.get(f"{slot}_{name}", words[0]):
                continue
            found = _clip(_scene(**shown | {f"{slot}_{name}": word}), 24)
            assert (found - usual).abs().max() > 0.1, f"{slot} {name}: {word}"


@pytest.mark.parametrize(("camera", "across", "down"), [("panning right", 16, 0), ("panning down", 0, 16)])
def test_the_backdrop_follows_less_of_a_pan(camera, across, down):
    """From the first frame to the last the camera goes 0.4 of the frame; the backdrop is seen to go 0.4 of that."""
    parameters = _scene(view_camera=camera, view_backdrop="marble")
    start, end = (_clip(parameters, frame, 100) for frame in (0, 32))
    assert (start[:, :, down:, across:] - end[:, :, : 100 - down, : 100 - across]).abs().max() < 1e-4
    assert (start - end).abs().mean() > 0.08


def test_objects_are_where_the_focus_says():
    """A white square on grey, seen by a camera that zooms: the middle of what is bright is the focus."""
    words = {"first_shape": "square", "first_colour": "white", "first_size": "small", "first_direction": "up"}
    for camera in ("zooming in", "rolling left", "panning left"):
        parameters = _scene(**words, view_camera=camera, view_backdrop_colour="navy")
        for frame in (8, 24):
            bright = (_clip(parameters, frame)[0].amin(0) > 0.6).float()
            y, x = (bright.nonzero().float().mean(0) + 0.5) / bright.shape[0]
            expected = RICH.focus(parameters, torch.tensor([frame / 32]))[0, 0]
            torch.testing.assert_close(torch.stack([x, y]), expected, atol=0.01, rtol=0)


def test_rounded_weights_travel_without_loss(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.Linear(500, 40), torch.nn.Conv3d(4, 8, 3))
    path = tmp_path / "model" / files.dit_file("large")
    files.save_weights(model, path, torch.bfloat16, 7, world="rich")
    (tmp_path / "model" / "metrics.json").write_text("{}")
    for name, rounded in load_file(str(path)).items():
        kept = model.state_dict()[name].detach()
        # Half a step, which is at most two 63rds of the row's largest weight; vectors and kernels are not rounded.
        worst = kept.abs().amax(-1, keepdim=True) / 63 if kept.ndim == 2 else kept.abs() / 256
        assert ((rounded.float() - kept).abs() <= worst + 1e-9).all(), name
    parts = parcel.pack(tmp_path / "model", tmp_path / "parts", mebibytes=0.05)
    assert len(parts) > 1
    assert all(part.stat().st_size <= 0.05 * 2**20 for part in parts)
    assert sum(part.stat().st_size for part in parts) < 0.6 * path.stat().st_size
    parcel.unpack(tmp_path / "parts", tmp_path / "again")
    assert (tmp_path / "again" / "metrics.json").read_text() == "{}"
    again = tmp_path / "again" / files.dit_file("large")
    found, expected = load_file(str(again)), load_file(str(path))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"{parts[0].name} is missing from"):
        parcel.unpack(tmp_path / "parts", tmp_path / "third")


def test_parts_of_two_parcels_are_refused(tmp_path):
    for number in (1, 2):
        torch.manual_seed(number)
        model = torch.nn.Linear(300, 500)
        files.save_weights(model, tmp_path / str(number) / files.dit_file("x"), torch.bfloat16, 7)
        parts = parcel.pack(tmp_path / str(number), tmp_path / f"parts{number}", mebibytes=0.1)
    parts[0].write_bytes((tmp_path / "parts1" / parts[0].name).read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        parcel.unpack(tmp_path / "parts2", tmp_path / "out")


def test_a_run_that_is_killed_leaves_weights(tmp_path, monkeypatch):
    """What a checkpoint wrote is a whole file that loads; it says that it is not complete."""
    monkeypatch.setattr(dit, "CHECKPOINT_SECONDS", -1)
    chosen = settings.replace(tiny(LARGE), dit_stages=(settings.DitStage(16, 1, 1.0, 3.0, 1.0),))
    begun = []

    def log(line: str) -> None:
        begun.append(line)
        if "stage 1 of 1" in line:  # trained, and not yet written at the end
            raise KeyboardInterrupt

    basis = LatentBasis(torch.zeros(768), torch.zeros(768, 16))
    with pytest.raises(KeyboardInterrupt):
        dit.train_dit(basis, chosen, torch.device("cpu"), time.time() + 8, tmp_path, log=log)
    path = tmp_path / files.dit_file("large")
    with safe_open(str(path), framework="pt") as file:
        facts = file.metadata()
    assert (facts["complete"], facts["world"]) == ("False", "rich")
    assert int(facts["steps"]) > 0
    assert sum(p.numel() for p in files.load_transformer(path).parameters()) == _parameters(128, 128, 1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_two_processes_train_one_model(tmp_path, monkeypatch):
    """The real command on the CPU: both end with the same weights although each drew clips of its own, and the folder
    loads, samples and travels."""
    from comfyui_psa.workshop.training.sheet import sample_clips

    out = tmp_path / "model"
    command = [sys.executable, str(files.__file__).replace("files.py", "train_demo.py"), "--size", "large", "--tiny"]
    command += ["--device", "cpu", "--processes", "2", "--minutes", "0.3", "--only", "dit", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((out / files.METRICS_FILE).read_text())["dit"]
    assert figures["processes"] == 2
    assert figures["steps"] > 0
    assert figures["clips"] == 4 * figures["steps"], "two clips in each process"
    assert figures["different_clips"] == 2
    assert figures["same_weights_in_all"]

    with pytest.raises(files.MissingModelError, match="autoencoder"):
        files.read_folder(out)
    chosen = tiny(LARGE)
    files.save_weights(files.WanAutoencoder(chosen.vae_width), out / files.vae_file("large"), torch.float16)
    found = files.read_folder(out)
    assert (found.name, found.blocks, found.heads) == ("large", chosen.layers, chosen.width // HEAD_WIDTH)
    assert (found.world.name, found.guidance) == ("rich", 3.0)
    clips = sample_clips(out, chosen, torch.device("cpu"))
    assert clips.shape == (6, 3, 33, 64, 64)
    assert clips.isfinite().all()

"""The direct runner gives the latents of ComfyUI's own sampler with PSA Patch, and meets the requested compute."""

import sys
from pathlib import Path

import pytest
import torch

from comfyui_psa.demo.scene import Scene, conditioning
from comfyui_psa.workshop.quality import command
from comfyui_psa.workshop.quality.attention import SparseAttention
from comfyui_psa.workshop.quality.demo_model import WEIGHTS, Clip, DemoModel, DenseAttention, Video, simple_schedule
from comfyui_psa.workshop.quality.matrix import LEAN, settings_of
from comfyui_psa.workshop.quality.results import read_runs
from comfyui_psa.workshop.quality.setting import Setting, resolve
from comfyui_psa.workshop.training import files
from comfyui_psa.workshop.training.files import DIT_FILE
from comfyui_psa.workshop.training.wan_dit import WanTransformer
from comfyui_psa.workshop.training.wan_vae import WanAutoencoder
from comfyui_psa.workshop.training.worlds import WORLDS

VIDEO = Video(frames=9, height=256, width=256)  # 768 tokens
CLIP = Clip(Scene(), 42, "clip")


@pytest.fixture(scope="module")
def model():
    return DemoModel(torch.device("cpu"), torch.float32)


def test_equals_comfyui(comfyui, model):
    import comfy.sample
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    from comfyui_psa.patching.patch import KEY, patch_model

    steps = 4  # the second lies on the bound itself
    inputs = {"preset": "wan2.1-14b", "sparsity": 0.6, "start_percent": 0.25, "min_tokens": 0}
    theirs = comfy.sd.load_diffusion_model(str(WEIGHTS / DIT_FILE), model_options={"dtype": torch.float32})
    (theirs,) = ModelSamplingSD3().patch(theirs, 12.0)
    patched = patch_model(theirs, **inputs, end_percent=1.0)
    noise = torch.randn(1, *VIDEO.latent, generator=torch.Generator().manual_seed(CLIP.seed))
    context = [[conditioning([CLIP.scene]), {}]]
    found = {
        name: comfy.sample.sample(
            each, noise, steps, 1.0, "euler", "simple", context, context, torch.zeros_like(noise), disable_pbar=True
        )
        for name, each in (("dense", theirs), ("psa", patched))
    }
    report = patched.get_attachment(KEY).report

    schedule = simple_schedule(steps, model.blocks)
    attention = SparseAttention(resolve(Setting("psa", "test", inputs), schedule, "auto", None), schedule, VIDEO.grid)
    ours = {
        name: model.sample([CLIP], VIDEO, schedule, each).latents[-1]
        for name, each in (("dense", DenseAttention()), ("psa", attention))
    }
    from comfyui_psa.workshop.training.latents import from_vae_space

    for name, latents in ours.items():
        expected = from_vae_space(found[name])
        assert (latents - expected).norm() / expected.norm() < 1e-3, name
    assert (ours["psa"] - ours["dense"]).norm() / ours["dense"].norm() > 0.02
    densities = attention.step_densities()
    assert densities[1:] == pytest.approx([1 - step["sparsity"] for step in report["steps"][1:]], abs=1e-4)
    assert densities[0] > 1, "it measures what is lost"
    assert sum(densities) / steps == pytest.approx(1 - report["saved"], abs=1e-4)
    assert report["correction"]["corrected_calls"] == sum(step["sparse_calls"] for step in report["steps"]) > 0


@pytest.mark.parametrize(
    "setting",
    [
        Setting("budget", "test", {"preset": "wan2.1-14b", "start_percent": 0.25}),
        Setting("dense block", "test", {"preset": "wan2.1-14b", "dense_blocks": "3"}),
        Setting("ramp", "test", {"preset": "wan2.1-14b"}, prototype={"ramp": (1.4, 0.6)}),
        Setting("falling", "test", {"preset": "wan2.1-14b", "falling": 0.4}),
        Setting("layers", "test", {"preset": "wan2.1-14b"}, prototype={"layers": {"0": 1.5, "5": 0.5}}),
        Setting("reuse", "test", {"preset": "wan2.1-14b"}, prototype={"reuse": 2}),
        Setting("ranked", "test", {"preset": "wan2.1-14b"}, prototype={"rank": {"q": "spread 8", "k": "pooled 4"}}),
        Setting("radial", "test", {"pyramid": "1: 0.2", "order": "raster"}, prototype={"static": "radial"}),
    ],
    ids=lambda setting: setting.name,
)
def test_a_run_takes_the_compute_that_was_asked_for(model, setting):
    schedule = simple_schedule(4, model.blocks)
    settings = resolve(setting, schedule, "auto", 0.55)
    attention = SparseAttention(settings, schedule, VIDEO.grid, setting.prototype)
    model.sample([CLIP], VIDEO, schedule, attention)
    densities = attention.step_densities()
    measured = 0
    if settings.correction is not None:  # one sparse call of every block that is not dense, beside the dense ones
        measured = (1 - settings.config.sparsity) * (1 - len(settings.dense_blocks) / model.blocks)
    assert densities[0] == pytest.approx(1 + measured, abs=0.02 if measured else 0)
    assert max(densities[1:]) < 1
    assert sum(densities) / len(densities) == pytest.approx(0.55, abs=0.01)


def test_the_input_falling_is_the_ramp(model):
    schedule = simple_schedule(4, model.blocks)
    densities = []
    for node, prototype in (({"falling": 0.4}, {}), ({}, {"ramp": (1.4, 0.6)})):
        settings = resolve(
            Setting("falls", "test", {"preset": "wan2.1-14b", "correction": "off"} | node), schedule, "auto", 0.55
        )
        attention = SparseAttention(settings, schedule, VIDEO.grid, prototype)
        model.sample([CLIP], VIDEO, schedule, attention)
        densities.append(attention.step_densities())
    assert densities[0] == densities[1]
    assert densities[0][1:] == pytest.approx([0.56, 0.4, 0.24], abs=0.01)


def test_levels_that_are_kept_are_those_of_the_first_step(model):
    schedule = simple_schedule(4, model.blocks)
    latents = []
    for prototype in ({}, {"reuse": 1}, {"reuse": 100}):
        setting = Setting("s", "test", {"preset": "wan2.1-14b", "correction": "off"}, prototype=prototype)
        attention = SparseAttention(resolve(setting, schedule, "auto", 0.5), schedule, VIDEO.grid, prototype)
        latents.append(model.sample([CLIP], VIDEO, schedule, attention).latents)
    stock, every, first = latents
    torch.testing.assert_close(every, stock)
    torch.testing.assert_close(first[1], stock[1])  # the first sparse step
    assert not torch.allclose(first[-1], stock[-1], atol=1e-3)


def test_compute_below_the_dense_part_is_refused(model):
    with pytest.raises(ValueError, match="dense part alone"):
        resolve(Setting("s", "test"), simple_schedule(8, model.blocks), "auto", 0.2)


@pytest.mark.parametrize("blocks", [6, 12])
@pytest.mark.parametrize("kind", ["full", "candidates", "quick", "velocity"])
def test_every_setting_of_the_matrix_resolves(kind, blocks):
    schedule = simple_schedule(20, blocks)
    settings = settings_of(kind, blocks)
    names = [setting.name for setting in settings]
    assert len(names) == len(set(names))
    for setting in settings:
        assert setting.match is None or names.index(setting.match) < names.index(setting.name)
        resolve(setting, schedule, "auto", 0.4 if setting.match else setting.compute)


@pytest.mark.parametrize("blocks", [1, 12])
def test_the_matrix_follows_the_blocks(blocks):
    found = {setting.name: setting for setting in settings_of("full", blocks)}
    assert len([name for name in found if name.startswith("block ") and " dense @" in name]) == blocks
    layers = found[f"layers 1.5 to 0.5 @{LEAN:.2f}"].prototype["layers"]
    assert list(layers) == [str(block) for block in range(blocks)]
    assert layers["0"] == 1.5
    assert layers[str(blocks - 1)] == (0.5 if blocks > 1 else 1.5)


def test_the_lean_compute_is_that_of_the_slider():
    assert pytest.approx(0.25 + 0.75 * 0.15) == LEAN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_given_the_type_of_the_model(model, dtype):
    class Watched(DenseAttention):
        seen = set()

        def __call__(self, q, k, v):
            self.seen |= {q.dtype, k.dtype, v.dtype}
            return super().__call__(q, k, v)

    schedule, video = simple_schedule(2, model.blocks), Video(frames=5, height=128, width=128)
    expected = model.sample([CLIP], video, schedule, DenseAttention()).latents
    watched = Watched()
    found = DemoModel(torch.device("cpu"), dtype).sample([CLIP], video, schedule, watched).latents
    assert watched.seen == {dtype}
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < (0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of a large model in small: two blocks of two heads on rich clips, random weights."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(1)
    network = WanTransformer(256, 128, 2)
    network.initialise(generator)
    with torch.no_grad():  # a new model's branches add nothing
        for name, weight in network.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.06, generator=generator)
            if name.endswith("text_embedding.0.weight"):
                weight.normal_(0.0, 0.2, generator=generator)
    facts = {"world": "rich", "guidance": 3.0}
    files.save_weights(network, folder / files.dit_file("large"), torch.bfloat16, 7, **facts)
    files.save_weights(WanAutoencoder(4), folder / files.vae_file("large"), torch.float16)
    return folder


def test_a_folder_with_guidance_equals_comfyui(comfyui, large):
    """Core's own Wan model loads the file; cfg 3 against the zeros that ConditioningZeroOut makes of a prompt."""
    import comfy.sample
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    from comfyui_psa.workshop.training.latents import from_vae_space

    model = DemoModel(torch.device("cpu"), torch.float32, large)
    assert (model.facts.name, model.blocks, model.guidance) == ("large", 2, 3.0)
    world = WORLDS["rich"]
    clip = Clip(world.scenes[1], 42, "clip")
    theirs = comfy.sd.load_diffusion_model(str(large / files.dit_file("large")), model_options={"dtype": torch.float32})
    (theirs,) = ModelSamplingSD3().patch(theirs, 12.0)
    noise = torch.randn(1, *VIDEO.latent, generator=torch.Generator().manual_seed(clip.seed))
    prompt = world.conditioning([clip.scene])
    positive, negative = [[prompt, {}]], [[torch.zeros_like(prompt), {}]]
    arguments = (noise, 3, 3.0, "euler", "simple", positive, negative, torch.zeros_like(noise))
    expected = from_vae_space(comfy.sample.sample(theirs, *arguments, disable_pbar=True))
    schedule = simple_schedule(3, model.blocks)
    found = model.sample([clip], VIDEO, schedule, DenseAttention()).latents[-1]
    assert (found - expected).norm() / expected.norm() < 1e-3
    alone = DemoModel(torch.device("cpu"), torch.float32, large, guidance=1.0)
    assert (alone.sample([clip], VIDEO, schedule, DenseAttention()).latents[-1] - found).norm() > 0.01 * found.norm()


@pytest.mark.parametrize(("asked", "name"), [([], "psa_large"), (["--cfg", "1"], "psa_large, cfg 1")])
def test_a_run_of_another_model_says_which(monkeypatch, tmp_path, large, asked, name):
    size = ["--scenes", "1", "--seeds", "1", "--frames", "5", "--side", "256", "--steps", "4"]
    asked = ["--smoke", "--only", "default @*", "--device", "cpu", "--model", str(large), *size, *asked]
    monkeypatch.setattr(sys, "argv", ["quality", *asked])
    assert command._parse(None).out == command.ROOT / "output" / "quality-large"
    monkeypatch.setattr(sys, "argv", ["quality", *asked, "--out", str(tmp_path)])
    assert command.main() == 0
    rows = read_runs(tmp_path)
    assert {row.model for row in rows} == {name}
    assert any(row.psnr is not None and row.compute < 1 for row in rows), [row.error for row in rows]


def test_a_folder_without_a_model_is_told_what_is_missing(monkeypatch, tmp_path, capsys, large):
    def run(folder):
        monkeypatch.setattr(sys, "argv", ["quality", "--smoke", "--model", str(folder)])
        assert command.main() == 2
        return capsys.readouterr().err

    assert "There is no folder" in run(tmp_path / "none")
    told = run(tmp_path)
    assert "diffusion_models/psa_" in told
    assert "--size large" in told
    half = tmp_path / files.dit_file("large")
    half.parent.mkdir()
    half.write_bytes((large / files.dit_file("large")).read_bytes())
    assert files.vae_file("large") in run(tmp_path)


def test_a_model_is_refused_where_none_is_used(monkeypatch, capsys, large):
    monkeypatch.setattr(sys, "argv", ["quality", "--report", "--model", str(large)])
    with pytest.raises(SystemExit):
        command.main()
    assert "--model does not apply" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_float16_says_so(monkeypatch, tmp_path):
    size = ["--scenes", "1", "--seeds", "1", "--frames", "5", "--side", "128", "--steps", "4"]
    asked = ["--smoke", "--device", "cpu", "--dtype", "fp16", "--out", str(tmp_path), *size]
    monkeypatch.setattr(sys, "argv", ["quality", *asked])
    assert command.main() == 0
    rows = read_runs(tmp_path)
    assert {row.precision for row in rows} == {"fp16, torch"}
    assert any(row.psnr is not None for row in rows)


@pytest.mark.parametrize(
    ("asked", "folder"),
    [([], "quality"), (["--dtype", "fp16"], "quality-fp16"), (["--dtype", "bf16"], "quality-bf16")],
)
def test_a_run_in_another_type_leaves_the_usual_results(monkeypatch, asked, folder):
    monkeypatch.setattr(sys, "argv", ["quality", *asked])
    assert command._parse(None).out == command.ROOT / "output" / folder
    monkeypatch.setattr(sys, "argv", ["quality", *asked, "--out", "elsewhere"])
    assert command._parse(None).out == Path("elsewhere")

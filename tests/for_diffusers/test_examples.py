"""The example scripts with the command lines that they promise, on diffusers' pipelines with tiny random transformers.

Stood in for: weights and text encoder, which cannot be had here, and the ffmpeg that diffusers writes videos with.
"""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "for_diffusers" / "examples" / "inference"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def script(path):
    spec = importlib.util.spec_from_file_location("example", SCRIPTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def written(monkeypatch):
    """The videos that were written: (frames, path, fps)."""
    import diffusers.utils

    videos = []
    monkeypatch.setattr(
        diffusers.utils, "export_to_video", lambda frames, path, fps: videos.append((len(frames), path, fps))
    )
    return videos


@pytest.mark.parametrize("path", ["wan21/wan21_1.3b.py", "wan21/wan21_14b.py", "cogvideo/cogvideo_5b.py"])
def test_help_needs_nothing(path):
    out = subprocess.run([sys.executable, SCRIPTS / path, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--use_psa" in out


@pytest.mark.parametrize("path", ["wan21/wan21_1.3b.py", "cogvideo/cogvideo_5b.py"])
def test_a_video_that_could_not_be_written_is_refused_at_once(path, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script(path).main(["--prompt", "your prompt here", f"--output={tmp_path / 'missing' / 'video.mp4'}"])
    said = capsys.readouterr().err
    assert f"argument --output: there is no folder {tmp_path / 'missing'}; make it, or pass another path" in said


def test_the_wan_command_line_runs(monkeypatch, tmp_path, written):
    """On a console that does not have all letters of the file's name."""
    import diffusers

    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, num_layers=1, ffn_dim=64, text_dim=4096
    ).eval()
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )
    sources = []
    monkeypatch.setattr(
        diffusers.AutoencoderKLWan,
        "from_pretrained",
        classmethod(lambda _, source, **__: sources.append(source) or vae),
    )
    monkeypatch.setattr(
        diffusers.WanPipeline, "from_pretrained", classmethod(lambda _, source, **__: sources.append(source) or pipe)
    )
    monkeypatch.setattr(pipe, "encode_prompt", lambda **_: (normal(1, 13, 4096), normal(1, 13, 4096, seed=1)))
    output, console = tmp_path / "видео.mp4", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    words = ["--prompt", "your prompt here", "--use_psa", "--no_warmup", "--steps=2", "--width=256", "--height=256"]
    script("wan21/wan21_1.3b.py").main([*words, "--frames=9", "--min_tokens=0", "--device=cpu", f"--output={output}"])
    assert sources == ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"] * 2
    assert pipe.scheduler.config.flow_shift == 5.0
    said = console.buffer.getvalue().decode("ascii")
    assert "9 frames" in said
    assert "PSA: 4 sparse attention calls, mean sparsity 0.8" in said  # 2 steps, with guidance, one layer
    assert "0 dense" in said
    assert written == [(9, str(output), 16)]


def test_the_cogvideo_command_line_runs(monkeypatch, tmp_path, capsys, tiny, written):
    import diffusers

    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=tiny.transformer("1.5"),
        scheduler=tiny.scheduler("1.5", "dpm"),
    )  # fmt: skip
    pipe.vae = SimpleNamespace(enable_tiling=lambda: None)
    asked = []
    monkeypatch.setattr(
        diffusers.CogVideoXPipeline,
        "from_pretrained",
        classmethod(lambda _, source, **__: asked.append(source) or pipe),
    )
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_, **__: (tiny.text(), tiny.text(6)))
    monkeypatch.setattr(pipe, "decode_latents", lambda latents: latents[:, :, :3])
    monkeypatch.setattr(
        pipe.video_processor, "postprocess_video", lambda video, **_: torch.rand(1, 9, 192, 256, 3).numpy()
    )
    words = ["--model", "cogvideo1.5_5b", "--prompt", "your prompt here", "--use_psa", "--steps=10", "--frames=21"]
    words += ["--width=256", "--height=192", "--min_tokens=0", "--device=cpu", f"--output={tmp_path / 'cog.mp4'}"]
    script("cogvideo/cogvideo_5b.py").main(words)
    assert asked == ["zai-org/CogVideoX1.5-5B"]
    said = capsys.readouterr().out
    assert "PSA: 14 sparse attention calls" in said  # 10 steps of which 3 are dense, two layers, guidance in one batch
    assert "6 dense" in said
    assert [fps for *_, fps in written] == [16]


WAN = SCRIPTS / "wan21" / "wan21_14b.py"


def started(*command, ranks):
    """What a script does in so many processes that torchrun starts."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run([sys.executable, *torchrun, *command], capture_output=True, text=True, timeout=300)


def example(output, *words, ranks, broken="none"):
    """The Wan example, on a tiny pipeline."""
    small = ["--width=256", "--height=256", "--frames=9", "--steps=3", "--min_tokens=0", "--device=cpu"]
    words = ["--prompt", "your prompt here", *small, f"--output={output}", *words]
    return started(Path(__file__).with_name("example_with_stand_ins.py"), WAN, broken, *words, ranks=ranks)


@pytest.mark.slow(seconds=60)
def test_two_processes_make_one_video_together(tmp_path):
    alone, both = tmp_path / "alone.npy", tmp_path / "both.npy"
    words = ["--use_psa", "--sparsity=0.6"]
    one = example(alone, *words, ranks=1)
    assert one.returncode == 0, one.stderr
    two = example(both, *words, "--ulysses=2", ranks=2)
    assert two.returncode == 0, two.stderr
    assert (np.load(both) == np.load(alone)).all()
    assert two.stdout.count("9 frames in") == 1
    assert "PSA (rank 0 of 2, for its heads): 4 sparse attention calls" in two.stdout
    assert two.stderr.count("  0%|") == one.stderr.count("  0%|") == 1, "one progress bar"
    assert set(tmp_path.iterdir()) == {alone, both}


@pytest.mark.slow(seconds=30)
def test_the_others_end_with_a_process_that_fails(tmp_path):
    output = tmp_path / "video.npy"
    found = example(output, "--use_psa", "--ulysses=2", ranks=2, broken="1")
    assert found.returncode != 0
    assert "MemoryError: no room for the prompt" in found.stderr
    assert "Rank 1 of 2 has failed, see above. No video was written." in found.stderr
    assert not output.exists()


@pytest.mark.parametrize(("ranks", "asked"), [(1, 4), (2, 1)])
def test_as_many_processes_as_were_asked_for(monkeypatch, ranks, asked):
    """Said before anything is loaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = started(WAN, "--prompt", "your prompt here", f"--ulysses={asked}", ranks=ranks)
    assert found.returncode != 0
    assert (
        f"--ulysses {asked} needs {asked} processes, and there are {ranks}; start them with: torchrun" in found.stderr
    )

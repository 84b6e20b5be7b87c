"""The command line of `workshop/quality/run.py` and `python dev.py quality`."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import platform
import sys
import time
from pathlib import Path

import torch

from ..training.files import MissingModelError, ModelFolder, read_folder
from . import compile_ahead
from .demo_model import WEIGHTS, Clip, DemoModel, Video, simple_schedule
from .gallery import Gallery
from .matrix import settings_of
from .measure import Measurement
from .results import read_runs
from .summary import quick_line
from .times import measure_times
from .velocity import STEPS, measure_velocity

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (42, 7, 1234, 99)
DEFAULTS = {
    # steps, scenes, seeds, frames
    "full": (20, 4, 2, 33),
    # Not fewer steps: with 10, a dense quarter and the published 30 % would be the same three steps.
    "quick": (20, 2, 1, 17),
    "smoke": (8, 1, 1, 17),
    "candidates": (20, 4, 2, 33),
    "corrections": (20, 4, 2, 33),
    "tries": (20, 4, 2, 33),
    "rivals": (20, 4, 2, 33),
    "gallery": (20, 2, 1, 33),
    "velocity": (STEPS, 3, 1, 33),
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(description: str | None = None) -> int:
    """Run what the command line asks for and return the exit code."""
    began = time.monotonic()
    try:
        arguments = _parse(description)
    except MissingModelError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.report:
        from .report.page import write_report

        print(write_report())
        return 0
    if arguments.workflow:
        from .workflow import run_workflow

        return run_workflow(arguments.workflow, arguments.settings, arguments.seeds or 1, arguments.out, arguments.url)
    if arguments.times:
        device = torch.device("cuda")
        facts = {"machine": _machine(device), "date": datetime.date.today().isoformat()}
        measure_times(facts, arguments.out, print)
        return 0
    found = arguments.found
    guidance = found.guidance if arguments.cfg is None else arguments.cfg
    kind = next(
        (kind for kind in DEFAULTS if kind != "full" and getattr(arguments, kind)),
        "full",
    )
    asked = (arguments.steps, arguments.scenes, arguments.seeds, arguments.frames)
    steps, scenes, seeds, frames = (given or usual for given, usual in zip(asked, DEFAULTS[kind], strict=True))
    wanted = arguments.only or ["*"]
    settings = [
        s for s in settings_of(kind, found.blocks) if any(fnmatch.fnmatch(s.name, pattern) for pattern in wanted)
    ]
    device = torch.device(arguments.device)
    precision = arguments.dtype or ("bf16" if device.type == "cuda" else "float32")
    # The Triton kernels do not support float32 models; on a CPU the backend is torch anyway.
    backend = arguments.backend or ("triton" if device.type == "cuda" and precision != "float32" else "torch")
    video = Video(frames, arguments.side, arguments.side)
    clips = [
        Clip(scene, seed, f"scene {number}, seed {seed}")
        for number, scene in enumerate(found.world.scenes[:scenes], start=1)
        for seed in SEEDS[:seeds]
    ]
    if arguments.list:
        print("\n".join(setting.name for setting in settings))
        return 0
    if arguments.compile_part:
        schedule, rows = simple_schedule(steps, found.blocks), len(clips) * (1 if guidance == 1 else 2)
        compile_ahead.compile_part(
            settings, arguments.compile_part, schedule, video.grid, rows, found.heads, backend, DTYPES[precision]
        )
        return 0

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    print(
        f"{name_of(found, guidance)}: {len(settings)} settings, {len(clips)} clips of {video}, {steps} steps, "
        f"{precision}, {backend}; results in {arguments.out}"
    )
    workers = []
    if backend == "triton" and device.type == "cuda" and not arguments.no_compile_ahead:
        workers = compile_ahead.start(sys.argv[1:])
    model = DemoModel(device, DTYPES[precision], found, guidance)
    if workers:
        compile_ahead.finish(workers, 150)
        say("kernels compiled")
    facts = {
        "model": name_of(found, guidance),
        "machine": _machine(device),
        "precision": f"{precision}, {backend}",
        "steps": steps,
        "clips": len(clips),
        "date": datetime.date.today().isoformat(),
    }
    if kind == "velocity":
        facts = {name: facts[name] for name in ("model", "machine", "precision", "date")}
        measure_velocity(model, clips, video, settings, backend, facts, arguments.out, say)
        return 0
    measurement = Measurement(model, clips, video, simple_schedule(steps, model.blocks), backend, facts)
    sheet = Gallery(arguments.out, found.name) if arguments.gallery else None
    measured = measurement.run(settings, arguments.out, began + 60 * arguments.minutes, say, sheet)
    say(f"{measured} of {len(settings)} settings measured; {arguments.out}")
    if arguments.publish:
        from .report.gallery import publish

        say(f"written: {publish(arguments.out, found.name)}")
    if kind != "quick":
        return 0
    margin, line = quick_line(read_runs(arguments.out))
    print(line)
    return exit_code(margin)


def name_of(found: ModelFolder, guidance: float) -> str:
    """The model's name in the results: its files' name, plus the guidance scale if it is not the model's own."""
    return f"psa_{found.name}" + ("" if guidance == found.guidance else f", cfg {guidance:g}")


def exit_code(margin: float) -> int:
    """The quick run's exit code for our default minus the best published setting in dB: 0 only if ours is closer."""
    return 0 if margin > 0 else 1


def _parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="our default against published settings; exit code 1 if worse"
    )
    size.add_argument("--smoke", action="store_true", help="a few settings, 8 steps, one clip: does it run?")
    size.add_argument("--velocity", action="store_true", help="single model calls: how blocks should be ranked")
    size.add_argument("--candidates", action="store_true", help="possible new defaults, with both warm-ups")
    size.add_argument("--corrections", action="store_true", help="how the correction should be used by default")
    size.add_argument("--tries", action="store_true", help="ways to correct that the product does not have")
    size.add_argument("--rivals", action="store_true", help="our default against other ways to save the same time")
    size.add_argument("--gallery", action="store_true", help="PSA and its rivals as looping pictures")
    size.add_argument("--times", action="store_true", help="the time ranking takes at real models' sizes, on a GPU")
    size.add_argument("--report", action="store_true", help="write docs/quality.md from workshop/results/")
    size.add_argument("--workflow", type=Path, metavar="FILE", help="a ComfyUI workflow with a PSA Patch node")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="JSON list of PSA Patch inputs, for --workflow")
    parser.add_argument("--url", help="address of a running ComfyUI with this pack, for --workflow; default: start one")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="folder of a trained model; default: the demo's")
    parser.add_argument("--cfg", type=float, help="guidance scale, 1 for none; default: the model's own")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results; default: output/quality or output/gallery, plus -MODEL and -DTYPE if given",
    )
    parser.add_argument(
        "--publish", action="store_true", help="with --gallery: put its pictures and its page into docs/ as well"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="settings whose name matches one of these, such as 'paper*'"
    )
    parser.add_argument("--list", action="store_true", help="only print the names of the settings")
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--scenes", type=int, help="1 to 6")
    parser.add_argument("--seeds", type=int, help=f"1 to {len(SEEDS)}, per scene")
    parser.add_argument("--frames", type=int, help="1 + 4n")
    parser.add_argument("--side", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no setting after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="the model's type; default: bf16 on a GPU, float32 elsewhere")
    parser.add_argument("--backend", choices=("triton", "torch"), help="for attention")
    parser.add_argument("--no-compile-ahead", action="store_true", help="compile kernels only when needed")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # A run replaces the files in its folder, so other models and types get folders of their own.
    given = [name for name in ("model", "cfg") if getattr(arguments, name) is not None]
    if given and (arguments.workflow or arguments.times or arguments.report):
        parser.error(f"--{given[0]} does not apply: a workflow names its own model, --times and --report use none")
    arguments.found = read_folder(arguments.model.expanduser() if arguments.model else WEIGHTS)
    model = None if arguments.found.name == "demo" else arguments.found.name
    if arguments.publish and not arguments.gallery:
        parser.error("--publish does not apply: it needs --gallery")
    kind = "gallery" if arguments.gallery else "quality"
    arguments.out = arguments.out or ROOT / "output" / "-".join(filter(None, (kind, model, arguments.dtype)))
    return arguments


def _machine(device: torch.device) -> str:
    versions = f"torch {torch.__version__}"
    if device.type == "cuda":
        import triton

        return f"{torch.cuda.get_device_name(device)}, {versions}, triton {triton.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {versions}"

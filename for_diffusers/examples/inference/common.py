"""What the example scripts share: finding the pack (cloned or installed), the command line, the processes of several
GPUs, one run of a pipeline."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def load_pack(root: Path = ROOT) -> ModuleType:
    """The package `comfyui_psa`, installed with pip or from this clone. Its folder is never added to sys.path."""
    if "comfyui_psa" in sys.modules:
        return sys.modules["comfyui_psa"]
    if importlib.util.find_spec("comfyui_psa") is None:
        spec = importlib.util.spec_from_file_location(
            "comfyui_psa", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        sys.modules["comfyui_psa"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["comfyui_psa"])
    return importlib.import_module("comfyui_psa")


def make_parser(about: str, *, model: str, steps: int, guidance: float, size: tuple[int, int, int]) -> Any:
    """The arguments of every example. size: width, height, frames."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=model, help="a name of this script, a repository of the hub, or a folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--use_psa", action="store_true", help="attend with PSA; without it the pipeline is diffusers'")
    parser.add_argument("--sparsity", type=float, default=0.85, help="share of the attention work saved, 0 to 0.97")
    parser.add_argument("--preset", default="auto", help="a preset of choices/presets.json")
    parser.add_argument("--warmup", type=float, default=0.3, help="share of the steps that stay dense")
    parser.add_argument("--no_warmup", action="store_true", help="no step stays dense")
    parser.add_argument("--min_tokens", type=int, help="shorter sequences stay dense; default: that of apply_psa")
    parser.add_argument("--ulysses", type=int, default=1, help="GPUs that make one video together, with torchrun")
    parser.add_argument("--uneven", action="store_true", help="the heads or the tokens do not divide by --ulysses")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--guidance", type=float, default=guidance)
    for name, value in zip(("width", "height", "frames"), size, strict=True):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=_output, default=Path("video.mp4"))
    return parser


def _output(text: str) -> Path:
    """Refused before the video is made if it could not be written afterwards."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}; make it, or pass another path")
    return path


@contextmanager
def together(arguments: argparse.Namespace) -> Iterator[None]:
    """Join the processes that torchrun has started, each with a GPU of its own, for as long as the video takes.

    If one of them fails, it says so and ends, and torchrun ends the others.
    """
    started, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if arguments.ulysses != started:
        sys.exit(
            f"--ulysses {arguments.ulysses} needs {arguments.ulysses} processes, and there are {started}; start them "
            f"with: torchrun --nproc-per-node {arguments.ulysses} {sys.argv[0]} ..."
        )
    if started == 1:
        yield
        return
    import torch

    on_gpus = arguments.device == "cuda"
    if on_gpus:
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(arguments.device)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    try:
        yield
    except BaseException:
        traceback.print_exc()
        print(f"Rank {rank} of {started} has failed, see above. No video was written.", file=sys.stderr, flush=True)
        os._exit(1)  # not waiting for the others, which wait for this one
    torch.distributed.destroy_process_group()


def run(pipe: Any, arguments: argparse.Namespace, fps: int) -> None:
    """Patch the pipeline if asked to, make the video, write it and print what was done; rank 0 does that for all."""
    import diffusers
    import torch
    from diffusers.utils import export_to_video

    load_pack()
    from comfyui_psa.for_diffusers import apply_psa, enable_ulysses

    is_first = int(os.environ.get("RANK", 0)) == 0
    if not is_first:
        pipe.set_progress_bar_config(disable=True)
        diffusers.utils.logging.set_verbosity_error()
        logging.getLogger("ComfyUI-PSA").setLevel(logging.ERROR)
    if arguments.ulysses > 1:
        enable_ulysses(pipe, uneven=arguments.uneven)
    applied = None
    if arguments.use_psa:
        warm_up = 0 if arguments.no_warmup else arguments.warmup
        given = {} if arguments.min_tokens is None else {"min_tokens": arguments.min_tokens}
        applied = apply_psa(pipe, arguments.sparsity, arguments.preset, warm_up=warm_up, **given)
    began = time.perf_counter()
    frames = pipe(
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        width=arguments.width,
        height=arguments.height,
        num_frames=arguments.frames,
        generator=torch.Generator().manual_seed(arguments.seed),
        **({} if is_first else {"output_type": "latent"}),
    ).frames[0]
    if not is_first:
        return
    seconds = time.perf_counter() - began
    export_to_video(frames, str(arguments.output), fps=fps)
    sys.stdout.reconfigure(errors="backslashreplace")  # not every console has all letters of a file's name
    print(f"{arguments.output}: {len(frames)} frames in {seconds:.1f} s")
    if applied is not None:
        sparsity = applied.mean_sparsity()
        part = "" if arguments.ulysses == 1 else f" (rank 0 of {arguments.ulysses}, for its heads)"
        print(
            f"PSA{part}: {applied.sparse_calls} sparse attention calls, mean sparsity "
            f"{'-' if sparsity is None else f'{sparsity:.3f}'}, {applied.dense_calls} dense"
        )
        for reason, calls in applied.fallbacks.items():
            print(f"PSA: {calls} calls stayed dense: {reason}")

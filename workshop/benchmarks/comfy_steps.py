"""ComfyUI's own model code and sampling in a benchmark, without its server."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def import_comfyui(device: str) -> None:
    """Make the modules of the ComfyUI in COMFYUI_PATH importable, set to compute on `device`, "cuda" or "cpu"."""
    folder = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "ComfyUI")
    if not (folder / "comfy").is_dir():
        sys.exit(f"There is no ComfyUI in {folder}; set COMFYUI_PATH")
    # ComfyUI has a top-level module `nodes`, which this pack's must not shadow.
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"
    comfy.cli_args.args.use_pytorch_cross_attention = True
    comfy.cli_args.args.gpu_only = device == "cuda"


def step_seconds(
    model: Any, sample: Callable[[Any, Callable[..., None]], object], now: Callable[[], float]
) -> list[float]:
    """Seconds of every step of a sampling run, the first counted from where the sampler asks the model first.

    Args:
        model: a ComfyUI MODEL. sample: sample(model, callback) samples, and calls back after every step.
        now: the time in seconds, once all devices have done their work.
    """
    import comfy.patcher_extension

    times: list[float] = []

    def first_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if not times:
            times.append(now())
        return executor(*args, **kwargs)

    timed = model.clone()
    timed.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "benchmark", first_call)
    sample(timed, lambda *_: times.append(now()))
    return [end - begin for begin, end in itertools.pairwise(times)]

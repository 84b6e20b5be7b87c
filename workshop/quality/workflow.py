"""Measures any ComfyUI workflow with a PSA Patch node on a real server: dense, then every setting, with the same seeds.

Dense is the same workflow at sparsity 0, where PSA Patch leaves the model unchanged bit for bit. Frames are saved
losslessly right after the decoder; the workflow's own output nodes are left out.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..tools.client import Client, Prompt
from ..tools.paths import comfyui_folder
from ..tools.serve import running_server
from ..tools.terminal import Failure
from ..tools.workflow import graph_to_prompt, load_workflow
from . import metrics
from .results import RunRow, Writer

PATCH, SEEDS = "PSAPatch", ("seed", "noise_seed")
DECODERS = ("VAEDecode", "VAEDecodeTiled")
DEFAULT_SETTINGS = (
    {"sparsity": 0.70},
    {"sparsity": 0.85},
    {"sparsity": 0.90},
    {"preset": "module-default (published)", "order": "curve", "sparsity": 0.85},
)
FRAMES, REPORT = "psa quality frames", "psa quality report"
"""Ids of the added nodes."""


def run_workflow(file: Path, settings: Path | None, seeds: int, out: Path, url: str | None) -> int:
    """Measure a workflow, write `runs.csv` into `out` and return the exit code.

    Args:
        file: a workflow as the frontend saves it, or in API format.
        settings: JSON list of objects with inputs of PSA Patch and, optionally, a "name". None: a short default list.
        seeds: how many seeds to run, counting up from the workflow's own.
        url: address of a running server that has the workflow's models; None starts one as `dev.py demo` does.
    """
    chosen = json.loads(settings.read_text(encoding="utf-8")) if settings else list(DEFAULT_SETTINGS)
    if not (isinstance(chosen, list) and chosen and all(isinstance(entry, dict) for entry in chosen)):
        raise SystemExit(f"{settings}: expected a list of objects, for example {json.dumps(DEFAULT_SETTINGS[:2])}")
    try:
        if url:
            measure_workflow(Client(url.rstrip("/")), file, chosen, seeds, out, print)
        else:
            with running_server(comfyui_folder()) as server:
                measure_workflow(Client(server.url), file, chosen, seeds, out, print)
    except Failure as failure:
        raise SystemExit(f"Error: {failure}") from failure
    print(out)
    return 0


def measure_workflow(
    client: Client,
    file: Path,
    settings: Sequence[dict[str, Any]],
    seeds: int,
    out: Path,
    say: Callable[[str], None],
) -> list[RunRow]:
    """Run the workflow dense and with every setting on `client`'s server; write the rows to `out` and return them.

    Raises:
        Failure: the workflow is unsuitable, or a node failed; names the node.
    """
    prompt = to_measured(_load(file, client))
    writer, rows = Writer(out), []
    facts = {"model": file.stem, "machine": _machine(client), "date": datetime.date.today().isoformat()}
    for shift in range(seeds):
        dense, _, seconds = _run(client, prompt, {"sparsity": 0.0}, shift)
        clip = f"seed +{shift}"
        row = RunRow("dense", "workflow", clip, 1.0, 1.0, 1.0, run_s=sum(seconds), steps=len(seconds), clips=1, **facts)
        writer.add([row])
        rows.append(row)
        for setting in settings:
            inputs = {name: value for name, value in setting.items() if name != "name"}
            name = str(setting.get("name") or ", ".join(f"{key} {value}" for key, value in inputs.items()))
            frames, report, seconds = _run(client, prompt, inputs, shift)
            row = RunRow(
                name,
                "workflow",
                clip,
                **_densities(report),
                psnr=metrics.psnr(dense, frames),
                ssim=metrics.ssim(dense, frames),
                flicker=metrics.flicker(dense, frames) if dense.shape[1] > 1 else None,
                **_seconds(report, seconds),
                settings=json.dumps(inputs),
                steps=len(report.get("steps", seconds)),
                clips=1,
                **facts,
            )
            writer.add([row])
            rows.append(row)
            shown = "equal to dense" if math.isinf(row.psnr) else f"PSNR {row.psnr:.2f} dB, SSIM {row.ssim:.4f}"
            say(f"{name}, {clip}: compute {row.compute:.3f}, {shown}")
    return rows


def to_measured(prompt: Prompt) -> Prompt:
    """The prompt with a lossless output for its frames and PSA Report, reduced to the nodes that these need.

    Raises:
        Failure: there is no PSA Patch, or not exactly one decoder after it.
    """
    patches = [node for node, entry in prompt.items() if entry["class_type"] == PATCH]
    if not patches:
        raise Failure("The workflow has no PSA Patch node.")
    decoders = [
        node
        for node, entry in prompt.items()
        if entry["class_type"] in DECODERS and _upstream(prompt, node) & set(patches)
    ]
    if len(decoders) != 1:
        raise Failure(f"The workflow has {len(decoders)} decoders after PSA Patch; expected exactly one.")
    (decoder,) = decoders
    samples = prompt[decoder]["inputs"]["samples"]
    # With two experts, only the first patch is reported; both get the same setting.
    report = {"model": [patches[0], 0], "samples": samples}
    frames = {"images": [decoder, 0], "filename_prefix": "psa_quality/frame"}
    found = {**prompt, REPORT: {"class_type": "PSAReport", "inputs": report}}
    found[decoder] = {**prompt[decoder], "inputs": {**prompt[decoder]["inputs"], "samples": [REPORT, 0]}}
    found[FRAMES] = {"class_type": "SaveImage", "inputs": frames}
    needed = _upstream(found, FRAMES)
    return {node: entry for node, entry in found.items() if node in needed}


def _upstream(prompt: Prompt, node: str) -> set[str]:
    """`node` and all nodes that it depends on."""
    seen, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current in seen or current not in prompt:
            continue
        seen.add(current)
        links = prompt[current]["inputs"].values()
        pending += [str(link[0]) for link in links if isinstance(link, list) and len(link) == 2]
    return seen


def _load(file: Path, client: Client) -> Prompt:
    content = load_workflow(file)
    return graph_to_prompt(content, client.get("/object_info")) if "nodes" in content else content


def _run(client: Client, prompt: Prompt, inputs: dict[str, Any], shift: int) -> tuple[torch.Tensor, dict, list[float]]:
    """Frames uint8 [3, F, H, W], PSA Report's JSON, and the seconds of every step as reported by the server."""
    changed = {}
    for node, entry in prompt.items():
        values = dict(entry["inputs"])
        if entry["class_type"] == PATCH:
            values |= inputs
        values |= {name: values[name] + shift for name in SEEDS if isinstance(values.get(name), int)}
        changed[node] = {**entry, "inputs": values}
    result = client.run(changed)
    report = json.loads(result.outputs[REPORT]["text"][0])
    samplers = dict.fromkeys(message.node for message in result.progress if "Sampler" in message.class_type)
    seconds = [second for node in samplers for second in result.step_seconds(node)]
    return _frames(client, result.outputs[FRAMES]["images"]), report, seconds


def _frames(client: Client, images: Sequence[dict]) -> torch.Tensor:
    pictures = [
        np.array(Image.open(io.BytesIO(client.download("/view?" + urllib.parse.urlencode(image)))).convert("RGB"))
        for image in images
    ]
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)


def _densities(report: dict) -> dict[str, float]:
    """From PSA Report: compute, density of the sparse steps, share of dense steps."""
    steps = report.get("steps", [])
    sparse, costs = [], []
    for step in steps:
        calls = step["sparse_calls"] + step["dense_calls"]
        density = 1 - (step["sparsity"] or 0.0)
        # A step without calls was never seen by PSA (the model was left unchanged), so it is dense.
        costs.append((density * step["sparse_calls"] + step["dense_calls"]) / calls if calls else 1.0)
        if step["sparse_calls"]:
            sparse.append(density)
    if not costs:
        return {"compute": 1.0, "density": 1.0, "warm_up": 1.0}
    return {
        "compute": sum(costs) / len(costs),
        "density": sum(sparse) / len(sparse) if sparse else 1.0,
        "warm_up": 1 - len(sparse) / len(costs),
    }


def _seconds(report: dict, seconds: Sequence[float]) -> dict[str, float | None]:
    sparse = {i for i, step in enumerate(report.get("steps", [])) if step["sparse_calls"]}
    times = {kind: [s for i, s in enumerate(seconds) if i and (i in sparse) == kind] for kind in (True, False)}
    return {
        "run_s": sum(seconds),
        "sparse_step_s": median(times[True]) if times[True] else None,
        "dense_step_s": median(times[False]) if times[False] else None,
    }


def _machine(client: Client) -> str:
    stats = client.get("/system_stats")
    device = (stats.get("devices") or [{}])[0].get("name", "unknown device")
    return f"{device}, torch {stats.get('system', {}).get('pytorch_version', '?')}"

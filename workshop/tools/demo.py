"""`python dev.py demo`: a real ComfyUI samples one video twice, dense and with PSA, and compares the two.

It queues `workflows/psa_demo.json` unchanged, apart from the command-line options. `figures.py` computes the figures,
`pictures.py` draws the pictures, `report.py` writes the page.
"""

from __future__ import annotations

import copy
import json
import platform
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from . import figures, hero, pictures, report, thumbnails
from .client import Client, Progress, Prompt, PromptResult
from .paths import DEMO_WEIGHTS, OUTPUT, WORKFLOWS
from .serve import running_server
from .server import ComfyServer
from .terminal import Failure, Phase
from .workflow import graph_to_prompt, load_workflow

WORKFLOW = WORKFLOWS / "psa_demo.json"
RESULTS = OUTPUT / "psa_demo"
WEIGHTS = ("diffusion_models/psa_demo_wan_dit.safetensors", "vae/psa_demo_wan_vae.safetensors")
FPS = 12


def run_demo(comfyui: Path, steps: int | None, sparsity: float | None) -> None:
    """Run the demo, write its results to `output/psa_demo/` and print its figures.

    Args:
        comfyui: ComfyUI's folder.
        steps, sparsity: None keeps the workflow's value.

    Raises:
        Failure: with the reason in one sentence.
    """
    for name in WEIGHTS:
        if not (DEMO_WEIGHTS / name).is_file():
            raise Failure(f"demo/weights/{name} is missing; train it with `python workshop/training/train_demo.py`.")
    with running_server(comfyui) as server:
        client = Client(server.url)
        prompt = graph_to_prompt(load_workflow(WORKFLOW), client.get("/object_info"))
        apply_options(prompt, steps, sparsity)
        print("One video is sampled twice, which takes a few minutes in all on a CPU.")
        with Phase("Loading and compiling: two steps of either sampler, which are not counted"):
            tried = _run(server, client, warm_up(prompt), lambda _: None)
        print(f"Sampling will take {most_seconds(prompt, tried):.0f} s at most, then the videos are decoded.")
        result = _sample(server, client, prompt)
        videos = download_videos(client, prompt, result)
    psa_report = report_of(prompt, result)
    with Phase("Comparing the videos"):
        measured = write_results(RESULTS, videos, samplers_of(prompt), result, psa_report)
    print(f"\n{measured.summary()}\n")
    if measured.warning:
        print(f"{measured.warning}\n")
    for name in (
        "report.html",
        "report.png",
        "side_by_side.mp4",
        "dense.webp",
        "psa.webp",
        "hero.webp",
        "figures.json",
    ):
        print(f"  {RESULTS / name}")


def apply_options(prompt: Prompt, steps: int | None, sparsity: float | None) -> None:
    """Apply the command-line options to the prompt; None keeps the workflow's value."""
    if steps is not None:
        for entry in prompt.values():
            if entry["class_type"] == "KSampler":
                entry["inputs"]["steps"] = steps
    if sparsity is not None:
        prompt[figures.find_node(prompt, "PSAPatch")]["inputs"]["sparsity"] = sparsity


def samplers_of(prompt: Prompt) -> dict[str, str]:
    """Node ids of the sampler after PSA Patch ("psa") and of the other ("dense")."""
    psa = figures.find_node(prompt, "KSampler", model=[figures.find_node(prompt, "PSAPatch"), 0])
    (dense,) = (node for node, entry in prompt.items() if entry["class_type"] == "KSampler" and node != psa)
    return {"dense": dense, "psa": psa}


def phases_of(prompt: Prompt) -> dict[str, str]:
    """Node id -> what it does and for which video, in words, for the nodes that take a while."""
    videos = {node: {"dense": "dense", "psa": "PSA"}[name] for name, node in samplers_of(prompt).items()}
    titles = {node: f"Sampling, {video}" for node, video in videos.items()}
    for node, entry in prompt.items():
        if entry["class_type"] == "VAEDecode":
            videos[node] = videos[entry["inputs"]["samples"][0]]
            titles[node] = f"Decoding, {videos[node]}"
    for node, entry in prompt.items():
        if entry["class_type"] == "SaveAnimatedWEBP":
            titles[node] = f"Saving, {videos.get(entry['inputs']['images'][0], 'side by side')}"
    return titles


def warm_up(prompt: Prompt) -> Prompt:
    """The prompt with two steps for each sampler and no videos: after it the model is loaded, the kernels are compiled,
    and whichever sampler is timed first has no disadvantage. With the demo's settings, the second step is sparse."""
    short: Prompt = {}
    ends = {f"end {node}": [node, 0] for node in samplers_of(prompt).values()}
    needed = [source for source, _ in ends.values()]
    while needed:
        node = needed.pop()
        if node not in short:
            short[node] = copy.deepcopy(prompt[node])
            needed += [value[0] for value in short[node]["inputs"].values() if isinstance(value, list)]
    apply_options(short, steps=2, sparsity=None)
    ending = {name: {"class_type": "PreviewAny", "inputs": {"source": source}} for name, source in ends.items()}
    return short | ending


def most_seconds(prompt: Prompt, tried: PromptResult) -> float:
    """Seconds that both samplers take if no step is faster than the dense one of the warm-up, `tried`."""
    dense = samplers_of(prompt)["dense"]
    return 2 * prompt[dense]["inputs"]["steps"] * tried.step_seconds(dense)[-1]


def _sample(server: ComfyServer, client: Client, prompt: Prompt) -> PromptResult:
    display = _Display(phases_of(prompt))
    try:
        return _run(server, client, prompt, display)
    except Failure as failure:
        display.close(failure)
        raise
    finally:
        display.close()


def _run(server: ComfyServer, client: Client, prompt: Prompt, on_progress: Callable[[Progress], None]) -> PromptResult:
    try:
        return client.run(prompt, on_progress)
    except Failure:
        server.check_alive()  # if the server died, its log says more
        raise


class _Display:
    """Shows one phase per sampler, with steps, seconds per step and the time remaining."""

    def __init__(self, titles: dict[str, str]) -> None:
        self._titles = titles
        self._node: str | None = None
        self._phase: Phase | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.node != self._node:
            self.close()
            self._node, self._times = progress.node, [progress.seconds]
            title = self._titles.get(progress.node)
            self._phase = Phase(title).__enter__() if title else None
            return
        self._times.append(progress.seconds)
        if self._phase is None or not progress.step:
            return
        # The first step includes loading the model, so it says little about the others.
        first = 1 if len(self._times) > 2 else 0
        pace = (self._times[-1] - self._times[first]) / (len(self._times) - 1 - first)
        left = pace * (progress.steps - progress.step)
        self._phase.update(f"step {progress.step}/{progress.steps}, {pace:.2f} s per step, {left:.0f} s left")

    def close(self, failure: Exception | None = None) -> None:
        """End the phase on display, if any."""
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.__exit__(type(failure) if failure else None)


def download_videos(client: Client, prompt: Prompt, result: PromptResult) -> dict[str, bytes]:
    """The two lossless WebP files that the prompt saved, under "dense" and "psa"."""
    videos = {}
    for name in ("dense", "psa"):
        node = figures.find_node(prompt, "SaveAnimatedWEBP", filename_prefix=f"psa_demo/{name}")
        try:
            (image,) = result.outputs[node]["images"]
        except (KeyError, ValueError):
            raise Failure(f"Node {node} saved no video.") from None
        videos[name] = client.download("/view?" + urllib.parse.urlencode(image))
    return videos


def report_of(prompt: Prompt, result: PromptResult) -> dict:
    """PSA Report's JSON."""
    texts = result.outputs.get(figures.find_node(prompt, "PSAReport"), {}).get("text")
    found = json.loads(texts[0]) if texts else {}
    if not found.get("steps"):
        raise Failure(f"PSA Report has no steps to show: {found.get('note', 'it reported nothing')}.")
    return found


def write_results(
    folder: Path, videos: dict[str, bytes], samplers: dict[str, str], result: PromptResult, psa_report: dict
) -> figures.Figures:
    """Compare the two videos and write all the demo's results into `folder`.

    Args:
        folder: created if missing.
        videos: lossless WebP files under "dense" and "psa".
        samplers: node ids under the same names.
        result: of the prompt that made both videos.
        psa_report: PSA Report's JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, webp in videos.items():
        (folder / f"{name}.webp").write_bytes(webp)
    dense, psa = (pictures.read_frames(videos[name]) for name in ("dense", "psa"))
    measured = figures.measure(dense, psa, samplers, result, psa_report)
    target = measured.report.get("target_sparsity")
    title = f"PSA at sparsity {target:.2f}" if target is not None else "PSA"
    pictures.write_video(pictures.side_by_side({"dense": dense, title: psa}), folder / "side_by_side.mp4", FPS)
    caption = f"{title}: PSNR {measured.psnr:.1f} dB, SSIM {measured.ssim:.3f} against dense"
    strip = pictures.contact_strip(dense, psa, caption)
    (folder / "report.png").write_bytes(pictures.png(strip))
    # workflows/psa_demo.jpg, the picture next to the template, is a copy of this one.
    thumbnails.split_frame(dense, psa, "PSA" if target is None else f"PSA {target:.2f}").save(
        folder / "thumbnail.jpg", quality=85
    )
    # docs/hero.webp, the picture in the README, is a copy of this one.
    hero.write_hero(folder / "hero.webp", dense, psa, measured.psnr, measured.report)
    frames, height, width = dense.shape[:3]
    subtitle = (
        f"This repository's demo model, {frames} frames of {width} by {height}, {len(measured.dense_seconds)} steps, "
        f"same noise for both; {_hardware()}."
    )
    video = (folder / "side_by_side.mp4").read_bytes()
    report.write_report(folder / "report.html", measured, subtitle, video, strip, psa)
    _write_figures(folder / "figures.json", measured, subtitle)
    return measured


def _write_figures(path: Path, measured: figures.Figures, subtitle: str) -> None:
    content = {
        "what": subtitle,
        "psnr_db": measured.psnr,
        "ssim": measured.ssim,
        "sparsity_of_sparse_steps": measured.mean_sparsity,
        "target_sparsity": measured.report.get("target_sparsity"),
        "median_seconds_per_step": {
            "dense": measured.dense_step,
            "psa_sparse": measured.psa_sparse_step,
            "psa_warm_up": measured.psa_warm_up_step,
        },
        "seconds_per_step": {"dense": measured.dense_seconds, "psa": measured.psa_seconds},
        "report": {name: value for name, value in measured.report.items() if name != "level_map"},
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

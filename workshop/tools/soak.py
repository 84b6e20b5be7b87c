"""`python dev.py soak`: runs many prompts on one real server and compares its memory before and after.

Every prompt samples the demo model, with PSA at varying settings; every fifth one without PSA. The first prompts are
not counted, because they load the model and fill permanent caches.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from .client import Client, Prompt
from .fuzz import SOURCES, sampling_nodes
from .serve import running_server
from .server import ComfyServer
from .workflow import default_value, inputs_of

WARM_UP = 8
ALLOWED_MB = 64
"""Growth attributed to the allocator; a leaked latent or model would exceed it after 50 prompts."""
SETTINGS = [
    {"mode": "topk", "order": "curve"},
    {"mode": "budget", "order": "raster", "tail": "on"},
    {"preset": "wan2.1-1.3b (published)"},
    {"importance": "sampled", "block_kv": "32"},
    {"importance": "means", "order": "tiles", "sparsity": 0.5},
]


def run_soak(comfyui: Path, prompts: int) -> bool:
    """Run the soak test on its own server and print the figures; returns whether memory use stayed level."""
    with running_server(comfyui) as server:
        before, after = soak(server, Client(server.url), prompts, print)
    return after - before <= ALLOWED_MB


def soak(server: ComfyServer, client: Client, prompts: int, say: Callable[[str], None]) -> tuple[float, float]:
    """Run `prompts` prompts after the warm-up and return the server's memory before and after, in MB.

    Raises:
        Failure: a prompt failed.
    """
    definitions, rng = client.get("/object_info"), random.Random(0)
    before = 0.0
    for number in range(-WARM_UP, prompts):
        if number == 0:
            before = memory_mb(server)
        result = client.run(prompt_of(number + WARM_UP, rng, definitions))
        assert result.outputs
        if number >= 0 and number % 10 == 9:
            say(f"  {number + 1} prompts: {memory_mb(server):.0f} MB")
    after = memory_mb(server)
    cuda = [device["torch_vram_total"] / 2**20 for device in client.get("/system_stats")["devices"]]
    say(f"server memory: {before:.0f} MB before, {after:.0f} MB after; torch on its devices: {cuda} MB")
    say(f"{prompts} prompts, {after - before:+.0f} MB")
    return before, after


def prompt_of(number: int, rng: random.Random, definitions: dict) -> Prompt:
    """A prompt that gets nothing from the caches of an earlier one."""
    patch = {spec.name: default_value(spec) for spec in inputs_of(definitions["PSAPatch"]) if spec.is_widget}
    patch |= SETTINGS[number % len(SETTINGS)] | {"min_tokens": 0, "model": ["model", 0], "start_percent": 0.0}
    patch["sparsity"] = patch["sparsity"] - 0.001 * (number % 100)
    kind, inputs = SOURCES["MODEL"]
    prompt = {"model": {"class_type": kind, "inputs": inputs}, "patch": {"class_type": "PSAPatch", "inputs": patch}}
    prompt |= sampling_nodes(["model" if number % 5 == 4 else "patch", 0], definitions)
    prompt["sampler"]["inputs"]["seed"] = rng.randrange(2**31)
    prompt["latent"]["inputs"] = prompt["latent"]["inputs"] | {"length": 9 + 4 * (number % 3)}
    return json.loads(json.dumps(prompt))


def memory_mb(server: ComfyServer) -> float:
    """Resident memory of the server and the processes it started, in MB."""
    import psutil  # installed with ComfyUI

    process = psutil.Process(server.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**20

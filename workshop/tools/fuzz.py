"""`python dev.py fuzz`: random and hostile node inputs and files over the API of a real server, thousands of times.

A case is one prompt with one node of the pack. It may succeed, be refused by ComfyUI's own checks, or end in an error
in the pack's words. Anything else is a failure: another error, a server that answers with none, or that dies.
Half of the cases have random inputs, the other half name a file of `fuzz_files`.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import urllib.error
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import Client, Prompt, PromptFailed
from .fuzz_files import FOLDER, GOOD_PRESETS, corpus
from .serve import running_server
from .server import ComfyServer
from .terminal import Failure
from .workflow import Input, default_value, inputs_of

OUR_WORDS = re.compile(r"failed: PSA [A-Z][\w ]*(,| needs|:)")
"""How an error of the pack begins: the node's name, and what was wrong with it."""
OUR_REFUSAL = re.compile(r" - PSA [A-Z][\w ]*(,| needs|:)")
"""The same, where the pack refuses a prompt before it runs."""
NOT_FUZZED = {"PSALoraDownload": "it would go to the network", "PSACalibrate": "each case would sample for a minute"}
SECONDS = 120
"""A case that has not ended by then is a failure."""
SAMPLED = 50
"""Every so many cases of the nodes that patch a model it is also sampled, for two steps."""
PATCHING = ("PSAPatch", "PSALoraLoader")
FILE_INPUTS = {
    "PSACogVideoXLoader": "checkpoint",
    "PSALoraLoader": "lora_name",
    "PSAPatch": "preset",
    "PSACalibrate": "preset",
    "PSAPyramid": "save_as",
}
"""The nodes that read or write a file, and the input that names it."""
FILE_NAMES = [
    "", ".", "..", "../x", "a/b", "a\\b", "C:\\x", "nul", "x\n", "\x00", "é" * 65, "good", "user/good", "user/../x",
    "folder",
    "circle", "psa_fuzz/gone.safetensors", "psa_fuzz\\good.safetensors", "psa_fuzz/../psa_fuzz/good.safetensors",
    "/dev/zero",
]  # fmt: skip
"""Names of files that no menu lists."""

SIZES = {"width": 64, "height": 64, "length": 9, "batch_size": 2, "steps": 50}
"""Inputs whose allowed values can ask for more than a machine has: no allowed value above these is tried."""

SOURCES: dict[str, tuple[str, dict]] = {
    "MODEL": ("UNETLoader", {"unet_name": "psa_demo_wan_dit.safetensors", "weight_dtype": "default"}),
    "VAE": ("VAELoader", {"vae_name": "psa_demo_wan_vae.safetensors"}),
    "LATENT": ("EmptyHunyuanLatentVideo", {"width": 256, "height": 192, "length": 9, "batch_size": 1}),
    "IMAGE": ("EmptyImage", {"width": 64, "height": 48, "batch_size": 1, "color": 0}),
    "CONDITIONING": ("PSADemoScene", {}),
}
"""What feeds an input that needs a link."""

TEXTS = [
    "", " ", "0", "-1", "0,1,2", "0-", "-", "1-0", "0-99999", "1: 0.1, 2: 0.2", "1: 0.1, 1: 0.1", "3: 0.5", "1:", ":1",
    "1: nan", "1: inf", "1: -0.1", "1e400: 1", "9" * 400, "1: " + "9" * 400, "0," * 20_000, "1: 0.001, " * 5_000,
    "x" * 100_000, "\x00", "\u202e0, 1", "０, １", "①: ½", "1\u200b: 0.5", "🎬" * 500, "é́́́", "' OR 1=1 --",
    "{{7*7}}", "${jndi:ldap://x}", "../../etc/passwd", "C:\\nul", "%s%n", "None", "nan", "true", "[0, 1]", '{"1": 0.5}',
    "auto", "preset", "\r\n0\r\n", "\ud800",
]  # fmt: skip
NUMBERS = [
    0,
    1,
    -1,
    0.0,
    -0.0,
    1e-12,
    0.5,
    0.9700000001,
    0.97,
    1.0,
    2,
    1e308,
    -1e308,
    10**30,
    -(2**63),
    2**64,
    0.1 + 0.2,
]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
OTHERS = [None, True, False, [], {}, [[]], ["1"], [1, 2, 3], {"a": {"b": []}}, [0] * 10_000]
"""No links: what ComfyUI makes of a link to nowhere is its own affair (0.30 ends its worker over one)."""


@dataclass
class Case:
    """One prompt: the node under test and its inputs."""

    number: int
    node: str
    inputs: dict
    prompt: Prompt

    def __str__(self) -> str:
        return f"case {self.number}, {self.node}: {json.dumps(self.inputs)[:600]}"


def run_fuzz(comfyui: Path, cases: int, seed: int) -> int:
    """Run `cases` cases, print every failure and the counts; returns the number of failures.

    Raises:
        Failure: the server died; the sentence names the case.
    """
    with tempfile.TemporaryDirectory(prefix="psa-fuzz-") as home, running_server(comfyui, home=Path(home)) as server:
        client = Client(server.url)
        return fuzz(server, client, cases, seed, print)


def fuzz(server: ComfyServer, client: Client, cases: int, seed: int, say: Callable[[str], None]) -> int:
    """As `run_fuzz`, on a server that runs already; it gets the files for the time being."""
    with corpus(server.home, seed):
        return _fuzz(server, client, cases, seed, say)


def _fuzz(server: ComfyServer, client: Client, cases: int, seed: int, say: Callable[[str], None]) -> int:
    rng, definitions = random.Random(seed), client.get("/object_info")
    nodes = [name for name in sorted(definitions) if name.startswith("PSA") and name not in NOT_FUZZED]
    nodes = [name for name in nodes if fixed_links(definitions[name]) is not None]
    ends: Counter[str] = Counter()
    for number in range(cases):
        if number % 2:
            node = rng.choice(list(FILE_INPUTS))
            case = make_case(rng, number, node, definitions, random_file(rng, node, definitions))
        else:  # half of these for the node with the most inputs
            node = "PSAPatch" if rng.random() < 0.5 else rng.choice(nodes)
            case = make_case(rng, number, node, definitions)
        end, message = run_case(server, client, case)
        ends[end] += 1
        if end == "failure":
            say(f"{case}\n    {message[:600]}")
        elif number % 500 == 499:
            say(f"  {number + 1} cases: {dict(ends)}")
    say(f"seed {seed}: {ends['success']} succeeded, {ends['refused']} refused by ComfyUI, {ends['ours']} by the pack")
    say(f"{cases} cases, {ends['failure']} failures")
    return ends["failure"]


def fixed_links(definition: dict) -> dict[str, str] | None:
    """Input name -> type for the inputs of a node that need a link; None where one of them has no source here."""
    needed = {spec.name: spec.type for spec in inputs_of(definition) if spec.required and not spec.is_widget}
    return needed if all(kind in SOURCES for kind in needed.values()) else None


def random_file(rng: random.Random, node: str, definitions: dict) -> str:
    """The name of a file for the input of `node` that names one: of those made for it, or none that is there."""
    (spec,) = (spec for spec in inputs_of(definitions[node]) if spec.name == FILE_INPUTS[node])
    made = [name for name in spec.choices or () if FOLDER in name or name.startswith("user/")]
    if node == "PSACalibrate":  # with a good one it would sample for a minute
        made = [name for name in made if name.removeprefix("user/") not in GOOD_PRESETS]
    return rng.choice(made) if made and rng.random() < 0.9 else rng.choice(FILE_NAMES)


def make_case(rng: random.Random, number: int, node: str, definitions: dict, file: str | None = None) -> Case:
    """A prompt with `node`: mostly its defaults, one to four inputs replaced, sometimes left out or sent as well.

    With `file` its defaults and that file.
    """
    specs = [spec for spec in inputs_of(definitions[node]) if spec.is_widget]
    inputs = {spec.name: default_value(spec) for spec in specs}
    if file is not None:
        inputs[FILE_INPUTS[node]] = file
    changed = [] if file is not None else rng.sample(specs, min(len(specs), rng.randint(1, 4)))
    for spec in changed:
        if rng.random() < 0.04:
            del inputs[spec.name]
        else:
            inputs[spec.name] = random_value(rng, spec)
    if rng.random() < 0.02:
        inputs["no_such_input"] = rng.choice(OTHERS)
    prompt: Prompt = {}
    links = {}
    for name, kind in fixed_links(definitions[node]).items():
        class_type, values = SOURCES[kind]
        if class_type == "PSADemoScene":
            values = {spec.name: default_value(spec) for spec in inputs_of(definitions[class_type])}
        prompt[kind.lower()] = {"class_type": class_type, "inputs": values}
        links[name] = [kind.lower(), 0]
    if links and rng.random() < 0.02:
        links[rng.choice(list(links))] = rng.choice(OTHERS)
    prompt["node"] = {"class_type": node, "inputs": inputs | links}
    if node in PATCHING and number % SAMPLED < 2:
        prompt |= sampled(["node", 0], definitions)
    elif definitions[node]["output"]:
        prompt["end"] = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
    return Case(number, node, inputs, prompt)


def random_value(rng: random.Random, spec: Input) -> object:
    """A value for a widget: allowed, at its limits, of the right kind, or anything at all."""
    kind = rng.random()
    if kind < 0.15 and spec.name not in SIZES:
        return rng.choice([*TEXTS, *NUMBERS, *OTHERS])
    if spec.choices is not None:
        return rng.choice(spec.choices) if spec.choices and kind < 0.8 else rng.choice(TEXTS)
    if spec.type in ("INT", "FLOAT"):
        least, most = spec.options.get("min", -1e9), spec.options.get("max", 1e9)
        cap = SIZES.get(spec.name, most)
        if kind < 0.65 or cap < most:
            most = cap
            value = rng.uniform(least, most)
            return int(value) if spec.type == "INT" else round(value, rng.randint(0, 6))
        return rng.choice([least, most, *NUMBERS])
    if spec.type == "BOOLEAN":
        return rng.random() < 0.5 if kind < 0.8 else rng.choice([*NUMBERS, *TEXTS])
    return rng.choice(TEXTS) if kind < 0.6 else random_text(rng)


def random_text(rng: random.Random) -> str:
    """Text near the grammars of `pyramid` and `dense_blocks`, or of any letters."""
    if rng.random() < 0.3:
        return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randint(1, 40)))
    parts = []
    for _ in range(rng.randint(1, 5)):
        factor = rng.choice([0, 1, 2, 3, 4, 8, 16, 64, 128, 999])
        share = rng.choice([0, 0.05, 0.1, 0.2, 0.5, 1, 1.5, -0.1])
        parts.append(rng.choice([f"{factor}: {share}", f"{factor}", f"{factor}-{factor + 2}", f"{share}", ""]))
    return rng.choice([", ", ",", ";", " "]).join(parts)


def sampled(model: list, definitions: dict) -> Prompt:
    """Nodes that sample `model` for two steps."""
    scene = {spec.name: default_value(spec) for spec in inputs_of(definitions["PSADemoScene"])}
    sampling = {
        "model": model, "positive": ["scene", 0], "negative": ["scene", 0], "latent_image": ["latent", 0], "seed": 1,
        "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    return {
        "scene": {"class_type": "PSADemoScene", "inputs": scene},
        "latent": {"class_type": SOURCES["LATENT"][0], "inputs": SOURCES["LATENT"][1]},
        "sampler": {"class_type": "KSampler", "inputs": sampling},
        "end": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["sampler", 0], "filename_prefix": "psa_fuzz/latent"},
        },
    }


def verdict(message: str) -> str:
    """What an error of a prompt counts as: ours, refused or failure."""
    if not message.startswith("ComfyUI refused the prompt"):
        return "ours" if OUR_WORDS.search(message) else "failure"
    nothing_said = message.startswith("ComfyUI refused the prompt: no reason given")
    raised = "Exception when validating" in message
    strange = "Custom validation failed" in message and not OUR_REFUSAL.search(message)
    return "failure" if nothing_said or raised or strange else "refused"


def run_case(server: ComfyServer, client: Client, case: Case) -> tuple[str, str]:
    """How a case ended: success, refused, ours or failure, and what was said.

    Raises:
        Failure: the server died.
    """
    try:
        client.run(case.prompt, timeout=SECONDS)
    except PromptFailed as error:
        return verdict(str(error)), str(error)
    except (Failure, urllib.error.URLError, OSError) as error:
        try:
            server.check_alive()
        except Failure as death:
            raise Failure(f"The server died at {case}\n{death}") from error
        return "failure", f"{type(error).__name__}: {error}"
    return "success", ""

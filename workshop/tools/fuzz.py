"""`python dev.py fuzz`: sends random and hostile inputs and files to the nodes of a real server, thousands of times.

A case is one prompt with one node of the pack. It may succeed, be refused by ComfyUI's own checks, or end with one of
the pack's own error messages. Anything else is a failure: another error, no reason given, or a dead server.
Half of the cases have random inputs, the other half name a file from `fuzz_files`.
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

OUR_ERROR = re.compile(r"failed: PSA [A-Z][\w ]*(,| needs|:)")
"""How the pack's own errors begin: the node's name, then what was wrong."""
OUR_REFUSAL = re.compile(r" - PSA [A-Z][\w ]*(,| needs|:)")
"""The same when the pack refuses a prompt before it runs."""
NOT_FUZZED = {"PSALoraDownload": "it would use the network", "PSACalibrate": "each case would sample for a minute"}
SECONDS = 120
"""A case that takes longer is a failure."""
SAMPLE_EVERY = 50
"""How often a node that patches a model also gets to sample it, for two steps."""
PATCHING = ("PSAPatch", "PSALoraLoader")
FILE_INPUTS = {
    "PSACogVideoXLoader": "checkpoint",
    "PSALoraLoader": "lora_name",
    "PSAPatch": "preset",
    "PSACalibrate": "preset",
    "PSAPyramid": "save_as",
}
"""Nodes that read or write a file, and the input that names it."""
FILE_NAMES = [
    "", ".", "..", "../x", "a/b", "a\\b", "C:\\x", "nul", "x\n", "\x00", "é" * 65, "good", "user/good", "user/../x",
    "folder",
    "circle", "psa_fuzz/gone.safetensors", "psa_fuzz\\good.safetensors", "psa_fuzz/../psa_fuzz/good.safetensors",
    "/dev/zero",
]  # fmt: skip
"""File names that no menu lists."""

SIZES = {"width": 64, "height": 64, "length": 9, "batch_size": 2, "steps": 50}
"""Inputs whose allowed values may exceed a machine's memory or time: no allowed value above these limits is tried."""

SOURCES: dict[str, tuple[str, dict]] = {
    "MODEL": ("UNETLoader", {"unet_name": "psa_demo_wan_dit.safetensors", "weight_dtype": "default"}),
    "VAE": ("VAELoader", {"vae_name": "psa_demo_wan_vae.safetensors"}),
    "LATENT": ("EmptyHunyuanLatentVideo", {"width": 256, "height": 192, "length": 9, "batch_size": 1}),
    "IMAGE": ("EmptyImage", {"width": 64, "height": 48, "batch_size": 1, "color": 0}),
    "CONDITIONING": ("PSADemoScene", {}),
}
"""What to connect to an input that needs a link."""

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
ODD_VALUES = [None, True, False, [], {}, [[]], ["1"], [1, 2, 3], {"a": {"b": []}}, [0] * 10_000]
"""No links: how ComfyUI handles a link to nowhere is not our concern (in 0.30 one ends its worker)."""


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
    """Run `cases` cases, print every failure and the totals, and return the number of failures.

    Raises:
        Failure: the server died; the message names the case.
    """
    with tempfile.TemporaryDirectory(prefix="psa-fuzz-") as home, running_server(comfyui, home=Path(home)) as server:
        client = Client(server.url)
        return fuzz(server, client, cases, seed, print)


def fuzz(server: ComfyServer, client: Client, cases: int, seed: int, say: Callable[[str], None]) -> int:
    """Like `run_fuzz`, on a running server; the files are removed from it afterwards."""
    with corpus(server.home, seed):
        return _fuzz(server, client, cases, seed, say)


def _fuzz(server: ComfyServer, client: Client, cases: int, seed: int, say: Callable[[str], None]) -> int:
    rng, definitions = random.Random(seed), client.get("/object_info")
    nodes = [name for name in sorted(definitions) if name.startswith("PSA") and name not in NOT_FUZZED]
    nodes = [name for name in nodes if required_links(definitions[name]) is not None]
    outcomes: Counter[str] = Counter()
    for number in range(cases):
        if number % 2:
            node = rng.choice(list(FILE_INPUTS))
            case = make_case(rng, number, node, definitions, random_file(rng, node, definitions))
        else:  # half of these go to the node with the most inputs
            node = "PSAPatch" if rng.random() < 0.5 else rng.choice(nodes)
            case = make_case(rng, number, node, definitions)
        outcome, message = run_case(server, client, case)
        outcomes[outcome] += 1
        if outcome == "failure":
            say(f"{case}\n    {message[:600]}")
        elif number % 500 == 499:
            say(f"  {number + 1} cases: {dict(outcomes)}")
    say(
        f"seed {seed}: {outcomes['success']} succeeded, {outcomes['refused']} refused by ComfyUI, "
        f"{outcomes['ours']} by the pack"
    )
    say(f"{cases} cases, {outcomes['failure']} failures")
    return outcomes["failure"]


def required_links(definition: dict) -> dict[str, str] | None:
    """Input name -> type for the node inputs that need a link; None if `SOURCES` lacks one of the types."""
    needed = {spec.name: spec.type for spec in inputs_of(definition) if spec.required and not spec.is_widget}
    return needed if all(kind in SOURCES for kind in needed.values()) else None


def random_file(rng: random.Random, node: str, definitions: dict) -> str:
    """A file name for `node`'s file input: mostly one of the files made for it, otherwise one that is not listed."""
    (spec,) = (spec for spec in inputs_of(definitions[node]) if spec.name == FILE_INPUTS[node])
    made = [name for name in spec.choices or () if FOLDER in name or name.startswith("user/")]
    if node == "PSACalibrate":  # with a good preset it would sample for a minute
        made = [name for name in made if name.removeprefix("user/") not in GOOD_PRESETS]
    return rng.choice(made) if made and rng.random() < 0.9 else rng.choice(FILE_NAMES)


def make_case(rng: random.Random, number: int, node: str, definitions: dict, file: str | None = None) -> Case:
    """A prompt with `node` at its defaults, except one to four inputs changed or left out, and rarely an unknown one.

    With `file`: its defaults and that file.
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
        inputs["no_such_input"] = rng.choice(ODD_VALUES)
    prompt: Prompt = {}
    links = {}
    for name, kind in required_links(definitions[node]).items():
        class_type, values = SOURCES[kind]
        if class_type == "PSADemoScene":
            values = {spec.name: default_value(spec) for spec in inputs_of(definitions[class_type])}
        prompt[kind.lower()] = {"class_type": class_type, "inputs": values}
        links[name] = [kind.lower(), 0]
    if links and rng.random() < 0.02:
        links[rng.choice(list(links))] = rng.choice(ODD_VALUES)
    prompt["node"] = {"class_type": node, "inputs": inputs | links}
    if node in PATCHING and number % SAMPLE_EVERY < 2:
        prompt |= sampling_nodes(["node", 0], definitions)
    elif definitions[node]["output"]:
        prompt["end"] = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
    return Case(number, node, inputs, prompt)


def random_value(rng: random.Random, spec: Input) -> object:
    """A value for a widget: an allowed one, one at its limits, one of the right type, or anything at all."""
    kind = rng.random()
    if kind < 0.15 and spec.name not in SIZES:
        return rng.choice([*TEXTS, *NUMBERS, *ODD_VALUES])
    if spec.choices is not None:
        return rng.choice(spec.choices) if spec.choices and kind < 0.8 else rng.choice(TEXTS)
    if spec.type in ("INT", "FLOAT"):
        low, high = spec.options.get("min", -1e9), spec.options.get("max", 1e9)
        cap = SIZES.get(spec.name, high)
        if kind < 0.65 or cap < high:
            value = rng.uniform(low, cap)
            return int(value) if spec.type == "INT" else round(value, rng.randint(0, 6))
        return rng.choice([low, high, *NUMBERS])
    if spec.type == "BOOLEAN":
        return rng.random() < 0.5 if kind < 0.8 else rng.choice([*NUMBERS, *TEXTS])
    return rng.choice(TEXTS) if kind < 0.6 else random_text(rng)


def random_text(rng: random.Random) -> str:
    """Text that resembles the syntax of `pyramid` and `dense_blocks`, or random characters."""
    if rng.random() < 0.3:
        return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randint(1, 40)))
    parts = []
    for _ in range(rng.randint(1, 5)):
        factor = rng.choice([0, 1, 2, 3, 4, 8, 16, 64, 128, 999])
        share = rng.choice([0, 0.05, 0.1, 0.2, 0.5, 1, 1.5, -0.1])
        parts.append(rng.choice([f"{factor}: {share}", f"{factor}", f"{factor}-{factor + 2}", f"{share}", ""]))
    return rng.choice([", ", ",", ";", " "]).join(parts)


def sampling_nodes(model: list, definitions: dict) -> Prompt:
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
    """What a prompt's error counts as: ours, refused or failure."""
    if not message.startswith("ComfyUI refused the prompt"):
        return "ours" if OUR_ERROR.search(message) else "failure"
    no_reason = message.startswith("ComfyUI refused the prompt: no reason given")
    raised = "Exception when validating" in message
    foreign = "Custom validation failed" in message and not OUR_REFUSAL.search(message)
    return "failure" if no_reason or raised or foreign else "refused"


def run_case(server: ComfyServer, client: Client, case: Case) -> tuple[str, str]:
    """How a case ended (success, refused, ours or failure), and its error message.

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

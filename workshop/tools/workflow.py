"""Converts workflows in the frontend's format to API prompts, and checks them against a server's node definitions.

Supports what the files in `workflows/` use: links, widgets, notes, muted and bypassed nodes, but no subgraphs, reroutes
or primitive nodes. `definitions` is always what `/object_info` returns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .client import Prompt
from .terminal import Failure

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
NOTES = ("Note", "MarkdownNote")
MODE_MUTED, MODE_BYPASSED = 2, 4
FILE_INPUTS = (
    "unet_name",
    "vae_name",
    "clip_name",
    "clip_name1",
    "clip_name2",
    "text_encoder",
    "ckpt_name",
    "image",
    "checkpoint",
    "lora_name",
)
"""Widgets whose choices are whatever files a server has."""


@dataclass(frozen=True)
class Input:
    """One input of a node definition."""

    name: str
    type: str
    options: dict
    required: bool

    @property
    def widget(self) -> str:
        """The type of its widget: its own, or the one it names if it takes links of several types."""
        return self.options.get("widgetType") or self.type

    @property
    def is_widget(self) -> bool:
        return self.widget in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def choices(self) -> list | None:
        """The allowed values of a combo, otherwise None."""
        found = self.options.get("options")
        if self.widget == "COMFY_DYNAMICCOMBO_V3":
            return [option["key"] for option in found]
        return found if self.widget == "COMBO" else None

    @property
    def companion(self) -> str | None:
        """Value of the extra widget that the frontend adds after this one and saves too, or None."""
        if self.widget == "INT" and (self.options.get("control_after_generate") or self.name in ("seed", "noise_seed")):
            return "fixed"
        return "image" if self.options.get("image_upload") else None


def inputs_of(definition: dict) -> Iterator[Input]:
    """The inputs of a node definition in the frontend's order."""
    for section in ("required", "optional"):
        for name, (kind, *rest) in definition["input"].get(section, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):  # the older notation for a combo
                kind, options["options"] = "COMBO", kind
            yield Input(name, kind, options, section == "required")


def load_workflow(path: Path) -> dict:
    """Read a workflow file."""
    return json.loads(path.read_text(encoding="utf-8"))


def graph_to_prompt(workflow: dict, definitions: dict) -> Prompt:
    """Convert the way the frontend does when queueing: skip notes and muted nodes, pass through bypassed ones.

    Raises:
        Failure: the server does not know a node's class.
    """
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link[0]: link for link in workflow["links"]}
    prompt: Prompt = {}
    for node in nodes.values():
        if node["mode"] in (MODE_MUTED, MODE_BYPASSED):
            continue
        if node["type"] not in definitions:
            raise Failure(f"ComfyUI has no node {node['type']!r}; is its node pack installed and loaded?")
        values = widget_values(node, definitions[node["type"]])
        for slot in node.get("inputs", []):
            source = _source(links, nodes, slot.get("link"))
            if source is not None:
                values[slot["name"]] = [str(source[0]), source[1]]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": values,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def widget_values(node: dict, definition: dict) -> dict:
    """Widget name -> value, from the node's `widgets_values`; missing values take their defaults."""
    saved = iter(node.get("widgets_values") or [])
    values = {}
    for spec in inputs_of(definition):
        if not spec.is_widget:
            continue
        value = next(saved, default_value(spec))
        if value is not None:
            values[spec.name] = value
        if spec.companion is not None:
            next(saved, None)
    return values


def default_value(spec: Input) -> object:
    """The value that the frontend gives a new widget."""
    blank = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
    return spec.options.get("default", (spec.choices or [None])[0] if spec.choices is not None else blank[spec.widget])


def _source(links: dict, nodes: dict, link_id: int | None) -> tuple[int, int] | None:
    """(node id, output slot) that actually feeds a link, past any bypassed nodes; None if nothing does."""
    while link_id is not None:
        _, origin, slot, _, _, kind = links[link_id]
        node = nodes[origin]
        if node["mode"] == MODE_MUTED:
            return None
        if node["mode"] != MODE_BYPASSED:
            return origin, slot
        # A bypassed node passes on the input in the same position if its type fits, otherwise the first that fits.
        inputs = node.get("inputs", [])
        candidates = [*inputs[slot : slot + 1], *inputs]
        link_id = next((found["link"] for found in candidates if found["type"] == kind), None)
    return None


def find_problems(workflow: dict, definitions: dict) -> list[str]:
    """Everything in a workflow that does not match the node definitions, one sentence each; empty if it all does."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    problems = []
    for node in nodes.values():
        where = f"node {node['id']} ({node['type']})"
        if node["type"] not in definitions:
            problems.append(f"{where}: the server does not know this class")
            continue
        problems += [f"{where}: {text}" for text in _input_problems(node, definitions[node["type"]])]
    for link in workflow["links"]:
        problems += [f"link {link[0]}: {text}" for text in _link_problems(link, nodes, definitions)]
    return problems


def _input_problems(node: dict, definition: dict) -> Iterator[str]:
    linked = {slot["name"] for slot in node.get("inputs", []) if slot.get("link") is not None}
    specs = list(inputs_of(definition))
    widgets = [spec for spec in specs if spec.is_widget]
    expected = len(widgets) + sum(spec.companion is not None for spec in widgets)
    if len(node.get("widgets_values") or []) != expected:
        yield f"has {len(node.get('widgets_values') or [])} widget values, not {expected}"
    values = widget_values(node, definition)
    for spec in specs:
        if spec.name in linked:
            continue
        if spec.is_widget:
            problem = _value_problem(values.get(spec.name), spec)
            if problem:
                yield f"{spec.name}: {problem}"
        elif spec.required:
            yield f"{spec.name}: required input is not connected"
    yield from (f"{name}: no such input" for name in linked - {spec.name for spec in specs})


def _value_problem(value: object, spec: Input) -> str | None:
    if spec.choices is not None:
        allowed = spec.name in FILE_INPUTS or value in spec.choices
        return None if allowed else f"{value!r} is not one of {spec.choices}"
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[spec.widget]
    if not isinstance(value, types) or (isinstance(value, bool) and spec.widget != "BOOLEAN"):
        return f"{value!r} is not of type {spec.widget}"
    low, high = spec.options.get("min"), spec.options.get("max")
    if (low is not None and value < low) or (high is not None and value > high):
        return f"{value!r} is not between {low} and {high}"
    return None


def _link_problems(link: list, nodes: dict, definitions: dict) -> Iterator[str]:
    link_id, origin, slot, target, target_slot, kind = link
    if origin not in nodes or target not in nodes:
        yield "one of its ends is missing"
        return
    source, sink = nodes[origin], nodes[target]
    if link_id not in (source["outputs"][slot].get("links") or []) or sink["inputs"][target_slot]["link"] != link_id:
        yield "the nodes at its ends do not list it"
    if source["type"] not in definitions or sink["type"] not in definitions:
        return
    offered = definitions[source["type"]]["output"]
    if slot >= len(offered) or offered[slot] != kind:
        yield f"{source['type']} has no output {slot} of type {kind}"
    wanted = {spec.name: spec.type for spec in inputs_of(definitions[sink["type"]])}
    name = sink["inputs"][target_slot]["name"]
    if kind not in wanted.get(name, "").split(",") and wanted.get(name) != "*":
        yield f"{sink['type']}'s input {name} does not accept {kind}"

"""Lays out a workflow in the frontend's format: groups side by side, the nodes of a group stacked vertically.

Supports only what `build_workflows.py` needs: no subgraphs, no widgets converted to inputs. Widget order and types come
from a server's node definitions, so a changed schema needs no change here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .workflow import default_value, inputs_of

GAP, PADDING, GROUP_TITLE = 40, 20, 60
TITLE, ROW = 30, 24
TEXT_HEIGHT = 130
# Room for what web/psa.js adds to a node, for previews, and for the higher rows of Nodes 2.0 where a node has many.
ROOM = {
    "PSAPatch": 230,
    "PSAPyramid": 180,
    "PSAReport": 410,
    "PSACompare": 60,
    "PSADemoScene": 60,
    "SaveAnimatedWEBP": 360,
}
FOLDED = ("PSAPatch", "PSAPyramid")
"""Nodes that show a button instead of their advanced inputs, with both renderers."""
COLOURS = {"blue": "#3f789e", "green": "#3f9e6b", "violet": "#7a5fa8", "grey": "#6b7280"}


@dataclass(frozen=True)
class Output:
    """One output of a node on the canvas, to connect to another node's input."""

    node: int
    slot: int
    type: str


class Canvas:
    """A workflow under construction. `definitions` is what `/object_info` returns."""

    def __init__(self, definitions: dict) -> None:
        self._definitions = definitions
        self._nodes: list[dict] = []
        self._links: list[list] = []
        self._groups: list[dict] = []
        self._x = self._y = 0
        self._width = 0

    @contextmanager
    def group(self, title: str, colour: str = "blue", width: int = 360) -> Iterator[None]:
        """Stack the nodes added inside the `with` block in a titled frame."""
        self._y, self._width = GROUP_TITLE, width
        self._x += PADDING
        yield
        frame = [self._x - PADDING, 0, width + 2 * PADDING, self._y - GAP + PADDING]
        self._groups.append(
            {
                "id": len(self._groups) + 1,
                "title": title,
                "bounding": frame,
                "color": COLOURS[colour],
                "font_size": 24,
                "flags": {},
            }
        )
        self._x += width + PADDING + GAP

    def note(self, markdown: str, height: int, title: str = "Note") -> None:
        """Add a note for the reader."""
        self._place("MarkdownNote", title, [markdown.strip()], [], [], height)

    def add(self, class_type: str, title: str | None = None, models: Sequence[dict] = (), **given: object) -> Node:
        """Add a node.

        Args:
            class_type: the server's name for it.
            title: shown in its header; None shows its own name.
            models: what the frontend offers to download, as `properties.models`.
            given: input name -> `Output` of another node, or the widget's value; other inputs keep their defaults.

        Raises:
            ValueError: the class has no such input.
        """
        definition = self._definitions[class_type]
        specs = list(inputs_of(definition))
        unknown = set(given) - {spec.name for spec in specs}
        if unknown:
            raise ValueError(f"{class_type} has no input {', '.join(sorted(unknown))}")
        inputs, values, text, hidden = [], [], 0, 0
        for spec in specs:
            if not spec.is_widget:
                optional = {} if spec.required else {"shape": 7}
                inputs.append({"name": spec.name, "type": spec.type, **optional, "link": None})
                continue
            values.append(given.get(spec.name, default_value(spec)))
            text += TEXT_HEIGHT * bool(spec.options.get("multiline"))
            hidden += class_type in FOLDED and bool(spec.options.get("advanced"))
            if spec.companion is not None:
                values.append(spec.companion)
        names = definition.get("output_name") or definition["output"]
        outputs = [
            {"name": name, "type": kind, "slot_index": slot, "links": []}
            for slot, (name, kind) in enumerate(zip(names, definition["output"], strict=True))
        ]
        rows = max(len(inputs), len(outputs)) + len(values) - hidden + bool(hidden)
        height = TITLE + ROW * rows + text + 10
        height += ROOM.get(class_type, 0)
        node = self._place(class_type, title, values, inputs, outputs, height)
        if models:
            node["properties"]["models"] = list(models)
        for slot, entry in enumerate(inputs):
            source = given.get(entry["name"])
            if isinstance(source, Node):
                source = source.output(entry["type"])
            if isinstance(source, Output):
                self._connect(source, node["id"], slot)
        return Node(node["id"], outputs)

    def _connect(self, source: Output, target: int, slot: int) -> None:
        link = len(self._links) + 1
        self._links.append([link, source.node, source.slot, target, slot, source.type])
        self._nodes[source.node - 1]["outputs"][source.slot]["links"].append(link)
        self._nodes[target - 1]["inputs"][slot]["link"] = link

    def _place(self, kind: str, title: str | None, values: list, inputs: list, outputs: list, height: int) -> dict:
        number = len(self._nodes) + 1
        node = {
            "id": number,
            "type": kind,
            "pos": [self._x, self._y],
            "size": [self._width, height],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            **({"title": title} if title else {}),
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
        self._nodes.append(node)
        self._y += height + TITLE + GAP
        return node

    def save(self, path: Path) -> None:
        """Write the workflow with one node or link per line, so that a changed node is one changed line."""
        workflow = {
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": self._groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 120]}},
            "version": 0.4,
        }
        lines = []
        for name, value in workflow.items():
            text = json.dumps(value, ensure_ascii=False)
            if name in ("nodes", "links", "groups"):
                text = "[\n" + ",\n".join("    " + json.dumps(item, ensure_ascii=False) for item in value) + "\n  ]"
            lines.append(f'  "{name}": {text}')
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@dataclass(frozen=True)
class Node:
    """A node on the canvas. Passed as an input, it stands for its only output of the input's type."""

    id: int
    outputs: list[dict]

    def output(self, name_or_type: str) -> Output:
        """The output with that name or, failing that, of that type.

        Raises:
            ValueError: there is none, or more than one.
        """
        for key in ("name", "type"):
            found = [slot for slot, output in enumerate(self.outputs) if output[key] == name_or_type]
            if len(found) == 1:
                return Output(self.id, found[0], self.outputs[found[0]]["type"])
        raise ValueError(f"node {self.id} does not have exactly one output {name_or_type}")

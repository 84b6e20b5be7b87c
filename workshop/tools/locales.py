"""Writes `locales/en/nodeDefs.json` from a server's node definitions, as `python dev.py workflows` does.

English is what the schemas say; the other languages are written by hand beside it, and `tests/comfyui/test_locales.py`
says what they lack.
"""

from __future__ import annotations

import json
from pathlib import Path

from .workflow import inputs_of

PREFIX = "PSA"


def english(definitions: dict) -> dict:
    """Node id -> names and tooltips in the frontend's `nodeDefs.json` format; `definitions` answers `/object_info`."""
    nodes = {}
    for name, definition in sorted(definitions.items()):
        if not name.startswith(PREFIX):
            continue
        inputs = {
            spec.name: {"name": spec.options.get("display_name") or spec.name, "tooltip": spec.options["tooltip"]}
            for spec in inputs_of(definition)
        }
        outputs = {}
        tooltips = definition.get("output_tooltips") or []
        for slot, label in enumerate(definition["output_name"]):
            tooltip = tooltips[slot] if slot < len(tooltips) else None
            outputs[str(slot)] = {"name": label, **({"tooltip": tooltip} if tooltip else {})}
        nodes[name] = {
            "display_name": definition["display_name"],
            "description": definition["description"],
            "inputs": inputs,
            "outputs": outputs,
        }
    return nodes


def write_english(definitions: dict, folder: Path) -> Path:
    """Write the English file below `folder` and return its path."""
    path = folder / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(english(definitions), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path

"""Writes `locales/en/nodeDefs.json` from a server's node definitions, for `python dev.py workflows`.

The English text comes from the schemas. Other languages are translated by hand; `tests/comfyui/test_locales.py` reports
what they are missing.
"""

from __future__ import annotations

import json
from pathlib import Path

from .workflow import inputs_of

PREFIX = "PSA"


def english(definitions: dict) -> dict:
    """Node id -> names and tooltips, as in the frontend's `nodeDefs.json`; `definitions` comes from `/object_info`."""
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
    """Write the English file into `folder`/en and return its path."""
    path = folder / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(english(definitions), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path

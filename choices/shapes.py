"""What the page needs to draw a setting before it runs: the shape of every preset, as plain data."""

from __future__ import annotations

from .settings import AUTO, AUTO_PRESETS
from .user_presets import usable_presets

# The first of AUTO_PRESETS is drawn until the node has run with a model and told which preset it was (live.py).
_DRAWN = ("mode", "shares", "tail", "block_kv", "importance", "similarity_cap")


def preset_shapes() -> dict[str, dict]:
    """Preset name -> what `web/expectation.js` reads of it; `auto` is the one that most models get."""
    presets = usable_presets()
    shapes = {
        name: {
            **{field: preset.settings[field] for field in _DRAWN if field in preset.settings},
            "as_written": not preset.is_scaled,
            "sparsity": preset.sparsity,
            "about": preset.about,
        }
        for name, preset in presets.items()
    }
    for shape in shapes.values():
        shape["shares"] = {str(factor): share for factor, share in shape["shares"].items()}
        shape["capped"] = bool(shape.pop("similarity_cap", None))
        shape.setdefault("block_kv", 64)
    return {AUTO: shapes[AUTO_PRESETS[0]], **shapes}

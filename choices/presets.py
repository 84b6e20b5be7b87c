"""Presets: the published settings of PSA, unchanged, and ours derived from each.

The published numbers are in `presets.json` (arXiv 2512.04025 and the official release; shares are the differences of
its cumulative bounds). A published preset computes what the paper describes, with sampled importance. Ours keeps the
levels but meets the slider (budget mode instead of threshold). It ranks blocks of 128 queries and 64 keys by the mean
weight of pooled tokens, with a quarter of the published scores. Other differences are under "ours" in the file. The
tail, which is not in the paper, is off: on the demo model it costs more than it gives. "evidence" names the page that
measures ours. "menu" names the one of the two, "ours" or "published", that the nodes offer; the others can be written
into a prompt, and stay in workflows that have them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..kernels.config import ConfigError, PyramidConfig
from .correction import AUTO, OFF, OURS, Correction

PUBLISHED_SUFFIX = " (published)"
_NOT_SETTINGS = ("about", "dense_steps", "published", "ours", "evidence", "menu")
RANKING = {"importance": "pooled", "reduction": "mean"}
"""How our presets rank blocks."""
OWN_SHAPE = {"mode": "topk", "tail": False, "order": "curve", **RANKING}
"""Defaults for the user's own levels, in PSA Pyramid and in a preset file."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named setting.

    Attributes:
        about: a sentence; settings: fields of `PyramidConfig`, without `sparsity`.
        dense_steps: how many of a run's first steps stay dense; None if a share of the schedule decides.
        evidence: page of this repository that measures it against others; empty if there is none.
        sparsity: the target that it was made for, a suggestion to the user, or None.
        correction: how its sparse calls are corrected; None if they are not, unless the user asks for it.
        in_menu: whether the nodes offer it.
        as_written: True uses the shares as they are; a target sparsity then has no effect.
    """

    name: str
    about: str
    settings: dict[str, Any]
    sparsity: float | None = None
    as_written: bool = False
    dense_steps: int | None = None
    evidence: str = ""
    correction: Correction | None = OURS
    in_menu: bool = True

    @property
    def is_scaled(self) -> bool:
        """Whether the shares are scaled to meet a target sparsity. Otherwise they are used as written: in threshold
        mode, where density follows the data, or because the preset is `as_written`."""
        return not self.as_written and self.settings["mode"] != "threshold"

    def correction_of_size(self, size: str) -> Correction | None:
        """The correction of a size in `CORRECTIONS`; auto leaves it to the preset whether there is one."""
        if size == OFF or (size == AUTO and self.correction is None):
            return None
        return dataclasses.replace(self.correction or OURS, size=size)

    def config(self, sparsity: float | None, **changes: Any) -> PyramidConfig:
        """The configuration with other settings in it, at a target sparsity if the shares are scaled.

        Raises:
            ConfigError: the combination is impossible.
        """
        changed = dataclasses.replace(self, settings={**self.settings, **changes})
        if changed.settings["mode"] == "budget" and self.as_written:
            if "mode" in changes:
                allowed = "topk or threshold with a preset whose levels are used as written"
                raise ConfigError("mode", "budget", allowed, "set mode to topk")
            allowed = "off in budget mode, which always meets the sparsity slider"
            raise ConfigError("as_written", True, allowed, "turn as_written off, or set mode to threshold")
        return PyramidConfig(sparsity=sparsity if changed.is_scaled else None, **changed.settings)

    def unscaled(self) -> PyramidConfig:
        """The levels alone, without a target sparsity. Budget mode needs one; here it cuts the mass like threshold
        mode.

        Raises:
            ConfigError: the levels are impossible.
        """
        mode = self.settings["mode"]
        return self.config(None, **({"mode": "threshold"} if mode == "budget" and not self.as_written else {}))


def load_presets(path: Path | None = None) -> dict[str, Preset]:
    """All presets by name: for every entry of the file ours under its name, and the published one too if there is
    one."""
    entries = json.loads((path or Path(__file__).with_name("presets.json")).read_text(encoding="utf-8"))
    presets: dict[str, Preset] = {}
    for name, entry in entries.items():
        settings = {key: value for key, value in entry.items() if key not in _NOT_SETTINGS}
        for field in ("shares", "similarity_cap"):
            settings[field] = {int(factor): share for factor, share in settings.get(field, {}).items()}
        # In a threshold preset the slider would have no effect; in budget mode the levels meet it.
        mode = "budget" if settings["mode"] == "threshold" else settings["mode"]
        ours = {"mode": mode, "shares": settings["shares"], "order": settings["order"], "tail": False}
        ours |= RANKING | entry.get("ours", {})
        steps = ours.pop("dense_steps", None)
        # null: a preset without a dense step would need one more, a quarter of a run of four steps.
        given = ours.pop("correction", {})
        correction = None if given is None else Correction(**given)
        about = f"{entry['about']}: its pyramid, met to the slider's sparsity"
        evidence = entry.get("evidence", "")
        menu = entry.get("menu")
        presets[name] = Preset(
            name,
            about,
            ours,
            dense_steps=steps,
            evidence=evidence,
            correction=correction,
            in_menu=menu == "ours",
        )
        if not entry.get("published", True):
            continue
        published = settings | {"tail": False, "importance": "sampled", "reduction": "max"}
        about = f"{entry['about']}, as published (dense steps: {entry['dense_steps']})"
        name += PUBLISHED_SUFFIX
        presets[name] = Preset(name, about, published, correction=None, in_menu=menu == "published")
    return presets

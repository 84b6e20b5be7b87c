"""The list of settings as data: for the paper's claims, for claims beyond them, rivals, and the published presets.

Nothing is computed here. Compute is the whole run's attention FLOPs as a share of the dense run's, see `setting.py`.
The most important settings come first, in case a run is cut short.
"""

from __future__ import annotations

from typing import Any

from .corrections import corrections
from .gallery import gallery
from .rivals import rivals
from .setting import Setting
from .tries import tries

LEAN, MIDDLE = 0.3625, 0.4375
"""A quarter of the steps dense, and the others at sparsity 0.85 or 0.75."""
FRONT = (1 / 3, 1 / 2, 2 / 3)
"""3x, 2x and 1.5x less attention compute."""
ALL = (LEAN, MIDDLE, *FRONT)

PUBLISHED = {
    # preset: start_percent, the published share of dense steps; module-default has none, so it gets the same as others
    "wan2.1-14b": 0.30,
    "wan2.1-1.3b": 0.30,
    "wan2.1-1.3b-topk": 0.30,
    "wan2.2-a14b": 0.30,
    "wan2.2-5b": 0.30,
    "cogvideox1.5-5b": 0.30,
    "cogvideox-5b": 0.30,
    "cogvideox-5b-4step": 0.0,
    "module-default": 0.30,
}
_WRITTEN_SPARSITY = {"wan2.1-1.3b-topk": 0.90, "cogvideox-5b-4step": 0.84375}
"""1 - density of the shares as written, if it is not 0.85 (topk presets)."""
QUICK = ("cogvideox1.5-5b", "wan2.1-1.3b-topk")
"""The quick run's published presets: those that came closest to our default at equal compute in the full run."""

TAUS = (0.5, 1.0, 1.5, 2.0)
"""Sol-Attn's thresholds: standard deviations above the row's mean at which a block is seen in full."""
PAPER = {"preset": "module-default (published)", "order": "curve"}
"""The paper's recipe in one setting: topk 10/5/0/20, curve order, sampled importance, 128/64, a quarter dense."""
BUDGETS = {
    "40/10/10/20": "1: 0.40, 2: 0.10, 4: 0.10, 8: 0.20",
    "50/10/10/10": "1: 0.50, 2: 0.10, 4: 0.10, 8: 0.10",
    "70/10/10": "1: 0.70, 4: 0.10, 8: 0.10",
    "60/0/0/30": "1: 0.60, 8: 0.30",
    "80": "1: 0.80",
}


def settings_of(kind: str, blocks: int = 6) -> list[Setting]:
    """The list of a run of a model of so many blocks, each name once.

    kind: `full`, `quick`, `smoke`, `velocity`, `candidates`, `corrections`, `tries`, `rivals` or `gallery`.

    Raises:
        ValueError: no such list.
    """
    if kind == "quick":
        return _published(QUICK)
    if kind in LISTS:
        return LISTS[kind]()
    if kind == "smoke":
        wanted = ("default", "block-sparse", "radial mask", "levels kept for 2 steps", "fresh sample 0")
        chosen = [s for s in settings_of("full", blocks) if s.name.rsplit(" @", 1)[0] in wanted and s.compute == LEAN]
        return [*chosen, *_published(("wan2.1-14b",))]
    if kind != "full":
        raise ValueError(f"no list of settings is called {kind!r}")
    found: dict[str, Setting] = {}
    for setting in [*_front(), *_published(tuple(PUBLISHED), ramp=True), *_paper(), *_beyond(blocks), *_noise()]:
        found.setdefault(setting.name, setting)
    return list(found.values())


def _at(name: str, group: str, compute: tuple[float, ...], node: dict[str, Any], **more: Any) -> list[Setting]:
    return [Setting(f"{name} @{c:.2f}", group, node, compute=c, **more) for c in compute]


def _front() -> list[Setting]:
    """Quality against compute: settings a user might choose, and rivals."""
    full = PAPER | {"pyramid": "1: 1.0", "sparsity": 0.0}
    return [
        Setting("all blocks in full", "front", full),  # the loss from precision alone
        *_at("default", "front", ALL, {}, sheet=True),
        *_at("pooled by max", "front", ALL, PAPER | {"importance": "pooled"}, config={"reduction": "max"}),
        *_at("default, falling", "front", ALL, {"falling": 0.6}),
        *_at("paper", "front", ALL, PAPER, sheet=True),
        *_at("block-sparse", "front", ALL, PAPER | {"pyramid": "1: 0.25"}, sheet=True),
        *_at("radial mask", "front", ALL, PAPER | {"pyramid": "1: 0.25"}, prototype={"static": "radial"}, sheet=True),
        *_at("paper, raster", "front", ALL, PAPER | {"order": "raster"}),
        *_at("PSA-3", "front", ALL, PAPER | {"pyramid": "1: 0.15, 2: 0.10, 4: 0.20"}),
        *_at("budget 70/10/10, raster", "front", ALL, _budget("70/10/10", order="raster")),
        *_at("budget 70/10/10, raster, tail", "front", ALL, _budget("70/10/10", order="raster", tail="on")),
    ]


def _budget(name: str, **node: Any) -> dict[str, Any]:
    return PAPER | {"mode": "budget", "pyramid": BUDGETS[name]} | node


def _published(presets: tuple[str, ...], ramp: bool = False) -> list[Setting]:
    """Each published preset unchanged, and our default at the compute which that preset takes."""
    found = []
    for preset in presets:
        node = {"preset": f"{preset} (published)", "start_percent": PUBLISHED[preset]}
        node["sparsity"] = _WRITTEN_SPARSITY.get(preset, 0.85)
        found.append(Setting(f"{preset} (published)", "published", node))
        found.append(Setting(f"default = {preset}", "published", match=f"{preset} (published)"))
        if ramp:
            name = f"default, falling = {preset}"
            found.append(Setting(name, "published", {"falling": 0.6}, match=f"{preset} (published)"))
    return found


TILES = {"1x8x8": (1, 8, 8), "4x4x4": (4, 4, 4), "1x4x16": (1, 4, 16), "3x8x8": (3, 8, 8)}
LEVELS = {
    "10/5/0/20 to 64": "1: 0.10, 2: 0.05, 8: 0.20, 64: 0.65",
    "10/5/5/10/10/10": "1: 0.10, 2: 0.05, 4: 0.05, 8: 0.10, 16: 0.10, 32: 0.10",
    "10/0/10/0/20": "1: 0.10, 4: 0.10, 16: 0.20",
    "12/10": "1: 0.12, 2: 0.10",
    "12/0/15": "1: 0.12, 4: 0.15",
    "12/0/0/25": "1: 0.12, 8: 0.25",
}
RAMPS = {"1.6 to 0.4": (1.6, 0.4), "1.3 to 0.7": (1.3, 0.7), "0.7 to 1.3": (0.7, 1.3), "0.4 to 1.6": (0.4, 1.6)}


def _paper() -> list[Setting]:
    both = (LEAN, MIDDLE)
    found = []
    for name in ("40/10/10/20", "70/10/10"):
        node = PAPER | {"mode": "threshold", "pyramid": BUDGETS[name]}
        found.append(Setting(f"threshold {name}", "claims", node))
        found.append(Setting(f"topk = threshold {name}", "claims", PAPER, match=f"threshold {name}"))
        found.append(Setting(f"budget = threshold {name}", "claims", _budget(name), match=f"threshold {name}"))
    for name, blocks in (("128/128", (128, 128)), ("128/32", (128, 32)), ("64/64", (64, 64)), ("32/32", (32, 32))):
        node = PAPER | {"block_q": str(blocks[0]), "block_kv": str(blocks[1])}
        found += _at(f"paper, {name}", "claims", both, node)
        if name == "32/32":
            found += _at(f"paper, {name}, mean", "claims", both, node, config={"reduction": "mean"})
    found += _at("paper, mean", "claims", both, PAPER, config={"reduction": "mean"})
    wide = _budget("50/10/10/10", block_kv="128")
    cap = {"similarity_cap": {2: 0.70, 4: 0.65, 8: 0.60}}
    found += _at("budget 50/10/10/10, 128/128", "claims", both, wide)
    found += _at("budget 50/10/10/10, 128/128, cap", "claims", both, wide, config=cap)
    for name, shares in (
        ("PSA-2", "4: 1.0"),
        ("PSA-4", "1: 0.10, 2: 0.20, 4: 0.20"),
        ("PSA-5", "1: 0.10, 2: 0.10, 4: 0.40"),
    ):
        found += _at(name, "claims", (MIDDLE,), PAPER | {"pyramid": shares})
    for start in (0.0, 0.1, 0.2, 0.3, 0.4):
        found += _at(f"warm-up {start:.2f}", "claims", (MIDDLE, 0.5), PAPER | {"start_percent": start})
    return found


def _beyond(blocks: int) -> list[Setting]:
    both = (LEAN, MIDDLE)
    found = _at("paper, tail", "beyond", both, PAPER | {"tail": "on"})
    for name in BUDGETS:
        found += _at(f"budget {name}", "beyond", both, _budget(name))
        found += _at(f"budget {name}, raster", "beyond", both, _budget(name, order="raster"))
    found += _at("budget 40/10/10/20, tail", "beyond", both, _budget("40/10/10/20", tail="on"))
    for order in ("curve", "raster"):
        suffix = "" if order == "curve" else ", raster"
        node = PAPER | {"order": order}
        found += _at(f"paper{suffix}, pooled", "beyond", both, node | {"importance": "pooled"})
        found += _at(f"paper{suffix}, means", "beyond", both, node | {"importance": "means"})
        exact = {"sample_share": 1.0, "reduction": "mean"}
        found += _at(f"paper{suffix}, exact", "beyond", both, node, config=exact)
    for name, tile in TILES.items():
        found += _at(f"paper, tiles {name}", "beyond", both, PAPER | {"order": "tiles"}, config={"tile": tile})
    for name, pyramid in LEVELS.items():
        found += _at(f"levels {name}", "beyond", both, PAPER | {"pyramid": pyramid})
    for block in range(blocks):
        found += _at(f"block {block} dense", "beyond", (MIDDLE,), PAPER | {"dense_blocks": str(block)})
    for name, ramp in RAMPS.items():
        found += _at(f"ramp {name}", "beyond", (MIDDLE,), PAPER, prototype={"ramp": ramp})
    for name, (first, last) in {"1.5 to 0.5": (1.5, 0.5), "0.5 to 1.5": (0.5, 1.5)}.items():
        layers = {str(block): first + (last - first) * block / max(1, blocks - 1) for block in range(blocks)}
        found += _at(f"layers {name}", "beyond", both, {}, prototype={"layers": layers})
    ends = PAPER | {"start_percent": 0.15, "end_percent": 0.9}
    found += _at("dense 15 % first, 10 % last", "beyond", (MIDDLE,), ends)
    for n in (2, 4, 100):
        found += _at(f"levels kept for {n} steps", "beyond", both, PAPER, prototype={"reuse": n})
    for tau in TAUS:
        node = PAPER | {"pyramid": "1: 0.25", "order": "raster"}  # ComfyUI's node leaves the tokens where they are
        found.append(Setting(f"Sol-Attn, tau {tau}", "rivals", node, prototype={"sol": tau}))
        found.append(Setting(f"default = Sol-Attn, tau {tau}", "rivals", match=f"Sol-Attn, tau {tau}"))
        found.append(Setting(f"paper = Sol-Attn, tau {tau}", "rivals", PAPER, match=f"Sol-Attn, tau {tau}"))
    found += _at("random mask", "rivals", (LEAN,), PAPER | {"pyramid": "1: 0.25"}, prototype={"static": "random"})
    found += _at("paper, raster, 128/32", "beyond", both, PAPER | {"order": "raster", "block_kv": "32"})
    found += _at("paper, raster, 64/64", "beyond", both, PAPER | {"order": "raster", "block_q": "64"})
    return found


def _velocity() -> list[Setting]:
    """Ways to rank blocks, otherwise the paper's recipe: for single model calls, with the slider at 0.85."""
    found = []
    for share, reduction in ((4, "max"), (4, "mean"), (8, "mean"), (8, "max"), (16, "mean"), (1, "mean")):
        kind = f"sampled, 1 in {share}" if share > 1 else "exact, all tokens"
        config = {"reduction": reduction, "sample_share": 1 / share}
        found.append(Setting(f"{kind}, {reduction}", "velocity", PAPER, config=config))
    for kind, reduction in (("pooled", "max"), ("pooled", "mean"), ("means", "mean")):
        config = {"reduction": reduction}
        found.append(Setting(f"{kind}, {reduction}", "velocity", PAPER | {"importance": kind}, config=config))
    # The two decisive ones come first.
    return sorted(found, key=lambda s: s.name not in ("sampled, 1 in 8, mean", "pooled, mean"))


def _sampled(share: int, reduction: str = "mean") -> dict[str, Any]:
    return {"config": {"sample_share": 1 / share, "reduction": reduction}}


def _ranked(q: str, k: str, reduction: str = "mean", second_order: bool = False) -> dict[str, Any]:
    return {"prototype": {"rank": {"q": q, "k": k, "reduction": reduction, "second_order": second_order}}}


POOLED = {"importance": "pooled"}
_MEAN = {"config": {"reduction": "mean"}}
CANDIDATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: node inputs that differ from the paper's recipe, and settings that the node does not offer
    "pooled, mean": (POOLED, _MEAN),
    "pooled, mean, 1.6 to 0.4": (POOLED, _MEAN | {"prototype": {"ramp": (1.6, 0.4)}}),
    "pooled, max": (POOLED, {"config": {"reduction": "max"}}),
    "1 in 4, mean": ({}, _sampled(4)),
    "1 in 8, mean": ({}, _sampled(8)),
    "pooled, mean, 1.3 to 0.7": (POOLED, _MEAN | {"prototype": {"ramp": (1.3, 0.7)}}),
    "pooled, mean, 1.8 to 0.2": (POOLED, _MEAN | {"prototype": {"ramp": (1.8, 0.2)}}),
    "pooled, mean, 128/32": (POOLED | {"block_kv": "32"}, _MEAN),
    "pooled, mean, full sum": ({}, _ranked("pooled 8", "pooled 8")),
    "1 in 4, max": ({}, _sampled(4, "max")),
    "1 in 8, mean, 128/32": ({"block_kv": "32"}, _sampled(8)),
    "1 in 16, mean": ({}, _sampled(16)),
    "1 in 8, max": ({}, _sampled(8, "max")),
    "pooled 4, mean": ({}, _ranked("pooled 4", "pooled 4")),
    "pooled 4, max": ({}, _ranked("pooled 4", "pooled 4", "max")),
    "pooled 2, mean": ({}, _ranked("pooled 2", "pooled 2")),
    "spread 8, mean": ({}, _ranked("spread 8", "spread 8")),
    "strided 8, mean": ({}, _ranked("strided 8", "strided 8")),
    "pooled, second order, mean": ({}, _ranked("pooled 8", "pooled 8", second_order=True)),
    "queries 1 in 16, keys 1 in 4, mean": ({}, _ranked("sampled 16", "sampled 4")),
    "1 in 8, mean, 12/0/0/25": ({"pyramid": "1: 0.12, 8: 0.25"}, _sampled(8)),
}
"""Possible new defaults, see `_candidates`; the likeliest come first."""
WARM_UPS = (0.25, 0.30)
_LIKELY = 5
"""How many of them, from the first, are compared with published presets."""
_TOPK = ("cogvideox1.5-5b", "wan2.1-1.3b-topk", "cogvideox-5b", "module-default")
"""Published topk presets, which come closer to dense at their compute than the threshold presets."""


def _candidates() -> list[Setting]:
    """Each candidate with both warm-ups at three computes; the likeliest also at the compute of published presets."""
    found = [setting for setting in _published(_TOPK) if not setting.match]
    for number, (name, (node, more)) in enumerate(CANDIDATES.items()):
        for start in WARM_UPS:
            full, inputs = f"{name}, from {start:.2f}", PAPER | {"start_percent": start} | node
            if number < _LIKELY:
                found += [
                    Setting(f"{full} = {preset}", "candidates", inputs, match=f"{preset} (published)", **more)
                    for preset in _TOPK
                ]
            found += _at(full, "candidates", (LEAN, MIDDLE, 0.5), inputs, **more)
    # A falling density might replace some of the dense steps.
    ramp = _MEAN | {"prototype": {"ramp": (1.6, 0.4)}}
    inputs = PAPER | POOLED | {"start_percent": 0.20}
    found += _at("pooled, mean, 1.6 to 0.4, from 0.20", "candidates", (LEAN, MIDDLE, 0.5), inputs, **ramp)
    return found


def _noise() -> list[Setting]:
    """The random sample for importance: the same in every step, or a fresh one in each; several draws of both."""
    found = []
    for seed in range(4):
        config = {"seed": seed}
        found += _at(f"fixed sample {seed}", "noise", (LEAN,), PAPER, config=config, average="fixed samples")
        fresh = {"fresh": True}
        found += _at(
            f"fresh sample {seed}", "noise", (LEAN,), PAPER, config=config, prototype=fresh, average="fresh samples"
        )
    return found


LISTS = {
    "velocity": _velocity,
    "candidates": _candidates,
    "corrections": corrections,
    "tries": tries,
    "rivals": rivals,
    "gallery": gallery,
}
"""Lists that are the same for every model."""

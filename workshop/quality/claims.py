"""The paper's claims and our own questions as data, each a comparison of settings of `matrix.py`."""

from __future__ import annotations

import dataclasses

from .matrix import ALL, BUDGETS, LEAN, LEVELS, MIDDLE, RAMPS, TAUS, TILES


@dataclasses.dataclass(frozen=True)
class Claim:
    """Claims that `first` is closer to dense than `second`. Names without a compute, compared at each."""

    text: str
    source: str
    first: str
    second: str
    compute: tuple[float, ...] = ()
    equal: bool = False
    """Claims that `first` is as close as `second`, not closer."""


def claims() -> list[Claim]:
    """The paper's claims and our own questions, each a comparison of measured settings."""
    both = (LEAN, MIDDLE)
    return [
        Claim("Several levels beat a binary mask", "table of masks", "PSA-3", "block-sparse", both),
        Claim("10/5/0/20 beats a binary mask", "release", "paper", "block-sparse", ALL),
        Claim("Threshold beats topk", "4.3", "threshold 40/10/10/20", "topk = threshold 40/10/10/20"),
        Claim("Threshold beats topk", "4.3", "threshold 70/10/10", "topk = threshold 70/10/10"),
        Claim("The curve beats raster order", "4.3", "paper", "paper, raster", ALL),
        Claim("Blocks of 64 keys beat 128", "ablation", "paper", "paper, 128/128", both),
        Claim("Blocks of 32 keys beat 64", "ablation", "paper, 128/32", "paper", both),
        Claim("64x64 beats 128x128", "ablation", "paper, 64/64", "paper, 128/128", both),
        Claim("32x32 beats 64x64", "ablation", "paper, 32/32", "paper, 64/64", both),
        Claim("Max beats mean importance at 128/64", "ablation", "paper", "paper, mean", both),
        Claim("Max equals mean importance at 32/32", "ablation", "paper, 32/32", "paper, 32/32, mean", both, True),
        Claim(
            "The similarity cap helps", "4.3", "budget 50/10/10/10, 128/128, cap", "budget 50/10/10/10, 128/128", both
        ),
        Claim("PSA-3 beats PSA-1 (plain block-sparse)", "ablation", "PSA-3", "block-sparse", (MIDDLE,)),
        Claim("PSA-3 beats PSA-2", "ablation", "PSA-3", "PSA-2", (MIDDLE,)),
        Claim("PSA-3 beats PSA-4", "ablation", "PSA-3", "PSA-4", (MIDDLE,)),
        Claim("PSA-3 beats PSA-5", "ablation", "PSA-3", "PSA-5", (MIDDLE,)),
        *(
            Claim(
                f"Dense first {start:.0%} beats dense first 25%", "ours", f"warm-up {start:.2f}", "paper", (MIDDLE, 0.5)
            )
            for start in (0.0, 0.1, 0.2, 0.3, 0.4)
        ),
        Claim("The tail helps topk", "ours", "paper, tail", "paper", both),
        Claim("The tail helps a budget", "ours", "budget 40/10/10/20, tail", "budget 40/10/10/20", both),
        *(Claim(f"Budget {name} beats topk", "ours", f"budget {name}", "paper", both) for name in BUDGETS),
        *(
            Claim(f"Budget {name} beats topk in raster order", "ours", f"budget {name}, raster", "paper, raster", both)
            for name in BUDGETS
        ),
        Claim("Pooled importance equals sampled, curve", "ours", "paper, pooled", "paper", both, True),
        Claim("Means equal sampled importance, curve", "ours", "paper, means", "paper", both, True),
        Claim("Exact importance beats sampled, curve", "ours", "paper, exact", "paper", both),
        Claim("Pooled importance equals sampled, raster", "ours", "paper, raster, pooled", "paper, raster", both, True),
        Claim("Exact importance beats sampled, raster", "ours", "paper, raster, exact", "paper, raster", both),
        *(Claim(f"Tiles {name} beat the curve", "ours", f"paper, tiles {name}", "paper", both) for name in TILES),
        *(Claim(f"Levels {name} beat 10/5/0/20", "ours", f"levels {name}", "paper", both) for name in LEVELS),
        *(Claim(f"Block {block} dense pays", "ours", f"block {block} dense", "paper", (MIDDLE,)) for block in range(6)),
        *(Claim(f"Density {name} over the steps pays", "ours", f"ramp {name}", "paper", (MIDDLE,)) for name in RAMPS),
        Claim(
            "Per-layer budgets: density 1.5 to 0.5 over the blocks pays",
            "ours",
            "layers 1.5 to 0.5",
            "default",
            both,
        ),
        Claim("Per-layer budgets: density 0.5 to 1.5 pays", "ours", "layers 0.5 to 1.5", "default", both),
        Claim("Dense last tenth instead of dense first", "ours", "dense 15 % first, 10 % last", "paper", (MIDDLE,)),
        *(
            Claim(f"Levels kept for {n} steps cost nothing", "ours", f"levels kept for {n} steps", "paper", both, True)
            for n in (2, 4, 100)
        ),
        Claim("A fresh sample each step is closer", "ours", "fresh sample 0", "paper", (LEAN,)),
        Claim("Our default beats a radial mask", "rival", "default", "radial mask", ALL),
        Claim("Our default beats plain block-sparse attention", "rival", "default", "block-sparse", ALL),
        *(
            Claim(
                f"Our default beats Sol-Attn at tau {tau}",
                "rival",
                f"default = Sol-Attn, tau {tau}",
                f"Sol-Attn, tau {tau}",
            )
            for tau in TAUS
        ),
        Claim("A radial mask beats a random one", "control", "radial mask", "random mask", (LEAN,)),
    ]


def choice_claims() -> list[Claim]:
    """Questions about the candidates for the default; the names are those of `_candidates`."""
    three = (LEAN, MIDDLE, 0.5)

    def ask(text: str, first: str, second: str, *, equal: bool = False) -> Claim:
        names = (name if ", from " in name else f"{name}, from 0.25" for name in (first, second))
        return Claim(text, "ours", *names, three, equal)

    ours = "pooled, mean"
    return [
        ask("Mean beats max over means of 8 tokens", ours, "pooled, max"),
        ask("Mean beats max over a sample of a quarter", "1 in 4, mean", "1 in 4, max"),
        ask("Importance from the pyramid itself (means of 8) equals a sample of a quarter", ours, "1 in 4, mean",
            equal=True),
        ask("A sample of an eighth equals one of a quarter", "1 in 8, mean", "1 in 4, mean", equal=True),
        ask("A sample of a sixteenth equals one of a quarter", "1 in 16, mean", "1 in 4, mean", equal=True),
        ask("Few queries and many keys (1 in 16, 1 in 4) beat 1 in 8 of both", "queries 1 in 16, keys 1 in 4, mean",
            "1 in 8, mean"),
        ask("Means of 4 tokens beat means of 8", "pooled 4, mean", ours),
        ask("Means of 2 tokens beat means of 8", "pooled 2, mean", ours),
        ask("A token out of every 8 neighbours beats their mean", "spread 8, mean", ours),
        ask("The middle one of every 8 neighbours beats their mean", "strided 8, mean", ours),
        ask("The spread inside the groups, to second order, helps", "pooled, second order, mean", ours),
        ask("The sum of a row from means of 32 costs nothing", ours, "pooled, mean, full sum", equal=True),
        ask("Blocks of 32 keys beat 64", "pooled, mean, 128/32", ours),
        ask("12/0/0/25 beats 10/5/0/20", "1 in 8, mean, 12/0/0/25", "1 in 8, mean"),
        ask("Dense first 30% beats dense first 25%", "pooled, mean, from 0.30", ours),
        ask("Per-step budgets: density 1.3 to 0.7 beats a constant one", "pooled, mean, 1.3 to 0.7", ours),
        ask("Per-step budgets: density 1.6 to 0.4 beats a constant one", "pooled, mean, 1.6 to 0.4", ours),
        ask("Per-step budgets: density 1.8 to 0.2 beats a constant one", "pooled, mean, 1.8 to 0.2", ours),
        ask("Density 1.6 to 0.4 with 20% dense beats a constant one with 25%",
            "pooled, mean, 1.6 to 0.4, from 0.20", ours),
    ]  # fmt: skip

"""Claims with their verdicts, and what was kept of what was tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..claims import Claim
from ..summary import Difference, judge
from .parts import Runs, clips_of, error_of


def claims_section(title: str, file: str, runs: Runs, found: Iterable[Claim]) -> str:
    """A table of claims, whether each holds, and the differences that say so."""
    lines = ["| claim | from | verdict | difference in dB (compute) |", "|---|---|---|---|"]
    for claim in found:
        differences = judge(runs, claim)
        if differences:
            values = "; ".join(f"{d.psnr:+.2f}{error_of(d)} ({d.computes[0]:.2f})" for d in differences)
            lines.append(f"| {claim.text} | {claim.source} | {verdict(claim, differences)} | {values} |")
    return f"""
## {title}

From `{file}`. Differences are first minus second: the mean over {clips_of(runs)} clips ± its standard error. *Holds*
and *does not hold* require two standard errors at every compute measured, a weak test with so few clips. For a claim of
equality, *not refuted* means that zero is within two standard errors.

{chr(10).join(lines)}"""


def verdict(claim: Claim, differences: Sequence[Difference]) -> str:
    """`holds`, `does not hold`, `not decided`, or `mixed` if the computes contradict each other."""
    verdicts = {difference.verdict for difference in differences}
    if claim.equal:
        if verdicts == {"no difference"}:
            return "not refuted"
        return "does not hold" if "does not hold" in verdicts else "holds, and better"
    if verdicts >= {"holds", "does not hold"}:
        return "mixed"
    if len(verdicts) == 1:
        return "not decided" if verdicts == {"no difference"} else verdicts.pop()
    return "not decided, leans to " + ("yes" if "holds" in verdicts else "no")


def kept_section() -> str:
    """What stayed in the product and what did not, with the reasons."""
    return """
## What was kept, and what was dropped

We kept importance from means of 8 tokens (the rows of the pyramid's 1/8 level), reduced by mean; the row sum over means
of 32; curve order; no tail; a dense first quarter. A sample of a quarter, reduced by mean, is up to half a decibel
closer, but takes 1.45 times as long at 12 x 64800 x 128; in the same time, means of 8 keep 2 dB more. The sample is
available as the node's `importance: sampled`.

The following are no longer defaults, but still inputs of the node:

- The tail, a budget across the rows and heads of a call, dense blocks at the expense of the others, tiles, and levels
  other than 10/5/0/20.
- Blocks of 32 keys: 0.2 to 1.1 dB closer; about a seventh slower with 12 heads of 64800 tokens, hardly slower with 40.
- `start_percent` 0.30: closer than 0.25 from a compute of 0.50 (a sparsity of about 0.70) upwards, less close below
  0.44. With the slider at 0.85, 0.25 stays the default.
- Levels kept for several steps (`reuse_steps`): they lose nothing here and save the time of choosing, but need 2 bytes
  of memory per pair of blocks that is seen. 1 stays the default.
- A density that falls over the steps (`falling`; 1.6 to 0.4 is 0.6): better than a constant one in every comparison
  above and takes no extra time, but in some by less than two standard errors. On the CPU (17 frames, 10 steps) it is
  better in PSNR (by 0.1 and 0.3 dB) but not in SSIM; on the demo's own clip it is worse, by 1.7 dB from 0.25 and by
  0.1 dB from 0.30 (CPU, 16 steps). With real weights, the last steps draw detail that these clips do not have, so 0
  stays the default until `falling` has been tested on them.

Not in the node: means of 4 or 2 tokens, a token instead of a mean, a second-order correction for the spread within
groups, and different numbers of queries and keys. None is better than means of 8 at every compute, and all cost more.
For budgets per layer, see the verdicts."""

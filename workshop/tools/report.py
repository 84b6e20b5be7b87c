"""The demo's report: one self-contained HTML page with a light and a dark theme. Layout only, no measuring.

The page is `report_template.html` with its placeholders filled in; pictures and video are embedded.
"""

from __future__ import annotations

import base64
from collections import Counter
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from comfyui_psa.reports.paint import level_colour

from . import pictures
from .figures import Figures

TEMPLATE = Path(__file__).with_name("report_template.html")
CHART_WIDTH, CHART_HEIGHT = 760, 200


def write_report(
    path: Path, figures: Figures, subtitle: str, video: bytes, strip: Image.Image, psa: np.ndarray
) -> None:
    """Write the page.

    Args:
        path: the HTML file to write.
        figures: the measurements.
        subtitle: what was sampled, and on which hardware.
        video: mp4 of both videos side by side.
        strip: the contact strip.
        psa: the frames of the PSA run, uint8 [F, H, W, 3].
    """
    placeholders = {
        "headline": escape(figures.headline()),
        "subtitle": escape(subtitle),
        "video": _data("video/mp4", video),
        "figures": _figure_rows(figures),
        "sparsity_chart": bar_chart([("psa", figures.sparsity)], 1.0, target=figures.report.get("target_sparsity")),
        "seconds_chart": bar_chart([("dense", figures.dense_seconds), ("psa", figures.psa_seconds)], unit=" s"),
        "strip": _data("image/png", pictures.png(strip)),
        "maps": _maps(figures.report, psa),
        "fallbacks": _fallbacks(figures.report),
    }
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(placeholders)
    path.write_text(page, encoding="utf-8")


def bar_chart(
    series: list[tuple[str, list[float | None]]], top: float | None = None, unit: str = "", target: float | None = None
) -> str:
    """An SVG bar chart: one group of bars per step, one bar per series (CSS class, values); None leaves a gap.

    Args:
        series: may differ in length.
        top: value at the top edge; None uses the largest value.
        unit: written after the value at the top edge.
        target: where to draw a dashed line.
    """
    steps = max(len(values) for _, values in series)
    top = top or max((value for _, values in series for value in values if value is not None), default=1.0)
    left, bottom = 48, CHART_HEIGHT - 24
    group = (CHART_WIDTH - left) / max(1, steps)
    bar = group * 0.8 / len(series)
    marks = [f'<line class="axis" x1="{left}" x2="{CHART_WIDTH}" y1="{bottom}" y2="{bottom}"/>']
    marks += [f'<text x="{left - 6}" y="18" text-anchor="end">{top:.3g}{unit}</text>']
    for index, (name, values) in enumerate(series):
        for step, value in enumerate(values):
            if value is None:
                continue
            height = (bottom - 12) * value / top
            x = left + step * group + group * 0.1 + index * bar
            marks.append(
                f'<rect class="{name}" x="{x:.1f}" y="{bottom - height:.1f}" width="{bar:.1f}" height="{height:.1f}" '
                f'rx="2"><title>step {step + 1}: {value:.3f}{unit}</title></rect>'
            )
    for step in range(steps):
        marks.append(
            f'<text x="{left + (step + 0.5) * group:.1f}" y="{CHART_HEIGHT - 6}" text-anchor="middle">{step + 1}</text>'
        )
    if target is not None:
        y = bottom - (bottom - 12) * target / top
        marks.append(f'<line class="target" x1="{left}" x2="{CHART_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" width="100%" role="img">{"".join(marks)}</svg>'


def _figure_rows(figures: Figures) -> str:
    report = figures.report
    rows = {
        "PSNR of PSA against dense": f"{figures.psnr:.2f} dB",
        "SSIM of PSA against dense": f"{figures.ssim:.4f}",
        "Sparsity of the sparse steps": _number(figures.mean_sparsity, ".3f"),
        "Target sparsity": _number(report.get("target_sparsity"), ".2f"),
        "Sparse steps": f"{len(figures.sparse_steps)} of {len(figures.sparsity)}",
        "Seconds per step, dense run (median)": _number(figures.dense_step, ".2f"),
        "Seconds per step, PSA run, sparse steps (median)": _number(figures.psa_sparse_step, ".2f"),
        "Seconds per step, PSA run, dense warm-up (median)": _number(figures.psa_warm_up_step, ".2f"),
        "Token grid (time, height, width)": " × ".join(map(str, report.get("grid") or ["-"])),
        "Preset, backend": f"{report.get('preset', '-')}, {report.get('backend', '-')}",
    }
    return "".join(f'<tr><td>{name}</td><td class="number">{escape(value)}</td></tr>' for name, value in rows.items())


def _maps(report: dict, psa: np.ndarray) -> str:
    found = report.get("level_map")
    if not found:
        return ""
    shares = Counter(factor for row in found["factors"] for factor in row)
    total = sum(shares.values())
    keys = " ".join(
        f'<span class="key" style="background: rgb{level_colour(factor)}"></span>'
        f"{_level_name(factor, found['block_kv'])} {shares[factor] / total:.1%}"
        for factor in sorted(shares, key=lambda factor: factor or 1_000_000)
    )
    caption = (
        f"Step {found['step'] + 1}, block {found['block']}, head {found['head']}, order {escape(found['order'])}: "
        f"rows are query blocks of {found['block_q']} tokens, columns key blocks of {found['block_kv']}.<br>{keys}"
    )
    parts = ["<h2>Levels of one layer</h2>", _figure(pictures.level_map(found["factors"]), caption, "pixels")]
    if found.get("token_levels") and report.get("grid"):
        low, high = min(found["token_levels"]), max(found["token_levels"])
        caption = (
            "The same map over the video: the share of its resolution at which each token was read, averaged over "
            f"the query blocks, from {low:.2f} (dark) to {high:.2f} (light). One picture per latent frame."
        )
        over = pictures.attention_over_video(psa, found["token_levels"], report["grid"])
        parts.append(_figure(over, caption, "smooth"))
    return "".join(parts)


def _figure(picture: Image.Image, caption: str, style: str) -> str:
    source = _data("image/png", pictures.png(picture))
    return f'<figure><img class="{style}" src="{source}" alt=""><figcaption>{caption}</figcaption></figure>'


def _level_name(factor: int, block_kv: int) -> str:
    if factor == 0:
        return "dropped"
    if factor == 1:
        return "full resolution"
    return "one row per block" if factor == block_kv else f"1/{factor}"


def _fallbacks(report: dict) -> str:
    rows = [
        f'<tr><td>{escape(entry["reason"])}</td><td class="number">{entry["calls"]}</td></tr>'
        for entry in report.get("fallbacks", [])
    ]
    if not rows:
        return "<p>Only the warm-up.</p>"
    return f"<table><tr><th>Reason</th><th>Attention calls</th></tr>{''.join(rows)}</table>"


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

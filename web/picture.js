/* Draws one node's picture: a bar for what is seen, a bar for the work that remains, figures, and the curve of a run.
 * Plain DOM; it knows nothing about ComfyUI. Text is always inserted as text, never as markup.
 */

import { percent } from "./outcome.js";
import { told } from "./translate.js";
import { say } from "./words.js";

// From yellow to dark blue: lighter means more detail, even to the colour-blind. Factor 0 is not seen at all.
const COLOURS = { 1: "#fde725", 2: "#5ec962", 4: "#21918c", 8: "#3b7cc4", 16: "#5a55b0", 32: "#6d4aa0" };
const COARSE = "#7d4a96";
// Work whose level is not known.
const WHOLE = "all";
const [SPARSITY, SECONDS] = ["#fde725", "#7fb2ff"];
const UNSEEN = "repeating-linear-gradient(45deg, #55585f 0 4px, #43464c 4px 8px)";
const STYLE = `
.psa-picture { box-sizing: border-box; width: 100%; padding: 4px 6px; font: 12px/1.35 system-ui, sans-serif;
    color: var(--input-text, #ddd); pointer-events: none; overflow: hidden; }
.psa-picture .psa-headline { font-size: 14px; font-weight: 600; }
.psa-picture .psa-row { display: flex; align-items: center; gap: 6px; }
.psa-picture .psa-row span { flex: 0 0 auto; min-width: 34px; }
/* Quiet by its size and not by being faint: some palettes have no contrast to spare. */
.psa-picture .psa-quiet { font-size: 11px; }
.psa-picture .psa-bar { flex: 1; display: flex; height: 14px; margin: 2px 0; border-radius: 3px; overflow: hidden;
    background: color-mix(in srgb, var(--input-text, #ddd) 15%, transparent); }
.psa-picture .psa-bar div { height: 100%; min-width: 0; }
.psa-picture .psa-work { height: 8px; }
.psa-picture .psa-legend { display: flex; flex-wrap: wrap; gap: 0 10px; }
.psa-picture .psa-key { display: inline-block; width: 8px; height: 8px; margin-right: 4px; border-radius: 2px; }
/* Mixed with the text colour, so that it is readable in every palette. */
.psa-picture .psa-problem { color: color-mix(in srgb, #ff922b 50%, var(--input-text, #ddd)); font-weight: 600; }
.psa-picture .psa-old { font-style: italic; }
.psa-picture svg.psa-old { opacity: 0.75; }
/* Waiting for the server's answer. The delay keeps a quick answer from making the bars flicker. */
.psa-picture.psa-waiting .psa-bar { opacity: 0.5; transition: opacity 0.2s 0.5s; }
.psa-picture svg { display: block; width: 100%; height: 34px; margin-top: 3px; border-radius: 3px;
    background: #2a2c31; }
.psa-picture svg:empty { background: color-mix(in srgb, var(--input-text, #ddd) 15%, transparent); }
`;

/** A block of figures that follow a slider and, with `live`, the curve of a run. `content` is as tall as its words. */
export class Picture {
    constructor(live) {
        this.element = part("div", "psa-picture");
        this.content = this.element.appendChild(part("div"));
        this.headline = this.content.appendChild(part("div", "psa-headline"));
        this.speed = this.content.appendChild(part("div", "psa-quiet psa-speed"));
        this.bar = this.row("psa-bar psa-seen");
        this.work = this.row("psa-bar psa-work");
        this.legend = this.content.appendChild(part("div", "psa-legend"));
        this.note = this.content.appendChild(part("div", "psa-quiet psa-note"));
        if (live) {
            this.line = this.content.appendChild(svg("svg", { viewBox: "0 0 300 34", preserveAspectRatio: "none" }));
            this.caption = this.content.appendChild(part("div", "psa-caption"));
            this.sentence = this.content.appendChild(part("div", "psa-sentence"));
        }
        addStyle();
    }

    row(classes) {
        const row = this.content.appendChild(part("div", "psa-row"));
        row.append(part("span", "psa-quiet"), part("div", classes), part("span", "psa-quiet"));
        return row.children[1];
    }

    /** Show a setting: its figures (choices/picture.py), a sentence about a problem, or neither. `ran`: what its run
     * did, see outcome.js; `measuredHere`: whether the speed figures were measured on a GPU like this machine's. */
    show({ language, figures, problem, stock, off, notes, ran, measuredHere }) {
        const text = (key, values) => say(language, key, values);
        this.headline.classList.toggle("psa-problem", Boolean(problem || ran?.problem));
        this.bar.replaceChildren();
        this.work.replaceChildren();
        this.legend.replaceChildren();
        this.note.textContent = notes.join(" ");
        this.speed.textContent = "";
        for (const bar of [this.bar, this.work]) bar.parentElement.style.display = "none";
        if (problem || stock || off || ran?.dense || !figures) {
            this.headline.textContent = problem ?? (off ? text("off") : stock ? text("stock") : (ran?.bold ?? ""));
            return;
        }
        const { sparsity, coverage, speedup } = figures;
        const expected = sparsity === null ? text("follows") : text("saved", { saved: percent(sparsity) });
        this.headline.textContent = ran?.bold ?? expected;
        if (ran) this.speed.textContent = ran.detail;
        else if (speedup && measuredHere) {
            const [low, high] = speedup.map((times) => times.toFixed(1));
            this.speed.textContent = high < 1.05 ? text("noFaster") : text("faster", { low, high });
        }
        label(this.bar, figures.of_mass ? text("mass") : text("seen"), coverage === null ? "" : percent(coverage));
        const pairs = Object.entries(figures.shares)
            .map(([factor, share]) => [Number(factor), share])
            .filter(([, share]) => share > 0)
            .sort(([a], [b]) => (a || Infinity) - (b || Infinity));
        for (const [factor, share] of pairs) {
            this.bar.append(segment(factor, share));
            if (factor && !figures.of_mass) this.work.append(segment(factor, share / factor));
            const key = factor === 0 ? "none" : factor === 1 ? "full" : factor === figures.tail ? "tail" : "pooled";
            const entry = this.legend.appendChild(part("span"));
            const colour = entry.appendChild(part("span", "psa-key"));
            colour.style.background = colourOf(factor);
            entry.append(`${percent(share)} ${text(key, { factor })}`);
        }
        if (sparsity !== null) label(this.work, text("work"), percent(1 - sparsity));
        if (figures.of_mass && sparsity !== null) this.work.append(segment(WHOLE, 1 - sparsity));
        if (figures.of_mass) this.note.textContent = [text("massNote"), ...notes].join(" ");
        else if (figures.capped) this.note.textContent = [...notes, text("capped")].join(" ");
        this.element.dataset.sparsity = sparsity === null ? "" : sparsity.toFixed(4);
        this.element.dataset.coverage = coverage === null ? "" : coverage.toFixed(4);
    }

    /** Show the steps of a run, oldest first, and what stayed dense: as of the last step, or over the whole `run` once
     * it has ended. `old`: a sentence about it if its inputs differ from the node's, otherwise "". */
    follow({ language, steps, run, old }) {
        const text = (key, values) => say(language, key, values);
        this.line.replaceChildren();
        this.caption.textContent = "";
        this.element.dataset.steps = String(steps.length);
        for (const element of [this.line, this.caption]) element.classList.toggle("psa-old", Boolean(old));
        if (!steps.length) {
            this.sentence.textContent = old || (run ? "" : text("noRun"));
            return;
        }
        const last = steps[steps.length - 1];
        const total = Math.max(last.steps ?? 0, last.step + 1);
        const xOf = (step) => (total > 1 ? 4 + (292 * step) / (total - 1) : 150);
        // The first step may include loading the model, which must not flatten the rest of the curve.
        const longest = Math.max(...steps.slice(steps.length > 2 ? 1 : 0).map((step) => step.seconds), 1e-6);
        this.draw(SECONDS, "psa-seconds", steps.map((s) => [xOf(s.step), 31 - 28 * Math.min(1, s.seconds / longest)]));
        this.draw(SPARSITY, "psa-sparsity", steps.map((s) => [xOf(s.step), 31 - 28 * (s.sparsity ?? 0)]));
        const measured = last.sparsity?.toFixed(3);
        const sparsity = measured === undefined ? text(`${last.kind}Step`) : text("measured", { sparsity: measured });
        const top = text("top", { seconds: longest.toFixed(2) });
        this.caption.append(`${text(old ? "liveOld" : "live", { step: last.step + 1, steps: total })} `);
        const seconds = text("seconds", { seconds: last.seconds.toFixed(2) });
        for (const [colour, words] of [[SPARSITY, sparsity], [SECONDS, seconds]]) {
            const mark = this.caption.appendChild(part("span"));
            mark.appendChild(part("span", "psa-key")).style.background = colour;
            mark.append(words);
            this.caption.append(" ");
        }
        this.caption.append(top);
        const reasons = Object.entries((run ?? last).reasons);
        const remarks = reasons.map(([reason, calls]) => text("denseCalls", { calls, reason: told(language, reason) }));
        for (const note of run?.notes ?? []) remarks.push(text("remark", { note: told(language, note) }));
        if (!run && !remarks.length && !steps.some((step) => step.sparsity !== null)) remarks.push(text("before"));
        // If nothing was sparse, the bold line already says why.
        this.sentence.textContent = old || (run?.dense ? "" : remarks.join(" "));
    }

    draw(colour, name, points) {
        const coordinates = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
        const style = { fill: "none", stroke: colour, "stroke-width": 1.5, "vector-effect": "non-scaling-stroke" };
        this.line.append(svg("polyline", { class: name, points: coordinates, ...style }));
        const [x, y] = points[points.length - 1];
        this.line.append(svg("circle", { cx: x, cy: y, r: 2, fill: colour }));
    }
}

/** A node's figures in words, for nodes whose own picture is too small to read. */
export class Line {
    constructor() {
        this.element = part("div", "psa-picture psa-line");
        this.content = this.element.appendChild(part("div"));
        addStyle();
    }

    show(text) {
        this.content.textContent = text;
    }
}

function addStyle() {
    if (document.getElementById("psa-picture-style")) return;
    const style = document.head.appendChild(part("style"));
    style.id = "psa-picture-style";
    style.textContent = STYLE;
}

/** Show a bar, with words before it and a figure after it. */
function label(bar, before, after) {
    bar.previousSibling.textContent = before;
    bar.nextSibling.textContent = after;
    bar.parentElement.style.display = "";
}

function segment(factor, share) {
    const element = part("div");
    element.dataset.factor = String(factor);
    element.style.cssText = `width: ${(100 * share).toFixed(3)}%; background: ${colourOf(factor)}`;
    return element;
}

function colourOf(factor) {
    if (factor === WHOLE) return "#9aa0ab";
    return factor ? (COLOURS[factor] ?? COARSE) : UNSEEN;
}

function part(name, classes = "") {
    const element = document.createElement(name);
    if (classes) element.className = classes;
    return element;
}

function svg(name, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
}

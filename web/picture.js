/* Draws one node's picture: a bar of what is seen, a bar of the work that is left, figures, and the line of a run.
 * Plain DOM; it knows nothing of ComfyUI. Text goes in as text, never as markup.
 */

import { percent } from "./outcome.js";
import { say } from "./words.js";

// From yellow to dark blue: light means more detail, also where colours cannot be told apart. 0 is not seen at all.
const COLOURS = { 1: "#fde725", 2: "#5ec962", 4: "#21918c", 8: "#3b7cc4", 16: "#5a55b0", 32: "#6d4aa0" };
const COARSE = "#7d4a96";
// Work of which is not known which level it goes to.
const WHOLE = "all";
const [SPARSITY, SECONDS] = ["#fde725", "#7fb2ff"];
const UNSEEN = "repeating-linear-gradient(45deg, #55585f 0 4px, #43464c 4px 8px)";
const STYLE = `
.psa-picture { box-sizing: border-box; width: 100%; padding: 4px 6px; font: 12px/1.35 system-ui, sans-serif;
    color: var(--input-text, #ddd); pointer-events: none; overflow: hidden; }
.psa-picture .psa-headline { font-size: 14px; font-weight: 600; }
.psa-picture .psa-row { display: flex; align-items: center; gap: 6px; }
.psa-picture .psa-row span { flex: 0 0 auto; min-width: 34px; }
.psa-picture .psa-quiet { opacity: 0.75; }
.psa-picture .psa-bar { flex: 1; display: flex; height: 14px; margin: 2px 0; border-radius: 3px; overflow: hidden;
    background: color-mix(in srgb, var(--input-text, #ddd) 15%, transparent); }
.psa-picture .psa-bar div { height: 100%; min-width: 0; }
.psa-picture .psa-work { height: 8px; }
.psa-picture .psa-legend { display: flex; flex-wrap: wrap; gap: 0 10px; }
.psa-picture .psa-key { display: inline-block; width: 8px; height: 8px; margin-right: 4px; border-radius: 2px; }
/* Mixed with the colour of the text, it can be read on a light node and on a dark one. */
.psa-picture .psa-problem { color: color-mix(in srgb, #e8590c 60%, var(--input-text, #ddd)); font-weight: 600; }
.psa-picture .psa-old { opacity: 0.6; }
/* Figures of inputs that the server has not answered for; an answer within moments does not make it flicker. */
.psa-picture.psa-waiting { opacity: 0.6; transition: opacity 0.2s 0.5s; }
.psa-picture svg { display: block; width: 100%; height: 34px; margin-top: 3px; border-radius: 3px;
    background: #2a2c31; }
`;

/** A block of figures that follow a slider, and, with `live`, the line of a run. */
export class Picture {
    constructor(live) {
        this.element = part("div", "psa-picture");
        this.headline = this.element.appendChild(part("div", "psa-headline"));
        this.speed = this.element.appendChild(part("div", "psa-quiet psa-speed"));
        this.bar = this.row("psa-bar psa-seen");
        this.work = this.row("psa-bar psa-work");
        this.legend = this.element.appendChild(part("div", "psa-legend"));
        this.note = this.element.appendChild(part("div", "psa-quiet psa-note"));
        if (live) {
            this.line = this.element.appendChild(svg("svg", { viewBox: "0 0 300 34", preserveAspectRatio: "none" }));
            this.caption = this.element.appendChild(part("div", "psa-caption"));
            this.sentence = this.element.appendChild(part("div", "psa-sentence"));
        }
        if (!document.getElementById("psa-picture-style")) {
            const style = document.head.appendChild(part("style"));
            style.id = "psa-picture-style";
            style.textContent = STYLE;
        }
    }

    row(classes) {
        const row = this.element.appendChild(part("div", "psa-row"));
        row.append(part("span", "psa-quiet"), part("div", classes), part("span", "psa-quiet"));
        return row.children[1];
    }

    /** Show a setting: its figures (choices/picture.py), the sentence of a problem, or neither; `ran`: what happened
     * with it, see outcome.js; `measuredHere`: whether the figures of speed were measured on a machine like this one. */
    show({ language, figures, problem, stock, notes, ran, measuredHere }) {
        const text = (key, values) => say(language, key, values);
        this.headline.classList.toggle("psa-problem", Boolean(problem || ran?.problem));
        this.bar.replaceChildren();
        this.work.replaceChildren();
        this.legend.replaceChildren();
        this.note.textContent = notes.join(" ");
        this.speed.textContent = "";
        for (const bar of [this.bar, this.work]) bar.parentElement.style.display = "none";
        if (problem || stock || ran?.dense || !figures) {
            const said = stock ? text("stock") : (ran?.bold ?? "");
            this.headline.textContent = problem ?? said;
            return;
        }
        const { sparsity, coverage, speedup } = figures;
        const expected = sparsity === null ? text("follows") : text("saved", { saved: percent(sparsity) });
        this.headline.textContent = ran?.bold ?? expected;
        if (ran) this.speed.textContent = ran.detail;
        else if (speedup && measuredHere) {
            const [least, most] = speedup.map((times) => times.toFixed(1));
            this.speed.textContent = most < 1.05 ? text("noFaster") : text("faster", { least, most });
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

    /** Show the steps of a run, oldest first, and what stayed dense: by the last step, or by the whole `run`
     * when it has ended. `old`: a sentence about it where it had other inputs than the node shows, otherwise "". */
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
        const place = (step) => (total > 1 ? 4 + (292 * step) / (total - 1) : 150);
        // The first step may hold the loading of the model: it must not flatten the others.
        const most = Math.max(...steps.slice(steps.length > 2 ? 1 : 0).map((step) => step.seconds), 1e-6);
        this.draw(SECONDS, "psa-seconds", steps.map((s) => [place(s.step), 31 - 28 * Math.min(1, s.seconds / most)]));
        this.draw(SPARSITY, "psa-sparsity", steps.map((s) => [place(s.step), 31 - 28 * (s.sparsity ?? 0)]));
        const measured = last.sparsity?.toFixed(3);
        const sparsity = measured === undefined ? text(`${last.kind}Step`) : text("measured", { sparsity: measured });
        this.caption.append(`${text(old ? "liveOld" : "live", { step: last.step + 1, steps: total })} `);
        const seconds = text("seconds", { seconds: last.seconds.toFixed(2) });
        for (const [colour, words] of [[SPARSITY, sparsity], [SECONDS, seconds]]) {
            const mark = this.caption.appendChild(part("span"));
            mark.appendChild(part("span", "psa-key")).style.background = colour;
            mark.append(words);
            this.caption.append(" ");
        }
        const reasons = Object.entries((run ?? last).reasons);
        const told = reasons.map(([reason, calls]) => text("denseCalls", { calls, reason }));
        for (const note of run?.notes ?? []) told.push(`${note}.`);
        if (!run && !told.length && !steps.some((step) => step.sparsity !== null)) told.push(text("before"));
        this.sentence.textContent = old || (run?.dense ? "" : told.join(" ")); // why nothing was sparse is in bold
    }

    draw(colour, name, points) {
        const places = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
        const style = { fill: "none", stroke: colour, "stroke-width": 1.5, "vector-effect": "non-scaling-stroke" };
        this.line.append(svg("polyline", { class: name, points: places, ...style }));
        const [x, y] = points[points.length - 1];
        this.line.append(svg("circle", { cx: x, cy: y, r: 2, fill: colour }));
    }
}

/** Words before a bar and a figure after it; a bar without them is hidden. */
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

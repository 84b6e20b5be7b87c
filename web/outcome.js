/* What is said in bold about a run: what it did, or why it did nothing and what to do. Pure functions; a run is what
 * patching/handle.py tells of one that has ended ("psa.run").
 */

import { say as sayIn } from "./words.js";

/** What a node did, as {what, bold: the same as a sentence of this run, detail, dense, problem}; null where nothing is
 * known yet.
 * `note`: why its model was not patched at all; `replaced`: id of the PSA Patch that took its place. */
export function happened(language, { run, note, replaced, stock }) {
    const say = (key, figures) => sayIn(language, key, figures);
    const nothing = (what) => ({ what, bold: what, detail: "", dense: true, problem: true });
    if (replaced) return nothing(say("replaced", { by: replaced }));
    if (note) return stock ? null : nothing(say("unserved", { reason: sentences(note) }));
    if (!run) return null;
    if (run.dense) return nothing(say("stayedDense", { reason: sentences(run.dense) }));
    const { sparse = 0 } = run.kinds;
    const count = (kinds) => kinds.reduce((sum, [, steps]) => sum + steps, 0);
    const done = count(Object.entries(run.kinds).filter(([kind]) => kind !== "interrupted"));
    const figures = { sparse, done, steps: run.completed ? done : (run.steps ?? done), saved: percent(run.saved) };
    const what = say(run.completed ? "ran" : "stopped", figures);
    return { what, bold: say("thisRun", { what }), detail: seconds(say, run), dense: false };
}

/** The same in one line, of a run with other inputs than the node shows; "" where nothing is known. */
export function lastRun(language, state) {
    const found = happened(language, state);
    return found ? sayIn(language, "lastRun", { what: [found.what, found.detail].filter(Boolean).join("; ") }) : "";
}

function seconds(say, { kinds, seconds }) {
    const told = ["sparse", "dense"]
        .filter((kind) => seconds[kind] !== undefined)
        .map((kind) => say(`${kind}Seconds`, { seconds: brief(seconds[kind]) }));
    for (const kind of ["skipped", "unseen"]) if (kinds[kind]) told.push(say(kind, { steps: kinds[kind] }));
    return told.join(", ");
}

/** Seconds to two digits or whole: 0.47, 1.4, 12. */
function brief(value) {
    return value.toFixed(value < 1 ? 2 : value < 10 ? 1 : 0);
}

/** "the video is short; sample more" -> "the video is short. Sample more": reason and what to do, a sentence each. */
function sentences(reason) {
    const [why, ...rest] = reason.replace(/\.$/, "").split("; ");
    return [why, ...rest.map((part) => part.charAt(0).toUpperCase() + part.slice(1))].join(". ");
}

/** 0.853 -> "85 %"; small shares with a digit more. */
export function percent(share) {
    const value = 100 * share;
    return `${value >= 9.95 || value === 0 ? value.toFixed(0) : value.toFixed(1)} %`;
}

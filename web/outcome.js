/* The bold line about a run: what it did, or why it did nothing and what to do about it. Pure functions; `run` is the
 * message "psa.run" that patching/handle.py sends when a run ends.
 */

import { told } from "./translate.js";
import { say as sayIn } from "./words.js";

/** What a node did, as {what, bold: the same as a full sentence, detail, dense, problem}; null if nothing is known yet.
 * `note`: why its model was not patched at all; `replaced`: the id of the PSA Patch that took its place. */
export function happened(language, { run, note, replaced, stock }) {
    const say = (key, figures) => sayIn(language, key, figures);
    const nothing = (what) => ({ what, bold: what, detail: "", dense: true, problem: true });
    if (replaced) return nothing(say("replaced", { by: replaced }));
    if (note) return stock ? null : nothing(say("unserved", { reason: sentences(language, note) }));
    if (!run) return null;
    if (run.dense) return nothing(say("stayedDense", { reason: sentences(language, run.dense) }));
    const { sparse = 0 } = run.kinds;
    const count = (kinds) => kinds.reduce((sum, [, steps]) => sum + steps, 0);
    const done = count(Object.entries(run.kinds).filter(([kind]) => kind !== "interrupted"));
    const figures = { sparse, done, steps: run.completed ? done : (run.steps ?? done), saved: percent(run.saved) };
    const what = say(run.completed ? "ran" : "stopped", figures);
    const detail = [seconds(say, run), pays(language, run)].filter(Boolean).join(". ");
    return { what, bold: say("thisRun", { what }), detail, dense: false };
}

/** The same in one line, for a run whose inputs differ from the node's; "" if nothing is known. */
export function lastRun(language, state) {
    const found = happened(language, state);
    return found ? sayIn(language, "lastRun", { what: [found.what, found.detail].filter(Boolean).join("; ") }) : "";
}

function seconds(say, { kinds, seconds }) {
    const parts = ["sparse", "dense"]
        .filter((kind) => seconds[kind] !== undefined)
        .map((kind) => say(`${kind}Seconds`, { seconds: rounded(seconds[kind]) }));
    for (const kind of ["skipped", "unseen"]) if (kinds[kind]) parts.push(say(kind, { steps: kinds[kind] }));
    return parts.join(", ");
}

/** How many times as fast a sparse step is, and why if that is too little; "" if the run cannot tell. */
function pays(language, { pays }) {
    if (!pays) return "";
    if (!pays.why) return sayIn(language, "pays", { times: pays.times.toFixed(1) });
    return sayIn(language, "paysNot", { times: pays.times.toFixed(2), why: sentences(language, pays.why) });
}

/** Seconds with two digits, or whole from 10 on: 0.47, 1.4, 12. */
function rounded(value) {
    return value.toFixed(value < 1 ? 2 : value < 10 ? 1 : 0);
}

/** "the video is short; sample more" -> "the video is short. Sample more": one sentence for the reason, one for the
 * remedy; or what that is in another language. */
function sentences(language, reason) {
    const [why, ...rest] = told(language, reason).replace(/\.$/, "").split("; ");
    return [why, ...rest.map((part) => part.charAt(0).toUpperCase() + part.slice(1))].join(". ");
}

/** 0.853 -> "85 %"; shares below 10 % get one decimal. */
export function percent(share) {
    const value = 100 * share;
    return `${value >= 9.95 || value === 0 ? value.toFixed(0) : value.toFixed(1)} %`;
}

/* The line of figures in PSA Report, PSA Compare and PSA Calibrate. Pure functions; the figures are the JSON that the
 * nodes give out.
 */

import { happened } from "./outcome.js";
import { told } from "./translate.js";
import { say } from "./words.js";

const LINES = { PSAReport: reported, PSACompare: compared, PSACalibrate: calibrated };

/** Classes of nodes that have a line. */
export const WITH_LINE = Object.keys(LINES);

/** What a node of a class found, in words; `json`: its figures, undefined before a run. */
export function lineOf(language, node, json) {
    if (!json) return say(language, "noRun");
    try {
        return LINES[node](language, JSON.parse(json));
    } catch {
        return say(language, "noFigures"); // NaN is not JSON
    }
}

function reported(language, { note, dense = null, steps = [], saved, pays }) {
    const nothing = note ?? dense ?? "-";
    if (!steps.length) return say(language, "nothing", { reason: told(language, nothing).replace(/\.$/, "") });
    const kinds = {};
    for (const { kind } of steps) kinds[kind] = (kinds[kind] ?? 0) + 1;
    const seconds = {};
    for (const kind of ["sparse", "dense"]) {
        const found = pays?.[kind] ?? median(steps.filter((step) => step.kind === kind).map((step) => step.seconds));
        if (found !== undefined) seconds[kind] = found;
    }
    const completed = !kinds.interrupted;
    const run = { completed, steps: steps.length, kinds, saved, seconds, pays, dense: completed ? dense : null };
    const { what, detail } = happened(language, { run });
    return [what, detail].filter(Boolean).join("; ");
}

function compared(language, { psnr, ssim, lpips }) {
    const equal = psnr === null; // infinite
    const figures = { psnr: psnr?.toFixed(2), ssim: ssim.toFixed(4), lpips: lpips?.toFixed(4) };
    const words = say(language, equal ? "equal" : "compared", figures);
    return lpips == null ? words : `${words}, LPIPS ${figures.lpips}`;
}

function calibrated(language, { goal, target, sparsity, reached, dense_seconds: dense, points }) {
    const figures = { sparsity: sparsity.toFixed(2), target: `${goal} ${target}` };
    const away = (point) => Math.abs(point.sparsity - sparsity);
    const nearest = points.reduce((a, b) => (away(b) < away(a) ? b : a));
    const measured = {
        sparsity: nearest.sparsity.toFixed(2),
        error: nearest.error.toFixed(3),
        times: (dense / nearest.seconds).toFixed(2),
    };
    return `${say(language, reached ? "reached" : "notReached", figures)} ${say(language, "calibrated", measured)}`;
}

/** The median as Python's statistics.median has it; undefined for no values. */
function median(values) {
    if (!values.length) return undefined;
    const sorted = [...values].sort((a, b) => a - b);
    const middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

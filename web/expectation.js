/* What a setting means before it runs: the same figures as choices/expectation.py, which says where they come from.
 * Pure functions; tests/browser/test_expectation.py holds the two together. A shape is what the node PSA Pyramid or a
 * preset says: {mode, shares: {factor: share}, tail, block_kv, importance, as_written, capped}.
 */

export const BLOCKS = 4096;
export const MEASURED = { slowest: [0.2036, 0.765], fastest: [0.0476, 0.876] };
const SAMPLED_EXTRA = [0.138, 0.079];
const MASS_EXTRA = [0.283, 0.011];
const TOLERANCE = 1e-6;

/** Levels that hold anything, finest first: [[factor, share], ...]. */
export function levelsOf(shape) {
    return Object.entries(shape.shares)
        .map(([factor, share]) => [Number(factor), Number(share)])
        .filter(([, share]) => share > 0)
        .sort(([a], [b]) => a - b);
}

/** Why a shape is impossible at a target sparsity: {key, ...figures} of a sentence in words.js, or null. */
export function problemOf(shape, sparsity) {
    const levels = levelsOf(shape);
    if (!levels.length) return { key: "noLevel" };
    const sum = levels.reduce((total, [, share]) => total + share, 0);
    if (sum > 1 + TOLERANCE) return { key: "tooMuch", sum };
    if (shape.as_written && shape.mode === "budget") return { key: "budgetAsWritten" };
    if (levels.some(([factor]) => factor > shape.block_kv)) return { key: "tooCoarse", block: shape.block_kv };
    if (takenAsWritten(shape) || sparsity === null) return null;
    const least = 1 - 1 / levels[0][0];
    const most = 1 - (shape.tail ? 1 / shape.block_kv : 0);
    const reached = sparsity >= least - TOLERANCE && sparsity <= most + TOLERANCE;
    return reached ? null : { key: "unreachable", sparsity, least, most };
}

/** Whether the target sparsity does not act. */
export function takenAsWritten(shape) {
    return shape.mode === "threshold" || Boolean(shape.as_written);
}

/** Figures of a shape at a target sparsity (null: as it is written): {shares, sparsity, coverage, speedup}; null where
 * they follow the data. Shares are of the block pairs, by pooling factor, 0 for those not seen at all. */
export function expect(shape, sparsity) {
    const target = takenAsWritten(shape) ? null : sparsity;
    if (shape.mode !== "topk") {
        const speedup = target === null ? null : speedupOf(shape, 1 - target);
        return { shares: null, sparsity: target, coverage: shape.tail ? 1 : null, speedup };
    }
    const levels = levelsOf(shape);
    const dropped = shape.tail ? shape.block_kv : 0;
    const ends = topkEnds(levels, dropped, target);
    const shares = {};
    let start = 0;
    levels.forEach(([factor], i) => {
        shares[factor] = (ends[i] - start) / BLOCKS;
        start = ends[i];
    });
    shares[dropped] = (shares[dropped] ?? 0) + (BLOCKS - start) / BLOCKS;
    const density = Object.entries(shares).reduce((sum, [f, share]) => sum + (f > 0 ? share / f : 0), 0);
    return { shares, sparsity: 1 - density, coverage: 1 - (shares[0] ?? 0), speedup: speedupOf(shape, density) };
}

/** Dense time over PSA's time of one attention call: [least, most] of the shapes that were measured on an H100. */
export function speedupOf(shape, density) {
    return [MEASURED.slowest, MEASURED.fastest].map(([fixed, perWork], i) => {
        const sampled = shape.importance === "sampled" ? SAMPLED_EXTRA[i] : 0;
        const mass = shape.mode === "topk" ? 0 : MASS_EXTRA[i];
        return 1 / (fixed + sampled + mass + perWork * density);
    });
}

/** Where the ranks of each level end, as kernels/levels.py searches them. */
function topkEnds(levels, dropped, sparsity) {
    const bounds = [];
    levels.reduce((total, [, share]) => (bounds.push(Math.min(1, total + share)), total + share), 0);
    const scaled = (scale) =>
        bounds.map((bound) => Math.max(1, Math.min(BLOCKS, Math.floor(bound * scale * BLOCKS + 0.5))));
    if (sparsity === null) return scaled(1);
    const costs = [...levels.map(([factor]) => 1 / factor), dropped ? 1 / dropped : 0];
    const miss = (scale) => {
        const ends = [0, ...scaled(scale), BLOCKS];
        return costs.reduce((sum, cost, i) => sum + cost * (ends[i + 1] - ends[i]), 0) / BLOCKS - (1 - sparsity);
    };
    let [low, high] = [0, 1 / bounds[0] + 1];
    for (let i = 0; i < 40; i++) {
        const middle = (low + high) / 2;
        if (miss(middle) < 0) low = middle;
        else high = middle;
    }
    return scaled(Math.abs(miss(low)) <= Math.abs(miss(high)) ? low : high);
}

/* Puts the picture into PSA Patch and PSA Pyramid, and keeps it in step with sliders, wires and runs.
 * Works with both renderers: it only reads widgets' values, and adds one DOM widget that is never saved.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { expect, problemOf, takenAsWritten } from "./expectation.js";
import { happened, lastRun } from "./outcome.js";
import { Picture } from "./picture.js";
import { say as sayIn } from "./words.js";

const PATCH = "PSAPatch";
const PYRAMID = "PSAPyramid";
const HEIGHT = { [PATCH]: 216, [PYRAMID]: 128 };
const WIDTH = 340;
const SLIDERS = { full: 1, half: 2, quarter: 4, eighth: 8 };
const CAPS = ["similarity_half", "similarity_quarter", "similarity_eighth"];
const FROM_PRESET = "preset";
/** Milliseconds without a change after which the server is asked about the inputs. */
const PAUSE = 200;

/** Preset name -> shape, from the node's definition. */
let presets = {};
/** Node -> {picture, queued: its inputs as they were in the last prompt, auto: the preset that `auto` was then, ...NO_RUN}. */
const states = new WeakMap();
/** What is known of a run before there is one: its id; its steps; what was told of it at its end; why the model was not
 * patched; id of the PSA Patch that took the node's place. */
const NO_RUN = { id: null, steps: [], run: null, note: "", replaced: null };
/** GPUs on which the speed of attention was measured, and whether this machine has one. */
const MEASURED_ON = /\bH100\b/;
let measuredHere = false;

app.registerExtension({
    name: "psa.picture",

    async setup() {
        const stats = await api.getSystemStats().catch(() => null);
        measuredHere = (stats?.devices ?? []).some((device) => MEASURED_ON.test(device.name));
        if (measuredHere) everyNode(refresh);
    },

    beforeRegisterNodeDef(_, definition) {
        if (definition.name === PATCH) readPresets(definition);
    },

    refreshComboInNodes(definitions) {
        if (definitions?.[PATCH]) readPresets(definitions[PATCH]);
        everyNode(refresh);
    },

    nodeCreated(node) {
        if (node.comfyClass !== PATCH && node.comfyClass !== PYRAMID) return;
        const picture = new Picture(node.comfyClass === PATCH);
        const height = HEIGHT[node.comfyClass];
        picture.element.style.minHeight = `${height}px`;
        states.set(node, { picture, queued: null, auto: "", ...NO_RUN });
        const widget = node.addDOMWidget("psa_picture", "psa_picture", picture.element, {
            serialize: false,
            hideOnZoom: false,
            hideInPanel: true,
            getMinHeight: () => height,
            getMaxHeight: () => height,
        });
        widget.serialize = false;
        // Nodes 2.0 folds the advanced inputs away and grows a node to what it holds; the classic renderer shows all.
        const [width, least] = node.computeSize();
        node.setSize([Math.max(WIDTH, width), LiteGraph.vueNodesMode ? 0 : least]);

        for (const other of node.widgets) {
            if (other === widget) continue;
            chain(other, "callback", (value) => {
                if (other.name === "preset") suggestSparsity(node, value);
                refreshWithNeighbours(node);
            });
        }
        chain(node, "onConfigure", () => refreshWithNeighbours(node));
        chain(node, "onAdded", () => refreshWithNeighbours(node)); // only now it has neighbours
        chain(node, "onConnectionsChange", () => queueMicrotask(() => refreshWithNeighbours(node)));
        chain(node, "onExecuted", (output) => {
            if (!output?.psa) return;
            const [note = "", auto = ""] = output.psa;
            Object.assign(states.get(node), NO_RUN, { note, auto, queued: output.psa_asked?.[0] ?? null });
            refresh(node);
        });
        refresh(node);
        // The classic renderer places a DOM widget when it draws for the second time.
        requestAnimationFrame(() => requestAnimationFrame(() => app.canvas?.setDirty(true, true)));
    },

    afterConfigureGraph() {
        everyNode(refresh);
    },
});

listen("psa.step", (state, step) => (ofRun(state, step).steps = [...state.steps, step]));
listen("psa.run", (state, run) => (ofRun(state, run).run = run));
listen("psa.replaced", (state, { by }) => (state.replaced = by));

/** What the server tells of a node goes into its state, and the node is drawn again. */
function listen(event, take) {
    api.addEventListener(event, ({ detail }) => {
        const node = findNode(detail.node);
        if (!states.has(node)) return;
        take(states.get(node), detail);
        refresh(node);
    });
}

/** A node's state, with nothing in it of a run before the one that is told of. */
function ofRun(state, { run: id, asked }) {
    if (state.id !== id) Object.assign(state, NO_RUN, { id, queued: asked ?? state.queued });
    return state;
}

/** Draw what the node's inputs mean now, and what ran with them, or with others before. */
function refresh(node) {
    const state = states.get(node);
    if (!state) return;
    const means = node.comfyClass === PATCH ? ofPatch(node) : ofPyramid(node);
    if (state.refused && !means.problem) Object.assign(means, { problem: { sentence: state.refused }, figures: null });
    const known = { ...state, stock: means.stock };
    const changed = !shows(node, state.queued);
    const ran = changed ? null : happened(language(), known);
    state.picture.show({ language: language(), measuredHere, ran, ...means });
    const { picture, steps, run, note } = state;
    const anything = steps.length || run || note;
    const old = changed && anything ? lastRun(language(), known) || say("lastUnfinished") : "";
    if (picture.line) picture.follow({ language: language(), steps, run, old });
    ask(node, state);
}

/** Whether a node still shows the inputs that were queued (`asked_of` in patching/live.py); true where not known. */
function shows(node, asked) {
    if (!asked) return true;
    if (!("psa_pyramid" in asked) && input(node, "psa_pyramid")?.link != null) return false;
    return Object.entries(asked).every(([name, given]) => {
        // What is at the other end of a wire, outside of a subgraph say, is not known: it counts as the same.
        if (input(node, name)?.link != null) {
            const pyramid = name === "psa_pyramid" ? source(node) : undefined;
            return !given || pyramid?.comfyClass !== PYRAMID || shows(pyramid, given);
        }
        const widget = node.widgets?.find((found) => found.name === name);
        return widget ? widget.value === given : name !== "psa_pyramid";
    });
}

/** Ask the server for what the node would refuse to run with, and show it; once for the same inputs. */
function ask(node, state) {
    const inputs = {};
    for (const widget of node.widgets ?? []) if (widget.serialize !== false) inputs[widget.name] = widget.value;
    for (const slot of node.inputs ?? []) if (slot.link != null) inputs[slot.name] = null;
    const body = JSON.stringify({ node: node.comfyClass, inputs });
    if (body === state.asked) return;
    state.asked = body;
    clearTimeout(state.waiting);
    state.waiting = setTimeout(async () => {
        let refused = null;
        try {
            const answer = await api.fetchApi("/psa/check", { method: "POST", body });
            if (answer.ok) ({ refused } = await answer.json());
        } catch {
            // without an answer the run says it
        }
        if (state.asked !== body || (state.refused ?? null) === refused) return;
        state.refused = refused;
        refresh(node);
    }, PAUSE);
}

/** The node and those at the other end of its PSA_PYRAMID wire. */
function refreshWithNeighbours(node) {
    refresh(node);
    if (node.comfyClass === PYRAMID) targets(node).forEach(refresh);
    else if (source(node)) refresh(source(node));
}

function ofPyramid(node) {
    const shape = pyramidShape(node);
    const patch = targets(node).find((target) => target.comfyClass === PATCH);
    const sparsity = patch && !takenAsWritten(shape) ? patchSparsity(patch) : null;
    const scaled = sparsity !== null && sparsity > 0;
    const notes = [];
    if (scaled) notes.push(say("scaled", { sparsity: sparsity.toFixed(2) }));
    else if (shape.mode !== "budget") notes.push(say("asWritten"));
    const problem = problemOf(shape, scaled ? sparsity : null);
    return { shape, problem, figures: problem ? null : expect(shape, scaled ? sparsity : null), notes };
}

function ofPatch(node) {
    const notes = [];
    const sparsity = patchSparsity(node);
    const linked = input(node, "sparsity")?.link != null;
    if (linked) notes.push(say("wired", { sparsity: sparsity.toFixed(2) }));
    if (sparsity === 0 && !linked) return { stock: true, notes };
    let shape;
    if (input(node, "psa_pyramid")?.link != null) {
        const pyramid = source(node);
        if (pyramid?.comfyClass !== PYRAMID) return { notes: [...notes, say("unknown")] };
        shape = pyramidShape(pyramid);
    } else {
        const name = value(node, "preset");
        const preset = (name === "auto" && presets[states.get(node).auto]) || presets[name];
        if (!preset) return { problem: { key: "badPreset" }, notes };
        shape = { ...preset };
        for (const name of ["mode", "importance"]) if (given(node, name)) shape[name] = value(node, name);
        if (given(node, "tail")) shape.tail = value(node, "tail") === "on";
        if (given(node, "block_kv")) shape.block_kv = Number(value(node, "block_kv"));
        const text = value(node, "pyramid") ?? "";
        if (text.trim()) shape.shares = parseLevels(text);
        if (!shape.shares) return { problem: { key: "badText" }, notes };
    }
    const problem = problemOf(shape, sparsity);
    return { shape, problem, figures: problem ? null : expect(shape, sparsity), notes };
}

function pyramidShape(node) {
    const shares = Object.fromEntries(Object.entries(SLIDERS).map(([name, factor]) => [factor, value(node, name)]));
    return {
        shares,
        mode: value(node, "mode"),
        tail: Boolean(value(node, "tail")),
        as_written: Boolean(value(node, "as_written")),
        importance: value(node, "importance"),
        block_kv: Number(value(node, "block_kv")),
        capped: CAPS.some((name) => value(node, name) > 0),
    };
}

/** "1: 0.10, 8: 0.20" -> {1: 0.1, 8: 0.2}; null where it cannot be read. As choices/settings.py parses it. */
function parseLevels(text) {
    const shares = {};
    for (const piece of text.split(",")) {
        const match = /^\s*(\d{1,3})\s*:\s*(\d*\.?\d+)\s*$/.exec(piece);
        if (!match || Number(match[1]) in shares) return null;
        shares[Number(match[1])] = Number(match[2]);
    }
    return shares;
}

/** A preset may say which sparsity it was made for: choosing it moves the slider there. */
function suggestSparsity(node, name) {
    const sparsity = presets[name]?.sparsity;
    const slider = node.widgets.find((widget) => widget.name === "sparsity");
    if (sparsity != null && slider) slider.value = Math.min(sparsity, slider.options.max ?? 1);
}

function readPresets(definition) {
    const [, options] = definition.input?.required?.preset ?? [];
    presets = options?.psa_shapes ?? {};
}

function patchSparsity(node) {
    return Number(value(node, "sparsity") ?? 0);
}

function value(node, name) {
    return node.widgets?.find((widget) => widget.name === name)?.value;
}

function given(node, name) {
    return (value(node, name) ?? FROM_PRESET) !== FROM_PRESET;
}

function input(node, name) {
    return node.inputs?.find((slot) => slot.name === name);
}

/** The node whose pyramid a PSA Patch takes, or undefined. A node that is in no graph has no neighbours: one that is
 * loaded, pasted or put into a subgraph is configured before it is added, and asking then is an error. */
function source(node) {
    const slot = node.graph ? node.inputs.findIndex((found) => found.name === "psa_pyramid") : -1;
    return slot < 0 ? undefined : (node.getInputNode(slot) ?? undefined);
}

/** The nodes that a PSA Pyramid feeds. */
function targets(node) {
    return (node.graph && node.getOutputNodes(0)) || [];
}

/** The node with an id as the server knows it, "12" or, in subgraphs, "12:5". */
function findNode(id) {
    let graph = app.rootGraph ?? app.graph;
    let node;
    for (const piece of String(id).split(":")) {
        node = graph?.getNodeById(Number(piece)) ?? graph?.getNodeById(piece);
        graph = node?.subgraph;
    }
    return node;
}

function everyNode(visit, graph = app.rootGraph ?? app.graph) {
    for (const node of graph?.nodes ?? []) {
        visit(node);
        if (node.subgraph) everyNode(visit, node.subgraph);
    }
}

function chain(object, name, then) {
    const before = object[name];
    object[name] = function (...args) {
        const result = before?.apply(this, args);
        then(...args);
        return result;
    };
}

function language() {
    return app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
}

function say(key, figures) {
    return sayIn(language(), key, figures);
}

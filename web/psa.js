/* Puts the picture into PSA Patch and PSA Pyramid, and keeps it in step with sliders, wires and runs.
 * Works with both renderers: it only reads widgets' values, and adds one DOM widget that is never saved.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { happened, lastRun } from "./outcome.js";
import { Picture } from "./picture.js";
import { say as sayIn } from "./words.js";

const PATCH = "PSAPatch";
const PYRAMID = "PSAPyramid";
const HEIGHT = { [PATCH]: 216, [PYRAMID]: 128 };
const WIDTH = 340;

/** Preset name -> the sparsity that it was made for, from the node's definition. */
let suggested = {};
/** Node -> {picture, queued: its inputs as they were in the last prompt, auto: the preset that `auto` was then, asked: what
 * the server was last to be asked, answer: what it last said (null: nothing yet), waiting: for an answer, ...NO_RUN}. */
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
        if (definition.name === PATCH) readSuggested(definition);
    },

    refreshComboInNodes(definitions) {
        if (definitions?.[PATCH]) readSuggested(definitions[PATCH]);
        everyNode(refresh);
    },

    nodeCreated(node) {
        if (node.comfyClass !== PATCH && node.comfyClass !== PYRAMID) return;
        const picture = new Picture(node.comfyClass === PATCH);
        const height = HEIGHT[node.comfyClass];
        picture.element.style.minHeight = `${height}px`;
        states.set(node, { picture, queued: null, auto: "", asked: "", answer: null, waiting: false, ...NO_RUN });
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

api.addEventListener("reconnected", () => everyNode(askAgain));

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

/** Draw a node, and ask what its inputs mean where that is not known. */
function refresh(node) {
    const state = states.get(node);
    if (!state) return;
    draw(node, state);
    ask(node, state);
}

/** Draw what the node's inputs mean, as the server last said, and what ran with them, or with others before. */
function draw(node, state) {
    const means = meaning(node, state);
    const known = { ...state, stock: means.stock };
    const changed = !shows(node, state.queued);
    const ran = changed ? null : happened(language(), known);
    state.picture.show({ language: language(), measuredHere, ran, ...means });
    const { picture, steps, run, note } = state;
    const anything = steps.length || run || note;
    const old = changed && anything ? lastRun(language(), known) || say("lastUnfinished") : "";
    if (picture.line) picture.follow({ language: language(), steps, run, old });
}

function meaning(node, { answer }) {
    const patch = node.comfyClass === PATCH;
    const wired = patch && input(node, "sparsity")?.link != null;
    const sparsity = patchSparsity(node);
    const notes = wired ? [say("wired", { sparsity: sparsity.toFixed(2) })] : [];
    const { refused: problem = null, figures = null } = answer ?? {};
    const stock = patch && sparsity === 0 && !wired;
    if (answer?.silent) notes.push(say("noAnswer"));
    else if (patch && unreadable(node)) notes.push(say("unknown"));
    else if (!patch && figures?.target != null) notes.push(say("scaled", { sparsity: figures.target.toFixed(2) }));
    else if (!patch && figures && value(node, "mode") !== "budget") notes.push(say("asWritten"));
    return { problem, figures, stock, notes };
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

/** Ask the server what the node's inputs mean: one question at a time, and the last one always. */
async function ask(node, state) {
    state.asked = JSON.stringify(question(node, state));
    if (state.waiting || state.asked === state.answer?.to) return;
    state.waiting = true;
    state.picture.element.classList.add("psa-waiting");
    while (state.asked !== state.answer?.to) {
        const to = state.asked;
        state.answer = { ...(await answerTo(to)), to };
        draw(node, state);
    }
    state.waiting = false;
    state.picture.element.classList.remove("psa-waiting");
}

/** {refused, figures} as nodes/check_route.py answers, or {silent: true}. */
async function answerTo(body) {
    try {
        const response = await api.fetchApi("/psa/check", { method: "POST", body });
        return response.ok ? await response.json() : { silent: true };
    } catch {
        return { silent: true };
    }
}

function question(node, { auto }) {
    const asked = { node: node.comfyClass, ...widgetsOf(node) };
    if (node.comfyClass === PYRAMID) {
        const patch = targets(node).find((target) => target.comfyClass === PATCH);
        return { ...asked, sparsity: patch ? patchSparsity(patch) : null };
    }
    const pyramid = source(node);
    if (pyramid?.comfyClass !== PYRAMID) return { ...asked, auto };
    return { ...asked, pyramid: { node: PYRAMID, ...widgetsOf(pyramid) } };
}

/** What a node's widgets show, and the names of the inputs that come over a wire. */
function widgetsOf(node) {
    const widgets = (node.widgets ?? []).filter((widget) => widget.serialize !== false);
    return {
        inputs: Object.fromEntries(widgets.map((widget) => [widget.name, widget.value])),
        linked: (node.inputs ?? []).filter((slot) => slot.link != null).map((slot) => slot.name),
    };
}

/** After the server was away. */
function askAgain(node) {
    const state = states.get(node);
    if (state?.answer?.silent) state.answer = null;
    refresh(node);
}

/** The node and those at the other end of its PSA_PYRAMID wire. */
function refreshWithNeighbours(node) {
    refresh(node);
    if (node.comfyClass === PYRAMID) targets(node).forEach(refresh);
    else if (source(node)) refresh(source(node));
}

/** A preset may say which sparsity it was made for: choosing it moves the slider there. */
function suggestSparsity(node, name) {
    const sparsity = suggested[name];
    const slider = node.widgets.find((widget) => widget.name === "sparsity");
    if (sparsity != null && slider) slider.value = Math.min(sparsity, slider.options.max ?? 1);
}

function readSuggested(definition) {
    const [, options] = definition.input?.required?.preset ?? [];
    suggested = options?.psa_sparsities ?? {};
}

function patchSparsity(node) {
    return Number(value(node, "sparsity") ?? 0);
}

function value(node, name) {
    return node.widgets?.find((widget) => widget.name === name)?.value;
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

/** Whether a PSA Patch takes its pyramid from something else than a PSA Pyramid. */
function unreadable(node) {
    return input(node, "psa_pyramid")?.link != null && source(node)?.comfyClass !== PYRAMID;
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

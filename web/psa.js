/* Adds the picture to PSA Patch and PSA Pyramid and keeps it up to date with sliders, wires and runs. Adds a line of
 * figures to the nodes that measure. Works with both renderers: it only reads widget values, and adds widgets that are
 * never saved.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { fold } from "./fold.js";
import { lineOf, WITH_LINE } from "./line.js";
import { happened, lastRun } from "./outcome.js";
import { Line, Picture } from "./picture.js";
import { learn, told } from "./translate.js";
import { say as sayIn } from "./words.js";

const PATCH = "PSAPatch";
const PYRAMID = "PSAPyramid";
const WITH_PRESET = [PATCH, "PSACalibrate"];
/** Width and height of what is added to a node; a node that shows a picture of its own is wider. */
const SIZE = { [PATCH]: [340, 216], [PYRAMID]: [340, 168] };
const LINE_SIZE = [460, 46];
const PADDING = 8;
/** LiteGraph's modes of a node that is muted, and of one that is bypassed. */
const OFF = [2, 4];

/** Preset name -> the sparsity it was made for, from the node's definition. */
let suggested = {};
/** Node -> {picture, arrange: shows and hides inputs, queued: its inputs in the last prompt, auto: the preset that `auto`
 * meant then, received: the sparsity that it got then (null: none yet), asked: the latest question for the server,
 * answer: its last answer (null: none yet), waiting: whether one is due, ...NO_RUN}. */
const states = new WeakMap();
/** A node's state before any run. id: the run's; run: the message sent at its end; note: why the model was not patched;
 * replaced: the id of the PSA Patch that took the node's place. */
const NO_RUN = { id: null, steps: [], run: null, note: "", replaced: null };
/** GPUs that the speed of attention was measured on, and whether this machine has one. */
const MEASURED_ON = /\bH100\b/;
let measuredHere = false;

app.registerExtension({
    name: "psa.picture",

    async setup() {
        const [stats] = await Promise.all([api.getSystemStats().catch(() => null), learn(language())]);
        measuredHere = (stats?.devices ?? []).some((device) => MEASURED_ON.test(device.name));
        everyNode(refresh);
        app.ui.settings.addEventListener("Comfy.VueNodes.Enabled.change", () => {
            requestAnimationFrame(() => everyNode((node) => states.get(node)?.arrange()));
        });
    },

    beforeRegisterNodeDef(_, definition) {
        if (definition.name === PATCH) readSuggested(definition);
    },

    refreshComboInNodes(definitions) {
        if (definitions?.[PATCH]) readSuggested(definitions[PATCH]);
        everyNode(keepPreset);
        everyNode(refresh);
    },

    nodeCreated(node) {
        if (WITH_LINE.includes(node.comfyClass)) addLine(node);
        if (node.comfyClass in SIZE) addPicture(node);
        if (WITH_PRESET.includes(node.comfyClass)) chain(node, "onConfigure", () => keepPreset(node));
    },

    afterConfigureGraph() {
        everyNode(refresh);
    },
});

function addLine(node) {
    const line = new Line();
    const show = (json) => line.show(lineOf(language(), node.comfyClass, json));
    addElement(node, "psa_line", line, LINE_SIZE);
    chain(node, "onExecuted", (output) => output?.text && show(output.text[0]));
    show();
}

function addPicture(node) {
    const picture = new Picture(node.comfyClass === PATCH);
    const arrange = fold(node, language);
    const unknown = { queued: null, auto: "", received: null, asked: "", answer: null, waiting: false };
    states.set(node, { picture, arrange, ...unknown, ...NO_RUN });
    addElement(node, "psa_picture", picture, SIZE[node.comfyClass]);
    arrange();

    for (const other of node.widgets) {
        if (other.serialize === false) continue;
        chain(other, "callback", (value) => {
            if (other.name === "preset") suggestSparsity(node, value);
            refreshWithNeighbours(node);
        });
    }
    chain(node, "onConfigure", () => {
        arrange();
        refreshWithNeighbours(node);
    });
    chain(node, "onAdded", () => refreshWithNeighbours(node)); // before, it has no neighbours
    chain(node, "onConnectionsChange", () => {
        queueMicrotask(() => {
            arrange();
            refreshWithNeighbours(node);
        });
    });
    chain(node, "onExecuted", (output) => {
        if (!output?.psa) return;
        // With a list at an input the node runs once for each of its values: the last of them is sampled last.
        const [note = "", auto = ""] = output.psa.slice(-2);
        const received = output.psa_sparsity?.at(-1) ?? null;
        Object.assign(states.get(node), NO_RUN, { note, auto, received, queued: output.psa_asked?.at(-1) ?? null });
        refresh(node);
    });
    refresh(node);
    // The classic renderer positions a DOM widget only on its second draw.
    requestAnimationFrame(() => requestAnimationFrame(() => app.canvas?.setDirty(true, true)));
}

/** Add a DOM widget that is neither saved nor shown in the properties panel, and make room for it; it becomes higher if
 * its words need that, in a narrow node. */
function addElement(node, name, { element, content }, [width, height]) {
    let current = height;
    element.style.minHeight = `${height}px`;
    const widget = node.addDOMWidget(name, name, element, {
        serialize: false,
        hideOnZoom: false,
        hideInPanel: true,
        getMinHeight: () => current,
        getMaxHeight: () => current,
    });
    new ResizeObserver(() => {
        if (!content.offsetHeight) return; // not on the page
        current = Math.max(height, content.offsetHeight + PADDING);
        element.style.minHeight = `${current}px`;
        if (!LiteGraph.vueNodesMode) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    }).observe(content);
    widget.serialize = false;
    // Nodes 2.0 hides the advanced inputs and fits a node's height to its content.
    const [minWidth, minHeight] = node.computeSize();
    node.setSize([Math.max(width, minWidth), LiteGraph.vueNodesMode ? 0 : minHeight]);
}

api.addEventListener("reconnected", () => everyNode(askAgain));
api.addEventListener("execution_start", () => everyNode(refresh)); // nodes may have been muted or bypassed

listen("psa.step", (state, step) => (stateForRun(state, step).steps = [...state.steps, step]));
listen("psa.run", (state, run) => (stateForRun(state, run).run = run));
listen("psa.replaced", (state, { by }) => (state.replaced = by));

// What ComfyUI shows of an error is what this event brings. A capturing listener is called before ComfyUI's own.
api.addEventListener("execution_error", translateError, { capture: true });

function translateError({ detail }) {
    const [, error, after] = /^(.*?)(\s*)$/s.exec(detail.exception_message ?? "");
    detail.exception_message = told(language(), error, namesOf(findNode(detail.node_id))) + after;
}

/** Apply what the server says about a node to its state, and redraw the node. */
function listen(event, apply) {
    api.addEventListener(event, ({ detail }) => {
        const node = findNode(detail.node);
        if (!states.has(node)) return;
        apply(states.get(node), detail);
        refresh(node);
    });
}

/** A node's state, cleared of earlier runs if this run is a new one. */
function stateForRun(state, { run: id, asked }) {
    if (state.id !== id) Object.assign(state, NO_RUN, { id, queued: asked ?? state.queued });
    return state;
}

/** Draw a node, and ask the server what its inputs mean unless that is known. */
function refresh(node) {
    const state = states.get(node);
    if (!state) return;
    draw(node, state);
    ask(node, state);
}

/** Draw what the node's inputs mean according to the server's last answer, and the last run with these or earlier
 * inputs. */
function draw(node, state) {
    const setting = settingOf(node, state);
    const known = { ...state, stock: setting.stock };
    const changed = setting.off || !matches(node, state.queued);
    const ran = changed ? null : happened(language(), known);
    state.picture.show({ language: language(), measuredHere, ran, ...setting });
    const { picture, steps, run, note } = state;
    const hasRun = steps.length || run || note;
    const old = changed && hasRun ? lastRun(language(), known) || say("lastUnfinished") : "";
    if (picture.line) picture.follow({ language: language(), steps, run, old });
}

/** What Picture.show draws of a node's inputs: {problem, figures, stock, off, notes}. */
function settingOf(node, { answer, received }) {
    const [patch, off] = [node.comfyClass === PATCH, OFF.includes(node.mode)];
    const wired = patch && isWired(node);
    const sparsity = patchSparsity(node);
    const notes = wired ? [say(received === null ? "wired" : "wiredRan", { sparsity: sparsity.toFixed(2) })] : [];
    const { refused, figures = null } = answer ?? {};
    const names = { ...namesOf(patch && source(node)), ...namesOf(node) };
    const problem = refused && !off ? told(language(), refused, names) : null;
    const stock = patch && sparsity === 0 && (!wired || received !== null);
    if (answer?.silent) notes.push(say("noAnswer"));
    else if (patch && pyramidUnreadable(node)) notes.push(say("unknown"));
    else if (!patch && figures?.target != null) notes.push(say("scaled", { sparsity: figures.target.toFixed(2) }));
    else if (!patch && figures && value(node, "mode") !== "budget") notes.push(say("asWritten"));
    return { problem, figures, stock, off, notes };
}

/** Whether a node still has the inputs that were queued (`asked_of` in patching/live.py); true if that is unknown. */
function matches(node, asked) {
    if (!asked) return true;
    if (Object.hasOwn(asked, "psa_pyramid") !== takesPyramid(node)) return false;
    return Object.entries(asked).every(([name, given]) => {
        // What is at the other end of a wire may be unknown, say outside a subgraph: it counts as unchanged.
        if (input(node, name)?.link != null) {
            const pyramid = name === "psa_pyramid" ? source(node) : undefined;
            return !given || pyramid?.comfyClass !== PYRAMID || matches(pyramid, given);
        }
        const widget = node.widgets?.find((found) => found.name === name);
        return widget ? widget.value === given : name !== "psa_pyramid";
    });
}

/** Ask the server what the node's inputs mean: one question at a time, and always the latest one. */
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

/** The answer of nodes/check_route.py, {refused, figures}, or {silent: true} if there is none. */
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
    asked.inputs.sparsity = patchSparsity(node);
    if (pyramid?.comfyClass !== PYRAMID) return { ...asked, auto };
    return { ...asked, pyramid: { node: PYRAMID, ...widgetsOf(pyramid) } };
}

/** The values of a node's widgets, and the names of its wired inputs. */
function widgetsOf(node) {
    const widgets = (node.widgets ?? []).filter((widget) => widget.serialize !== false);
    return {
        inputs: Object.fromEntries(widgets.map((widget) => [widget.name, widget.value])),
        linked: (node.inputs ?? [])
            .filter(({ name, link }) => (name === "psa_pyramid" ? takesPyramid(node) : link != null))
            .map((slot) => slot.name),
    };
}

/** What the page calls a node's inputs: {name: label}. */
function namesOf(node) {
    const inputs = [...(node?.inputs ?? []), ...(node?.widgets ?? [])];
    return Object.fromEntries(inputs.map(({ name, localized_name: shown, label }) => [name, shown ?? label ?? name]));
}

/** Forget that the server did not answer, and ask again. */
function askAgain(node) {
    const state = states.get(node);
    if (state?.answer?.silent) state.answer = null;
    refresh(node);
}

/** Refresh a node and those at the other end of its PSA_PYRAMID wire. */
function refreshWithNeighbours(node) {
    refresh(node);
    if (node.comfyClass === PYRAMID) targets(node).forEach(refresh);
    else if (source(node)) refresh(source(node));
}

/** Move the slider to the sparsity that a preset was made for, if it names one. */
function suggestSparsity(node, name) {
    const sparsity = suggested[name];
    const slider = node.widgets.find((widget) => widget.name === "sparsity");
    if (sparsity != null && slider) slider.value = Math.min(sparsity, slider.options.max ?? 1);
}

/** Let the menu of a node have its own preset, also one that is not offered to new nodes, from an older workflow. */
function keepPreset(node) {
    if (!WITH_PRESET.includes(node.comfyClass)) return;
    const { options, value } = node.widgets.find((widget) => widget.name === "preset");
    if (!options.values.includes(value)) options.values = [...options.values, value];
}

function readSuggested(definition) {
    const [, options] = definition.input?.required?.preset ?? [];
    suggested = options?.psa_sparsities ?? {};
}

/** The sparsity that a PSA Patch has: its slider's, or over a wire that of the last run, if there was one. */
function patchSparsity(node) {
    const received = isWired(node) ? states.get(node)?.received : null;
    return Number(received ?? value(node, "sparsity") ?? 0);
}

function isWired(node) {
    return input(node, "sparsity")?.link != null;
}

function value(node, name) {
    return node.widgets?.find((widget) => widget.name === name)?.value;
}

function input(node, name) {
    return node.inputs?.find((slot) => slot.name === name);
}

/** The node that a PSA Patch gets its pyramid from, or undefined. */
function source(node) {
    return takesPyramid(node) ? atPyramidInput(node) : undefined;
}

/** Whether a PSA Patch gets a pyramid: nothing comes from a PSA Pyramid that is muted or bypassed. */
function takesPyramid(node) {
    const from = atPyramidInput(node);
    const off = from?.comfyClass === PYRAMID && OFF.includes(from.mode);
    return input(node, "psa_pyramid")?.link != null && !off;
}

/** The node at the other end of the wire. A node that is being loaded, pasted or moved into a subgraph is configured
 * before it is in a graph, and asking for its neighbours then is an error. */
function atPyramidInput(node) {
    const slot = node.graph ? (node.inputs ?? []).findIndex((found) => found.name === "psa_pyramid") : -1;
    return slot < 0 ? undefined : (node.getInputNode(slot) ?? undefined);
}

/** Whether a PSA Patch gets its pyramid from anything but a PSA Pyramid. */
function pyramidUnreadable(node) {
    return takesPyramid(node) && source(node)?.comfyClass !== PYRAMID;
}

/** The nodes that a PSA Pyramid feeds. */
function targets(node) {
    return (node.graph && node.getOutputNodes(0)) || [];
}

/** The node with the server's id: "12" or, in subgraphs, "12:5". */
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

/** Call `then` after an object's own method `name`. */
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

/* Folds a node's advanced inputs away behind a button in the classic renderer, which would draw all of them. Nodes 2.0
 * folds them by itself, but gives a node that it loads room for all of them.
 */

import { say } from "./words.js";

/** Add the button to a node. Returns a function that hides and shows the inputs, to be called when wires or the renderer
 * change. */
export function fold(node, language) {
    const advanced = node.widgets.filter((widget) => widget.options?.advanced);
    const button = node.addWidget("button", "psa_more", null, () => {}, { serialize: false, canvasOnly: true });
    button.serialize = false;
    let open = false;
    const arrange = () => {
        const folded = !open && !LiteGraph.vueNodesMode;
        for (const widget of advanced) widget.hidden = folded && !wired(node, widget);
        button.label = say(language(), open ? "fewer" : "more", { inputs: advanced.length });
        if (!LiteGraph.vueNodesMode) node.setSize([node.size[0], node.computeSize()[1]]);
        node.setDirtyCanvas?.(true, true);
    };
    button.callback = () => {
        open = !open;
        arrange();
    };
    const { computeSize } = node;
    node.computeSize = function (...args) {
        const [width, height] = computeSize.apply(this, args);
        const unseen = LiteGraph.vueNodesMode && !this.showAdvanced ? advanced.length + 1 : 0;
        return [width, height - unseen * (LiteGraph.NODE_WIDGET_HEIGHT + 4)];
    };
    return arrange;
}

function wired(node, widget) {
    return node.inputs?.some((slot) => slot.name === widget.name && slot.link != null) ?? false;
}

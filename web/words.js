/* The sentences in the nodes' pictures, in English and Chinese. `{name}` is replaced by a figure. */

const WORDS = {
    en: {
        saved: "{saved} of the attention work saved in the sparse steps",
        stock: "Stays dense: sparsity is 0. Move the slider up to save work.",
        follows: "Work saved: depends on the video",
        faster: "attention {low} to {high} times faster (H100)",
        noFaster: "attention is no faster than dense here (H100)",
        seen: "sees",
        work: "work",
        mass: "mass",
        massNote: "Shares of the attention mass: how many blocks that makes depends on the video.",
        full: "seen in full",
        half: "at 1/2",
        pooled: "at 1/{factor}",
        tail: "one mean row of {factor}",
        none: "not at all",
        capped: "Similarity caps refine some blocks, so slightly less is saved.",
        scaled: "PSA Patch scales the levels to its sparsity of {sparsity}.",
        asWritten: "The levels are used as written.",
        wired: "sparsity is wired; the picture shows {sparsity}.",
        unknown: "The pyramid comes from a node that cannot be read here; the figures will appear during the run.",
        noAnswer: "The server is not answering; the figures will appear during the run.",
        live: "step {step} of {steps}:",
        seconds: "{seconds} s",
        measured: "measured sparsity {sparsity}",
        denseStep: "dense",
        skippedStep: "answered by a cache",
        unseenStep: "not seen by PSA",
        thisRun: "This run: {what}",
        lastRun: "Last run, with other inputs: {what}",
        lastUnfinished: "The last run had other inputs.",
        ran: "{sparse} of {steps} steps sparse, {saved} of the attention saved",
        stopped: "stopped after {done} of {steps} steps, {sparse} of them sparse, {saved} of the attention saved",
        stayedDense: "Stayed dense: {reason}.",
        unserved: "Stays dense: {reason}. Load another model, or bypass this node: it has no effect here.",
        replaced: "Has no effect: PSA Patch #{by} comes after it and replaces it. Remove one of the two.",
        sparseSeconds: "sparse steps {seconds} s",
        denseSeconds: "dense steps {seconds} s",
        pays: "A sparse step is {times} times as fast",
        paysNot: "A sparse step is {times} times as fast: {why}",
        skipped: "{steps} steps answered by a cache",
        unseen: "{steps} steps not seen by PSA",
        liveOld: "last run, step {step} of {steps}:",
        denseCalls: "{calls} calls stayed dense: {reason}.",
        remark: "{note}.",
        before: "Dense until start_percent, then sparse.",
        noRun: "No run yet: measurements will appear here.",
    },
    zh: {
        saved: "稀疏步中节省 {saved} 的注意力计算",
        stock: "保持稠密：稀疏度为 0。调高滑块即可节省计算。",
        follows: "节省的计算量取决于视频内容",
        faster: "注意力速度为稠密的 {low} 到 {high} 倍（H100 实测）",
        noFaster: "此设置下注意力不比稠密更快（在 H100 上实测）",
        seen: "可见",
        work: "计算",
        mass: "质量",
        massNote: "按注意力质量划分的份额：对应多少块取决于视频。",
        full: "完整分辨率",
        half: "1/2",
        pooled: "1/{factor}",
        tail: "每 {factor} 个取一行均值",
        none: "完全不看",
        capped: "相似度上限会细化部分块：节省略少。",
        scaled: "PSA Patch 将各层级缩放到稀疏度 {sparsity}。",
        asWritten: "各层级按所写数值使用。",
        wired: "稀疏度来自连线；此处按 {sparsity} 显示。",
        unknown: "金字塔来自此处无法读取的节点；运行时显示数值。",
        noAnswer: "服务器没有应答：运行时显示数值。",
        live: "第 {step}/{steps} 步：",
        seconds: "{seconds} 秒",
        measured: "实测稀疏度 {sparsity}",
        denseStep: "稠密",
        skippedStep: "由缓存给出",
        unseenStep: "未经过 PSA",
        thisRun: "本次运行：{what}",
        lastRun: "上次运行（输入不同）：{what}",
        lastUnfinished: "上次运行的输入不同。",
        ran: "{steps} 步中 {sparse} 步稀疏，共节省 {saved} 的注意力计算",
        stopped: "在 {steps} 步中的第 {done} 步后停止：其中 {sparse} 步稀疏，节省 {saved} 的注意力计算",
        stayedDense: "保持了稠密：{reason}。",
        unserved: "保持稠密：{reason}。请换用其他模型，或绕过此节点：它在这里不起作用。",
        replaced: "在此不起作用：其后的 PSA Patch #{by} 取代了它。请移除其中一个。",
        sparseSeconds: "稀疏步 {seconds} 秒",
        denseSeconds: "稠密步 {seconds} 秒",
        pays: "稀疏步的速度是稠密步的 {times} 倍",
        paysNot: "稀疏步的速度是稠密步的 {times} 倍：{why}",
        skipped: "{steps} 步由缓存给出",
        unseen: "{steps} 步未经过 PSA",
        liveOld: "上次运行，第 {step}/{steps} 步：",
        denseCalls: "{calls} 次调用保持稠密：{reason}。",
        remark: "{note}。",
        before: "“开始百分比”为稠密，之后为稀疏。",
        noRun: "尚未运行：采样时此处显示实测稀疏度与秒数。",
    },
};

export const LANGUAGES = Object.keys(WORDS);

/** The one of our languages that a page in ComfyUI's language `locale` is shown in. */
export function languageOf(locale) {
    return String(locale).startsWith("zh") ? "zh" : "en";
}

/** The sentence `key` in the page's language, with its figures filled in. */
export function say(locale, key, figures = {}) {
    return WORDS[languageOf(locale)][key].replace(/\{(\w+)\}/g, (_, name) => figures[name] ?? "?");
}

/** Keys that one language has and another lacks; empty if there are none. */
export function missingWords() {
    const keys = new Set(LANGUAGES.flatMap((language) => Object.keys(WORDS[language])));
    return LANGUAGES.flatMap((language) => [...keys].filter((key) => !(key in WORDS[language])));
}

/* The sentences of the in-node picture, in English and Chinese. `{name}` is filled in. */

const WORDS = {
    en: {
        saved: "{saved} of the attention work saved",
        stock: "Stock model: nothing is saved",
        follows: "Work saved: follows the video",
        faster: "attention {least} to {most} times faster (H100)",
        noFaster: "attention is no faster than dense here (H100)",
        seen: "sees",
        work: "work",
        mass: "mass",
        massNote: "Shares of the attention mass: how many blocks they are follows the video.",
        full: "seen in full",
        half: "at 1/2",
        pooled: "at 1/{factor}",
        tail: "one mean row of {factor}",
        none: "not at all",
        capped: "Similarity caps refine some blocks: a little less is saved.",
        scaled: "PSA Patch scales the levels to its sparsity of {sparsity}.",
        asWritten: "The levels as they are written.",
        wired: "sparsity comes over a wire; shown for {sparsity}.",
        unknown: "The pyramid comes from a node that cannot be read here; the figures appear with the run.",
        noLevel: "No level is above 0: the video must be seen somehow.",
        tooMuch: "The levels add up to {sum}; at most 1.00.",
        budgetAsWritten: "Budget mode always meets the sparsity slider: turn as_written off, or choose threshold.",
        tooCoarse: "A level is coarser than block_kv {block}.",
        unreachable: "Sparsity {sparsity} is out of reach for these levels: {least} to {most}.",
        badText: "The levels in pyramid cannot be read; write '1: 0.10, 2: 0.05, 8: 0.20'.",
        badPreset: "This preset cannot be used; running says why.",
        live: "step {step} of {steps}:",
        seconds: "{seconds} s",
        measured: "measured sparsity {sparsity}",
        denseStep: "dense",
        dense: "Stays dense: {reason}.",
        denseCalls: "{calls} calls stayed dense: {reason}.",
        before: "Dense until start_percent, then sparse.",
        noRun: "No run yet: what is measured appears here.",
    },
    zh: {
        saved: "节省 {saved} 的注意力计算",
        stock: "原始模型：不节省计算",
        follows: "节省的计算量取决于视频内容",
        faster: "注意力速度为稠密的 {least} 到 {most} 倍（H100 实测）",
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
        noLevel: "没有任何层级大于 0：视频总得以某种方式被看到。",
        tooMuch: "各层级之和为 {sum}；最多 1.00。",
        budgetAsWritten: "budget 模式总是满足稀疏度滑块：请关闭 as_written，或选择 threshold。",
        tooCoarse: "有层级比 block_kv {block} 更粗。",
        unreachable: "这些层级无法达到稀疏度 {sparsity}：可达 {least} 到 {most}。",
        badText: "无法读取 pyramid 中的层级；请写成 '1: 0.10, 2: 0.05, 8: 0.20'。",
        badPreset: "此预设无法使用；运行时会说明原因。",
        live: "第 {step}/{steps} 步：",
        seconds: "{seconds} 秒",
        measured: "实测稀疏度 {sparsity}",
        denseStep: "稠密",
        dense: "保持稠密：{reason}。",
        denseCalls: "{calls} 次调用保持稠密：{reason}。",
        before: "start_percent 之前为稠密，之后为稀疏。",
        noRun: "尚未运行：采样时此处显示实测稀疏度与秒数。",
    },
};

export const LANGUAGES = Object.keys(WORDS);

/** The sentence `key` in a language (English where there is none), with figures filled in. */
export function say(language, key, figures = {}) {
    const words = WORDS[String(language).startsWith("zh") ? "zh" : "en"];
    return words[key].replace(/\{(\w+)\}/g, (_, name) => figures[name] ?? "?");
}

/** Keys that one language has and another lacks; empty when they are complete. */
export function missingWords() {
    const keys = new Set(LANGUAGES.flatMap((language) => Object.keys(WORDS[language])));
    return LANGUAGES.flatMap((language) => [...keys].filter((key) => !(key in WORDS[language])));
}

/* What the server says, in the page's language. The server speaks English, and so does its log. A table in messages/,
 * one file a language, has the same sentences in another language: `…` in a sentence is what is only known when it is
 * shown, and the first of them is {1} in the translation. Sentences without a translation stay English.
 */

import { languageOf } from "./words.js";

/** Language -> its table. */
const tables = new Map();

/** Get the table of a language, if there is one. */
export async function learn(locale) {
    const language = languageOf(locale);
    if (language === "en" || tables.has(language)) return;
    try {
        const response = await fetch(new URL(`./messages/${language}.json`, import.meta.url), { cache: "no-cache" });
        tables.set(language, new Table(await response.json()));
    } catch (error) {
        console.warn("ComfyUI-PSA: messages stay English", error);
    }
}

/** A text of the server in a language. `names`: what the page calls the inputs that the text may name. */
export function told(locale, text, names = {}) {
    if (text.length > LONGEST) return text;
    const found = tables.get(languageOf(locale))?.find(text, new Map(Object.entries(names)));
    return found?.replace(SPACE, "") ?? text;
}

/** More letters than any of our sentences has. */
const LONGEST = 4000;
/** Between two Chinese words, where figures would have been. */
const SPACE = /(?<=[\u4e00-\u9fff]) (?=[\u4e00-\u9fff])/g;
/** A value that words such as "to" may stand between. */
const NUMBER = /^-?[\d.]+$/;

/** A table, made for looking up texts. */
export class Table {
    constructor(entries) {
        this.exact = new Map();
        this.templates = [];
        for (const [english, words] of Object.entries(entries)) {
            const parts = english.split("…");
            if (parts.length === 1) this.exact.set(english, words);
            else this.templates.push(template(parts, words));
        }
        // What says more of the text by itself goes first.
        this.templates.sort((a, b) => b.letters - a.letters);
    }

    /** The translation of a whole text, null if there is none. `known`: translations of other texts; it learns. */
    find(text, known) {
        if (known.has(text)) return known.get(text);
        const found =
            this.exact.get(text) ??
            this.sentences(text, known) ??
            this.filled(text, known) ??
            this.quoted(text, known) ??
            this.listed(text, known) ??
            null;
        known.set(text, found);
        return found;
    }

    filled(text, known) {
        for (const { pattern, own, words } of this.templates) {
            const [, ...values] = pattern.exec(text) ?? [];
            if (!values.length) continue;
            const found = values.map((value) => this.find(value, known));
            // Any text may have a colon or the word "to": then the rest must be known, too.
            if (own === 0 && found.every((value) => value === null)) continue;
            if (own === 1 && !values.every((value, i) => found[i] !== null || NUMBER.test(value))) continue;
            return words.replace(/\{(\d+)\}/g, (_, n) => found[n - 1] ?? values[n - 1]);
        }
        return null;
    }

    quoted(text, known) {
        const [, , inner] = /^(['"])(.+)\1$/.exec(text) ?? [];
        return inner === undefined ? null : this.find(inner, known);
    }

    listed(text, known) {
        const items = text.split(", ");
        if (items.length < 2) return null;
        const found = items.map((item) => this.find(item, known));
        return found.includes(null) ? null : found.join("，");
    }

    /** Of an error: what it says, and what to do, which begins with a capital letter there and not in the table. */
    sentences(text, known) {
        if (!text.endsWith(".")) return null;
        for (let at = text.indexOf(". "); at > 0; at = text.indexOf(". ", at + 1)) {
            const said = this.find(text.slice(0, at), known);
            const rest = text.slice(at + 2, -1);
            const remedy = this.find(rest.charAt(0).toLowerCase() + rest.slice(1), known) ?? this.find(rest, known);
            if (said !== null && remedy !== null) return `${said}。${remedy}。`;
        }
        return null;
    }
}

function template(parts, words) {
    const letters = parts.join("").length;
    const own = (parts.join(" ").match(/[A-Za-z]{2,}/g) ?? []).length;
    const pattern = parts.map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("(.*?)");
    return { pattern: new RegExp(`^${pattern}$`, "s"), letters, own, words };
}

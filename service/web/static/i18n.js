// Words and numbers in the person's language. Every sentence of the page is in strings/<language>.json, under the same key in each.

import { preferences } from "./preferences.js";

export const LANGUAGES = { en: "English", de: "Deutsch" };

let strings = {};
let warnings = []; // patterns of the server's warnings, which have no codes, and their sentences: strings/warnings.<language>.json
let fromServer = {}; // what the server says, by its codes, in plainer words or another language: strings/server.<language>.json
let plurals = new Intl.PluralRules("en");
let language = "en";

/** Return the attributes of an element whose text is as the server wrote it, for those who read aloud. */
export function asServed() {
  return language === "en" ? {} : { lang: "en" };
}

/** Load a language, by default the one that the address names (`/?lang=de`), that was chosen before, or that the page came in. */
export async function useLanguage(wanted = new URLSearchParams(location.search).get("lang") ?? preferences.language ?? document.documentElement.lang) {
  language = wanted in LANGUAGES ? wanted : "en";
  const read = async (file) => (await fetch(`static/strings/${file}.json`)).json();
  let found;
  [strings, fromServer, found] = await Promise.all([read(language), read(`server.${language}`), read(`warnings.${language}`)]);
  warnings = Object.entries(found).map(([pattern, sentence]) => [new RegExp(pattern, "s"), sentence]);
  plurals = new Intl.PluralRules(language);
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-t-label]")) element.setAttribute("aria-label", t(element.dataset.tLabel));
}

export function currentLanguage() {
  return language;
}

/** Return the sentence of a key with its values in it; of a key with plural forms, the one that `n` takes. */
export function t(key, values = {}) {
  return key in strings ? filled(strings[key], values) : key;
}

/** Return what the server says under a code in the person's words, or null where there is no such sentence. */
export function serverWords(code, values = {}) {
  return code in fromServer ? filled(fromServer[code], values) : null;
}

/** Return a warning of the server in the person's words, or null where there is no such sentence. */
export function warningWords(text) {
  for (const [pattern, sentence] of warnings) {
    const found = pattern.exec(text);
    if (found) return filled(sentence, found.groups ?? {});
  }
  return null;
}

function filled(found, values) {
  const form = values.n === 0 && found.zero ? "zero" : plurals.select(values.n);
  const text = typeof found === "string" ? found : (found[form] ?? found.other);
  return text.replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === "number" ? number(value) : String(value ?? "");
  });
}

/** Return the sentence of a key where there is one, else `otherwise`: for words that the server may add to. */
export function known(key, otherwise) {
  return key in strings ? t(key) : otherwise;
}

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(value);
}

export function percent(share, digits = 0) {
  if (share === null || share === undefined) return "–";
  return new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: digits }).format(share);
}

export function points(difference) {
  const sign = difference > 0 ? "+" : "";
  return `${sign}${number(100 * difference, 1)}`;
}

export function bytes(count) {
  const units = ["byte", "kilobyte", "megabyte", "gigabyte"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, count)) / 3));
  const style = { style: "unit", unit: units[power], unitDisplay: "short", maximumFractionDigits: power > 1 ? 1 : 0 };
  return new Intl.NumberFormat(language, style).format(count / 1000 ** power);
}

export function duration(seconds) {
  const unit = seconds < 1 ? ["millisecond", 1000 * seconds] : seconds < 90 ? ["second", seconds]
    : seconds < 5400 ? ["minute", seconds / 60] : ["hour", seconds / 3600];
  const digits = unit[0] === "hour" || (unit[0] === "millisecond" && unit[1] < 10) ? 1 : 0;
  const style = { style: "unit", unit: unit[0], unitDisplay: "short", maximumFractionDigits: digits };
  return new Intl.NumberFormat(language, style).format(unit[1]);
}

export function when(unixSeconds) {
  const date = new Date(1000 * unixSeconds);
  const today = date.toDateString() === new Date().toDateString();
  return new Intl.DateTimeFormat(language, today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" }).format(date);
}

export function list(words) {
  return new Intl.ListFormat(language).format(words);
}

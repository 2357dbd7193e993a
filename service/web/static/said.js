// What the server has said in sentences: warnings, and the history of a job.

import { h } from "./dom.js";
import { asServed, serverWords, warningWords, when } from "./i18n.js";

/** Return a warning as an item of a list. */
export function warningItem(text) {
  const words = warningWords(text);
  return h("li", { class: "notice", ...(words === null ? asServed() : {}) }, words ?? text);
}

/** Return an event of a job as an item of a list. */
export function eventItem({ kind, level, message, data, created_at: at }) {
  const words = kind === "warning" ? warningWords(message) : serverWords(`event.${kind}`, data ?? {});
  return h("li", { class: level, ...(words === null ? asServed() : {}) }, h("time", {}, when(at)), ` ${words ?? message}`);
}

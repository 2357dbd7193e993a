// What a job or a comparison is called, where it is, and its state in words and a mark.

import { h } from "./dom.js";
import { inWords } from "./figures.js";
import { duration, known, list, percent, t } from "./i18n.js";

const MARKS = { queued: "○", running: "◐", cancelling: "◌", succeeded: "●", failed: "✕", cancelled: "–" };
const ENDED = ["succeeded", "failed", "cancelled"];

export function hasEnded(job) {
  return ENDED.includes(job.status);
}

export function isComparison(job) {
  return job.object === "fine_tuning.comparison";
}

export function pathOf(id) {
  return `v1/fine_tuning/${id.startsWith("ftcmp") ? "comparisons" : "jobs"}/${encodeURIComponent(id)}`;
}

export function linkOf(job) {
  return `#/${isComparison(job) ? "compare" : "runs"}/${encodeURIComponent(job.id)}`;
}

export function methodName(type) {
  return known(`method.${type}`, type);
}

export function titleOf(job) {
  const name = job.fine_tuned_model ? `${job.fine_tuned_model}@${job.fine_tuned_version}` : (job.suffix ?? job.metadata?.dataset ?? t("runs.unnamed"));
  if (isComparison(job)) return t("runs.comparison_title", { name });
  return t("runs.title", { name, method: methodName(job.method.type) });
}

export function stateMark(status) {
  return h("span", { class: `state state-${status}` }, h("span", { "aria-hidden": "true" }, MARKS[status] ?? ""), ` ${t(`state.${status}`)}`);
}

/** Return where a job is, in one sentence. */
export function progressSentence(job) {
  if (job.status === "failed") return job.error?.message ?? "";
  if (job.status === "succeeded") return isComparison(job) ? (job.verdict?.sentence ?? "") : accuracyOf(job);
  if (job.status === "queued") return t("run.queue", { n: job.queue_position ?? 0 });
  if (!job.phase) return "";
  const { done, total } = job.progress ?? {};
  const parts = [known(`phase.${job.phase}`, job.phase)];
  if (total) parts.push(percent(done / total));
  const eta = job.progress?.values?.eta_seconds;
  if (eta) parts.push(t("run.eta", { time: duration(eta) }));
  return parts.join(" · ");
}

function accuracyOf(job) {
  return inWords(job.metrics, "runs.accuracy");
}

export function classNames(names, most = 6) {
  return names.length > most ? t("data.classes_and_more", { names: names.slice(0, most).join(", "), n: names.length - most }) : list(names);
}

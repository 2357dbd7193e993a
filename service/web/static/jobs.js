// What a job or a comparison is called, where it is, and its state in words and a mark.

import { h } from "./dom.js";
import { inWords } from "./figures.js";
import { asServed, duration, known, list, number, percent, serverWords, t } from "./i18n.js";
import { session } from "./session.js";

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
  if (job.status === "failed") return session.failure(job.error);
  if (job.status === "succeeded") return isComparison(job) ? shortVerdict(job.verdict) : accuracyOf(job);
  if (job.status === "queued") return t("run.queue", { n: job.queue_position ?? 0 });
  if (!job.phase) return "";
  const { done, total } = job.progress ?? {};
  const parts = [known(`phase.${job.phase}`, job.phase)];
  if (total) parts.push(percent(done / total));
  const eta = job.progress?.values?.eta_seconds;
  if (eta) parts.push(t("run.eta", { time: duration(eta) }));
  return parts.join(" · ");
}

export function shortVerdict(verdict) {
  if (!verdict) return "";
  return serverWords("verdict.short", { outcome: t(`verdict.${verdict.outcome}`), choose: methodName(verdict.choose) }) ?? verdict.sentence;
}

/** Return which way a comparison chooses, and why, in one paragraph. */
export function verdictOf(result, pairs) {
  const { outcome, choose, sentence, margin } = result.verdict;
  const others = result.arms.filter(({ name }) => name !== choose);
  const points = (difference) => number(100 * difference, 1);
  const value = ({ metrics }) => metrics[result.headline]?.value ?? 0;
  const second = [...others].sort((one, other) => value(other) - value(one))[0];
  const pair = pairs.find(({ a, b }) => [a, b].includes(choose) && [a, b].includes(second?.name));
  const sign = pair?.a === choose ? 1 : -1;
  const words = pair && serverWords(`verdict.${outcome}`, {
    choose: methodName(choose), others: list(others.map(({ name }) => methodName(name))), second: methodName(second.name), images: pair.n,
    margin: points(margin), points: points(sign * pair.difference),
    low: points(Math.min(sign * pair.low, sign * pair.high)), high: points(Math.max(sign * pair.low, sign * pair.high)),
  });
  return words ? h("p", { class: "lead" }, words) : h("p", { class: "lead", ...asServed() }, sentence);
}

function accuracyOf(job) {
  return inWords(job.metrics, "runs.accuracy");
}

export function classNames(names, most = 6) {
  return names.length > most ? t("data.classes_and_more", { names: names.slice(0, most).join(", "), n: names.length - most }) : list(names);
}

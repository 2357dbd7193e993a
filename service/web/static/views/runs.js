// Runs: the list, and one of them from its place in the queue to its result.

import { all, request } from "../api.js";
import { h, put } from "../dom.js";
import { inWords } from "../figures.js";
import { t, when } from "../i18n.js";
import { hasEnded, isComparison, linkOf, methodName, progressSentence, shortVerdict, stateMark, titleOf } from "../jobs.js";
import { watch } from "../live.js";
import { reportButton, showResult } from "../result.js";
import { session } from "../session.js";

const LIST_MS = 4000; // between two looks at the list
const MOST = 200;

export async function open(root, [id], signal) {
  return id ? openOne(root, id, signal) : openList(root, signal);
}

async function openList(root, signal) {
  const rows = h("ul", { class: "cards wide" });
  const read = () => Promise.all(["jobs", "comparisons"].map((kind) => all(`v1/fine_tuning/${kind}`, { signal, most: MOST })));
  const show = (lists) => {
    const jobs = lists.flat().sort((a, b) => b.created_at - a.created_at);
    put(rows, jobs.map((job) => h("li", { class: "card" },
      h("div", { class: "row" }, h("h2", {}, h("a", { href: linkOf(job) }, titleOf(job))), stateMark(job.status)),
      h("p", {}, progressSentence(job)),
      h("p", { class: "hint" }, [when(job.created_at), isComparison(job) ? null : job.model].filter(Boolean).join(" · ")))));
    return jobs;
  };
  const [jobs, made] = [show(await read()), await localRuns("training", signal)];
  put(root, h("div", { class: "row heading" }, h("h1", { tabindex: "-1" }, t("runs.list")), h("a", { class: "button primary", href: "#/train" }, t("runs.new"))),
    jobs.length || made ? rows : h("div", { class: "empty" }, h("p", {}, t("runs.empty")), h("a", { class: "button primary", href: "#/train" }, t("runs.new"))), made);
  if (jobs.every(hasEnded)) return;
  refresh();
  async function refresh() {
    for (let going = true; going && !signal.aborted;) {
      await new Promise((resolve) => setTimeout(resolve, LIST_MS));
      if (signal.aborted || document.hidden) continue;
      try {
        going = show(await read()).some((job) => !hasEnded(job));
      } catch {
        // the server is away for a moment: the list stays as it was
      }
    }
  }
}

/** Return what the command line has made in this workspace, which belongs to no job; null where there is nothing or it may not be seen. */
export async function localRuns(kind, signal) {
  if (!session.may("admin")) return null;
  const found = (await all("v1/runs", { signal, most: MOST })).filter((run) => run.kind === kind);
  return found.length > 0 && h("section", {}, h("h2", {}, t("runs.local")), h("ul", { class: "cards wide" }, found.map((run) => {
    const version = run.model && `${run.model}@${run.version}`;
    const name = run.method ? t("runs.title", { name: version ?? run.id, method: methodName(run.method) }) : (version ?? run.id);
    return h("li", { class: "card" }, h("h3", {}, name), h("p", {}, run.verdict ? shortVerdict(run.verdict) : inWords(run.metrics, "runs.accuracy")),
      h("p", { class: "hint" }, when(run.finished_at), version && ` · ${run.id}`),
      h("div", { class: "row" }, run.links.report && reportButton(run.links.report.slice(1)),
        version && h("a", { class: "button", href: `#/models/${encodeURIComponent(run.model)}` }, t("result.model", { version }))));
  })));
}

async function openOne(root, id, signal) {
  const job = await request(`v1/fine_tuning/jobs/${encodeURIComponent(id)}`, { signal });
  const body = h("div", {});
  put(root, h("p", { class: "crumbs" }, h("a", { href: "#/runs" }, t("runs.list"))), h("h1", { tabindex: "-1" }, titleOf(job)), body);
  if (job.status === "succeeded") return showResult(body, job, signal);
  watch(body, job, signal, async (ended) => {
    root.querySelector("h1").textContent = titleOf(ended);
    if (ended.status === "succeeded") await showResult(body, ended, signal);
  });
  return undefined;
}

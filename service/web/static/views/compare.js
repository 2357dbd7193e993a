// Comparisons: the list, and one of them: verdict, differences, cost, the pictures that divide two ways, and promotion.

import { all, request } from "../api.js";
import { bars, forest } from "../charts.js";
import { alertBox, field, h, put } from "../dom.js";
import { bytes, duration, number, percent, t, when } from "../i18n.js";
import { hasEnded, linkOf, methodName, progressSentence, stateMark, titleOf, verdictOf } from "../jobs.js";
import { watch } from "../live.js";
import { promoteButton } from "../promotion.js";
import { gallery, reportButton } from "../result.js";
import { session } from "../session.js";
import { localRuns } from "./runs.js";

const RUNS_MS = 3000;
const MOST_DISPUTED = 24;

export async function open(root, [id], signal) {
  return id ? openOne(root, id, signal) : openList(root, signal);
}

async function openList(root, signal) {
  const [comparisons, jobs, made] = await Promise.all([
    all("v1/fine_tuning/comparisons", { signal, most: 100 }), all("v1/fine_tuning/jobs?status=succeeded", { signal, most: 100 }),
    localRuns("comparison", signal),
  ]);
  put(root, h("div", { class: "row heading" }, h("h1", { tabindex: "-1" }, t("compare.title")), h("a", { class: "button primary", href: "#/train" }, t("compare.new"))),
    comparisons.length || made
      ? h("ul", { class: "cards wide" }, comparisons.map((one) => h("li", { class: "card" },
        h("div", { class: "row" }, h("h2", {}, h("a", { href: linkOf(one) }, titleOf(one))), stateMark(one.status)),
        h("p", {}, progressSentence(one)), h("p", { class: "hint" }, when(one.created_at)))))
      : h("div", { class: "empty" }, h("p", {}, t("compare.empty")), h("a", { class: "button primary", href: "#/train" }, t("compare.new"))),
    made, jobs.length > 1 && ofJobs(jobs));
}

/** Return the form that compares runs that exist. */
function ofJobs(jobs) {
  const messages = h("div", {});
  const boxes = jobs.map((job) => h("label", { class: "check" }, h("input", { type: "checkbox", value: job.id }),
    `${titleOf(job)} · ${when(job.finished_at)}`));
  const form = h("form", { onsubmit: async (event) => {
    event.preventDefault();
    const runs = boxes.map((box) => box.querySelector("input")).filter(({ checked }) => checked).map(({ value }) => value);
    put(messages);
    if (runs.length < 2) return put(messages, alertBox(t("compare.choose_two")));
    try {
      location.hash = linkOf(await request("v1/fine_tuning/comparisons", { method: "POST", json: { runs } }));
    } catch (error) {
      put(messages, alertBox(session.words(error)));
    }
    return undefined;
  } }, h("p", { class: "hint" }, t("compare.existing_how")), h("div", { class: "checks" }, boxes), messages, h("button", { type: "submit" }, t("compare.existing_start")));
  return h("section", {}, h("h2", {}, t("compare.existing")), form);
}

async function openOne(root, id, signal) {
  const path = `v1/fine_tuning/comparisons/${encodeURIComponent(id)}`;
  const comparison = await request(path, { signal });
  const body = h("div", {});
  put(root, h("p", { class: "crumbs" }, h("a", { href: "#/compare" }, t("compare.title"))), h("h1", { tabindex: "-1" }, titleOf(comparison)), body);
  if (comparison.status === "succeeded") return showVerdict(body, comparison, path, signal);
  const live = h("div", {});
  const runs = h("ul", { class: "run-states" });
  put(body, live, comparison.arms.length > 0 && h("section", {}, h("h2", {}, t("compare.runs")), runs));
  const showRuns = async () => {
    const { data } = await request(`${path}/runs`, { signal });
    put(runs, data.map((run) => h("li", {}, `${methodName(run.arm)} · ${t("compare.seed", { seed: String(run.seed) })} · ${t(`run_state.${run.status}`)}`)));
  };
  watch(live, comparison, signal, async (ended) => {
    if (ended.status === "succeeded") await showVerdict(body, ended, path, signal);
    else await showRuns();
  });
  if (!comparison.arms.length || hasEnded(comparison)) return undefined;
  await showRuns();
  const timer = setInterval(() => {
    if (body.contains(runs)) showRuns().catch(() => {}); // the next look asks again
    else clearInterval(timer);
  }, RUNS_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
  return undefined;
}

async function showVerdict(root, comparison, path, signal) {
  const result = await request(`${path}/result`, { signal });
  const pairs = result.pairs.filter(({ metric }) => metric.split("/").at(-1) === result.headline.split("/").at(-1));
  const mark = { better: "▲", equivalent: "＝", undecided: "?" }[result.verdict.outcome];
  put(root,
    h("section", { class: `verdict ${result.verdict.outcome}` }, h("h2", {}, h("span", { "aria-hidden": "true" }, `${mark} `), t(`verdict.${result.verdict.outcome}`)),
      verdictOf(result, pairs),
      h("div", { class: "row" },
        comparison.fine_tuned_model && promoteButton(comparison.fine_tuned_model, comparison.fine_tuned_version, () => {}),
        comparison.fine_tuned_model && h("a", { class: "button", href: `#/try/${encodeURIComponent(`${comparison.fine_tuned_model}@${comparison.fine_tuned_version}`)}` }, t("result.try")),
        reportButton(`${path}/report`), comparison.fine_tuned_model && h("a", { class: "button", href: "#/models" }, t("compare.live")))),
    arms(result),
    h("section", {}, forest(pairs.map((pair) => ({ ...pair, a: methodName(pair.a), b: methodName(pair.b) })), result.verdict.margin)),
    disputed(result, signal),
    cost(result));
}

function arms(result) {
  const leading = result.leading ?? result.headline;
  const overClasses = leading !== result.headline; // classes differ much in size
  return h("section", {}, h("h2", {}, t("compare.arms")), bars(result.arms.map((arm) => {
    const figure = arm.metrics[leading] ?? {};
    const interval = figure.low === null || figure.low === undefined ? "" : ` [${percent(figure.low)} – ${percent(figure.high)}]`;
    return { label: methodName(arm.name), share: figure.value, note: `${percent(figure.value, 1)}${interval}`, strong: arm.name === result.verdict.choose };
  }), { label: t("compare.arms") }),
  overClasses && h("p", { class: "hint" }, t("compare.over_classes")),
  h("p", { class: "hint" }, t("compare.left_out", { n: result.left_out })));
}

/** Return the path of a run's pictures: those of a comparison's runs are the comparison's. */
function imagesOf(run) {
  return run.replace(/\/runs\/[^/]+$/, "");
}

/** Return the pictures that one way gets right and another wrong, by the first run of each. */
function disputed(result, signal) {
  const firsts = result.arms.filter(({ runs }) => runs[0]); // those of the command line have no path
  if (firsts.length < 2) return null;
  const options = () => firsts.map(({ name, runs: [run] }) => h("option", { value: run.slice(1) }, methodName(name)));
  const [right, wrong] = [h("select", { onchange: show }, options()), h("select", { onchange: show }, options())];
  wrong.selectedIndex = 1;
  const found = h("div", { "aria-live": "polite" });
  const wrongOf = async (run) => {
    const { data } = await request(`${run}/answers?split=${result.split}&wrong=true&limit=1000`, { signal });
    return data;
  };
  async function show() {
    const [ofRight, ofWrong] = await Promise.all([wrongOf(right.value), wrongOf(wrong.value)]);
    const alsoWrong = new Set(ofRight.map(({ id }) => id));
    const divided = ofWrong.filter(({ id }) => !alsoWrong.has(id));
    put(found, h("p", {}, t("compare.divided", { n: divided.length })), gallery(imagesOf(right.value), divided.slice(0, MOST_DISPUTED), null));
  }
  show().catch(() => put(found, h("p", { class: "hint" }, t("compare.no_answers")))); // runs whose folders are gone
  return h("section", {}, h("h2", {}, t("compare.disputed")),
    h("div", { class: "row" }, field(t("compare.right"), right), field(t("compare.wrong"), wrong)), found);
}

function cost(result) {
  const rows = [["wall_seconds", duration], ["latency_seconds", duration], ["bundle_bytes", bytes], ["trainable_parameters", number]];
  return h("section", {}, h("h2", {}, t("result.cost")), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("result.cost") }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("compare.way")), rows.map(([key]) => h("th", { scope: "col" }, t(`cost.${key}`))))),
    h("tbody", {}, result.arms.map((arm) => h("tr", {}, h("th", { scope: "row" }, methodName(arm.name)),
      rows.map(([key, say]) => h("td", {}, typeof arm.cost[key] === "number" ? say(arm.cost[key]) : "–"))))))));
}

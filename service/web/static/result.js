// What a run came to: how good in words, where it fails with the pictures, what it cost, and what to do next.

import { hasKey, request, requestBlob, saveFile } from "./api.js";
import { answerBars, bars, confusion, intervalBar } from "./charts.js";
import { ask, h, put } from "./dom.js";
import { asServed, bytes, duration, known, number, percent, t } from "./i18n.js";
import { curvesOf } from "./live.js";
import { methodName } from "./jobs.js";
import { picture } from "./pictures.js";
import { warningItem } from "./said.js";

const WORST = 24;
const CELL = 60;

export async function showResult(root, job, signal) {
  const path = `v1/fine_tuning/jobs/${encodeURIComponent(job.id)}`;
  const [result, metrics] = await Promise.all([request(`${path}/result`, { signal }), request(`${path}/metrics`, { signal })]);
  const split = ["test", "cv", "val"].find((name) => result.splits[name]);
  const judged = result.splits[split];
  const unequal = judged?.leading && judged.leading !== judged.headline;
  const version = result.model && `${result.model}@${result.version}`;
  put(root,
    h("div", { class: "row actions" },
      version && h("a", { class: "button primary", href: `#/try/${encodeURIComponent(version)}` }, t("result.try")),
      version && h("a", { class: "button", href: `#/models/${encodeURIComponent(result.model)}` }, t("result.model", { version })),
      reportButton(version && `v1/models/${encodeURIComponent(result.model)}/versions/${result.version}/report`),
      h("a", { class: "button", href: `#/train/${job.training_file}` }, t("result.again"))),
    judged && accuracy(judged, split),
    result.warnings.length > 0 && h("section", {}, h("h2", {}, t("result.warnings")),
      h("ul", { class: "notices" }, result.warnings.map(warningItem))),
    unequal && perClass(judged),
    judged && await mistakes(path, split, version, job.training_file, signal),
    judged?.confusion && h("section", {}, h("h2", {}, t("result.confusion")),
      confusion(judged.confusion, judged.classes, (label, answer) => showCell(path, split, label, answer, version, job.training_file))),
    judged && !unequal && perClass(judged),
    cost(result),
    h("section", {}, h("h2", {}, t("result.how")), h("p", {}, t("result.made", { method: methodName(result.method.type), backbone: job.model, license: result.license ?? t("unknown") })),
      h("p", { class: "hint", ...asServed() }, result.summary),
      h("div", { class: "charts" }, curvesOf(metrics.data))));
}

function accuracy(judged, split) {
  if (judged.leading && judged.leading !== judged.headline) return overClasses(judged, split);
  const value = judged.values[judged.headline];
  const [low, high] = judged.intervals[judged.headline];
  const right = Math.round(value * judged.n);
  if (judged.headline === "map") return severalLabels(judged, split, value, low, high);
  return h("section", { class: "accuracy" },
    h("h2", {}, t("result.accuracy")),
    h("p", { class: "figure" }, percent(value, 1)),
    intervalBar(value, low, high),
    h("p", {}, t("result.right", { right, n: judged.n, split: t(`split.${split}`) })),
    h("p", { class: "lead" }, t("result.in_words", { low: Math.floor(100 * low), high: Math.ceil(100 * high) })),
    judged.n < 100 && h("p", { class: "hint" }, t("result.few_test", { n: judged.n })),
    h("p", { class: "hint" }, t("result.alike")));
}

/** Classes differ much in size: the mean over classes first, then how many pictures were right. */
function overClasses(judged, split) {
  const value = judged.values[judged.leading];
  const [low, high] = judged.intervals[judged.leading];
  return h("section", { class: "accuracy" },
    h("h2", {}, t("result.accuracy")),
    h("p", { class: "figure" }, percent(value, 1)),
    intervalBar(value, low, high),
    h("p", {}, t("result.over_classes", { low: percent(low, 1), high: percent(high, 1) })),
    h("p", { class: "lead" }, t("result.right", { right: Math.round(judged.values[judged.headline] * judged.n), n: judged.n, split: t(`split.${split}`) })),
    judged.n < 100 && h("p", { class: "hint" }, t("result.few_test", { n: judged.n })),
    h("p", { class: "hint" }, t("result.alike")));
}

function severalLabels(judged, split, value, low, high) {
  const { exact_match: exact, micro_f1: f1 } = judged.values;
  return h("section", { class: "accuracy" },
    h("h2", {}, t("result.accuracy")),
    h("p", { class: "figure" }, percent(value, 1)),
    intervalBar(value, low, high),
    h("p", {}, t("result.map", { low: percent(low, 1), high: percent(high, 1) })),
    h("p", { class: "lead" }, t("result.exact", { right: Math.round(exact * judged.n), n: judged.n, split: t(`split.${split}`), f1: number(f1, 2) })),
    h("p", {}, t("result.cardinality", {
      true: number(judged.facts.labels_per_image, 2), given: number(judged.facts.labels_given_per_image, 2) })),
    judged.n < 100 && h("p", { class: "hint" }, t("result.few_test", { n: judged.n })));
}

async function mistakes(path, split, version, dataset, signal) {
  const wrong = await request(`${path}/answers?split=${split}&wrong=true&limit=${WORST}`, { signal }).catch((error) => {
    if (error.status === 404) return null; // the run's folder is gone, or each image has several labels
    throw error;
  });
  if (wrong === null) return null;
  const seen = wrong.data.length === 0 || await requestBlob(`${path}/image?id=${encodeURIComponent(wrong.data[0].id)}&side_px=16`, { signal })
    .then(() => true, (error) => { if (error.status === 404) return false; throw error; }); // data with tables: no pictures here
  return h("section", {}, h("h2", {}, t("result.mistakes")),
    wrong.data.length ? [h("p", { class: "hint" }, t("result.mistakes_how")), seen ? gallery(path, wrong.data, version, dataset) : listed(wrong.data)]
      : h("p", { class: "notice good" }, t("result.no_mistakes", { split: t(`split.${split}`) })));
}

/** Return the names of pictures that are not shown here, with what they are and what the model said. */
function listed(answers) {
  return h("ul", {}, answers.map((one) => h("li", {}, h("code", {}, one.id), " ", t("result.is", { label: one.label }), ", ",
    t("result.said", { answer: one.answer, share: percent(one.probability) }))));
}

/** Return pictures with what they are and what the model said. */
export function gallery(path, answers, version, dataset = null) {
  return h("ul", { class: "gallery" }, answers.map((one) => {
    const alt = t("result.picture", { label: one.label, answer: one.answer });
    return h("li", {}, h("button", { type: "button", class: "tile", onclick: () => showPicture(path, one, version, dataset) },
      picture(`${path}/image?id=${encodeURIComponent(one.id)}&side_px=160`, alt)),
    h("span", { class: "tile-words" }, h("span", {}, t("result.is", { label: one.label })),
      h("span", {}, t("result.said", { answer: one.answer, share: percent(one.probability) }))));
  }));
}

async function showCell(path, split, label, answer, version, dataset) {
  const query = new URLSearchParams({ split, label, answer, limit: CELL });
  const found = await request(`${path}/answers?${query}`);
  await ask(label === answer ? t("result.cell_right", { label }) : t("result.cell_wrong", { label, answer }), (done) => [
    gallery(path, found.data, version, dataset), h("button", { type: "button", onclick: () => done(null) }, t("close"))]);
}

async function showPicture(path, one, version, dataset) {
  const address = `${path}/image?id=${encodeURIComponent(one.id)}`;
  await ask(t("result.picture", { label: one.label, answer: one.answer }), (done) => {
    const map = h("div", { "aria-live": "polite" });
    const look = async () => {
      const form = new FormData();
      form.append("image", await requestBlob(address), "image");
      const said = await request(`v1/models/${encodeURIComponent(version)}/predict?explain=true`, { method: "POST", body: form });
      put(map, said.explanation.overlay_png_base64
        ? h("img", { class: "large", alt: t("try.map"), src: `data:image/png;base64,${said.explanation.overlay_png_base64}` })
        : h("p", {}, t("try.no_map", { reason: said.explanation.reason })),
      answerBars(said));
    };
    return [
      picture(`${address}&side_px=1024`, one.id, { class: "large" }), map,
      h("p", { class: "hint" }, one.id),
      h("div", { class: "row" }, version && h("button", { type: "button", onclick: look }, t("result.look")),
        dataset?.startsWith("file-") && h("a", { class: "button", href: `#/data/${dataset}/${encodeURIComponent(one.id)}`, onclick: () => done(null) }, t("result.correct")),
        h("button", { type: "button", onclick: () => done(null) }, t("close")))];
  });
}

function perClass(judged) {
  const rows = judged.per_class.map(({ name, n, n_correct, recall }) => ({
    label: name, share: recall, note: n ? t("result.of", { right: n_correct, n }) : t("result.no_test"),
  }));
  return h("section", {}, h("h2", {}, t("result.per_class")), h("p", { class: "hint" }, t("result.per_class_how")), bars(rows, { label: t("result.per_class") }));
}

function cost({ cost: spent }) {
  const shown = [
    ["wall_seconds", duration], ["train_seconds", duration], ["latency_seconds", duration],
    ["bundle_bytes", bytes], ["peak_memory_bytes", bytes], ["trainable_parameters", number],
  ].filter(([key]) => typeof spent[key] === "number");
  return h("section", {}, h("h2", {}, t("result.cost")), h("dl", { class: "figures" }, shown.map(([key, say]) => h("div", {},
    h("dt", {}, known(`cost.${key}`, key)), h("dd", {}, say(spent[key]))))));
}

/** Return the link to a report; with a key it is saved, because a link cannot carry one. */
export function reportButton(path) {
  if (!path) return null;
  if (!hasKey()) return h("a", { class: "button", href: path, target: "_blank", rel: "noopener" }, t("result.report"));
  return h("button", { type: "button", onclick: () => saveFile(path, "report.html") }, t("result.save_report"));
}

// The plain choice of how thoroughly to train: for each what of the chosen network would learn, and about how long that takes here.

import { isBusy, Refused, request } from "./api.js";
import { h, newId, put, svg } from "./dom.js";
import { duration, list, percent, t } from "./i18n.js";
import { methodName } from "./jobs.js";

export const CHOICES = {
  quick: { method: "linear_probe" },
  better: { method: { type: "partial", stages: 2 } },
  best: { method: "auto" },
  compare: { methods: ["linear_probe", "partial", "full"] },
};
const METHODS = Object.values(CHOICES).flatMap(({ method, methods }) => methods ?? [method]);
const BUSY_PAUSE_MS = 5000; // before a server that has too much to do is asked again
const PAUSE_MS = 300; // after the last change, before the server is asked
const DRAWING = { width: 146, height: 24, gap: 4, head: 18, inset: 2 };

/** Return the choices, and what shows a plan for what is known so far.
 *
 * @param {() => {settings: object, images: number | null, classes: number | null, bytes: number | null, seeds: number}} known
 */
export function planChoices(known, onchange, signal) {
  const group = newId("choice");
  const shown = new Map();
  const note = h("p", { class: "hint", "aria-live": "polite" });
  const options = h("fieldset", { class: "choices" }, h("legend", { class: "visually-hidden" }, t("train.step_choice")),
    Object.keys(CHOICES).map((key, at) => {
      const network = h("span", { class: "network" });
      const time = h("span", { class: "estimate" });
      shown.set(key, { network, time });
      return h("label", { class: "choice" },
        h("input", { type: "radio", name: group, value: key, checked: at === 0, onchange }),
        h("span", { class: "choice-body" }, h("strong", {}, t(`choice.${key}`)), h("span", {}, t(`choice.${key}.what`)), network, time));
    }));
  let plan = null;
  let asking = null;
  let timer = 0;

  async function ask() {
    const { settings, images, classes, bytes } = known();
    const sections = Object.fromEntries(["model", "data", "hyperparameters", "compute"].filter((name) => settings[name]).map((name) => [name, settings[name]]));
    asking?.abort();
    asking = new AbortController();
    const mine = asking;
    put(note, t("plan.measuring"));
    try {
      plan = await request("v1/fine_tuning/plans", { method: "POST", signal: mine.signal,
        json: { ...sections, methods: METHODS, ...(images ? { images, classes: Math.max(1, classes ?? 2), bytes } : {}) } });
    } catch (error) {
      if (mine.signal.aborted) return;
      if (isBusy(error)) {
        timer = setTimeout(ask, BUSY_PAUSE_MS);
        return;
      }
      if (!(error instanceof Refused)) throw error;
      plan = null; // what is wrong with a setting is shown at its field when the job is sent
    }
    show();
  }

  function show() {
    for (const [key, { network, time }] of shown) {
      const planned = plan && ofChoice(key, plan, known().seeds);
      put(network, planned && [drawing(plan.stages, planned), h("span", { class: "hint" }, inWords(plan, planned, key))]);
      put(time, planned?.seconds && h("span", { title: t("plan.note") }, t("plan.time", {
        about: duration(rounded(planned.seconds.about)), low: duration(rounded(planned.seconds.low)), high: duration(rounded(planned.seconds.high)),
      })));
    }
    put(note, plan && t(plan.methods[0].seconds ? "plan.note" : "plan.later"));
  }

  signal.addEventListener("abort", () => { clearTimeout(timer); asking?.abort(); }, { once: true });
  return {
    element: h("div", { class: "thoroughness" }, options, note),
    value: () => options.querySelector("input:checked").value,
    /** Ask for the plan anew, a moment after the last change. */
    refresh() {
      clearTimeout(timer);
      timer = setTimeout(ask, PAUSE_MS);
    },
    /** Show the plan again: the number of runs has changed. */
    show,
  };
}

/** Return what a choice trains and takes: of a comparison, all of its ways together. */
function ofChoice(key, plan, seeds) {
  const { method, methods } = CHOICES[key];
  const wanted = (methods ?? [method]).map((one) => plan.methods[METHODS.indexOf(one)]);
  if (!methods) return wanted[0];
  const sum = (name) => seeds * wanted.reduce((total, { seconds }) => total + seconds[name], 0);
  const tried = new Set(wanted.flatMap(({ trains }) => trains));
  return {
    trains: [], may_train: [...tried].sort((one, other) => one - other),
    seconds: wanted[0].seconds && { low: sum("low"), about: sum("about"), high: sum("high") },
  };
}

/** Draw the network's stages and its head. Filled: it learns. Dashed: that is tried. */
function drawing(stages, { trains, may_train }) {
  const { width, height, gap, head, inset } = DRAWING;
  const each = (width - head - gap) / stages.length;
  const space = Math.min(gap, each / 3);
  const part = (x, size, kind, name) => svg("rect", { x, y: 3, width: size, height: height - 6, rx: Math.min(3, size / 3), class: kind }, svg("title", {}, name));
  return svg("svg", { viewBox: `0 0 ${width + inset} ${height}`, class: "blocks", "aria-hidden": "true" },
    stages.map(({ index, name }, at) => part(inset + at * each, each - space,
      trains.includes(index) ? "learns" : may_train.includes(index) ? "maybe" : "frozen", name)),
    part(width - head, head, "learns", t("plan.head")));
}

function inWords({ stages, parameters }, { trains, may_train }, key) {
  const { methods } = CHOICES[key];
  if (methods) return t("plan.compares", { ways: list(methods.map(methodName)) });
  if (!trains.length && !may_train.length) return t("plan.learns_head");
  if (!trains.length) return t("plan.tries", { stages: stagesInWords(stages, may_train) });
  const share = stages.filter(({ index }) => trains.includes(index)).reduce((sum, stage) => sum + stage.parameters, 0) / parameters;
  return t("plan.learns", { stages: stagesInWords(stages, trains), share: percent(share) });
}

/** Return which stages these are: their names in the network's code say nothing to most people. */
function stagesInWords(stages, chosen) {
  if (chosen.length === stages.length) return t("plan.every_stage", { n: stages.length });
  const last = stages.slice(-chosen.length).every(({ index }) => chosen.includes(index));
  if (last) return t("plan.last_stages", { n: chosen.length, total: stages.length });
  return list(stages.filter(({ index }) => chosen.includes(index)).map(({ name }) => name));
}

/** Return seconds as a person would say them: an estimate of 13.7 s pretends to know more than it does. */
function rounded(seconds) {
  const unit = seconds < 90 ? 1 : 60;
  const value = seconds / unit;
  const step = value < 10 ? 1 : 5;
  return Math.max(1, Math.round(value / step) * step) * unit;
}

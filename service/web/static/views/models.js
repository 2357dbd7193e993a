// What answers now, since when and by whose decision; every model with its versions; promotion and the way back.

import { request } from "../api.js";
import { alertBox, ask, field, h, put } from "../dom.js";
import { downloadButton } from "../downloads.js";
import { inWords } from "../figures.js";
import { bytes, percent, t, when } from "../i18n.js";
import { classNames, methodName } from "../jobs.js";
import { promoteButton } from "../promotion.js";
import { reportButton } from "../result.js";
import { session } from "../session.js";

const LOCAL = "local"; // the owner where there are no keys
const FIRST = "first registration"; // nobody decided: the first model of a workspace is its default
const PRECISIONS = [0.8, 0.9, 0.95, 0.99]; // of the answers that are given, how many are right

export async function open(root, [name], signal) {
  const again = () => open(root, [name], signal);
  const [models, deployed, history] = await Promise.all([
    request("v1/models?limit=1000", { signal }), request("v1/deployments/default", { signal }), request("v1/deployments/default/history", { signal }),
  ]);
  const shown = models.data.filter(({ id }) => !name || id === name);
  put(root,
    name && h("p", { class: "crumbs" }, h("a", { href: "#/models" }, t("models.title"))),
    h("h1", { tabindex: "-1" }, name ?? t("models.title")),
    live(deployed, history.data, again),
    shown.length ? shown.map((model) => modelCard(model, deployed, again, signal))
      : h("div", { class: "empty" }, h("p", {}, t("models.empty")), session.may("jobs") && h("a", { class: "button primary", href: "#/train" }, t("runs.new"))));
}

function live(deployed, history, again) {
  if (!deployed.model) return h("section", { class: "card" }, h("h2", {}, t("models.live")), h("p", {}, t("models.nothing_live")));
  const messages = h("div", {});
  const [now, ...past] = history;
  const back = async () => {
    try {
      await request("v1/deployments/default/rollback", { method: "POST" });
      await again();
    } catch (error) {
      put(messages, alertBox(session.words(error)));
    }
  };
  return h("section", { class: "card live" }, h("h2", {}, t("models.live")),
    h("p", { class: "figure" }, h("a", { href: `#/models/${encodeURIComponent(deployed.model)}` }, `${deployed.model} @ ${deployed.version}`)),
    now && h("p", { class: "hint" }, sinceWhen(now)),
    deployed.pinned && h("p", { class: "hint" }, t("models.pinned")),
    messages,
    h("div", { class: "row" }, h("a", { class: "button", href: "#/try" }, t("result.try")),
      session.may("admin") && !deployed.pinned && past.length > 0 && h("button", { type: "button", onclick: back }, t("models.back"))),
    past.length > 0 && h("details", {}, h("summary", {}, t("models.history")),
      h("ol", { class: "events" }, history.map((one) => h("li", {}, h("time", {}, when(one.at)), ` ${[one.reference, one.by === FIRST ? t("models.first") : one.by === LOCAL ? null : one.by].filter(Boolean).join(" · ")}`)))));
}

function sinceWhen({ at, by }) {
  if (by === FIRST) return t("models.since_first", { when: when(at) });
  return by === LOCAL ? t("models.since_when", { when: when(at) }) : t("models.since", { when: when(at), by });
}

function modelCard(model, deployed, again, signal) {
  return h("section", { class: "card" },
    h("div", { class: "row" }, h("h2", {}, h("a", { href: `#/models/${encodeURIComponent(model.id)}` }, model.id)),
      h("span", { class: "tag" }, t(`models.${model.visibility}`)), model.owned_by !== LOCAL && h("span", { class: "hint" }, model.owned_by)),
    h("ul", { class: "versions" }, model.versions.map((one) => versionRow(model, one, deployed, again, signal))));
}

function versionRow(model, one, deployed, again, signal) {
  const isLive = deployed.model === model.id && deployed.version === one.version;
  const path = `v1/models/${encodeURIComponent(model.id)}/versions/${encodeURIComponent(one.version)}`;
  const more = h("div", {});
  const details = h("details", { ontoggle: () => details.open && !more.children.length && showMore() }, h("summary", {}, t("models.details")), more);

  async function showMore() {
    const [version, drift] = await Promise.all([request(path, { signal }), request(`${path}/drift`, { signal })]);
    const accuracy = inWords(version.metrics, "models.accuracy", { n: version.metrics["test/n"] ?? 0 });
    put(more,
      h("dl", { class: "figures" }, [
        [t("result.accuracy"), accuracy || "–"],
        [t("data.classes"), classNames(version.classes)], [t("models.method"), methodName(version.method.type)],
        [t("models.backbone"), version.backbone], [t("models.license"), version.license ?? t("unknown")], [t("models.size"), bytes(version.bundle_bytes)],
      ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      h("p", { class: "hint" }, driftInWords(drift)),
      abstention(version),
      h("div", { class: "row" }, version.links.report && reportButton(`${path}/report`),
        session.may("jobs") && h("a", { class: "button", href: `#/train//${encodeURIComponent(`${model.id}@${one.version}`)}` }, t("models.train_on")),
        version.links.job?.startsWith("/v1/fine_tuning/jobs/") && session.may("jobs") && h("a", { class: "button", href: `#/runs/${version.links.job.split("/").at(-1)}` }, t("models.run"))));
  }

  /** Return the switch that makes a version say by itself when it is unsure. */
  function abstention({ abstain_precision: precision, calibration }) {
    if (!session.may("jobs") || calibration.thresholds) return null; // with several labels each has a threshold instead
    const messages = h("div", {});
    const choice = h("select", { value: precision === null ? "" : String(precision), onchange: async () => {
      put(messages);
      try {
        await request(`${path}/abstention`, { method: "PUT", json: { precision: choice.value === "" ? null : Number(choice.value) } });
      } catch (error) {
        choice.value = precision === null ? "" : String(precision);
        put(messages, alertBox(session.words(error)));
      }
    } }, h("option", { value: "" }, t("models.abstain_off")), [...new Set([...PRECISIONS, precision])].filter(Boolean).map((one) =>
      h("option", { value: String(one) }, t("models.abstain_at", { share: percent(one) }))));
    return [field(t("models.abstain"), choice, { hint: t("models.abstain_hint") }), messages];
  }

  return h("li", {},
    h("div", { class: "row" }, h("strong", {}, t("models.version", { version: one.version })),
      isLive && h("span", { class: "tag on" }, t("models.is_live")),
      one.aliases.includes("champion") && h("span", { class: "tag" }, t("models.champion")),
      h("span", { class: "hint" }, when(one.created)),
      one.refused && h("span", { class: "tag bad" }, one.refused)),
    h("div", { class: "row" },
      h("a", { class: "button", href: `#/try/${encodeURIComponent(`${model.id}@${one.version}`)}` }, t("result.try")),
      downloadButton(model.id, one.version),
      !isLive && !deployed.pinned && promoteButton(model.id, one.version, again),
      session.may("jobs") && !isLive && h("button", { type: "button", class: "quiet", onclick: () => remove(model, one, again) }, t("delete"))),
    details);
}

/** Return whether the live answers of a version still look like those to images that did not train it. */
function driftInWords({ state, n, n_needed: needed, tests }) {
  const differing = tests.filter(({ drifted }) => drifted).map(({ name }) => t(`models.drift.${name}`)).join(", ");
  return t(`models.drift.${state}`, { n, needed, differing });
}

async function remove(model, one, again) {
  const reference = `${model.id}@${one.version}`;
  await ask(t("models.delete_title", { name: reference }), (answer) => {
    const messages = h("div", {});
    const go = async () => {
      try {
        await request(`v1/models/${encodeURIComponent(model.versions.length === 1 ? model.id : reference)}`, { method: "DELETE" });
        answer(true);
        await again();
      } catch (error) {
        put(messages, alertBox(session.words(error)));
      }
    };
    return [h("p", {}, t("models.delete_what")), messages, h("div", { class: "row" },
      h("button", { type: "button", class: "danger", onclick: go }, t("delete")), h("button", { type: "button", onclick: () => answer(null) }, t("keep")))];
  });
}

// What an examination of a dataset found, one card for each kind of fault, with its pictures and the button that deals with it.

import { all, follow, request } from "./api.js";
import { alertBox, h, put } from "./dom.js";
import { asServed, known, percent, serverWords, t } from "./i18n.js";
import { hasEnded } from "./jobs.js";
import { picture } from "./pictures.js";
import { session } from "./session.js";

const SHOWN_CASES = 8;

/** Return a section that examines an upload on request, and shows what was found before.
 *
 * @param {{id: string}} file
 * @param {(change: {images: Set<string>, label: string | null}) => void} change plans a correction.
 * @param {(id: string) => string | null | undefined} mark what is planned for a picture: a label, null where it is left out.
 * @param {(image: {id: string, labels: string[]}) => void} enlarge shows one picture.
 */
export function examinationOf(file, { change, mark, enlarge, signal }) {
  const state = h("div", { role: "status" });
  const cards = h("div", { class: "findings" });
  const begin = h("button", { type: "button", onclick: examine }, t("check.begin"));

  async function examine() {
    begin.disabled = true;
    try {
      await watchCheck(await request(`v1/files/${file.id}/check`, { method: "POST", signal }));
    } catch (error) {
      if (error.name !== "AbortError") put(state, alertBox(session.words(error)));
    }
    begin.disabled = false;
  }

  async function watchCheck(check) {
    const path = `v1/checks/${check.id}`;
    if (!hasEnded(check)) {
      begin.disabled = true;
      const bar = h("progress", { max: "1", "aria-label": t("check.running") });
      const said = h("span", {}, t("check.running"));
      const stop = h("button", { type: "button", class: "quiet", onclick: () => request(`${path}/cancel`, { method: "POST" }) }, t("stop"));
      put(state, h("div", { class: "sending" }, said, bar, stop));
      await follow(`${path}/events`, { signal, onevent: (kind, data) => {
        if (kind !== "progress" || !data.total) return;
        bar.value = data.done / data.total;
        said.textContent = `${known(`phase.${data.phase}`, data.message || data.phase)} · ${percent(data.done / data.total)}`;
      } });
      begin.disabled = false;
    }
    const ended = await request(path, { signal });
    if (ended.status !== "succeeded") return put(state, ended.error && alertBox(session.failure(ended.error)));
    const found = await request(`${path}/result`, { signal });
    begin.textContent = t("check.again");
    put(state, h("p", { class: "hint" }, serverWords("check.conclusion", { n: found.n_images }) ?? ended.conclusion));
    return showFindings(path, found);
  }

  function showFindings(path, { findings }) {
    const acknowledge = async (kind, keys, acknowledged) => {
      try {
        showFindings(path, await request(`${path}/acknowledgements`, { method: "POST", json: { kind, keys, acknowledged }, signal }));
      } catch (error) {
        if (error.name !== "AbortError") put(state, alertBox(session.words(error)));
      }
      cards.querySelector("button")?.focus(); // the button that was used is gone
    };
    const left = findings.filter(({ count }) => count > 0).map((finding) => card(finding, acknowledge));
    const accepted = findings.filter(({ acknowledged }) => acknowledged > 0);
    put(cards, left.length ? left : h("p", { class: "notice good" }, t("check.nothing")), accepted.map((finding) => h("div", { class: "row" },
      h("p", { class: "hint" }, `${titleOf(finding)}: `, t("check.accepted", { n: finding.acknowledged })),
      h("button", { type: "button", class: "quiet", onclick: () => acknowledge(finding.kind, null, false) }, t("check.show_again")))));
  }

  const titleOf = ({ kind, title }) => serverWords(`finding.${kind}.title`) ?? title;

  /** Return the pictures that may be left out: of copies all but one that is not left out already, else every one. */
  function superfluousOf({ fix, cases }) {
    const out = new Set();
    if (fix !== "leave_out" && fix !== "group") return out;
    const stays = (id) => !out.has(id) && mark(id) !== null;
    for (const { ids } of cases) for (const id of ids.filter(stays).slice(ids.length > 1 ? 1 : 0)) out.add(id);
    return out;
  }

  function card(finding, acknowledge) {
    const cases = h("ul", { class: "cases" });
    const more = h("button", { type: "button", class: "quiet", onclick: () => showCases(finding.cases.length) }, t("check.more"));
    const showCases = (most) => {
      put(cases, finding.cases.slice(0, most).map((one) => caseOf(finding, one, acknowledge)));
      more.hidden = most >= finding.cases.length;
    };
    showCases(SHOWN_CASES);
    const told = (tag, part, attributes) => {
      const words = serverWords(`finding.${finding.kind}.${part}`, { n: finding.count });
      return words === null ? h(tag, { ...attributes, ...asServed() }, finding[part]) : h(tag, attributes, words);
    };
    const n = superfluousOf(finding).size;
    const leaveOut = (event) => {
      event.target.disabled = true;
      const images = superfluousOf(finding); // anew: another card may have taken care of some
      if (images.size) change({ images, label: null });
    };
    return h("section", { class: `card finding-${finding.severity}` },
      h("div", { class: "row" }, told("h3", "title", {}), h("span", { class: `tag ${finding.severity === "problem" ? "bad" : ""}` }, t(`check.${finding.severity}`, { n: finding.count }))),
      told("p", "evidence", {}), told("p", "advice", { class: "hint" }), cases, h("div", { class: "row" }, more,
        n > 0 && h("button", { type: "button", onclick: leaveOut }, t("check.leave_out", { n })),
        h("button", { type: "button", class: "quiet", onclick: () => acknowledge(finding.kind, null, true) }, t("check.all_fine", { n: finding.cases.length }))));
  }

  function caseOf({ kind, fix, count }, { ids, said, suggested, key }, acknowledge) {
    const accept = fix === "relabel" && suggested !== null && ids.length === 1
      && h("button", { type: "button", onclick: (event) => { event.target.disabled = true; change({ images: new Set(ids), label: suggested }); } }, t("check.it_is", { name: suggested }));
    return h("li", {}, h("div", { class: "strip" }, ids.slice(0, SHOWN_CASES).map((id) => h("button", { type: "button", class: "tile", title: id, onclick: () => open(id) },
      picture(`v1/files/${file.id}/image?id=${encodeURIComponent(id)}&side_px=160`, id)))), h("p", { class: "hint", ...asServed() }, said), accept,
      count > 1 && ids.length > 0 && h("button", { type: "button", class: "quiet", onclick: () => acknowledge(kind, [key], true) }, t("check.fine")));
  }

  async function open(id) {
    const [image] = (await request(`v1/files/${file.id}/images?id=${encodeURIComponent(id)}`, { signal })).data;
    if (image) enlarge(image);
  }

  async function showLast() {
    const checks = (await all("v1/checks", { signal })).filter((one) => one.file === file.id);
    const last = checks.find((one) => one.status === "succeeded" || !hasEnded(one));
    if (last) await watchCheck(last);
  }
  showLast().catch((error) => { if (error.name !== "AbortError") put(state, alertBox(session.words(error))); });

  return h("section", {}, h("div", { class: "row heading" }, h("h2", {}, t("check.title")), begin), h("p", { class: "hint" }, t("check.what")), state, cards);
}

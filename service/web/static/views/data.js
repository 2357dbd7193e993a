// Datasets on the server: classes with counts, what was found in them, and their pictures.

import { all, request } from "../api.js";
import { bars } from "../charts.js";
import { alertBox, ask, field, h, newId, put } from "../dom.js";
import { examinationOf } from "../examination.js";
import { asServed, bytes, list, number, t, when } from "../i18n.js";
import { virtualGrid } from "../pictures.js";
import { warningItem } from "../said.js";
import { session } from "../session.js";

const PAGE = 1000;
const LARGE_PX = 1024;
const UNEVEN = 10; // the largest class has so many times the pictures of the smallest
const FEW = 10;

export async function open(root, [id, imageId], signal) {
  return id ? openOne(root, id, imageId, signal) : openList(root, signal);
}

async function openList(root, signal) {
  const files = (await all("v1/files", { signal })).filter(({ purpose }) => purpose === "fine-tune");
  put(root, h("div", { class: "row heading" }, h("h1", { tabindex: "-1" }, t("data.title")),
    h("a", { class: "button primary", href: "#/train" }, t("data.new"))),
  files.length
    ? h("ul", { class: "cards" }, files.map((file) => h("li", { class: "card" },
      h("h2", {}, h("a", { href: `#/data/${file.id}` }, file.filename)),
      h("p", {}, t("data.summary", { n: total(countsOf(file)), classes: file.summary.classes.length })),
      h("p", { class: "hint" }, `${bytes(file.stored_bytes)} · ${when(file.created_at)}`),
      h("a", { class: "button", href: `#/train/${file.id}` }, t("data.train")))))
    : h("div", { class: "empty" }, h("p", {}, t("data.empty")), h("a", { class: "button primary", href: "#/train" }, t("data.new"))));
}

async function openOne(root, id, imageId, signal) {
  const file = await request(`v1/files/${id}`, { signal });
  const counts = countsOf(file);
  const most = Math.max(...Object.values(counts));
  const changes = []; // {images: Set, label} or {from, to}, oldest first: what the next version will have otherwise
  const chosen = new Set(); // ids of pictures that are to be changed together
  let choosing = false;
  let lastChosen = null; // its place in the grid
  const label = h("select", { onchange: () => showPictures() },
    h("option", { value: "" }, t("data.every_class")), file.summary.classes.map((name) => h("option", { value: name }, name)));
  const rename = h("button", { type: "button", onclick: () => renameClass(label.value) }, t("data.rename"));
  const choose = h("button", { type: "button", class: "toggle", "aria-pressed": "false", onclick: () => chooseSeveral(!choosing) }, t("data.choose"));
  const known = h("datalist", { id: newId("classes") }, file.summary.classes.map((name) => h("option", { value: name })));
  const classOfChosen = h("input", { type: "text", list: known.id, autocomplete: "off", maxlength: "200", required: true });
  const selection = h("div", {});
  const pending = h("div", { class: "pending", role: "status" });
  const grid = h("div", {});
  let shown = new AbortController();
  let imageAt;

  function showPictures() {
    shown.abort();
    shown = new AbortController();
    signal.addEventListener("abort", () => shown.abort(), { once: true });
    rename.hidden = label.value === "";
    imageAt = imageFinder(file.id, label.value, shown.signal);
    lastChosen = null;
    const count = label.value ? counts[label.value] : total(counts);
    put(grid, virtualGrid(count, cell, { signal: shown.signal }));
  }

  async function cell(index) {
    const image = await imageAt(index);
    const decided = mark(image.id);
    return {
      path: `v1/files/${file.id}/image?id=${encodeURIComponent(image.id)}&side_px=160`,
      label: `${image.labels.join(", ")} · ${image.id.split("/").at(-1)}`,
      note: decided === undefined ? null : (decided ?? t("data.left_out")),
      chosen: choosing ? chosen.has(image.id) : undefined,
      open: (event) => (choosing ? toggle(index, image, event) : enlarge(image)),
    };
  }

  function change(one) {
    changes.push(one);
    showPending();
    showPictures();
  }

  function chooseSeveral(on) {
    choosing = on;
    chosen.clear();
    choose.setAttribute("aria-pressed", on);
    showSelection();
    showPictures();
  }

  /** Choose a picture or no longer; with the shift key, all from the last one on. */
  async function toggle(index, image, { currentTarget: tile, shiftKey }) {
    const on = !chosen.has(image.id);
    const [first, last] = shiftKey && lastChosen !== null ? [Math.min(index, lastChosen), Math.max(index, lastChosen)] : [index, index];
    for (let at = first; at <= last; at += 1) {
      const { id } = await imageAt(at);
      if (on) chosen.add(id);
      else chosen.delete(id);
    }
    if (first !== last) showPictures();
    else tile.setAttribute("aria-pressed", on);
    lastChosen = index;
    showSelection();
  }

  function showSelection() {
    if (!choosing) return put(selection);
    const decide = (decided) => {
      const images = new Set(chosen);
      chosen.clear();
      change({ images, label: decided });
      showSelection();
    };
    return put(selection, h("form", { class: "notice row", onsubmit: (event) => { event.preventDefault(); decide(classOfChosen.value.trim()); } },
      h("strong", { role: "status" }, t("data.chosen", { n: chosen.size })),
      chosen.size > 0
        ? [known, field(t("data.are"), classOfChosen),
          h("button", { type: "submit", class: "primary" }, t("data.relabel")),
          h("button", { type: "button", class: "danger", onclick: () => decide(null) }, t("data.leave_out"))]
        : h("span", { class: "hint" }, t("data.choose_how"))));
  }

  function showPending() {
    const messages = h("div", {});
    const save = async () => {
      try {
        const made = await request(`v1/files/${file.id}/revisions`, { method: "POST", json: corrections(changes) });
        changes.length = 0;
        location.hash = `#/data/${made.id}`;
      } catch (error) {
        put(messages, alertBox(session.words(error)));
      }
    };
    const undo = () => {
      changes.pop();
      for (const taken of root.querySelectorAll(".findings button:disabled")) taken.disabled = false;
      showPending();
      showPictures();
    };
    put(pending, changes.length > 0 && h("div", { class: "notice row" },
      h("strong", {}, t("data.changes", { n: changes.length })),
      h("button", { type: "button", class: "primary", onclick: save }, t("data.save")),
      h("button", { type: "button", onclick: undo }, t("data.undo")), messages));
  }

  /** Return what was decided about an image: a label, null where it is left out, undefined where nothing was. */
  function mark(image) {
    return changes.findLast(({ images }) => images?.has(image))?.label;
  }

  async function renameClass(from) {
    const to = await ask(t("data.rename_title", { name: from }), (answer) => {
      const input = h("input", { type: "text", value: from, maxlength: "200" });
      return h("form", { onsubmit: (event) => { event.preventDefault(); answer(input.value.trim()); } }, field(t("data.new_name"), input),
        h("div", { class: "row" }, h("button", { type: "submit", class: "primary" }, t("done")),
          h("button", { type: "button", onclick: () => answer(null) }, t("stop"))));
    });
    if (to && to !== from) change({ from, to });
  }

  async function enlarge(one) {
    const { picture } = await import("../pictures.js");
    const decided = await ask(one.labels.join(", "), (answer) => {
      const is = h("select", { value: mark(one.id) ?? one.labels[0] }, file.summary.classes.map((name) => h("option", { value: name }, name)));
      if (one.correctable === false) return [
        picture(`v1/files/${file.id}/image?id=${encodeURIComponent(one.id)}&side_px=${LARGE_PX}`, one.id, { class: "large" }),
        h("p", { class: "hint" }, one.id), h("p", {}, t("data.not_correctable")),
        h("button", { type: "button", onclick: () => answer(null) }, t("close"))];
      return [
        picture(`v1/files/${file.id}/image?id=${encodeURIComponent(one.id)}&side_px=${LARGE_PX}`, one.id, { class: "large" }),
        h("p", { class: "hint" }, one.id),
        h("div", { class: "row" }, field(t("data.is"), is),
          h("button", { type: "button", class: "primary", onclick: () => answer({ images: new Set([one.id]), label: is.value }) }, t("data.relabel")),
          h("button", { type: "button", class: "danger", onclick: () => answer({ images: new Set([one.id]), label: null }) }, t("data.leave_out")),
          h("button", { type: "button", onclick: () => answer(null) }, t("close")))];
    });
    if (decided && decided.label !== (mark(one.id) ?? one.labels[0])) change(decided);
  }

  async function remove() {
    const sure = await ask(t("data.delete_title", { name: file.filename }), (answer) => [
      h("p", {}, t("data.delete_what")),
      h("div", { class: "row" }, h("button", { type: "button", class: "danger", onclick: () => answer(true) }, t("delete")),
        h("button", { type: "button", onclick: () => answer(null) }, t("keep")))]);
    if (!sure) return;
    await request(`v1/files/${file.id}`, { method: "DELETE" });
    location.hash = "#/data";
  }

  addEventListener("beforeunload", (event) => { if (changes.length) event.preventDefault(); }, { signal });
  const first = await request(`v1/files/${file.id}/images?limit=1`, { signal }).catch((error) => error);
  const visible = Array.isArray(first.data);
  const correctable = visible && first.data.every((image) => image.correctable);
  put(root,
    h("p", { class: "crumbs" }, h("a", { href: "#/data" }, t("data.title"))),
    h("div", { class: "row heading" }, h("h1", { tabindex: "-1" }, file.filename),
      h("a", { class: "button primary", href: `#/train/${file.id}` }, t("data.train")),
      h("button", { type: "button", class: "quiet", onclick: remove }, t("delete"))),
    h("p", { class: "hint" }, `${t("pictures", { n: total(counts) })} · ${bytes(file.stored_bytes)} · ${when(file.created_at)}`),
    h("div", { class: "sticky" }, selection, pending),
    findings(file, counts),
    visible && session.may("jobs") && examinationOf(file, { change, mark, enlarge, signal }),
    h("section", {}, h("h2", {}, t("data.classes")),
      bars(Object.entries(counts).map(([name, n]) => ({ label: name, share: n / most, note: number(n) })), { label: t("data.classes") })),
    Object.keys(file.summary.counts).length > 1 && h("p", { class: "hint" }, t("data.splits", {
      splits: list(Object.entries(file.summary.counts).map(([split, some]) => `${split} ${number(total(some))}`)) })),
    h("section", {}, h("h2", {}, t("data.pictures")),
      visible ? [h("p", { class: "hint" }, t(correctable ? "data.pictures_how" : "data.not_correctable")),
        h("div", { class: "row" }, field(t("data.class"), label), correctable && [rename, choose]),
        grid]
        : h("p", { class: "notice" }, session.words(first))));
  if (!visible) return;
  showPictures();
  if (imageId) {
    const known = (await request(`v1/files/${file.id}/images?id=${encodeURIComponent(imageId)}`, { signal })).data[0];
    if (known) setTimeout(() => { if (!signal.aborted) enlarge(known); });
  }
}

/** Return changes as the server takes them; a later one wins. */
function corrections(changes) {
  const labels = {};
  const renamed = {};
  for (const { images, label, from, to } of changes) {
    if (images) for (const image of images) labels[image] = label;
    else renamed[from] = to;
  }
  for (const [image, label] of Object.entries(labels)) if (label in renamed) labels[image] = renamed[label];
  return { labels, renamed };
}

/** Return what stands out, one card each. */
function findings(file, counts) {
  const few = Object.entries(counts).filter(([, n]) => n < FEW).map(([name]) => name);
  const sizes = Object.values(counts);
  const cards = [
    ...file.summary.warnings.map(warningItem),
    ...(file.summary.understood ?? []).map((text) => h("li", { class: "notice good", ...asServed() }, text)),
    few.length > 0 && h("li", { class: "notice" }, t("data.few", { names: list(few), n: FEW })),
    Math.max(...sizes) > UNEVEN * Math.min(...sizes) && h("li", { class: "notice" }, t("data.uneven")),
  ].filter(Boolean);
  return h("section", {}, h("h2", {}, t("data.findings")),
    cards.length ? h("ul", { class: "notices" }, cards) : h("p", { class: "notice good" }, t("data.no_findings")));
}

function countsOf(file) {
  const counts = Object.fromEntries(file.summary.classes.map((name) => [name, 0]));
  for (const byClass of Object.values(file.summary.counts)) for (const [name, n] of Object.entries(byClass)) counts[name] = (counts[name] ?? 0) + n;
  return counts;
}

function total(counts) {
  return Object.values(counts).reduce((sum, n) => sum + n, 0);
}

/** Return what finds an image by its place in the list of a class, which is read in pages, as far as it is looked at. */
function imageFinder(fileId, label, signal) {
  const pages = [];
  const pageAfter = (after) => {
    const query = new URLSearchParams({ limit: PAGE, ...(label ? { label } : {}), ...(after ? { after } : {}) });
    return request(`v1/files/${fileId}/images?${query}`, { signal });
  };
  async function page(number_) {
    pages[number_] ??= number_ === 0 ? pageAfter(null) : page(number_ - 1).then((before) => pageAfter(before.last_id));
    return pages[number_];
  }
  return async (index) => (await page(Math.floor(index / PAGE))).data[index % PAGE];
}

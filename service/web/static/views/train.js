// From photographs to a job: pictures in named classes, a plain choice, one button.

import { all, Refused, requestWhenFree, sendInParts } from "../api.js";
import { CHOICES, planChoices } from "../choices.js";
import { alertBox, ask, field, h, newId, put } from "../dom.js";
import { bytes, number, percent, t } from "../i18n.js";
import { classNames, linkOf } from "../jobs.js";
import { session } from "../session.js";
import { settingsForm } from "../settings.js";
import { entriesOf, filesOfDrop, filesOfInput, sortOut } from "../dropped.js";
import { checksum, pack, TooLarge } from "../zip.js";

const SHOWN_PICTURES = 6;
const BURST = 20;
const BURST_PAUSE_MS = 150;
const OFTEN_ENOUGH = 10; // pictures of a class; with fewer, the page says so

/** Open the view for an upload, where one is named, starting from a model of one's own, where one is named. */
export async function open(root, [wanted, from], signal) {
  const given = from ? { "model.backbone": from } : {};
  const [uploads, settings] = await Promise.all([all("v1/files", { signal }), settingsForm(signal, given)]);
  const files = uploads.filter(({ purpose }) => purpose === "fine-tune");
  const state = { classes: new Map(), layout: [], archive: null, skipped: 0, busy: false, attempt: null };
  const dataset = h("select", { onchange: () => showSource() },
    h("option", { value: "" }, t("train.new_pictures")),
    files.map((file) => h("option", { value: file.id }, t("train.dataset", { name: file.filename, n: pictureCount(file) }))));
  if (wanted) dataset.value = wanted;
  const name = h("input", { type: "text", autocomplete: "off", placeholder: t("train.name_example"), maxlength: "60" });
  const folders = h("input", { type: "file", webkitdirectory: true, multiple: true, id: "train-folder", class: "visually-hidden", onchange: () => take(filesOfInput(folders)) });
  const loose = h("input", { type: "file", multiple: true, accept: "image/*,.heic,.heif,.zip,.tar,.tgz,.gz", id: "train-files", class: "visually-hidden", onchange: () => take(filesOfInput(loose)) });
  const zone = h("label", { class: "drop", for: "train-folder" },
    h("p", { class: "invitation" }, h("strong", {}, t("train.drop")), h("br"), t("train.drop_more")));
  const found = h("div", { class: "classes", "aria-live": "polite" });
  const source = h("div", {});
  const messages = h("div", {});
  const progress = h("div", { class: "sending", "aria-live": "polite" });
  const seeds = h("input", { type: "number", min: "1", max: "50", value: "3", oninput: () => choice.show() });
  const seedsField = field(t("train.seeds"), seeds, { hint: t("train.seeds_hint") });
  const choice = planChoices(
    () => ({ settings: settings.values(), seeds: Math.max(1, Number(seeds.value) || 1), ...knownPictures() }),
    () => { seedsField.hidden = choice.value() !== "compare"; }, signal);
  settings.element.addEventListener("change", () => choice.refresh());
  seedsField.hidden = true;
  const begin = h("button", { type: "submit", class: "primary large" }, t("train.start"));

  const sourceField = field(t("train.source"), dataset);
  function showSource() {
    sourceField.hidden = files.length === 0;
    const known = files.find(({ id }) => id === dataset.value);
    put(source, known
      ? h("p", {}, t("train.known", { n: pictureCount(known), classes: classNames(known.summary.classes) }))
      : [zone, folders, loose,
        h("div", { class: "row" },
          h("label", { class: "button", for: "train-folder" }, t("train.choose_folder")),
          h("label", { class: "button", for: "train-files" }, t("train.choose_files")),
          h("button", { type: "button", onclick: addClass }, t("train.add_class"))),
        found]);
    showReadiness();
  }

  async function take(files_) {
    put(messages);
    const sorted = sortOut(files_, t("train.loose_class"));
    state.skipped += sorted.skipped;
    if (sorted.archives.length) Object.assign(state, { archive: sorted.archives[0], classes: new Map(), layout: [] });
    else if (sorted.layout.length) Object.assign(state, { archive: null, classes: new Map(), layout: [...state.layout, ...sorted.layout] });
    else {
      state.archive = null;
      for (const [label, some] of sorted.classes) state.classes.set(label, [...(state.classes.get(label) ?? []), ...some]);
    }
    if (!name.value) name.value = nameOf(files_);
    if (!sorted.archives.length && !sorted.layout.length && !sorted.classes.size) put(messages, alertBox(t("train.no_pictures", { n: files_.length })));
    showFound();
  }

  function showFound() {
    const { archive, layout, classes, skipped } = state;
    put(found,
      archive && h("p", {}, t("train.archive", { name: archive.name, size: bytes(archive.size) })),
      layout.length > 0 && h("p", {}, t("train.layout", { n: layout.length })),
      [...classes].map(([label, some]) => classCard(label, some)),
      skipped > 0 && h("p", { class: "hint" }, t("train.skipped", { n: skipped })),
      (archive || layout.length || classes.size) ? h("button", { type: "button", class: "quiet", onclick: startOver }, t("train.start_over")) : null);
    showReadiness();
  }

  function startOver() {
    Object.assign(state, { classes: new Map(), layout: [], archive: null, skipped: 0 });
    showFound();
  }

  function classCard(label, some) {
    const input = h("input", { type: "text", value: label, onchange: () => rename(label, input.value.trim()) });
    const more = h("input", { type: "file", multiple: true, accept: "image/*,.heic,.heif", class: "visually-hidden", id: newId("more"),
      onchange: () => { state.classes.set(label, [...some, ...more.files]); showFound(); } });
    return h("section", { class: "card class-card", "aria-label": label,
      ondragover: (event) => { event.preventDefault(); event.stopPropagation(); },
      ondrop: async (event) => {
        event.preventDefault();
        event.stopPropagation();
        const dropped = sortOut(await filesOfDrop(event.dataTransfer), label);
        state.classes.set(label, [...some, ...[...dropped.classes.values()].flat()]);
        showFound();
      } },
      h("div", { class: "row" }, field(t("train.class_name"), input), h("strong", {}, t("pictures", { n: some.length }))),
      h("div", { class: "strip" }, some.slice(0, SHOWN_PICTURES).map((file) => localPicture(file))),
      some.length < OFTEN_ENOUGH && h("p", { class: "hint" }, t("train.few", { n: OFTEN_ENOUGH })),
      h("div", { class: "row" },
        h("label", { class: "button", for: more.id }, t("train.add_pictures")), more,
        navigator.mediaDevices && h("button", { type: "button", onclick: () => burst(label) }, t("train.record")),
        h("button", { type: "button", class: "quiet", onclick: () => { state.classes.delete(label); showFound(); } }, t("train.remove_class"))));
  }

  function rename(from, to) {
    if (!to || from === to) return showFound();
    const renamed = new Map();
    for (const [label, some] of state.classes) {
      const key = label === from ? to : label;
      renamed.set(key, [...(renamed.get(key) ?? []), ...some]);
    }
    state.classes = renamed;
    return showFound();
  }

  function addClass() {
    let number_ = state.classes.size + 1;
    while (state.classes.has(t("train.class_number", { n: number_ }))) number_ += 1;
    state.classes.set(t("train.class_number", { n: number_ }), []);
    showFound();
    found.querySelector(".class-card:last-of-type input[type=text]")?.select();
  }

  async function burst(label) {
    const shots = await recordBurst(label, signal);
    if (shots?.length) state.classes.set(label, [...(state.classes.get(label) ?? []), ...shots]);
    showFound();
  }

  /** What is missing before training can begin; nothing where it can. */
  function missing() {
    if (dataset.value || state.archive || state.layout.length) return null;
    if (!state.classes.size) return t(files.length ? "train.missing_pictures" : "train.missing_first_pictures");
    const empty = [...state.classes].filter(([, some]) => some.length < 2).map(([label]) => label);
    if (empty.length) return t("train.missing_in_class", { name: empty[0] });
    return state.classes.size < 2 ? t("train.missing_class") : null;
  }

  /** What is known of the pictures before the server has seen them: of an archive only its size. */
  function knownPictures() {
    const known = files.find(({ id }) => id === dataset.value);
    if (known) return { images: pictureCount(known), classes: known.summary.classes.length, bytes: known.bytes };
    const entries = state.layout.length ? state.layout : entriesOf(state.classes);
    const folders_ = new Set(entries.map(({ path }) => path.split("/").at(-2)));
    return { images: entries.length || null, classes: folders_.size, bytes: entries.reduce((sum, { file }) => sum + file.size, 0) };
  }

  const readiness = h("p", { class: "hint" });
  function showReadiness() {
    const why = missing();
    begin.disabled = why !== null || state.busy;
    readiness.textContent = why ?? "";
    if (!state.busy) choice.refresh();
  }

  async function send() {
    if (dataset.value) return dataset.value;
    const stop = new AbortController();
    const bar = h("progress", { max: "1", value: 0, "aria-label": t("train.sending") });
    const said = h("span", {}, t("train.packing"));
    put(progress, said, bar, h("button", { type: "button", class: "quiet", onclick: () => stop.abort() }, t("stop")));
    let archive = state.archive;
    let filename = archive?.name;
    let mark = archive && await checksum(archive);
    if (!archive) {
      const entries = state.layout.length ? state.layout : entriesOf(state.classes);
      ({ archive, mark } = await pack(entries, { onprogress: (share) => { bar.value = share; }, signal: stop.signal }));
      filename = `${name.value.trim() || t("train.name_default")}.zip`;
    }
    said.textContent = t("train.sending");
    const key = `page-${archive.size}-${mark}-${digest(filename)}`;
    const file = await sendInParts(archive, { filename, purpose: "fine-tune", key }, {
      signal: stop.signal,
      onprogress: (share, waiting) => {
        bar.value = share;
        said.textContent = waiting ? t("train.waiting") : share < 1 ? t("train.sent", { share: percent(share), size: bytes(archive.size) }) : t("train.unpacking");
      },
    });
    dataset.append(h("option", { value: file.id }, t("train.dataset", { name: file.filename, n: pictureCount(file) })));
    files.push(file);
    dataset.value = file.id; // if the job is refused, the pictures need not be sent again
    showSource();
    return file.id;
  }

  async function submit(event) {
    event.preventDefault();
    put(messages);
    settings.showErrors([]);
    state.busy = true;
    showReadiness();
    try {
      const training_file = await send();
      const { methods, method } = CHOICES[choice.value()];
      const body = { training_file, ...settings.values(), ...(methods ? { methods, seeds: Number(seeds.value) } : { method }) };
      const suffix = asModelName(name.value);
      if (suffix) body.suffix = suffix;
      state.attempt ??= crypto.randomUUID?.() ?? String(Math.random());
      const path = methods ? "v1/fine_tuning/comparisons" : "v1/fine_tuning/jobs";
      const job = await requestWhenFree(path, {
        method: "POST", json: body, headers: { "Idempotency-Key": `${state.attempt}-${digest(JSON.stringify(body))}` }, signal,
      }, () => put(progress, h("span", {}, t("train.busy"))));
      state.busy = false;
      location.hash = linkOf(job);
    } catch (error) {
      state.busy = false;
      put(progress);
      showReadiness();
      if (error.name === "AbortError") return;
      if (error instanceof TooLarge) put(messages, alertBox(t("train.too_large")));
      else {
        const left = error instanceof Refused ? settings.showErrors(error.errors) : [];
        put(messages, alertBox(session.words(error instanceof Refused ? Object.assign(error, { errors: left }) : error)));
        if (!(error instanceof Refused)) throw error;
      }
    }
  }

  for (const kind of ["dragenter", "dragover"])
    zone.addEventListener(kind, (event) => { event.preventDefault(); zone.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, () => zone.classList.remove("over"));
  zone.addEventListener("drop", async (event) => { event.preventDefault(); take(await filesOfDrop(event.dataTransfer)); });
  addEventListener("beforeunload", (event) => { if (state.busy) event.preventDefault(); }, { signal });

  put(root,
    h("h1", { tabindex: "-1" }, t("train.title")),
    h("p", { class: "lead" }, t("train.lead")),
    from && h("p", { class: "notice good" }, t("train.from", { name: from.replace("@", " @ ") })),
    h("form", { onsubmit: submit, novalidate: true },
      h("section", { class: "step" }, h("h2", {}, t("train.step_pictures")),
        sourceField, source),
      h("section", { class: "step" }, h("h2", {}, t("train.step_choice")), choice.element, seedsField),
      h("section", { class: "step" }, h("h2", {}, t("train.step_start")),
        field(t("train.name"), name, { hint: t("train.name_hint") }), settings.element, messages, progress, begin, readiness)));
  showSource();
  showFound();
}

function pictureCount(file) {
  return Object.values(file.summary.counts).flatMap((byClass) => Object.values(byClass)).reduce((sum, n) => sum + n, 0);
}

/** Return the name of the folder or archive that was given. */
function nameOf(files) {
  const [first] = files;
  const parts = first?.path.split("/") ?? [];
  const tops = new Set(files.map(({ path }) => path.split("/")[0]));
  if (parts.length > 2 && tops.size === 1) return parts[0];
  return files.length === 1 ? (first?.path ?? "").replace(/\.(zip|tar|tgz|tar\.gz)$/i, "") : "";
}

/** Return a text as the server takes a model's name. */
function asModelName(text) {
  return text.normalize("NFKD").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 60);
}

function digest(text) {
  let value = 5381;
  for (const character of text) value = ((value * 33) ^ character.codePointAt(0)) >>> 0;
  return value.toString(16);
}

function localPicture(file) {
  const image = h("img", { alt: file.name, class: "thumbnail", decoding: "async", loading: "lazy" });
  const address = URL.createObjectURL(file);
  image.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
  image.addEventListener("error", () => image.replaceWith(h("span", { class: "thumbnail missing" }, file.name.split(".").pop())), { once: true });
  image.src = address;
  return image;
}

/** Take pictures from the webcam while a button is held; resolves to the files, or null. */
async function recordBurst(label, signal) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 } } });
  } catch (error) {
    return ask(t("train.record"), (answer) => [
      alertBox(t("try.webcam_refused", { reason: error.message })), h("button", { type: "button", onclick: () => answer(null) }, t("close"))]);
  }
  const shots = [];
  const given = await ask(t("train.record_title", { name: label }), (answer) => {
    const video = h("video", { muted: true, playsinline: true, "aria-label": t("try.webcam_picture") });
    const count = h("output", {}, number(0));
    video.srcObject = stream;
    video.play();
    const take = async () => {
      for (let shot = 0; shot < BURST && !signal.aborted; shot += 1) {
        const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
        canvas.getContext("2d").drawImage(video, 0, 0);
        const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
        shots.push(new File([blob], `webcam-${Date.now()}.jpg`, { type: "image/jpeg" }));
        count.textContent = number(shots.length);
        await new Promise((resolve) => setTimeout(resolve, BURST_PAUSE_MS));
      }
    };
    return [video, h("p", {}, t("train.recorded"), " ", count), h("div", { class: "row" },
      h("button", { type: "button", class: "primary", onclick: take }, t("train.record_burst", { n: BURST })),
      h("button", { type: "button", onclick: () => answer(shots) }, t("done")))];
  });
  for (const track of stream.getTracks()) track.stop();
  return given ?? shots;
}

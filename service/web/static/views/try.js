// Ask a model about one picture: bars, where it looked, how long it took, and the same request as code.

import { hasKey, Refused, request } from "../api.js";
import { answerBars } from "../charts.js";
import { alertBox, field, h, put } from "../dom.js";
import { downloadButton } from "../downloads.js";
import { duration, list, percent, t } from "../i18n.js";
import { session } from "../session.js";

const LIVE_PAUSE_MS = 250;
const TOP_K = [1, 3, 5, 10];
const CAMERA_SIDE_PX = 640;
const RELIANCE = { abstain: "true", coverage: "0.9" };

export async function open(root, [wanted], signal) {
  const [models, deployed] = await Promise.all([
    request("v1/models?limit=1000", { signal }), request("v1/deployments/default", { signal }),
  ]);
  if (!models.data.length && !deployed.model) return put(root, empty());

  let file = null;
  let asked = 0;
  let live = null; // the camera's stream
  const silent = new Set(); // models that cannot say when they are unsure
  const model = h("select", { onchange: () => ask() },
    deployed.model && h("option", { value: "" }, t("try.model_default", { model: deployed.model, version: deployed.version })),
    models.data.flatMap(({ id, versions }) => versions.map(({ version, aliases }) =>
      h("option", { value: `${id}@${version}` }, `${id} @ ${version}${aliases.includes("champion") ? ` (${t("models.champion")})` : ""}`))));
  if (wanted) model.value = wanted;
  if (!model.value && !deployed.model) model.selectedIndex = 0;
  const topK = h("select", { onchange: () => ask(), value: "5" }, TOP_K.map((k) => h("option", {}, String(k))));
  const explain = h("input", { type: "checkbox", checked: true, onchange: () => ask() });
  const reliance = h("input", { type: "checkbox", checked: true, onchange: () => ask() });
  const opacity = h("input", { type: "range", min: "0", max: "100", value: "70", oninput: () => fade() });
  const chooser = h("input", { type: "file", accept: "image/*,.heic,.heif", class: "visually-hidden", id: "try-file", onchange: () => choose(chooser.files[0]) });
  const camera = h("input", { type: "file", accept: "image/*", capture: "environment", class: "visually-hidden", id: "try-photo", onchange: () => choose(camera.files[0]) });
  const seen = h("img", { alt: t("try.seen"), hidden: true });
  const map = h("img", { alt: t("try.map"), class: "map", hidden: true });
  const video = h("video", { muted: true, playsinline: true, hidden: true, "aria-label": t("try.webcam_picture") });
  const invitation = h("p", { class: "invitation" }, h("strong", {}, t("try.drop")), h("br"), t("try.drop_more"));
  const stage = h("label", { class: "drop square", for: "try-file" }, invitation, seen, map, video);
  const answer = h("div", { class: "answer", "aria-live": "polite" }, h("p", { class: "hint" }, t("try.nothing_yet")));
  const opacityField = field(t("try.opacity"), opacity, { wide: true });
  opacityField.hidden = true;
  const webcam = h("button", { type: "button", onclick: () => (live ? stopLive() : startLive()) }, t("try.webcam"));

  function fields() {
    return {
      top_k: topK.value, ...(explain.checked ? { explain: "true" } : {}),
      ...(reliance.checked && !silent.has(model.value) ? RELIANCE : {}),
    };
  }

  function path() {
    return model.value ? `v1/models/${encodeURIComponent(model.value)}/predict` : "predict";
  }

  async function ask() {
    if (!file) return;
    const question = ++asked;
    const form = new FormData();
    form.append("image", file, file.name);
    for (const [name, value] of Object.entries(fields())) form.append(name, value);
    const started = performance.now();
    stage.classList.add("busy");
    try {
      const said = await request(path(), { method: "POST", body: form, signal });
      if (question === asked) showAnswer(said, performance.now() - started);
    } catch (error) {
      if (signal.aborted) return;
      const about = error instanceof Refused && error.errors.some((one) => one.field in { ...RELIANCE, precision: "" });
      if (about && !silent.has(model.value)) {
        silent.add(model.value);
        await ask();
        return;
      }
      if (question === asked) put(answer, alertBox(session.words(error)));
      if (!(error instanceof Refused)) throw error;
    } finally {
      stage.classList.remove("busy");
    }
  }

  function showAnswer(said, roundTripMs) {
    const { explanation } = said;
    if (!live) showPictures(explanation);
    const { abstained, reason, prediction_set: set, labels } = said;
    put(answer,
      labels && h("p", { role: "status" }, labels.length ? h("strong", {}, t("try.labels", { labels: list(labels) })) : t("try.no_labels")),
      abstained && h("p", { class: "notice", role: "status" }, h("strong", {}, t(`abstained.${reason}`)), ` ${t("abstained.what")}`),
      answerBars(said),
      labels && h("p", { class: "hint" }, t("try.thresholds")),
      h("p", { class: "hint" }, t("try.facts", {
        model: said.model, version: said.version, inside: duration(said.timings.total_ms / 1000), whole: duration(roundTripMs / 1000),
      })),
      set && h("p", {}, t("try.set", { n: set.labels.length, share: percent(set.coverage), labels: list(set.labels) })),
      !labels && reliance.checked && silent.has(model.value) && h("p", { class: "hint" }, t("try.no_reliance")),
      explanation?.reason && h("p", { class: "hint" }, t("try.no_map", { reason: explanation.reason })),
      !labels && abstained === undefined && h("p", { class: "hint" }, t("try.always_answers")),
      !live && models.data.some(({ id }) => id === said.model) && h("div", { class: "row" }, downloadButton(said.model, said.version)),
      !live && code());
  }

  function showPictures(explanation) {
    video.hidden = true;
    map.hidden = !explanation?.overlay_png_base64;
    opacityField.hidden = map.hidden;
    if (explanation?.image_jpeg_base64) seen.src = `data:image/jpeg;base64,${explanation.image_jpeg_base64}`;
    else showFile();
    if (!map.hidden) map.src = `data:image/png;base64,${explanation.overlay_png_base64}`;
    seen.hidden = false;
    invitation.hidden = true;
    fade();
  }

  function showFile() {
    if (seen.src.startsWith("blob:")) URL.revokeObjectURL(seen.src);
    seen.src = URL.createObjectURL(file);
  }

  function fade() {
    map.style.opacity = String(opacity.value / 100);
  }

  function choose(given) {
    if (!given) return;
    stopLive();
    file = given;
    map.hidden = true;
    showFile();
    seen.hidden = false; // a HEIC photograph shows when the server has answered
    invitation.hidden = true;
    ask();
  }

  async function startLive() {
    try {
      live = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } });
    } catch (error) {
      put(answer, alertBox(t("try.webcam_refused", { reason: error.message })));
      return;
    }
    webcam.textContent = t("try.webcam_stop");
    video.srcObject = live;
    for (const one of [seen, map, invitation, opacityField]) one.hidden = true;
    video.hidden = false;
    await video.play();
    while (live && !signal.aborted) {
      file = await frameOf(video);
      await ask();
      await new Promise((resolve) => setTimeout(resolve, LIVE_PAUSE_MS));
    }
  }

  function stopLive() {
    for (const track of live?.getTracks() ?? []) track.stop();
    live = null;
    video.hidden = true;
    video.srcObject = null;
    webcam.textContent = t("try.webcam");
    if (file && seen.src) seen.hidden = false;
  }

  function code() {
    const snippets = snippetsOf(new URL(path(), document.baseURI).href, fields(), file.name);
    const shown = h("pre", { tabindex: "0" }, h("code", {}));
    const tabs = Object.keys(snippets).map((name, at) => h("button", {
      type: "button", class: "tab", "aria-pressed": String(at === 0), onclick: (event) => select(name, event.currentTarget),
    }, name));
    function select(name, button) {
      for (const tab of tabs) tab.setAttribute("aria-pressed", String(tab === button));
      shown.firstChild.textContent = snippets[name];
    }
    select(Object.keys(snippets)[0], tabs[0]);
    const copy = h("button", { type: "button", onclick: async () => {
      getSelection().selectAllChildren(shown);
      if (!navigator.clipboard) return; // not for pages over plain HTTP: the text is selected, and Ctrl-C copies it
      await navigator.clipboard.writeText(shown.textContent);
      copy.textContent = t("copied");
    } }, t("copy"));
    return h("section", { class: "code", "aria-label": t("try.code") },
      h("div", { class: "row" }, h("h2", {}, t("try.code")), h("div", { class: "tabs", role: "group", "aria-label": t("try.code") }, tabs), copy), shown);
  }

  for (const kind of ["dragenter", "dragover"])
    stage.addEventListener(kind, (event) => { event.preventDefault(); stage.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) stage.addEventListener(kind, () => stage.classList.remove("over"));
  stage.addEventListener("drop", (event) => { event.preventDefault(); choose(event.dataTransfer.files[0]); });
  seen.addEventListener("error", () => { seen.hidden = true; });
  document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]), { signal });
  signal.addEventListener("abort", stopLive);

  put(root,
    h("h1", { tabindex: "-1" }, t("try.title")),
    h("div", { class: "two" },
      h("section", {}, stage, chooser,
        h("div", { class: "row" },
          h("label", { class: "button", for: "try-file" }, t("try.choose")),
          h("span", { class: "phone-only" }, h("label", { class: "button", for: "try-photo" }, t("try.photo")), camera),
          navigator.mediaDevices && webcam)),
      h("section", { class: "asking" },
        h("div", { class: "row controls" }, field(t("try.model"), model, { wide: true }), field(t("try.top_k"), topK),
          h("label", { class: "check" }, explain, t("try.explain")),
          h("label", { class: "check" }, reliance, t("try.reliance")), opacityField),
        answer)));
  return undefined;
}

function empty() {
  return [
    h("h1", { tabindex: "-1" }, t("try.title")),
    h("div", { class: "empty" }, h("p", {}, t("try.empty")),
      session.may("jobs") && h("a", { class: "button primary", href: "#/train" }, t("try.empty_action"))),
  ];
}

async function frameOf(video) {
  const scale = Math.min(1, CAMERA_SIDE_PX / Math.max(video.videoWidth, video.videoHeight, 1));
  const canvas = h("canvas", { width: Math.round(video.videoWidth * scale), height: Math.round(video.videoHeight * scale) });
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
  return new File([blob], "webcam.jpg", { type: "image/jpeg" });
}

/** Return the same request as code; with a key, its variable and never the key itself. */
function snippetsOf(url, fields, name) {
  const withKey = hasKey();
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a POSIX shell
  const shellName = /^[\w. -]+$/.test(name) ? name : `"${name.replaceAll(/["\\]/g, "\\$&")}"`; // curl splits at , and ;
  const pairs = Object.entries(fields);
  return {
    curl: ["curl", "-F", quoted(`image=@${shellName}`), ...pairs.flatMap(([key, value]) => ["-F", `${key}=${value}`]),
      ...(withKey ? ["-H", '"Authorization: Bearer $FINETUNE_API_KEY"'] : []), quoted(url)].join(" "),
    Python: [
      ...(withKey ? ["import os", ""] : []), "import httpx", "",
      `with open(${JSON.stringify(name)}, "rb") as image:`,
      `    answer = httpx.post(${JSON.stringify(url)}, files={"image": image}, data=${JSON.stringify(fields)}${withKey
        ? ', headers={"Authorization": f"Bearer {os.environ[\'FINETUNE_API_KEY\']}"}' : ""})`,
      'print(answer.raise_for_status().json()["predictions"])',
    ].join("\n"),
    JavaScript: [
      'import { openAsBlob } from "node:fs";', "",
      "const form = new FormData();", `form.append("image", await openAsBlob(${JSON.stringify(name)}));`,
      ...pairs.map(([key, value]) => `form.append(${JSON.stringify(key)}, ${JSON.stringify(value)});`),
      `const answer = await fetch(${JSON.stringify(url)}, { method: "POST", body: form${withKey
        ? ", headers: { Authorization: `Bearer ${process.env.FINETUNE_API_KEY}` }" : ""} });`,
      "console.log((await answer.json()).predictions);",
    ].join("\n"),
  };
}

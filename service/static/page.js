// The page at /: one image to POST /predict, and its answer as bars, an overlay and a curl command.
// Everything that comes from the server is set as text, never as HTML.
"use strict";

const find = (id) => document.getElementById(id);
let chosen = null; // the File that is shown
let asked = 0; // counts questions, so that a late answer to an old one is dropped

function predictPath() {
  const model = find("model").value;
  const path = model ? `v1/models/${encodeURIComponent(model)}/predict` : "predict";
  return new URL(path, document.baseURI).href;
}

function fields() {
  const given = {};
  if (find("top-k").value) given.top_k = find("top-k").value;
  if (find("explain").checked) given.explain = "true";
  return given;
}

function quoted(text) {
  return "'" + text.replaceAll("'", "'\\''") + "'"; // for a POSIX shell
}

function curlCommand(name) {
  const file = /^[\w. -]+$/.test(name) ? name : `"${name.replaceAll(/["\\]/g, "\\$&")}"`; // curl splits at , and ;
  const parts = ["curl", "-F", quoted(`image=@${file}`)];
  for (const [key, value] of Object.entries(fields())) parts.push("-F", `${key}=${value}`);
  return [...parts, quoted(predictPath())].join(" ");
}

async function ask() {
  if (!chosen) return;
  const question = ++asked;
  const body = new FormData();
  body.append("image", chosen, chosen.name);
  for (const [key, value] of Object.entries(fields())) body.append(key, value);
  find("drop").classList.add("busy");
  const started = performance.now();
  try {
    const response = await fetch(predictPath(), { method: "POST", body });
    const answer = await response.json();
    if (question !== asked) return;
    if (response.ok) showAnswer(answer, performance.now() - started);
    else showError(`${answer.detail} (${answer.code}, ${answer.request_id})`);
  } catch (error) {
    if (question === asked) showError(`The server did not answer: ${error.message}`);
  } finally {
    if (question === asked) find("drop").classList.remove("busy");
  }
}

function showAnswer(answer, roundTripMs) {
  find("error").hidden = find("hint").hidden = true;
  find("result").hidden = false;
  find("bars").replaceChildren(...answer.predictions.map(bar));
  find("facts").textContent =
    `${answer.model}@${answer.version} · ${answer.timings.total_ms.toFixed(1)} ms in the server · ${roundTripMs.toFixed(0)} ms in all`;
  find("curl").textContent = curlCommand(chosen.name);
  const explanation = answer.explanation;
  if (explanation && explanation.overlay_png_base64) show(`data:image/png;base64,${explanation.overlay_png_base64}`);
  else show(URL.createObjectURL(chosen));
  find("no-map").hidden = !(explanation && explanation.reason);
  find("no-map").textContent = explanation && explanation.reason ? `No map: ${explanation.reason}` : "";
}

function bar({ label, probability }) {
  const row = document.createElement("li");
  const fill = document.createElement("i");
  fill.style.width = `${100 * probability}%`;
  const name = document.createElement("span");
  name.textContent = label;
  const share = document.createElement("output");
  share.textContent = `${(100 * probability).toFixed(1)} %`;
  row.append(fill, name, share);
  return row;
}

function show(source) {
  const preview = find("preview");
  if (preview.src.startsWith("blob:")) URL.revokeObjectURL(preview.src);
  preview.src = source;
  preview.hidden = false;
  find("invitation").hidden = true;
}

function showError(message) {
  find("result").hidden = find("hint").hidden = true;
  find("error").hidden = false;
  find("error").textContent = message;
}

function choose(file) {
  if (!file) return;
  chosen = file;
  show(URL.createObjectURL(file));
  ask();
}

async function showServing() {
  const ready = await fetch("readyz");
  const state = await ready.json();
  find("serving").textContent = ready.ok ? "ready" : state.detail;
  const models = await (await fetch("v1/models?limit=100")).json();
  for (const { id } of models.data) find("model").append(new Option(id, id));
}

const drop = find("drop");
for (const kind of ["dragenter", "dragover"])
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
find("preview").addEventListener("error", () => { find("preview").hidden = true; find("invitation").hidden = false; });
drop.addEventListener("drop", (event) => { event.preventDefault(); choose(event.dataTransfer.files[0]); });
document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
find("file").addEventListener("change", (event) => choose(event.target.files[0]));
for (const id of ["model", "top-k", "explain"]) find(id).addEventListener("change", ask);
find("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren(find("curl"));
  if (!navigator.clipboard) return; // no clipboard for pages over plain HTTP: selected is all we can do
  await navigator.clipboard.writeText(find("curl").textContent);
  find("copy").textContent = "Copied";
});
showServing();

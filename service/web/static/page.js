// The page at /: one image to POST /predict, its answer as bars, an overlay and a curl command; below, the newest jobs.
// Everything that comes from the server is set as text, never as HTML. An API key stays in this tab (sessionStorage) and goes
// nowhere but into the Authorization header.
"use strict";

const KEY = "finetune-api-key";
const JOBS_SHOWN = 8;
const JOBS_MS = 5000; // between two looks at them

const find = (id) => document.getElementById(id);
let chosen = null; // the File that is shown
let asked = 0; // counts questions, so that a late answer to an old one is dropped

function send(path, request = {}) {
  const key = sessionStorage.getItem(KEY);
  return fetch(path, key ? { ...request, headers: { Authorization: `Bearer ${key}` } } : request);
}

function useKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
  find("key").value = "";
  find("key").placeholder = text ? "in use for this tab" : "ft_…";
}

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
  if (sessionStorage.getItem(KEY)) parts.push("-H", '"Authorization: Bearer $FINETUNE_API_KEY"'); // never the key itself
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
    const response = await send(predictPath(), { method: "POST", body });
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
  const answer = await send("v1/models?limit=100");
  if (answer.status === 401) {
    find("serving").textContent = sessionStorage.getItem(KEY) ? "this API key is not accepted" : "this server wants an API key";
    find("key").focus();
  }
  const models = answer.ok ? (await answer.json()).data : [];
  find("model").replaceChildren(new Option("default", ""), ...models.map(({ id }) => new Option(id, id)));
}

async function showJobs() {
  const answers = await Promise.all(["jobs", "comparisons"].map((kind) => send(`v1/fine_tuning/${kind}?limit=${JOBS_SHOWN}`)));
  const told = await Promise.all(answers.map((answer) => answer.json()));
  const refused = answers.findIndex((answer) => !answer.ok);
  const jobs = refused >= 0 ? [] : told.flatMap(({ data }) => data).sort((a, b) => b.created_at - a.created_at).slice(0, JOBS_SHOWN);
  find("jobs").replaceChildren(...jobs.map(row));
  find("jobs").parentElement.hidden = jobs.length === 0;
  find("no-jobs").hidden = jobs.length > 0;
  find("no-jobs").textContent = refused >= 0 ? told[refused].detail : "There are none yet.";
}

function row(job) {
  const { done, total } = job.progress ?? {};
  const percent = total ? ` ${Math.round((100 * done) / total)} %` : "";
  const doing = job.phase ? `${job.phase}${percent}` : (job.error?.message ?? job.verdict?.sentence ?? "");
  const what = job.object === "fine_tuning.job" ? `${job.model} · ${job.method.type}` : `comparison: ${job.description}`;
  const made = job.fine_tuned_model ? `${job.fine_tuned_model}@${job.fine_tuned_version}` : "";
  const line = document.createElement("tr");
  for (const text of [job.id, what, job.status, doing, made]) {
    const cell = document.createElement("td");
    cell.textContent = text;
    line.append(cell);
  }
  line.children[2].className = job.status;
  return line;
}

async function watchJobs() {
  if (!document.hidden) await showJobs().catch((error) => { find("no-jobs").textContent = error.message; });
  setTimeout(watchJobs, JOBS_MS);
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
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key").value.trim());
  showServing();
  showJobs();
  ask();
});
useKey(sessionStorage.getItem(KEY) ?? "");
showServing();
watchJobs();

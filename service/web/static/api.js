// Requests to the server that the page came from. An API key is a variable of this module: it is in no storage and no address.

let key = null;
const listeners = new Set();

export class Refused extends Error {
  /** @param {{status: number, code: string, detail: string, errors: {field: string, detail: string}[], requestId: string}} said */
  constructor(said) {
    super(said.detail);
    Object.assign(this, said);
  }
}

export function useKey(text) {
  key = text || null;
}

export function hasKey() {
  return key !== null;
}

/** Call `listener` when the server refuses the key, or its absence. */
export function onUnauthorised(listener) {
  listeners.add(listener);
}

function headers(more = {}) {
  return key === null ? more : { ...more, Authorization: `Bearer ${key}` };
}

async function refusal(response) {
  let said = {};
  try {
    said = await response.json();
  } catch {
    // not a problem document: a proxy in between may answer with a page of its own
  }
  if (response.status === 401) for (const listener of listeners) listener();
  return new Refused({
    status: response.status, code: said.code ?? "", detail: said.detail ?? response.statusText, errors: said.errors ?? [],
    requestId: said.request_id ?? response.headers.get("x-request-id") ?? "",
  });
}

async function send(path, { method = "GET", json, body, headers: more = {}, signal } = {}) {
  const given = json === undefined ? body : JSON.stringify(json);
  const typed = json === undefined ? more : { "Content-Type": "application/json", ...more };
  let response;
  try {
    response = await fetch(path, { method, body: given, headers: headers(typed), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ status: 0, code: "offline", detail: "", errors: [], requestId: "" });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Return the JSON answer of a request. */
export async function request(path, options) {
  return (await send(path, options)).json();
}

const BUSY_TRIES = 5;

/** Return whether a request was refused because the server has too much to do at the moment. */
export function isBusy(error) {
  return error instanceof Refused && error.code === "overloaded";
}

/** Return the JSON answer of a request that is sent again while the server has too much to do; `onbusy` is called before each pause. */
export async function requestWhenFree(path, options, onbusy) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await request(path, options);
    } catch (error) {
      if (!isBusy(error) || tries === BUSY_TRIES) throw error;
      onbusy();
      await pause(Math.min(LONGEST_PAUSE_MS, 1000 * 2 ** tries), options.signal);
    }
  }
}

export async function requestText(path, options) {
  return (await send(path, options)).text();
}

export async function requestBlob(path, options) {
  return (await send(path, options)).blob();
}

/** Return every entry of a list, page by page; at most `most`. */
export async function all(path, { signal, most = 1000 } = {}) {
  const found = [];
  let after = "";
  for (;;) {
    const separator = path.includes("?") ? "&" : "?";
    const page = await request(`${path}${separator}limit=100${after}`, { signal });
    found.push(...page.data);
    if (!page.has_more || found.length >= most) return found;
    after = `&after=${encodeURIComponent(page.last_id)}`;
  }
}

const PART_BYTES = 8 * 2 ** 20;
const LATER = new Set([0, 408, 429, 502, 503, 504]);
const LONGEST_PAUSE_MS = 15_000;

/** Send a file in parts; resolves to what the server made of it. What is lost on the way is sent again until `signal` ends it.
 *
 * @param {Blob} file
 * @param {{filename: string, purpose: string, key: string}} what `key` says that this is the same file as one whose sending was
 *   interrupted: the parts that have arrived are not sent again.
 * @param {(share: number, waiting: boolean) => void} onprogress how much has arrived (0 to 1), and whether the server is not reached.
 */
export async function sendInParts(file, { filename, purpose, key: idempotencyKey }, { onprogress, signal }) {
  let share = 0;
  const patiently = async (work) => {
    for (let failures = 0; ; failures += 1) {
      try {
        return await work();
      } catch (error) {
        if (!(error instanceof Refused) || !LATER.has(error.status)) throw error;
        onprogress(share, true);
        await pause(Math.min(LONGEST_PAUSE_MS, 500 * 2 ** failures), signal);
      }
    }
  };
  const post = (path, options) => patiently(() => request(path, { method: "POST", signal, ...options }));
  const begun = await post("v1/uploads", { json: { filename, purpose, bytes: file.size }, headers: { "Idempotency-Key": idempotencyKey } });
  if (begun.file) return begun.file;
  const arrived = new Map(begun.parts.map((part) => [part.part_number, part]));
  for (let number_ = 1, start = 0; start < file.size; number_ += 1, start += PART_BYTES) {
    const part = file.slice(start, start + PART_BYTES);
    if (arrived.get(number_)?.bytes !== part.size) {
      const progress = (sent) => { share = (start + sent * part.size) / file.size; onprogress(share, false); };
      arrived.set(number_, await patiently(() => sendForm(`v1/uploads/${begun.id}/parts`, { part_number: number_, data: part }, { onprogress: progress, signal })));
    }
    share = (start + part.size) / file.size;
    onprogress(share, false);
  }
  const ids = [...arrived].sort(([one], [other]) => one - other).map(([, { id }]) => id);
  try {
    return (await post(`v1/uploads/${begun.id}/complete`, { json: { part_ids: ids } })).file;
  } catch (error) {
    if (error instanceof Refused) await post(`v1/uploads/${begun.id}/cancel`); // what it holds is refused, and would be again
    throw error;
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stopped = () => reject(new DOMException("the upload was stopped", "AbortError"));
    if (signal.aborted) return stopped();
    signal.addEventListener("abort", stopped, { once: true });
    return setTimeout(resolve, ms);
  });
}

/** Send a form with its progress (0 to 1); `fetch` cannot tell how much has been sent. */
function sendForm(path, fields, { onprogress, signal }) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", path);
    sending.responseType = "json";
    for (const [name, value] of Object.entries(headers())) sending.setRequestHeader(name, value);
    sending.upload.addEventListener("progress", (event) => onprogress(event.loaded / Math.max(1, event.total)));
    sending.addEventListener("load", () => {
      const said = sending.response ?? {};
      if (sending.status < 300) return resolve(said);
      if (sending.status === 401) for (const listener of listeners) listener();
      return reject(new Refused({
        status: sending.status, code: said.code ?? "", detail: said.detail ?? sending.statusText, errors: said.errors ?? [],
        requestId: said.request_id ?? "",
      }));
    });
    sending.addEventListener("error", () => reject(new Refused({ status: 0, code: "offline", detail: "", errors: [], requestId: "" })));
    sending.addEventListener("abort", () => reject(new DOMException("the upload was stopped", "AbortError")));
    signal.addEventListener("abort", () => sending.abort(), { once: true });
    sending.send(form);
  });
}

/** Follow a stream of events until it says that it is done; after a lost connection it goes on where it was.
 *
 * `EventSource` cannot send an Authorization header.
 * @param {(kind: string, data: object) => void} onevent kinds: message, progress, done.
 * @param {(connected: boolean) => void} onconnection
 */
export async function follow(path, { onevent, onconnection = () => {}, signal }) {
  let last = "";
  for (let failures = 0; !signal.aborted;) {
    try {
      const more = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      const response = await send(path, { headers: more, signal });
      onconnection(true);
      failures = 0;
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const frames = (rest + value).split("\n\n");
        rest = frames.pop();
        for (const frame of frames) {
          const lines = Object.fromEntries(frame.split("\n").filter((line) => /^\w+:/.test(line)).map((line) => {
            const at = line.indexOf(":");
            return [line.slice(0, at), line.slice(at + 1).trim()];
          }));
          if (lines.id) last = lines.id;
          if (!lines.data) continue;
          onevent(lines.event ?? "message", JSON.parse(lines.data));
          if (lines.event === "done") return;
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status >= 400 && error.status < 500) throw error;
      failures += 1;
    }
    onconnection(false);
    await new Promise((resolve) => setTimeout(resolve, Math.min(10_000, 500 * 2 ** failures)));
  }
}

/** Open what lies at a path in a new tab, or save it: with a key, a plain link would be refused. */
export async function saveFile(path, name) {
  const address = URL.createObjectURL(await requestBlob(path));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

// A job while it waits and runs: phases, time left, curves, what it says, and the button that stops it.

import { follow, request, requestText } from "./api.js";
import { lines } from "./charts.js";
import { alertBox, h, put } from "./dom.js";
import { headline, OF_IMAGES } from "./figures.js";
import { duration, known, number, percent, t } from "./i18n.js";
import { hasEnded, isComparison, pathOf, stateMark, titleOf } from "./jobs.js";
import { eventItem } from "./said.js";
import { session } from "./session.js";

const PHASES = ["preparing", "features", "training", "evaluating", "exporting", "registering"];
const CURVES_MS = 1500; // between two readings of what was measured
const LOG_LINES = 300;

/** Show a job until it has ended; `ended` is called with it then. Comes back where it was after a lost connection.
 * @param {(job: object) => Promise<void>} ended
 */
export function watch(root, job, signal, ended) {
  const path = pathOf(job.id);
  const state = h("p", { class: "state-line", role: "status" });
  const connection = h("p", { class: "hint", role: "status" });
  const phases = h("ol", { class: "phases" });
  const bar = h("progress", { max: "1", "aria-label": t("run.progress") });
  const detail = h("p", { class: "hint" });
  const curves = h("div", { class: "charts" });
  const said = h("ol", { class: "events" });
  const log = h("pre", { tabindex: "0" });
  const logBox = h("details", { ontoggle: () => logBox.open && showLog() }, h("summary", {}, t("run.log")), log);
  const messages = h("div", {});
  const cancel = h("button", { type: "button", class: "danger", onclick: stop }, t("run.cancel"));
  const notify = "Notification" in window && Notification.permission !== "denied"
    ? h("button", { type: "button", class: "quiet", onclick: askToNotify }, t("run.notify")) : null;
  let phase = job.phase;
  let curvesAt = 0;

  function showState(current) {
    put(state, stateMark(current.status), current.status === "queued" && ` · ${t("run.queue", { n: current.queue_position ?? 0 })}`);
    cancel.disabled = current.status === "cancelling";
    const shown = isComparison(job) ? [] : PHASES;
    put(phases, shown.map((name) => {
      const place = PHASES.indexOf(name) - PHASES.indexOf(phase);
      const kind = phase === null ? "later" : place < 0 ? "done" : place === 0 ? "now" : "later";
      return h("li", { class: kind, "aria-current": kind === "now" ? "step" : null }, h("span", {}, known(`phase.${name}`, name)));
    }));
  }

  function showProgress(progress) {
    if (!progress) return bar.removeAttribute("value");
    const { done, total, unit, values, message } = progress;
    bar.value = total ? done / total : 0;
    const parts = [known(`phase.${progress.phase}`, progress.phase), total ? t("run.done", { done, total, unit: known(`unit.${unit}`, unit) }) : "", message];
    if (values?.eta_seconds) parts.push(t("run.eta", { time: duration(values.eta_seconds) }));
    if (values?.loss !== undefined && values.loss !== null) parts.push(t("run.loss", { loss: number(values.loss, 3) }));
    const judged = headline(values, ["val"]);
    if (judged) parts.push(t(`run.val.${judged[0]}`, { share: percent(judged[1], 1) }));
    detail.textContent = parts.filter(Boolean).join(" · ");
    return undefined;
  }

  async function showCurves() {
    if (isComparison(job) || performance.now() - curvesAt < CURVES_MS) return;
    curvesAt = performance.now();
    put(curves, curvesOf((await request(`${path}/metrics`, { signal })).data));
  }

  async function showLog() {
    log.textContent = (await requestText(`${path}/logs?tail=${LOG_LINES}`, { signal })) || t("run.log_empty");
    log.scrollTop = log.scrollHeight;
  }

  async function stop() {
    try {
      showState(await request(`${path}/cancel`, { method: "POST" }));
    } catch (error) {
      put(messages, alertBox(session.words(error)));
    }
  }

  async function askToNotify() {
    const answer = await Notification.requestPermission();
    notify.textContent = answer === "granted" ? t("run.will_notify") : t("run.not_allowed");
    notify.disabled = true;
  }

  function tell(current) {
    document.title = `${t(`state.${current.status}`)} · ${titleOf(current)}`;
    if (document.hidden && "Notification" in window && Notification.permission === "granted")
      new Notification(titleOf(current), { body: t(`state.${current.status}`), tag: current.id });
  }

  put(root, state, phases, bar, detail, connection, messages, h("div", { class: "row" }, cancel, notify), curves,
    h("section", {}, h("h2", {}, t("run.said")), said), logBox);
  showState(job);
  showProgress(job.progress);
  showCurves().catch(() => {}); // there may be none yet

  if (hasEnded(job)) return finish(job);
  return follow(`${path}/events`, {
    signal,
    onconnection: (connected) => { connection.textContent = connected ? "" : t("run.reconnecting"); },
    onevent: async (kind, data) => {
      if (kind === "message") {
        said.append(eventItem(data));
        if (data.kind === "running") showState({ status: "running" }); // its first progress may take seconds
        return;
      }
      if (kind === "progress") {
        phase = data.phase;
        showState(data);
        showProgress(data.progress);
        showCurves().catch(() => {}); // the next progress asks again
        return;
      }
      finish(await request(path, { signal }));
    },
  }).catch((error) => { if (!signal.aborted) put(messages, alertBox(session.words(error))); });

  async function finish(current) {
    phase = current.phase;
    showState(current);
    cancel.hidden = true;
    bar.hidden = true;
    if (notify) notify.hidden = true;
    if (current.status === "failed")
      put(messages, alertBox(h("strong", {}, t("run.failed")), ` ${session.failure(current.error)}`), h("a", { class: "button", href: "#/train" }, t("run.try_again")));
    if (!hasEnded(job)) tell(current);
    if (!said.children.length) {
      const events = await request(`${path}/events?order=asc&limit=100`, { signal });
      put(said, events.data.map(eventItem));
    }
    await ended(current);
  }
}

/** Return charts of what was measured over the steps. */
export function curvesOf(rows) {
  const series = (key) => rows.filter(({ values }) => typeof values[key] === "number").map(({ step, values }) => [step, values[key]]);
  const xName = t("run.step");
  return [
    lines(t("run.loss_curve"), [{ name: t("run.train"), values: series("train/loss") }, { name: t("run.validation"), values: series("val/loss") }], { xName }),
    ...OF_IMAGES.map((name) => lines(t("run.accuracy_curve"), [
      { name: t("run.train"), values: series(`train/${name}`) }, { name: t("run.validation"), values: series(`val/${name}`) }], { xName, asShare: true })),
    lines(t("run.map_curve"), [{ name: t("run.validation"), values: series("val/map") }], { xName, asShare: true }),
  ].filter(Boolean);
}

// Pictures from the server, loaded when they come into view, and a grid that holds only those that can be seen.

import { requestBlob } from "./api.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

const AT_ONCE = 6;
const AHEAD_PX = 400;
let running = 0;
const waiting = [];

/** Run `work` when fewer than AT_ONCE run; the newest first, because it is what the person looks at. */
function queued(work, signal) {
  const run = async () => {
    if (signal.aborted) return next();
    running += 1;
    try {
      await work();
    } finally {
      running -= 1;
      next();
    }
  };
  if (running < AT_ONCE) run();
  else waiting.push(run);
}

function next() {
  if (running < AT_ONCE && waiting.length) waiting.pop()();
}

function load(image, path) {
  const stop = new AbortController();
  image.classList.add("loading");
  queued(async () => {
    try {
      const blob = await requestBlob(path, { signal: stop.signal });
      image.src = URL.createObjectURL(blob);
      image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
    } catch {
      image.classList.add("missing"); // gone, or the view was left: the alternative text stands in its place
    }
    image.classList.remove("loading");
  }, stop.signal);
  return stop;
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    load(target, target.dataset.path);
  }
}, { rootMargin: `${AHEAD_PX}px` });

/** Return an image that is fetched when it comes near the visible part of the page. */
export function picture(path, alt, attributes = {}) {
  const image = h("img", { alt, "data-path": path, class: "thumbnail", decoding: "async", ...attributes });
  seen.observe(image);
  return image;
}

/** Return a grid of any number of cells, of which only those near the visible part of the page exist.
 *
 * @param {number} count
 * @param {(index: number) => Promise<{path: string, label: string, note?: string, chosen?: boolean, open?: (event: Event) => void}>} cell
 *   what is at a place; `chosen` where it can be chosen among others.
 * @param {AbortSignal} signal ends when the view is left.
 */
export function virtualGrid(count, cell, { signal, sidePx = 132, gapPx = 8 }) {
  const grid = h("div", { class: "virtual", role: "list" });
  const made = new Map(); // index → {element, stop}
  let columns = 0;
  let asked = false;

  function lay() {
    asked = false;
    const width = grid.clientWidth;
    if (!width) return;
    const fitting = Math.max(1, Math.floor((width + gapPx) / (sidePx + gapPx)));
    if (fitting !== columns) {
      columns = fitting;
      grid.style.height = `${Math.ceil(count / columns) * (sidePx + gapPx)}px`;
      for (const index of [...made.keys()]) drop(index);
    }
    const top = -grid.getBoundingClientRect().top - AHEAD_PX;
    const first = Math.max(0, Math.floor(top / (sidePx + gapPx)) * columns);
    const last = Math.min(count, Math.ceil((top + innerHeight + 2 * AHEAD_PX) / (sidePx + gapPx)) * columns);
    for (const index of [...made.keys()]) if (index < first || index >= last) drop(index);
    for (let index = first; index < last; index += 1) if (!made.has(index)) make(index);
  }

  function drop(index) {
    const { element, stop } = made.get(index);
    stop.abort();
    element.remove();
    made.delete(index);
  }

  function make(index) {
    const left = (index % columns) * (sidePx + gapPx);
    const top = Math.floor(index / columns) * (sidePx + gapPx);
    const image = h("img", { alt: "", decoding: "async", class: "thumbnail" });
    const button = h("button", { type: "button", class: "tile", disabled: true, title: t("picture_at", { at: index + 1, n: count }) }, image);
    const element = h("div", {
      role: "listitem", class: "cell", "aria-posinset": index + 1, "aria-setsize": count,
      style: { transform: `translate(${left}px, ${top}px)`, width: `${sidePx}px`, height: `${sidePx}px` },
    }, button);
    const stop = new AbortController();
    made.set(index, { element, stop });
    grid.append(element);
    cell(index).then(({ path, label, open, note, chosen }) => {
      if (stop.signal.aborted) return;
      image.alt = label;
      button.title = label;
      button.disabled = false;
      if (chosen !== undefined) button.setAttribute("aria-pressed", chosen);
      if (note) button.append(h("span", { class: "tile-note" }, note));
      button.addEventListener("click", (event) => open?.(event));
      const loading = load(image, path);
      stop.signal.addEventListener("abort", () => loading.abort());
    }, () => image.classList.add("missing"));
  }

  function soon() {
    if (!asked) requestAnimationFrame(lay);
    asked = true;
  }

  addEventListener("scroll", soon, { passive: true, signal });
  const watcher = new ResizeObserver(soon);
  watcher.observe(grid);
  signal.addEventListener("abort", () => { watcher.disconnect(); for (const index of [...made.keys()]) drop(index); });
  return grid;
}

// Starts the page: language, who asks, and which view the address names. Views live in views/, one file each.

import { hasKey, onUnauthorised, Refused, request, useKey } from "./api.js";
import { alertBox, field, h, put } from "./dom.js";
import { currentLanguage, LANGUAGES, t, useLanguage } from "./i18n.js";
import { applyTheme, prefer, preferences } from "./preferences.js";
import { session } from "./session.js";

const VIEWS = ["data", "train", "runs", "compare", "models", "try"];
const NEEDS = { data: "jobs", train: "jobs", runs: "jobs", compare: "jobs", models: "predict", try: "predict" };
const main = document.getElementById("main");
let leaving = new AbortController();

/** Read who asks; false where the server wants a key that it has not got. */
async function identify() {
  try {
    session.caller = await request("v1/caller");
  } catch (error) {
    if (!(error instanceof Refused) || error.status !== 401) throw error;
    session.caller = null;
    session.refusal = hasKey() ? t("key.refused") : null;
  }
  showWhoAsks();
  return session.caller !== null;
}

function showWhoAsks() {
  const { caller } = session;
  const signedIn = caller !== null && hasKey();
  put(document.getElementById("who"), signedIn && [
    h("span", {}, t("key.signed_in", { owner: caller.owner })),
    h("button", { type: "button", class: "quiet", onclick: signOut }, t("key.sign_out")),
  ]);
  for (const link of document.querySelectorAll("nav [data-view]")) {
    link.parentElement.hidden = caller === null || !session.may(NEEDS[link.dataset.view]);
  }
}

function signOut() {
  useKey(null);
  start();
}

function showSignIn() {
  const input = h("input", { type: "password", autocomplete: "current-password", spellcheck: "false", placeholder: "ft_…", required: true });
  const form = h("form", { class: "card narrow", onsubmit: (event) => { event.preventDefault(); useKey(input.value.trim()); start(); } },
    h("h1", { tabindex: "-1" }, t("key.title")), h("p", {}, t("key.why")),
    session.refusal && alertBox(session.refusal),
    // A password manager keeps a key only with a name beside it.
    h("input", { type: "text", class: "visually-hidden", autocomplete: "username", value: "finetune", tabindex: "-1", "aria-hidden": "true" }),
    field(t("key.label"), input, { hint: t("key.memory") }),
    h("button", { type: "submit", class: "primary" }, t("key.use")));
  put(main, form);
  input.focus();
}

function place() {
  const [view, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  return { view, rest };
}

async function firstView() {
  const models = session.may("predict") ? (await request("v1/models?limit=1")).data : [];
  return models.length || !session.may("jobs") ? "try" : "train";
}

async function show({ moved = true } = {}) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  if (session.caller === null) return showSignIn();
  let { view, rest } = place();
  if (!VIEWS.includes(view) || !session.may(NEEDS[view])) [view, rest] = [await firstView(), []];
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${t(`nav.${view}`)} · finetune`;
  const root = h("div", { class: `view view-${view}`, "data-place": location.hash });
  try {
    main.setAttribute("aria-busy", "true"); // what is there stays until the next is complete
    const { open } = await import(`./views/${view}.js`);
    await open(root, rest, signal);
    if (signal.aborted) return;
    put(main, root);
  } catch (error) {
    if (signal.aborted) return;
    put(main, h("div", { class: "view" }, h("h1", { tabindex: "-1" }, t(`nav.${view}`)), alertBox(session.words(error)),
      h("button", { type: "button", onclick: () => show() }, t("again"))));
    if (!(error instanceof Refused)) throw error;
  } finally {
    if (!signal.aborted) main.removeAttribute("aria-busy");
  }
  if (moved && !signal.aborted && !root.contains(document.activeElement)) {
    scrollTo(0, 0);
    main.querySelector("h1")?.focus({ preventScroll: true });
  }
}

async function start() {
  try {
    await identify();
  } catch (error) {
    put(main, h("h1", { tabindex: "-1" }, "finetune"), alertBox(session.words(error)),
      h("button", { type: "button", onclick: start }, t("again")));
    return;
  }
  await show({ moved: false });
}

function prepareControls() {
  const theme = document.getElementById("theme");
  theme.value = preferences.theme ?? "system";
  theme.addEventListener("change", () => {
    prefer("theme", theme.value === "system" ? undefined : theme.value);
    applyTheme();
  });
  const language = document.getElementById("language");
  put(language, Object.entries(LANGUAGES).map(([code, name]) => h("option", { value: code, lang: code }, name)));
  language.value = currentLanguage();
  language.addEventListener("change", async () => {
    prefer("language", language.value);
    await useLanguage(language.value);
    showWhoAsks();
    await show({ moved: false });
  });
}

applyTheme();
await useLanguage();
prepareControls();
onUnauthorised(() => {
  if (session.caller === null) return;
  session.caller = null;
  session.refusal = t("key.refused");
  showWhoAsks();
  show();
});
addEventListener("hashchange", () => show());
await start();

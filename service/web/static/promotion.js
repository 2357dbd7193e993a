// Make a version what the server answers with, after its checks; and go back.

import { Refused, request } from "./api.js";
import { alertBox, ask, field, h, put } from "./dom.js";
import { headline } from "./figures.js";
import { asServed, t } from "./i18n.js";
import { session } from "./session.js";

/** Return the button that promotes a version; null where the person's key may not.
 * @param {() => void} promoted called after it was.
 */
export function promoteButton(model, version, promoted) {
  const wholeServer = session.may("admin");
  if (!wholeServer && !session.may("jobs")) return null;
  const button = h("button", { type: "button", class: "primary", onclick: async () => {
    if (await confirmPromotion(model, version, wholeServer)) {
      button.textContent = t("promote.done");
      button.disabled = true;
      promoted();
    }
  } }, t("promote.button"));
  return button;
}

/** Return the least value of the figure that this version is judged by. */
async function atLeast(model, version, value) {
  const found = await request(`v1/models/${encodeURIComponent(model)}/versions/${encodeURIComponent(version)}`);
  return { [`test/${headline(found.metrics)?.[0] ?? "top1"}`]: value };
}

function confirmPromotion(model, version, wholeServer) {
  return ask(t("promote.title", { model, version }), (answer) => {
    const least = h("input", { type: "number", min: "0", max: "100", step: "any", placeholder: "–" });
    const messages = h("div", {});
    const send = async (force) => {
      try {
        const minimum = least.value === "" ? {} : await atLeast(model, version, Number(least.value) / 100);
        if (wholeServer) await request("v1/deployments/default", { method: "PUT", json: { reference: `${model}@${version}`, minimum, force } });
        else await request(`v1/models/${encodeURIComponent(model)}/aliases/champion`, { method: "PUT", json: { version, minimum, force } });
        answer(true);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        const refused = error.code === "promotion_refused";
        put(messages, alertBox(refused ? t("promote.refused") : session.words(error),
          refused && h("ul", {}, error.errors.map((one) => h("li", {}, one.field.startsWith("test/") ? [t("promote.figure"), h("span", asServed(), ` (${one.field}): ${one.detail}`)] : h("span", asServed(), `${one.field}: ${one.detail}`))))),
        refused && h("button", { type: "button", class: "danger", onclick: () => send(true) }, t("promote.anyway")));
      }
    };
    return [
      h("p", {}, wholeServer ? t("promote.what") : t("promote.what_alias", { model })),
      h("p", { class: "hint" }, t("promote.checks")),
      field(t("promote.minimum"), least, { hint: t("promote.minimum_hint") }), messages,
      h("div", { class: "row" }, h("button", { type: "button", class: "primary", onclick: () => send(false) }, t("promote.go")),
        h("button", { type: "button", onclick: () => answer(null) }, t("stop"))),
    ];
  });
}

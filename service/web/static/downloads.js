// Take a model with you: as it runs here, or in the formats of other tools, which the server writes on request.

import { hasKey, request, saveFile } from "./api.js";
import { alertBox, ask, h, put } from "./dom.js";
import { bytes, t } from "./i18n.js";
import { session } from "./session.js";

const WRITTEN_ON_REQUEST = ["web", "timm", "safetensors", "openvino"]; // in the order in which they are offered

/** Return the button that opens the choice of formats of a version. */
export function downloadButton(model, version) {
  return h("button", { type: "button", onclick: () => choose(model, version) }, t("models.download"));
}

async function choose(model, version) {
  const path = `v1/models/${encodeURIComponent(model)}/versions/${encodeURIComponent(version)}`;
  const found = await request(path);
  const name = `${model}-${version}`;
  await ask(t("download.title", { name: `${model} @ ${version}` }), (answer) => {
    const messages = h("div", { role: "status" });
    const offers = WRITTEN_ON_REQUEST.filter((format) => found.exports.includes(format));
    return [
      h("ul", { class: "downloads" },
        offers.includes("web") && offer("web", written("web", `${name}.html`)),
        offer("bundle", plain(`${path}/bundle`, `${name}.tar`), { size: bytes(found.bundle_bytes) }),
        offer("onnx", plain(`${path}/files/model.onnx`, `${name}.onnx`)),
        offers.filter((format) => format !== "web").map((format) => offer(format, written(format, `${name}-${format}.zip`))),
        !offers.includes("web") && session.may("admin") && h("li", { class: "hint" }, t("download.no_web"))),
      messages,
      h("div", { class: "row" }, h("button", { type: "button", onclick: () => answer(null) }, t("close"))),
    ];

    /** Return the link to what lies on the server; with a key it is fetched, because a link cannot carry one. */
    function plain(address, filename) {
      if (!hasKey()) return (label) => h("a", { class: "button", href: address, download: filename, "aria-label": label }, t("models.download"));
      return (label) => h("button", { type: "button", "aria-label": label, onclick: () => save(address, filename, null) }, t("models.download"));
    }

    function written(format, filename) {
      return (label) => h("button", { type: "button", "aria-label": label, onclick: ({ currentTarget }) => save(`${path}/exports/${format}`, filename, currentTarget) }, t("models.download"));
    }

    async function save(address, filename, button) {
      put(messages, h("p", { class: "hint" }, t("download.writing")));
      if (button) button.disabled = true;
      try {
        await saveFile(address, filename);
        put(messages, h("p", { class: "notice good" }, t("download.saved", { name: filename })));
      } catch (error) {
        put(messages, alertBox(session.words(error)));
      }
      if (button) button.disabled = false;
    }
  });
}

function offer(format, action, values = {}) {
  const title = t(`download.${format}`);
  return h("li", {}, h("div", {}, h("strong", {}, title), h("p", { class: "hint" }, t(`download.${format}.what`, values))),
    action(`${t("models.download")}: ${title}`));
}

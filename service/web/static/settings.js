// The fields of a job's settings, made from the server's own description of them (/docs.json), so that what the server learns
// appears here by itself.

import { request } from "./api.js";
import { field, h } from "./dom.js";
import { known, t } from "./i18n.js";

const SECTIONS = ["model", "data", "hyperparameters", "augmentation", "export", "compute"];
const LEFT_OUT = new Set(["augmentation.transforms"]); // needs a list of transforms, which a spec file is for

let document_ = null;

async function schemas(signal) {
  document_ ??= (await request("docs.json", { signal })).components.schemas;
  return document_;
}

function resolved(schema, all) {
  const name = schema.$ref?.split("/").at(-1);
  return name ? all[name] : schema;
}

/** Return the object schema among the possible forms of a section. */
function objectOf(schema, all) {
  const found = resolved(schema, all);
  if (found.properties) return found;
  for (const option of [...(found.anyOf ?? []), ...(found.allOf ?? [])]) {
    const inner = objectOf(option, all);
    if (inner) return inner;
  }
  return null;
}

function choicesOf(schema) {
  const options = schema.anyOf ?? [schema];
  if (options.every((one) => one.enum || one.const !== undefined)) return options.flatMap((one) => one.enum ?? [one.const]);
  return options.length === 1 && schema.type === "boolean" ? [true, false] : null;
}

function leaves(path, schema, all, found) {
  const here = resolved(schema, all);
  const object = path ? objectOf(here, all) : here;
  if (object && !choicesOf(here)) {
    for (const [name, one] of Object.entries(object.properties)) leaves(path ? `${path}.${name}` : name, one, all, found);
  } else if (!LEFT_OUT.has(path)) {
    found.push({ path, schema: here, original: schema });
  }
}

/** Return the settings as groups of fields with `values()` for what was changed, and `showErrors(errors)`.
 *
 * @param {{[path: string]: string}} given values to begin with.
 */
export async function settingsForm(signal, given = {}) {
  const all = await schemas(signal);
  const job = all.JobCreate;
  const controls = new Map();
  const groups = [...SECTIONS, "seed"].filter((name) => job.properties[name]).map((section) => {
    const found = [];
    leaves(section, job.properties[section], all, found);
    return h("fieldset", {}, h("legend", {}, known(`settings.${section}`, section)),
      h("div", { class: "fields" }, found.map(({ path, schema, original }) => {
        const choices = choicesOf(schema);
        const initial = schema.default ?? original.default;
        const standard = initial === undefined || initial === null ? "" : String(initial);
        const control = choices
          ? h("select", {}, h("option", { value: "" }, t("settings.default", { value: standard || "–" })),
            choices.filter((one) => String(one) !== standard).map((one) => h("option", { value: JSON.stringify(one) }, String(one))))
          : h("input", { type: "text", placeholder: standard || "–", autocomplete: "off", spellcheck: "false" });
        if (given[path] !== undefined) control.value = given[path];
        const box = field(path.slice(path.indexOf(".") + 1), control, { hint: schema.description ?? original.description });
        controls.set(path, { control, box });
        return box;
      })));
  });
  const element = h("details", { class: "settings" }, h("summary", {}, t("settings.title")),
    h("p", { class: "hint" }, t("settings.how")), groups);

  return {
    element,
    values() {
      const body = {};
      for (const [path, { control }] of controls) {
        if (control.value.trim() === "") continue;
        const parts = path.split(".");
        let target = body;
        for (const part of parts.slice(0, -1)) target = target[part] ??= {};
        target[parts.at(-1)] = typed(control.value.trim());
      }
      return body;
    },
    /** Show each error at its field; return those that have none here. */
    showErrors(errors) {
      for (const { control, box } of controls.values()) {
        control.removeAttribute("aria-invalid");
        box.querySelector(".field-error")?.remove();
      }
      const left = [];
      for (const { field: path, detail } of errors) {
        const found = controls.get(path) ?? controls.get([...controls.keys()].find((known_) => path.startsWith(`${known_}.`) || path.startsWith(`${known_}[`) || known_ === `${path}.backbone` || known_ === `${path}.policy`));
        if (!found) {
          left.push({ field: path, detail });
          continue;
        }
        const id = `${found.control.id}-error`;
        found.control.setAttribute("aria-invalid", "true");
        found.control.setAttribute("aria-describedby", id);
        found.box.append(h("p", { class: "field-error", id }, detail));
        element.open = true;
      }
      element.querySelector("[aria-invalid]")?.focus();
      return left;
    },
  };
}

function typed(text) {
  try {
    return JSON.parse(text); // numbers, true, null, lists
  } catch {
    return text;
  }
}

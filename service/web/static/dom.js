// Elements from code. Text is always set as text, never as HTML, so nothing that a server or a file name says can run.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "indeterminate", "srcObject", "muted", "selected", "multiple"]);

/** Return an element. Attributes: `onclick: f`, `style: {width: "3px"}`, `hidden: true`; null and false leave one out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (!PROPERTIES.has(name)) element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  // After the children: the value of a select means one of its options.
  for (const [name, value] of Object.entries(attributes)) if (PROPERTIES.has(name) && value !== undefined) element[name] = value;
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) element.append(child);
}

/** Replace what is in an element. */
export function put(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

let counted = 0;

/** Return an id that nothing else on the page has. */
export function newId(prefix = "id") {
  counted += 1;
  return `${prefix}-${counted}`;
}

/** Return a label with its control below it; `hint` explains it. */
export function field(label, control, { hint, error, wide = false } = {}) {
  const id = control.id || newId("field");
  control.id = id;
  const notes = [];
  if (hint) notes.push(h("p", { class: "hint", id: `${id}-hint` }, hint));
  if (error) notes.push(h("p", { class: "field-error", id: `${id}-error` }, error));
  if (error) control.setAttribute("aria-invalid", "true");
  if (notes.length) control.setAttribute("aria-describedby", notes.map((note) => note.id).join(" "));
  return h("div", { class: wide ? "field wide" : "field" }, h("label", { for: id }, label), control, notes);
}

/** Return a box that says what is wrong, read out at once. */
export function alertBox(...children) {
  return h("div", { class: "notice bad", role: "alert" }, ...children);
}

/** Ask a person something in a dialog; resolves to what `answer` was called with, or null where it was dismissed. */
export function ask(title, build) {
  return new Promise((resolve) => {
    let given = null;
    const id = newId("dialog");
    const dialog = h("dialog", { "aria-labelledby": id });
    const answer = (value) => { given = value; dialog.close(); };
    dialog.append(h("h2", { id }, title), ...[build(answer)].flat());
    dialog.addEventListener("close", () => { dialog.remove(); resolve(given); });
    document.body.append(dialog);
    dialog.showModal();
  });
}

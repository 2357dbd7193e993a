// Figures as SVG and tables. Meaning is never in colour alone: marks differ in shape or carry their number.

import { h, newId, svg } from "./dom.js";
import { number, percent, points, t } from "./i18n.js";

const LONG_NOTE = 12; // characters, beside which a phone has no room for a name and a bar

/** Return horizontal bars of `{label, share, note, strong, given, threshold}`, each with its number. A row that is `given` has a
 * mark, one with a `threshold` a line where that is. */
export function bars(rows, { label } = {}) {
  const long = rows.some(({ note }) => note?.length > LONG_NOTE);
  return h("ul", { class: long ? "bars long" : "bars", "aria-label": label }, rows.map((row) =>
    h("li", { class: row.strong ? "strong" : null },
      h("span", { class: "bar-name" }, row.given && h("span", { class: "given", role: "img", "aria-label": t("try.given") }, "✓ "), row.label),
      h("span", { class: "bar-track", "aria-hidden": "true" },
        h("span", { class: "bar-fill", style: { width: `${100 * Math.max(0, Math.min(1, row.share ?? 0))}%` } }),
        row.threshold !== undefined && h("span", { class: "bar-threshold", style: { left: `${100 * row.threshold}%` } })),
      h("span", { class: "bar-value" }, row.note ?? percent(row.share, 1)))));
}

/** Return bars of an answer of the server: the most probable class is strong, or every label that is given. */
export function answerBars({ predictions, labels, thresholds }) {
  return bars(predictions.map(({ label, probability }, at) => ({
    label, share: probability, strong: labels ? labels.includes(label) : at === 0,
    given: labels?.includes(label), threshold: thresholds?.[label],
  })), { label: t("try.classes") });
}

/** Return lines over steps. `series`: `{name, dashed, values: [[x, y]]}`. */
export function lines(title, series, { asShare = false, xName } = {}) {
  const shown = series.filter(({ values }) => new Set(values.map(([x]) => x)).size > 1); // a single point is no curve
  const all = shown.flatMap(({ values }) => values);
  if (!all.length) return null;
  const [width, height, left, bottom, top, right] = [480, 200, 46, 26, 10, 12];
  const xs = all.map(([x]) => x);
  const ys = all.map(([, y]) => y);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs, Math.min(...xs) + 1)];
  const [y0, y1] = asShare ? [0, 1] : [Math.min(0, ...ys), Math.max(...ys) || 1];
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const py = (y) => height - bottom - ((y - y0) / (y1 - y0 || 1)) * (height - bottom - top);
  const ticks = [y0, (y0 + y1) / 2, y1];
  const id = newId("chart");
  const last = shown.map(({ name, values }) => `${name} ${said(values.at(-1)[1], asShare)}`).join(", ");
  return h("figure", { class: "chart" },
    h("figcaption", { id }, title, h("span", { class: "legend" }, shown.map(({ name, values }, at) =>
      h("span", { class: `key line-${at}` }, `${name} ${said(values.at(-1)[1], asShare)}`)))),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${last}` },
      ticks.map((y) => [
        svg("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }),
        svg("text", { class: "tick", x: left - 6, y: py(y) + 4, "text-anchor": "end" }, said(y, asShare)),
      ]),
      svg("text", { class: "tick", x: width - right, y: height - 6, "text-anchor": "end" }, `${xName} ${number(x1)}`),
      svg("text", { class: "tick", x: left, y: height - 6 }, number(x0)),
      shown.map(({ values }, at) => [
        svg("polyline", { class: `line line-${at}`, points: values.map(([x, y]) => `${px(x)},${py(y)}`).join(" ") }),
        svg("circle", { class: `dot line-${at}`, cx: px(values.at(-1)[0]), cy: py(values.at(-1)[1]), r: 3.5 }),
      ])));
}

function said(value, asShare) {
  return asShare ? percent(value) : number(value, Math.abs(value) < 10 ? 2 : 0);
}

/** Return a value with its interval on a scale from `low` to `high` of what is possible. */
export function intervalBar(value, low, high) {
  const [width, height] = [400, 34];
  const px = (share) => 8 + share * (width - 16);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "interval", "aria-hidden": "true" },
    svg("line", { class: "grid", x1: px(0), x2: px(1), y1: 17, y2: 17 }),
    svg("rect", { class: "span", x: px(low), y: 10, width: Math.max(2, px(high) - px(low)), height: 14, rx: 4 }),
    svg("circle", { class: "point", cx: px(value), cy: 17, r: 6 }));
}

/** Return the differences of a comparison, each with its interval; the band is what does not matter. */
export function forest(rows, margin) {
  const known = rows.filter(({ difference }) => difference !== null);
  if (!known.length) return null;
  const reach = Math.max(margin * 2, ...known.flatMap(({ low, high, difference }) => [low, high, difference].map((x) => Math.abs(x ?? 0)))) * 1.1;
  const [width, rowHeight, top] = [560, 84, 8];
  const height = top + rowHeight * known.length + 30;
  const px = (x) => 12 + ((x + reach) / (2 * reach)) * (width - 24);
  const sentences = known.map((row) => t("compare.difference", {
    a: row.a, b: row.b, points: points(row.difference), low: points(row.low ?? row.difference), high: points(row.high ?? row.difference),
  }));
  return h("figure", { class: "chart" },
    h("figcaption", {}, t("compare.forest"), h("p", { class: "hint" }, t("compare.band", { margin: number(100 * margin, 1) }))),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": sentences.join(" ") },
      svg("rect", { class: "band", x: px(-margin), y: top, width: px(margin) - px(-margin), height: height - top - 28 }),
      svg("line", { class: "zero", x1: px(0), x2: px(0), y1: top, y2: height - 28 }),
      known.map((row, at) => {
        const y = top + rowHeight * at + 36;
        return [
          svg("text", { class: "name", x: 12, y: y - 16 }, `${row.a} − ${row.b}`),
          svg("text", { class: "tick", x: width - 12, y: y + 26, "text-anchor": "end" },
            `${points(row.difference)} [${points(row.low ?? row.difference)}, ${points(row.high ?? row.difference)}]`),
          svg("line", { class: "whisker", x1: px(row.low ?? row.difference), x2: px(row.high ?? row.difference), y1: y, y2: y }),
          svg("rect", { class: "point", x: px(row.difference) - 5, y: y - 5, width: 10, height: 10 }),
        ];
      }),
      [-reach, 0, reach].map((x, at) => svg("text", {
        class: "tick", x: px(x), y: height - 8, "text-anchor": ["start", "middle", "end"][at],
      }, points(x)))),
    h("ul", { class: "visually-hidden" }, sentences.map((sentence) => h("li", {}, sentence))));
}

/** Return the confusion matrix as a table whose cells open the pictures behind them. */
export function confusion(matrix, classes, open) {
  const rowTotals = matrix.map((row) => row.reduce((sum, n) => sum + n, 0));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("result.confusion") },
    h("p", { class: "hint" }, t("result.confusion.how")),
    h("table", { class: "confusion" },
      h("thead", {}, h("tr", {}, h("td", {}), classes.map((name) => h("th", { scope: "col" }, h("span", {}, name))))),
      h("tbody", {}, matrix.map((row, label) =>
        h("tr", {}, h("th", { scope: "row" }, classes[label]), row.map((n, answer) => {
          const share = rowTotals[label] ? n / rowTotals[label] : 0;
          const right = label === answer;
          const kind = n === 0 ? "none" : right ? "right" : "wrong";
          const level = Math.ceil(share * 4);
          const sentence = t("result.confusion.cell", { n, label: classes[label], answer: classes[answer] });
          return h("td", { class: `${kind} level-${level}` }, n && open
            ? h("button", { type: "button", "aria-label": sentence, title: sentence, onclick: () => open(classes[label], classes[answer]) }, number(n))
            : h("span", {}, n ? number(n) : h("span", { "aria-label": "0" }, "·")));
        }))))));
}

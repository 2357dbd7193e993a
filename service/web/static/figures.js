// Which figure a model is judged by: the server's tasks say it, and each has its own.

import { percent, t } from "./i18n.js";

/** Names of the figures that a model is judged by first, and what is counted image by image. Both are shares. */
export const HEADLINES = ["top1", "map"];
export const OF_IMAGES = ["top1", "exact_match"];

/** What is told before the headline where classes differ much in size: its interval is recorded only then. */
const OVER_CLASSES = "mean_per_class_accuracy";

/** Return `[name, value]` of the figure to judge by among metrics such as `test/top1`; null where none was measured. */
export function headline(metrics, splits = ["test", "cv"]) {
  for (const split of splits) {
    if (typeof metrics?.[`${split}/${OVER_CLASSES}_low`] === "number") return [OVER_CLASSES, metrics[`${split}/${OVER_CLASSES}`]];
    for (const name of HEADLINES) {
      const value = metrics?.[`${split}/${name}`];
      if (typeof value === "number") return [name, value];
    }
  }
  return null;
}

/** Return the figure to judge by as a sentence: how many pictures were right, or how well labels are told apart. */
export function inWords(metrics, key, values = {}) {
  const found = headline(metrics);
  return found === null ? "" : t(`${key}.${found[0]}`, { share: percent(found[1], 1), ...values });
}

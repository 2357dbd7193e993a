// Who asks and what they may do, and what errors are called for people.

import { Refused } from "./api.js";
import { known, serverWords, t } from "./i18n.js";

const NEEDS_NO_DETAIL = new Set([ // what the server says besides is the same sentence in English
  "unauthorized", "forbidden", "disk_full", "store_unusable", "not_ready", "overloaded", "queue_full", "unavailable",
  "request_timeout", "too_many_requests", "internal_error", "offline",
]);

/** Return a sentence of the server in the person's language, with its own words behind it where they say more. */
function translated(code, detail) {
  const sentence = serverWords(`error.${code}`);
  if (sentence === null) return detail;
  return NEEDS_NO_DETAIL.has(code) || !detail ? sentence : serverWords("says", { sentence, detail });
}

export const session = {
  caller: null, // {owner, scopes, needs_key}
  refusal: null, // why the last key was not accepted

  /** Return whether the person's key allows a scope; what it does not allow is not shown. */
  may(scope) {
    const scopes = this.caller?.scopes ?? [];
    return scopes.includes("admin") || scopes.includes(scope) || (scope === "predict" && scopes.includes("jobs"));
  },

  /** Return an error in the person's words. */
  words(error) {
    if (!(error instanceof Refused)) return t("error.page", { message: error.message });
    const reason = known(`error.${error.code}`, error.detail);
    const details = error.errors.map((one) => one.detail).filter((detail) => detail && !reason.includes(detail));
    return translated(error.code, [reason, ...details.slice(0, 5)].join(" · "));
  },

  /** Return in the person's words why a job failed. */
  failure(error) {
    return error ? translated(error.code, error.message) : "";
  },
};

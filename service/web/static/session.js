// Who asks and what they may do, and what errors are called for people.

import { Refused } from "./api.js";
import { known, t } from "./i18n.js";

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
    return [reason, ...details.slice(0, 5)].join(" · ");
  },
};

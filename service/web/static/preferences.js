// What a person has chosen for this browser: language and theme, nothing else. A key is never written anywhere.

const NAMES = ["language", "theme"];

function stored(name) {
  try {
    return localStorage.getItem(`finetune-${name}`) ?? undefined;
  } catch {
    return undefined; // storage is switched off: then the system's settings hold
  }
}

export const preferences = Object.fromEntries(NAMES.map((name) => [name, stored(name)]));

export function prefer(name, value) {
  preferences[name] = value;
  try {
    if (value === undefined) localStorage.removeItem(`finetune-${name}`);
    else localStorage.setItem(`finetune-${name}`, value);
  } catch {
    // as above: the choice holds until the page is loaded again
  }
}

export function applyTheme() {
  const theme = preferences.theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** What this browser remembers of the page; forgets quietly where storage is forbidden. */

/** @param {string} name @param {any} otherwise */
export function recall(name, otherwise = null) {
  try {
    const text = localStorage.getItem(`tapeline.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** @param {string} name @param {any} value */
export function remember(name, value) {
  try {
    localStorage.setItem(`tapeline.${name}`, JSON.stringify(value));
  } catch {
    // Nothing depends on it.
  }
}

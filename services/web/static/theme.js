/** Dark or light, and the colours of up and down; a canvas asks here for the colours of the style sheet. */

import { remember } from "./store.js";

const PALETTES = ["blue", "green"];

export class Theme extends EventTarget {
  constructor() {
    super();
    this.#system = matchMedia("(prefers-color-scheme: dark)");
    this.#system.addEventListener("change", () => this.#tell());
  }

  #system;
  #cache = new Map();

  /** @returns {"dark" | "light"} */
  get name() {
    return document.documentElement.dataset.theme ?? (this.#system.matches ? "dark" : "light");
  }

  /** @returns {"blue" | "green"} */
  get palette() {
    return document.documentElement.dataset.palette ?? "blue";
  }

  /** A variable of the style sheet as a canvas takes it: `colour("--up")`. */
  colour(variable) {
    let found = this.#cache.get(variable);
    if (found === undefined) {
      found = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
      this.#cache.set(variable, found);
    }
    return found;
  }

  /** @param {"dark" | "light"} name */
  set(name) {
    document.documentElement.dataset.theme = name;
    remember("theme", name);
    this.#tell();
  }

  toggle() {
    this.set(this.name === "dark" ? "light" : "dark");
  }

  /** @param {string} name */
  setPalette(name) {
    if (!PALETTES.includes(name)) return;
    document.documentElement.dataset.palette = name;
    remember("palette", name);
    this.#tell();
  }

  #tell() {
    this.#cache.clear();
    this.dispatchEvent(new Event("change"));
  }
}

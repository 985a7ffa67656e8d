/** The symbol picker: a text box with a list below it (the combobox pattern), recent symbols first. */

import { recall, remember } from "./store.js";

const RECENT = 6;
const LIMIT = 60;
const TYPING_MS = 120;

export class Picker {
  /**
   * @param {HTMLInputElement} input @param {HTMLUListElement} list @param {import("./api.js").Api} api
   * @param {(instrument: Record<string, any>) => void} chosen
   */
  constructor(input, list, api, chosen) {
    Object.assign(this, { input, list, api, chosen });
    this.name = "";
    this.found = [];
    input.addEventListener("focus", () => this.open());
    input.addEventListener("click", () => this.open());
    input.addEventListener("input", () => this.#typed());
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("blur", () => this.close());
    // Before the box loses the focus.
    list.addEventListener("mousedown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => {
      const item = event.target.closest("[role=option]");
      if (item?.dataset.index) this.#choose(this.found[Number(item.dataset.index)]);
    });
  }

  #active = -1;
  #timer = 0;
  #asked = 0;

  /** @param {string} name what the box says while nobody searches */
  show(name) {
    this.name = name;
    if (this.list.hidden) this.input.value = name;
  }

  focus() {
    this.input.focus();
    this.open();
  }

  open() {
    if (!this.list.hidden) return;
    this.input.select();
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.#search("");
  }

  close() {
    clearTimeout(this.#timer);
    this.#asked += 1;
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
    this.input.value = this.name;
  }

  #typed() {
    if (this.list.hidden) {
      this.list.hidden = false;
      this.input.setAttribute("aria-expanded", "true");
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#search(this.input.value.trim()), TYPING_MS);
  }

  async #search(text) {
    const turn = ++this.#asked;
    try {
      const { instruments } = await this.api.get("/instruments", { q: text, limit: LIMIT });
      if (turn !== this.#asked) return;
      const recent = text ? [] : recall("recent", []);
      const first = instruments.filter(({ name }) => recent.includes(name));
      first.sort((a, b) => recent.indexOf(a.name) - recent.indexOf(b.name));
      this.#draw(text, first, instruments.filter((one) => !first.includes(one)));
    } catch (error) {
      if (turn === this.#asked) this.#say(error.message);
    }
  }

  #draw(text, recent, others) {
    this.found = [...recent, ...others];
    this.list.replaceChildren();
    if (this.found.length === 0) {
      this.#say(text ? `No symbol matches “${text}”.` : "No symbols yet: no feed has told of any.");
      return;
    }
    if (recent.length) this.#heading("Recent");
    this.found.forEach((one, i) => {
      if (recent.length && i === recent.length) this.#heading("All");
      this.list.append(option(one, i));
    });
    const exact = this.found.findIndex(({ name }) => name.toLowerCase() === (text || this.name).toLowerCase());
    this.#activate(exact >= 0 ? exact : 0);
  }

  #heading(text) {
    const item = document.createElement("li");
    item.role = "presentation";
    item.className = "heading";
    item.textContent = text;
    this.list.append(item);
  }

  #say(text) {
    this.found = [];
    this.#active = -1;
    this.list.replaceChildren();
    const item = document.createElement("li");
    item.role = "option";
    item.className = "empty";
    item.setAttribute("aria-disabled", "true");
    item.textContent = text;
    this.list.append(item);
  }

  #activate(index) {
    this.#active = index;
    for (const item of this.list.querySelectorAll("[role=option]")) {
      const active = Number(item.dataset.index) === index;
      item.setAttribute("aria-selected", String(active));
      if (!active) continue;
      this.input.setAttribute("aria-activedescendant", item.id);
      item.scrollIntoView({ block: "nearest" });
    }
  }

  #key(event) {
    const { key } = event;
    if (key === "ArrowDown" || key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) return this.open();
      const count = this.found.length;
      if (count) this.#activate((this.#active + (key === "ArrowDown" ? 1 : -1) + count) % count);
    } else if (key === "Enter") {
      event.preventDefault();
      this.#enter();
    } else if (key === "Escape") {
      event.preventDefault();
      this.close();
      this.input.blur();
    }
    return undefined;
  }

  async #enter() {
    // Somebody who types fast presses Enter before the list is there.
    const text = this.input.value.trim();
    const active = this.found[this.#active];
    if (this.list.hidden) return;
    clearTimeout(this.#timer);
    if (!text || text === this.name || (active && matches(active, text))) {
      if (active) this.#choose(active);
      return;
    }
    await this.#search(text);
    if (this.found[0]) this.#choose(this.found[Math.max(0, this.#active)]);
  }

  #choose(instrument) {
    this.name = instrument.name;
    const recent = [instrument.name, ...recall("recent", []).filter((name) => name !== instrument.name)];
    remember("recent", recent.slice(0, RECENT));
    this.close();
    this.input.blur();
    this.chosen(instrument);
  }
}

const plain = (text) => text.toLowerCase().replace(/[^a-z0-9]/g, "");
const matches = ({ name, symbol }, text) => plain(`${name} ${symbol}`).includes(plain(text));

function option(one, index) {
  const item = document.createElement("li");
  item.role = "option";
  item.id = `symbol-${index}`;
  item.dataset.index = String(index);
  item.dataset.name = one.name;
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = one.name;
  const about = document.createElement("span");
  about.className = "about";
  const until = one.expiration ? ` ${one.expiration.slice(0, 10)}` : "";
  about.textContent = [`${one.kind ?? ""}${until}`, one.exchange].filter(Boolean).join(" · ");
  item.append(name, about);
  return item;
}

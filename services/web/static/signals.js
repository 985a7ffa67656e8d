/**
 * The signals, newest first, live: what each says, why, and who has seen it; above them the open alerts.
 *
 * A list that is stepped through with j and k (or the arrows), opened with Enter, acknowledged with a. Rows stay the
 * same elements while others come, so that nothing jumps under a reader's focus.
 */

import { alertsOf } from "./alerts.js";
import { choice, el, put, soon, strikeText } from "./elements.js";
import { iso, seconds } from "./format.js";
import { contract, endOf, itemOf, title, words } from "./signal-item.js";
import { capital } from "./signal-why.js";
import { recall, remember } from "./store.js";

const HISTORY = 500;
const MOST = 3000; // held
const OLDER = 1000;
const MARKED = 1000; // emitted ones of the chart's underlying, which may go back further than the list
const PAGE = 25; // shown, and more on demand
const ACKS_MS = 20_000;
const GRADES = ["EXTREME", "VERY_HIGH", "HIGH", "MODERATE", "LOW"];
const STRONG = ["EXTREME", "VERY_HIGH"];
const STATUSES = {
  emitted: ["emitted"],
  watched: ["emitted", "monitor"],
  monitor: ["monitor"],
  rejected: ["rejected"],
  withdrawn: ["withdrawn"],
};
const STATUS_CHOICES = [
  ["watched", "Emitted + monitor"],
  ["emitted", "Emitted"],
  ["monitor", "Monitor"],
  ["rejected", "Rejected"],
  ["withdrawn", "Withdrawn"],
  ["", "Any status"],
];
const KEY = ["underlying", "expiration", "strike", "option_type", "time_window", "source"];

const keyOf = (signal) => KEY.map((name) => signal[name]).join("|");

/** @param {HTMLElement} element @param {any} app */
export function mount(element, app) {
  return new Signals(element, app);
}

class Signals {
  constructor(element, app) {
    this.app = app;
    /** @type {Map<string, any>} */
    this.held = new Map();
    /** @type {Map<string, any>} for the marks on the chart alone */
    this.marked = new Map();
    this.acks = new Map();
    this.items = new Map();
    this.open = new Set();
    this.filter = recall("signals.filter", { status: "watched", grade: "", scope: "" });
    this.most = PAGE;
    this.exhausted = "";
    this.ready = false;
    this.message = "";
    this.render = soon(() => this.#render());
    this.#build(element);
    this.#subscribe();
    app.state.addEventListener("symbol", () => (this.#readMarked(), this.render()));
    app.state.addEventListener("connection", this.render);
    app.state.addEventListener("mark", (event) => event.detail.layer === "signals" && this.show(event.detail.id));
    setInterval(
      () => document.visibilityState === "visible" && app.state.connection === "live" && this.#readAcks(),
      ACKS_MS,
    );
    this.#readAcks();
  }

  #build(element) {
    element.classList.add("signals");
    const set = (name) => (value) => {
      this.filter = { ...this.filter, [name]: value };
      remember("signals.filter", this.filter);
      this.most = PAGE;
      this.render();
    };
    const grades = [
      ["", "Any grade"],
      ...GRADES.slice(0, -1).map((grade) => [grade, grade === "EXTREME" ? "Extreme" : `${capital(words(grade))} +`]),
    ];
    const status = choice("Status", "signals-status", STATUS_CHOICES, this.filter.status, set("status"));
    const grade = choice("Grade", "signals-grade", grades, this.filter.grade, set("grade"));
    const scope = choice(
      "Of",
      "signals-scope",
      [
        ["", "All symbols"],
        ["chosen", "This symbol"],
      ],
      this.filter.scope,
      set("scope"),
    );
    this.by = el("input", {
      type: "text",
      "data-testid": "signals-by",
      maxlength: "60",
      size: "10",
      autocomplete: "nickname",
      spellcheck: "false",
      placeholder: "your name",
      on: { change: () => remember("signals.by", this.by.value.trim()) },
    });
    this.by.value = recall("signals.by", "") || "";
    this.count = el("span", { class: "count", "data-testid": "signals-count" });
    this.notice = el("p", { class: "notice", role: "status", hidden: true, "data-testid": "signals-notice" });
    this.list = el("ol", {
      class: "signal-list",
      "data-testid": "signals-list",
      "aria-label": "Signals, newest first",
      on: { keydown: (event) => this.#key(event) },
    });
    this.empty = el("p", { class: "empty", "data-testid": "signals-empty", hidden: true });
    this.more = el("button", {
      type: "button",
      class: "small more",
      hidden: true,
      "data-testid": "signals-more",
      text: "Show more",
      on: { click: () => this.#more() },
    });
    this.alerts = alertsOf(this.app, () => this.#name());
    element.append(
      el(
        "div",
        { class: "controls" },
        el("h2", {}, "Signals ", this.count),
        el("label", { class: "field group" }, el("span", { text: "Acknowledge as" }), this.by),
      ),
      el("div", { class: "controls" }, status.label, grade.label, scope.label),
      this.alerts.element,
      this.notice,
      el("div", { class: "signal-scroll" }, this.list, this.empty, this.more),
      el(
        "p",
        { class: "hint keyhelp" },
        el("kbd", { text: "j" }),
        " ",
        el("kbd", { text: "k" }),
        " move, ",
        el("kbd", { text: "Enter" }),
        " why, ",
        el("kbd", { text: "c" }),
        " chart, ",
        el("kbd", { text: "a" }),
        " acknowledge",
      ),
    );
  }

  #subscribe() {
    this.app.live.subscribe(
      { channel: "signals", symbol: "", history: HISTORY },
      {
        snapshot: (rows) => {
          this.held.clear();
          this.ready = true;
          this.message = "";
          this.#put(rows);
          this.#readMarked();
        },
        rows: (rows) => this.#tell(this.#put(rows)),
        notice: ({ code, message }) => {
          this.message = code === "waiting" ? message : "";
          this.render();
        },
        error: ({ message }) => {
          this.message = message;
          this.render();
        },
      },
    );
  }

  /** Takes rows; returns the emitted ones that were not known before. */
  #put(rows) {
    const fresh = [];
    for (const row of rows) {
      const key = keyOf(row);
      const before = this.held.get(key);
      if (before && before.revision > row.revision) continue;
      if (!before && row.status === "emitted") fresh.push(row);
      this.held.set(key, row);
    }
    if (this.held.size > MOST) {
      const kept = [...this.held].sort(([, a], [, b]) => newestFirst(a, b)).slice(0, MOST - PAGE);
      this.held = new Map(kept);
    }
    this.#mark();
    this.render();
    return fresh;
  }

  #tell(fresh) {
    if (fresh.length === 1)
      this.app.announce(`New signal: ${title(fresh[0])}, ${fresh[0].direction}, ${words(fresh[0].grade)}`);
    else if (fresh.length) this.app.announce(`${fresh.length} new signals`);
    if (fresh.length) this.alerts.refresh();
  }

  async #readMarked() {
    const underlying = this.app.state.symbol?.underlying;
    this.marked.clear();
    this.#mark();
    if (!underlying) return;
    try {
      const page = await this.app.api.get("/signals", { underlying, status: "emitted", limit: MARKED });
      if (underlying !== this.app.state.symbol?.underlying) return;
      for (const row of page.rows) this.marked.set(keyOf(row), row);
      this.#mark();
    } catch {
      // Those of the list are marked all the same.
    }
  }

  /** Those of the symbol on the chart, as marks: of a window and direction one, with the strongest's name. */
  #mark() {
    const underlying = this.app.state.symbol?.underlying;
    const groups = new Map();
    for (const row of new Map([...this.marked, ...this.held]).values()) {
      if (row.underlying !== underlying || row.status !== "emitted" || row.grade === "LOW") continue;
      const name = `${row.time_window}|${row.direction}`;
      const group = groups.get(name);
      if (group) group.push(row);
      else groups.set(name, [row]);
    }
    const marks = [...groups.values()].map((rows) => {
      const best = rows.reduce((a, b) => (b.score > a.score ? b : a));
      const strong = STRONG.includes(best.grade);
      const others = rows.length > 1 ? ` +${rows.length - 1}` : "";
      const what = best.option_type ? `${strikeText(best.strike)} ${best.option_type}` : best.source;
      const side = best.direction === "BUY" ? "buy" : "sell";
      return { id: keyOf(best), time: endOf(best), side, text: strong ? what + others : "", strong };
    });
    this.app.chart.mark("signals", marks);
  }

  /** Opens a signal and brings it into view, whatever the filters say. */
  show(key) {
    const row = this.held.get(key) ?? this.marked.get(key);
    if (!row) return;
    this.held.set(key, row);
    this.open.add(key);
    if (!this.#wanted(row)) this.filter = { ...this.filter, status: "", grade: "", scope: "" };
    this.most = Math.max(this.most, this.#found().indexOf(row) + 1);
    this.#render();
    this.items.get(key)?.toggle.focus();
  }

  #wanted(row) {
    const { status, grade, scope } = this.filter;
    return (
      (!status || STATUSES[status].includes(row.status)) &&
      (!grade || GRADES.indexOf(row.grade) <= GRADES.indexOf(grade)) &&
      (scope !== "chosen" || row.underlying === this.app.state.symbol?.underlying)
    );
  }

  #found() {
    return [...this.held.values()].filter((row) => this.#wanted(row)).sort(newestFirst);
  }

  #render() {
    const found = this.#found();
    const shown = found.slice(0, this.most);
    const keys = new Set();
    const nodes = shown.map((row) => {
      const key = keyOf(row);
      keys.add(key);
      return this.#item(key, row).li;
    });
    for (const key of this.items.keys()) if (!keys.has(key)) this.items.delete(key);
    const wanted = new Set(nodes);
    for (const node of [...this.list.children]) if (!wanted.has(node)) node.remove();
    nodes.forEach((node, i) => {
      if (this.list.children[i] !== node) this.list.insertBefore(node, this.list.children[i] ?? null);
    });
    if (!this.list.querySelector('button.toggle[tabindex="0"]')) {
      const first = this.list.querySelector("button.toggle");
      if (first) first.tabIndex = 0;
    }
    const rest = found.length - shown.length;
    this.more.hidden = !rest && (!this.ready || this.held.size === 0 || this.exhausted === this.#asked());
    put(this.more, "text", rest ? `Show more (${rest})` : "Look for older ones");
    put(
      this.count,
      "text",
      found.length === this.held.size ? `${found.length}` : `${found.length} of ${this.held.size}`,
    );
    this.empty.hidden = found.length > 0;
    put(this.empty, "text", this.#nothing());
    const words =
      this.ready && this.app.state.connection !== "live"
        ? "Not connected: newer signals may be missing."
        : this.ready
          ? this.message
          : "";
    this.notice.hidden = !words;
    put(this.notice, "text", words);
    for (const select of ["status", "grade", "scope"]) {
      const node = this.list.closest(".signals")?.querySelector(`[data-testid="signals-${select}"]`);
      if (node && node.value !== this.filter[select]) node.value = this.filter[select];
    }
  }

  /** Which older ones history would be asked for: those of one status, if the filter names one. */
  #asked() {
    const status = STATUSES[this.filter.status] ?? [];
    return status.length === 1 ? status[0] : "all";
  }

  async #more() {
    const found = this.#found();
    const before = this.most;
    this.most += PAGE;
    if (found.length <= before) await this.#older();
    this.render();
  }

  async #older() {
    const asked = this.#asked();
    const oldest = [...this.held.values()].map((row) => row.time_window).sort()[0];
    try {
      // The oldest window again: it may have been cut.
      const until = iso(seconds(oldest) + 1);
      const page = await this.app.api.get("/signals", {
        until: asked === "all" ? until : null,
        status: asked === "all" ? null : asked,
        limit: OLDER,
      });
      const before = this.held.size;
      this.#put(page.rows);
      if (!page.next || this.held.size === before) this.exhausted = asked;
      this.message = "";
    } catch (error) {
      this.message = error.message;
    }
  }

  #nothing() {
    if (!this.ready) return this.message || "Loading …";
    if (this.held.size) return "No signal passes these filters.";
    return "No signals yet. They come from option pressure, once a window stands out against earlier ones.";
  }

  /** The element of a signal, made anew only when something about it changed. */
  #item(key, row) {
    const ack = this.acks.get(key);
    const [open, before] = [this.open.has(key), this.items.get(key)];
    const today = row.time_window.slice(0, 10) === iso(this.app.state.now()).slice(0, 10);
    const state = [row.revision, row.status, ack?.by, open, today].join("|");
    if (before?.state === state) return before;
    const act = {
      toggle: () => this.#toggle(key, row),
      focus: (toggle) => {
        for (const other of this.list.querySelectorAll('button.toggle[tabindex="0"]')) other.tabIndex = -1;
        toggle.tabIndex = 0;
      },
      acknowledge: () => this.#acknowledge(key, row),
      chart: () => this.#chart(row),
    };
    const item = { state, ...itemOf({ key, row, ack, today, open }, act, before) };
    this.items.set(key, item);
    return item;
  }

  #toggle(key, row) {
    if (this.open.delete(key)) return this.#render();
    this.open.add(key);
    this.#render();
    return this.#chart(row);
  }

  #chart(row) {
    return Promise.resolve(this.app.chart.goTo(endOf(row))).catch((error) => {
      this.message = error.message;
      this.render();
    });
  }

  #name() {
    const name = this.by.value.trim();
    if (!name) {
      this.by.focus();
      this.message = "Say who acknowledges: type your name, then acknowledge again.";
      this.render();
    }
    return name;
  }

  async #acknowledge(key, row) {
    const by = this.#name();
    if (!by) return;
    try {
      const body = Object.fromEntries(KEY.map((name) => [name, row[name]]));
      await this.app.api.post("/signals/ack", { ...body, by });
      this.acks.set(key, { by, at: new Date(this.app.state.now() * 1000).toISOString() });
      this.message = "";
      this.app.announce(`Acknowledged: ${title(row)}`);
      this.alerts.refresh();
    } catch (error) {
      this.message = error.message;
    }
    this.render();
  }

  async #readAcks() {
    try {
      const { acks } = await this.app.api.get("/signals/acks");
      this.acks = new Map(acks.map((ack) => [keyOf(ack), ack]));
      this.render();
    } catch {
      // They are asked for again; the signals do not depend on it.
    }
  }

  #key(event) {
    const li = event.target.closest("li.signal");
    if (!li || event.ctrlKey || event.metaKey || event.altKey) return;
    const row = this.held.get(li.dataset.key);
    const to = {
      j: li.nextElementSibling,
      ArrowDown: li.nextElementSibling,
      k: li.previousElementSibling,
      ArrowUp: li.previousElementSibling,
    }[event.key];
    if (to) to.querySelector("button.toggle").focus();
    else if (event.key === "a" && row && !this.acks.has(li.dataset.key)) this.#acknowledge(li.dataset.key, row);
    else if (event.key === "c" && row) this.#chart(row);
    else if (!["j", "k", "ArrowDown", "ArrowUp"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
  }
}

const newestFirst = (a, b) =>
  a.time_window !== b.time_window
    ? a.time_window < b.time_window
      ? 1
      : -1
    : b.score - a.score || (keyOf(a) < keyOf(b) ? -1 : 1);

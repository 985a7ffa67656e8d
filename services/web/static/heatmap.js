/**
 * Option pressure of an underlying: strikes x windows, live.
 *
 * The newest windows come with the subscriptions, older ones from history when somebody goes back to them. Everything
 * that is shown is made anew from what is held (`Book`): windows end once a minute or less, so that is cheap.
 */

import { dayOf, el, expiryOf, fill, fixed, minuteOf, put, soon, strikeText } from "./elements.js";
import { iso, number, seconds, signed } from "./format.js";
import { partsOf } from "./heatmap-parts.js";
import { Book, at, cellWords, gridOf, nearest } from "./pressure-grid.js";
import { factsOf, optionsOf, placeBeside, rollupOf, sideOf } from "./pressure-details.js";
import { coloursOf, columnsThatFit, draw, hit, layoutOf } from "./pressure-draw.js";
import { tableOf } from "./pressure-table.js";
import { recall, remember } from "./store.js";

const HISTORY = 4000; // rows to begin with
const WINDOWS = 400; // rollups
const OLDER = 4000; // rows a page of history
const MOST = 40_000; // rows held while nobody looks at old windows
const STRIKES = 28; // rows drawn, unless all are asked for
const TABLE_COLUMNS = 24;
/** @param {HTMLElement} element @param {any} app */
export function mount(element, app) {
  return new Heatmap(element, app);
}

class Heatmap {
  constructor(element, app) {
    this.app = app;
    this.book = new Book();
    this.subs = [];
    this.underlying = "";
    this.type = recall("heatmap.type", "net");
    this.expiration = "";
    this.measure = recall("heatmap.measure", "volume");
    this.everyStrike = false;
    this.asTable = recall("heatmap.table", false);
    /** Time of the last window shown; "": the newest. */
    this.until = "";
    /** The chosen cell, by its names, so that it stays when the map moves. */
    this.cursor = null;
    this.pinned = false;
    this.exhausted = false;
    this.loading = false;
    this.waiting = "";
    this.refused = "";
    this.ready = false;
    this.render = soon(() => this.#render());
    this.#build(element);
    for (const event of ["symbol", "theme", "connection"]) app.state.addEventListener(event, () => this.#follow(event));
    new ResizeObserver(() => this.render()).observe(this.stage);
    document.addEventListener("scroll", () => this.cursor && this.render(), { capture: true, passive: true });
    this.#choose(app.state.symbol?.underlying || "");
    this.#list();
  }

  // What is on the page.

  #build(element) {
    element.classList.add("heatmap");
    const set = (change, kept) => (value) => {
      Object.assign(this, change(value));
      if (kept) remember(`heatmap.${kept}`, value);
      this.render();
    };
    const touch = (event) => event.pointerType === "touch";
    const parts = partsOf(this, {
      choose: (value) => this.#choose(value),
      expire: set((expiration) => ({ expiration })),
      measure: set((measure) => ({ measure }), "measure"),
      type: set((type) => ({ type }), "type"),
      strikes: set(() => ({ everyStrike: !this.everyStrike })),
      view: () => set((asTable) => ({ asTable }), "table")(!this.asTable),
      older: () => this.#go(-1),
      newer: () => this.#go(1),
      newest: set(() => ({ until: "" })),
      canvas: {
        pointermove: (event) => !touch(event) && !this.pinned && this.#point(event),
        pointerleave: (event) => !touch(event) && !this.pinned && this.#leave(),
        click: (event) => this.#click(event),
        keydown: (event) => this.#key(event),
        focus: () => this.canvas.matches(":focus-visible") && this.#cursorAtLeast(),
        blur: () => this.#leave(),
      },
    });
    element.append(...parts.children);
    Object.assign(this, parts);
  }

  // What is asked of the server.

  async #list() {
    let own = "";
    try {
      const { instruments } = await this.app.api.get("/instruments", { limit: 1000 });
      own = instruments.find((found) => found.name === this.app.state.symbol?.name)?.underlying;
      this.known = [...new Set(instruments.map((found) => found.underlying).filter(Boolean))].sort();
    } catch {
      this.known = [];
      setTimeout(() => this.#list(), 5000);
    }
    if (!this.underlying && this.known.length) {
      const last = recall("heatmap.underlying", "");
      this.#choose(own || (this.known.includes(last) ? last : this.known[0]));
    }
    this.render();
  }

  #follow(event) {
    const underlying = this.app.state.symbol?.underlying;
    if (event === "symbol" && underlying && underlying !== this.underlying) this.#choose(underlying);
    else this.render();
  }

  #choose(underlying) {
    for (const sub of this.subs) sub.close();
    this.subs = [];
    this.book.clear();
    Object.assign(this, {
      underlying,
      until: "",
      expiration: "",
      cursor: null,
      pinned: false,
      exhausted: false,
      ready: false,
      waiting: "",
      refused: "",
    });
    this.render();
    if (!underlying) return;
    remember("heatmap.underlying", underlying);
    const common = {
      notice: ({ code, message }) => {
        this.waiting = code === "waiting" ? message : "";
        this.render();
      },
      error: ({ message }) => {
        this.refused = message;
        this.render();
      },
    };
    this.subs.push(
      this.app.live.subscribe(
        { channel: "pressure", symbol: underlying, history: HISTORY },
        {
          ...common,
          snapshot: (rows) => this.#begin(rows),
          rows: (rows) => {
            this.book.put(rows);
            this.#held();
          },
        },
      ),
      this.app.live.subscribe(
        { channel: "rollups", symbol: underlying, history: WINDOWS },
        {
          ...common,
          snapshot: (rows) => {
            this.book.rollups.clear();
            this.book.putRollups(rows);
            this.render();
          },
          rows: (rows) => {
            this.book.putRollups(rows);
            this.render();
          },
        },
      ),
    );
  }

  #begin(rows) {
    const rollups = this.book.rollups;
    this.book.clear();
    this.book.rollups = rollups;
    this.book.put(rows);
    // The limit may have cut through the oldest window; it is shown once history has brought the rest.
    if (rows.length >= HISTORY && this.book.windows.size > 1) this.book.cut = this.book.oldest;
    Object.assign(this, { ready: true, exhausted: false });
    this.#held();
  }

  #held() {
    if (!this.until) this.book.trim(MOST);
    this.render();
  }

  /** Older windows, from history; false where there are none. */
  async #load() {
    const oldest = this.book.oldest;
    if (this.exhausted || this.loading || !oldest) return false;
    this.loading = true;
    this.render();
    const underlying = this.underlying;
    try {
      // The oldest window is asked for again: a page may have been cut in it.
      const until = iso(seconds(oldest) + 1);
      const page = await this.app.api.get("/pressure", { underlying, until, limit: OLDER });
      if (underlying !== this.underlying) return false;
      this.book.put(page.rows);
      this.book.cut = page.next ? this.book.oldest : "";
      this.exhausted = !page.next;
      const rollups = await this.app.api.get("/rollups", { underlying, since: this.book.oldest, until, limit: 10_000 });
      if (underlying === this.underlying) this.book.putRollups(rollups.rows);
      return true;
    } catch (error) {
      this.refused = error.message;
      return false;
    } finally {
      this.loading = false;
      this.render();
    }
  }

  // Moving about.

  async #go(pages) {
    if (this.loading) return;
    const [from, to] = this.shown ?? [0, 0];
    const step = Math.max(1, Math.round((to - from) * 0.75));
    if (pages < 0 && from - step < 0 && !this.exhausted) await this.#load();
    const { columns } = gridOf(this.book, this);
    const last = columns.findIndex((column) => column.time === this.visible?.columns.at(-1)?.time);
    const fits = this.#fits();
    const next = Math.max(Math.min(fits, columns.length) - 1, last + pages * step);
    this.until = next >= columns.length - 1 ? "" : columns[next].time;
    this.render();
  }

  #fits() {
    return this.asTable ? TABLE_COLUMNS : columnsThatFit(this.stage.clientWidth);
  }

  #point(event) {
    if (!this.visible) return false;
    const box = this.canvas.getBoundingClientRect();
    const { columns, strikes, layout } = this.visible;
    const place = hit(layout, event.clientX - box.left, event.clientY - box.top, columns.length, strikes.length);
    this.cursor = place && { time: columns[place.column].time, strike: strikes[place.row] ?? null };
    this.render();
    return Boolean(place);
  }

  /** Holds a cell's details until the next click. */
  #click(event) {
    const before = this.pinned && this.cursor;
    const found = this.#point(event);
    this.pinned = found && !(before && before.time === this.cursor.time && before.strike === this.cursor.strike);
    if (!this.pinned) this.#leave();
  }

  #leave() {
    Object.assign(this, { cursor: null, pinned: false, focused: false });
    this.render();
  }

  #cursorAtLeast() {
    if (!this.visible?.columns.length) return;
    const { columns, strikes, cells } = this.visible;
    if (!this.cursor) {
      const { time } = columns.at(-1);
      const strike = strikes.find((found) => cells.has(at(time, found))) ?? strikes[0];
      this.cursor = { time, strike };
    }
    this.pinned = this.focused = true;
    this.#tell();
    this.render();
  }

  #key(event) {
    if (event.key === "Escape") return this.#leave();
    if (event.ctrlKey || event.metaKey || event.altKey || !this.visible?.columns.length) return undefined;
    const { columns, strikes } = this.visible;
    const move = {
      ArrowLeft: [-1, 0],
      ArrowRight: [1, 0],
      ArrowUp: [0, -1],
      ArrowDown: [0, 1],
      Home: [-columns.length, 0],
      End: [columns.length, 0],
    }[event.key];
    if (event.key === "PageUp" || event.key === "PageDown") {
      event.preventDefault();
      return this.#go(event.key === "PageUp" ? -1 : 1);
    }
    if (!move) return undefined;
    event.preventDefault();
    this.#cursorAtLeast();
    const column = columns.findIndex(({ time }) => time === this.cursor.time);
    const row = strikes.indexOf(this.cursor.strike);
    if (event.key === "ArrowLeft" && column === 0) return this.#go(-1);
    if (event.key === "ArrowRight" && column === columns.length - 1 && this.until) return this.#go(1);
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    this.cursor = {
      time: columns[clamp(column + move[0], columns.length - 1)].time,
      strike: strikes[clamp(row + move[1], strikes.length - 1)] ?? null,
    };
    this.pinned = this.focused = true;
    this.#tell();
    return this.render();
  }

  #tell() {
    const { time, strike } = this.cursor;
    const cell = this.visible.cells.get(at(time, strike));
    const words = cell ? cellWords(cell, this.type) : "nothing traded";
    this.app.announce(`Strike ${strike === null ? "none" : strikeText(strike)}, ${minuteOf(time)}: ${words}`);
  }

  // Drawing.

  #render() {
    const grid = gridOf(this.book, this);
    const { columns } = grid;
    let to = this.until ? columns.findIndex((column) => column.time === this.until) + 1 : columns.length;
    if (to === 0) to = columns.length;
    const from = Math.max(0, to - this.#fits());
    this.shown = [from, to];
    const seen = columns.slice(from, to);
    const price = seen.findLast((column) => column.price !== null)?.price ?? null;
    const used = new Set(
      seen.flatMap((column) => grid.strikes.filter((strike) => grid.cells.has(at(column.time, strike)))),
    );
    const traded = grid.strikes.filter((strike) => used.has(strike));
    const strikes = this.everyStrike ? traded : nearest(traded, price, STRIKES);
    this.visible = {
      columns: seen,
      strikes,
      cells: grid.cells,
      layout: layoutOf(this.stage.clientWidth, seen.length, strikes.length),
    };
    const nothing = columns.length === 0;
    this.#controls(traded.length, to, columns.length);
    this.#words(seen);
    this.empty.hidden = !nothing;
    this.canvas.hidden = nothing || this.asTable;
    this.grid.hidden = nothing || !this.asTable;
    this.legend.hidden = nothing;
    if (nothing) {
      put(this.empty, "text", this.#nothing());
      return this.#details();
    }
    if (this.asTable) this.#table();
    else this.#draw();
    return this.#details();
  }

  #nothing() {
    if (!this.underlying) return "Choose an underlying: the symbol on the chart has no options here.";
    if (!this.ready) return this.refused || this.waiting || "Loading …";
    return `No option of ${this.underlying} has traded yet. The map begins with the first window that ends after a trade.`;
  }

  #controls(traded, to, columns) {
    const underlyings = [...new Set([...(this.known ?? []), this.underlying].filter(Boolean))].sort();
    fill(
      this.pick.select,
      this.underlying ? underlyings.map((u) => [u, u]) : [["", "–"], ...underlyings.map((u) => [u, u])],
      this.underlying,
    );
    this.pick.label.hidden = underlyings.length < 2 && Boolean(this.underlying);
    const expirations = this.book.expirations();
    fill(
      this.expirations,
      [
        ["", expirations.length === 1 ? "1 expiry" : `${expirations.length} expiries`],
        ...expirations.map((e) => [e, expiryOf(e)]),
      ],
      this.expiration,
    );
    this.expiration = this.expirations.value;
    this.every.hidden = traded <= STRIKES;
    put(this.every, "aria-pressed", String(this.everyStrike));
    put(this.every, "text", this.everyStrike ? `All ${traded} strikes` : `${STRIKES} of ${traded} strikes`);
    put(this.view, "aria-pressed", String(this.asTable));
    this.older.disabled = this.loading || (this.shown[0] === 0 && (this.exhausted || columns === 0));
    put(this.older, "aria-busy", String(this.loading));
    put(this.newest, "text", to >= columns ? "Live" : "To live");
    this.newer.disabled = to >= columns;
    put(this.newest, "aria-pressed", String(to >= columns));
    const [low, high] = this.type === "net" ? ["bearish", "bullish"] : ["sold", "bought"];
    put(this.legendEnds[0], "text", `− ${low} 10 : 1`);
    put(this.legendEnds[1], "text", `10 : 1 ${high} +`);
    const stale = this.app.state.connection !== "live" && this.ready ? "Not connected: what is shown may be old." : "";
    const words = stale || this.refused || (this.ready && this.waiting) || "";
    this.notice.hidden = !words;
    put(this.notice, "text", words);
  }

  #words(seen) {
    const column = seen.findLast((found) => found.rollup);
    this.summary.hidden = !column;
    if (!column) return;
    const r = column.rollup;
    const item = (name, value, side = "") =>
      el("span", {}, el("small", { text: name }), el("b", { class: side, text: value }));
    this.summary.replaceChildren(
      item(
        "Window",
        `${dayOf(column.time)} ${minuteOf(column.time)}–${minuteOf(column.end)}${column.complete ? "" : " (incomplete)"}`,
      ),
      item("Put/call", fixed(r.put_call_ratio, 2)),
      item(
        "Net",
        `${signed(Math.round(r.net_premium))} ${r.net_premium > 0 ? "bullish" : r.net_premium < 0 ? "bearish" : ""}`,
        sideOf(r.net_premium),
      ),
      item("Underlying", r.underlying_price === null ? "–" : number(r.underlying_price)),
    );
  }

  #draw() {
    const { columns, strikes, cells, layout } = this.visible;
    const column = this.cursor ? columns.findIndex(({ time }) => time === this.cursor.time) : -1;
    const cursor = column < 0 ? null : { column, row: strikes.indexOf(this.cursor.strike) };
    draw(this.canvas, {
      columns,
      strikes,
      cells,
      measure: this.measure,
      cursor,
      focused: this.focused,
      layout,
      colours: coloursOf(this.app.theme),
    });
    const drawn = columns.reduce(
      (n, { time }) => n + strikes.filter((strike) => cells.has(at(time, strike))).length,
      0,
    );
    Object.assign(this.canvas.dataset, {
      columns: columns.length,
      strikes: strikes.length,
      cells: drawn,
      newest: columns.at(-1)?.time ?? "",
      incomplete: columns.filter((found) => !found.complete).length,
      underlying: this.underlying,
    });
    put(
      this.canvas,
      "aria-label",
      `Option pressure of ${this.underlying}, ${strikes.length} strikes, ${columns.length} windows until ` +
        `${columns.length ? minuteOf(columns.at(-1).end) : "now"}. Arrow keys move, page keys go to older and newer windows; ` +
        "the button Table shows the same as a table.",
    );
  }

  #table() {
    const held = document.activeElement?.closest?.('[data-testid="heatmap-table"] td')?.dataset;
    const { columns, strikes, cells } = this.visible;
    const made = [
      this.type,
      this.expiration,
      this.measure,
      columns.length,
      ...strikes,
      ...columns.map(({ time, rollup }) => time + (rollup?.revision ?? "")),
      ...[...cells.values()].map((cell) => cell.revision + cell.rows.length),
    ].join();
    if (made === this.made && this.grid.firstChild) return;
    this.made = made;
    const scroll = this.grid.firstChild ? this.grid.scrollLeft : Number.MAX_SAFE_INTEGER;
    this.grid.replaceChildren(
      tableOf({
        columns,
        strikes,
        cells,
        type: this.type,
        caption: `Log ratio of ${this.type === "net" ? "bullish to bearish" : "bought to sold"} volume of ${this.underlying}, by strike and start of the window (UTC)`,
        chosen: (column, row) => {
          this.cursor = { time: columns[column].time, strike: strikes[row] };
          this.pinned = true;
          this.#details();
        },
        left: () => this.#leave(),
      }),
    );
    this.grid.scrollLeft = scroll;
    if (held) this.grid.querySelector(`td[data-time="${held.time}"][data-strike="${held.strike}"]`)?.focus();
  }

  #details() {
    const { columns, cells } = this.visible;
    const cell = this.cursor && cells.get(at(this.cursor.time, this.cursor.strike));
    const column = this.cursor && columns.find(({ time }) => time === this.cursor.time);
    put(this.details, "data-time", this.cursor?.time ?? null);
    put(this.details, "data-strike", this.cursor?.strike ?? null);
    if (!column) {
      if (this.details.matches(":popover-open")) this.details.hidePopover();
      return;
    }
    const when = `${dayOf(column.time)} ${minuteOf(column.time)}–${minuteOf(column.end)}`;
    const title = this.cursor.strike === null ? when : `${strikeText(this.cursor.strike)} · ${when}`;
    const nothing =
      this.cursor.strike === null ? [] : [el("p", { class: "hint", text: "Nothing traded here. The whole window:" })];
    const inside = cell
      ? [factsOf(cell, this.type), optionsOf(cell)]
      : [...nothing, column.rollup ? rollupOf(column.rollup) : ""];
    this.details.replaceChildren(el("h3", { text: title }), ...inside);
    if (!this.details.matches(":popover-open")) this.details.showPopover();
    this.#place(columns.indexOf(column));
  }

  /** The details beside their cell, within the window. */
  #place(column) {
    const { strikes, layout } = this.visible;
    const cell = this.grid.querySelector(`td[data-time="${this.cursor.time}"][data-strike="${this.cursor.strike}"]`);
    let box = this.asTable ? cell?.getBoundingClientRect() : null;
    if (!box) {
      const canvas = this.canvas.getBoundingClientRect();
      const row = strikes.indexOf(this.cursor.strike);
      const top = canvas.top + (row < 0 ? layout.lanes.ratio : layout.top + row * layout.line);
      const left = canvas.left + layout.left + column * layout.cell;
      box = { left, right: left + layout.cell, top, bottom: top + layout.line };
    }
    placeBeside(this.details, box, this.stage.getBoundingClientRect().left);
  }
}

/**
 * What the chart shows of one symbol and timeframe: history of the store, then the live rows behind it, and older
 * history when it is asked for. Tells of it by events:
 * "reset" (everything is new), "change" (detail: `[{bar, what}]`, see Bars.put), "older" (history came in front),
 * "big" (big trades), "trouble" (detail: one line, or "" when it is over), "loaded" (a first answer is there).
 */

import { ApiError } from "./api.js";
import { Bars } from "./bars.js";
import { Forming } from "./forming.js";
import { iso, seconds } from "./format.js";
import { columnsOf, isTicker, startOf, stepOf, windowOf } from "./timeframes.js";

const PAGE = 600;
const OLDER = 1500;
/** Rows that come again when the place on the bus is lost: they carry all columns, so they are fewer. */
const HISTORY = 300;
const MOST_BIG = 3000;
const RETRY_MS = 3000;
/** So far back the live seconds of a candle that forms are asked for. */
const FORMING_SECONDS = 900;
const PAGES_TO_GO = 6;

export class Market extends EventTarget {
  /** @param {import("./api.js").Api} api @param {import("./live.js").Live} live */
  constructor(api, live) {
    super();
    this.api = api;
    this.live = live;
    this.extra = [];
    /** The most rows that the server gives at once. */
    this.mostRows = 10_000;
    this.bars = new Bars("1m");
    /** @type {Map<number, {at: number, count: number, volume: number, side: string}>} */
    this.big = new Map();
    this.heardAt = 0;
    this.newest = NaN;
    this.detached = false;
    this.notice = "";
    this.#open = { abort: new AbortController(), subs: [] };
  }

  #open;
  #next = null;
  #loading = null;

  get step() {
    return stepOf(this.timeframe);
  }

  /** Its name for the API: of fixed candles with the exchange, because several may have the symbol. */
  get series() {
    const plain = isTicker(this.timeframe) || !this.exchange || this.symbol.includes(":");
    return plain ? this.symbol : `${this.exchange}:${this.symbol}`;
  }

  close() {
    this.#open.abort.abort();
    for (const sub of this.#open.subs) sub.close();
  }

  /**
   * Shows a symbol and timeframe. `until`: as it was before that instant, without live rows.
   * @param {string} symbol @param {string} timeframe @param {string[]} timeframes
   * @param {{until?: number, rolling?: boolean, exchange?: string}} options `rolling`: whether there are live seconds
   */
  async show(symbol, timeframe, timeframes, { until, rolling = true, exchange } = {}) {
    this.close();
    const open = (this.#open = { abort: new AbortController(), subs: [] });
    Object.assign(this, { symbol, timeframe, timeframes, rolling, exchange, detached: until !== undefined, notice: "" });
    this.bars = new Bars(timeframe);
    this.big.clear();
    [this.heardAt, this.newest, this.#next, this.#loading] = [0, NaN, null, null];
    const page = await this.#patiently(open, () => this.#page({ limit: PAGE, until }));
    if (page === null) return;
    this.#take(page.rows);
    this.#next = page.next;
    this.#tell("reset");
    this.#tell("loaded");
    if (!this.detached) this.#follow(open, page.id);
    if (rolling) this.#loadBig(open).catch(quiet);
  }

  /** Begin with live rows once it is known that there are seconds. */
  setRolling(rolling) {
    if (rolling === this.rolling) return;
    this.rolling = rolling;
    if (rolling && !this.detached && this.bars.list.length) this.#followSeconds(this.#open).catch(quiet);
  }

  /** More history, in front. @returns {Promise<boolean>} whether any came */
  older() {
    if (this.#loading) return this.#loading;
    const open = this.#open;
    const first = this.bars.first;
    if (!first || this.#next === "") return Promise.resolve(false);
    const from = this.#next === null ? { until: first.at } : { cursor: this.#next };
    this.#loading = this.#page({ limit: OLDER, ...from })
      .then((page) => {
        if (open !== this.#open) return false;
        this.#next = page.next ?? "";
        this.#take(page.rows);
        if (page.rows.length) this.#tell("older");
        if (this.rolling && page.rows.length) this.#loadBig(open, first.at).catch(quiet);
        return page.rows.length > 0;
      })
      .catch((error) => {
        if (error.name !== "AbortError") this.#tell("trouble", error.message);
        return false;
      })
      .finally(() => {
        if (open === this.#open) this.#loading = null;
      });
    return this.#loading;
  }

  /** Loads what is needed for an instant to be among the bars. */
  async reach(at) {
    const far = (this.bars.first?.at ?? NaN) - at > PAGES_TO_GO * OLDER * this.step;
    for (let i = 0; !far && i < PAGES_TO_GO && at < this.bars.first?.at; i++) if (!(await this.older())) break;
    if (this.detached ? at > this.bars.last?.at : false) return this.now();
    if (!(at < this.bars.first?.at)) return undefined;
    const { symbol, timeframe, timeframes, rolling, exchange } = this;
    return this.show(symbol, timeframe, timeframes, { until: at + 0.4 * PAGE * this.step, rolling, exchange });
  }

  /** Back to the live end. */
  async now() {
    const { symbol, timeframe, timeframes, rolling, exchange } = this;
    if (this.detached) await this.show(symbol, timeframe, timeframes, { rolling, exchange });
  }

  /** More columns for the bars that are there. @param {string[]} columns */
  async fill(columns) {
    this.extra = [...new Set([...this.extra, ...columns])];
    const { bars } = this;
    const open = this.#open;
    if (!bars.first) return;
    const missing = columns.filter((name) => bars.lastClosed?.[name] === undefined || bars.first[name] === undefined);
    if (missing.length === 0) return;
    const range = { since: iso(bars.first.at), until: this.detached ? iso(bars.last.at + 1) : undefined };
    let cursor;
    do {
      const page = await this.api.get("/candles", {
        symbol: this.series, timeframe: this.timeframe, limit: Math.min(5000, this.mostRows), cursor, ...range,
        columns: [bars.time, "revision", ...missing].join(","),
      }, open.abort.signal);
      for (const row of page.rows) {
        const bar = bars.byTime.get(seconds(row[bars.time]));
        if (bar && !bar.forming && row.revision >= bar.revision) for (const name of missing) bar[name] = row[name];
      }
      cursor = page.next;
    } while (cursor && open === this.#open);
    if (open === this.#open) this.#tell("older");
  }

  #page({ limit, until, cursor }) {
    const { series: symbol, timeframe } = this;
    const columns = [...columnsOf(timeframe), ...this.extra];
    const params = {
      symbol, timeframe, limit: Math.min(limit, this.mostRows), cursor, until: until === undefined ? "" : iso(until),
      columns: [...new Set(columns)].join(","),
    };
    return this.api.get("/candles", params, this.#open.abort.signal);
  }

  /** Until it works, or something else is to be shown: a store that is away comes back. */
  async #patiently(open, load) {
    for (;;) {
      try {
        const found = await load();
        if (open !== this.#open) return null;
        this.#tell("trouble", "");
        return found;
      } catch (error) {
        if (open !== this.#open || error.name === "AbortError") return null;
        const passing = error instanceof ApiError && [0, 429, 502, 503, 504].includes(error.status);
        this.#tell("trouble", passing ? `${error.message.replace(/[.\s]+$/, "")}. Trying again.` : error.message);
        if (!passing) return null;
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
        if (open !== this.#open) return null;
      }
    }
  }

  /** @returns {{bar: import("./bars.js").Bar, what: string}[]} */
  #take(rows, forming = false) {
    const changes = [];
    for (const row of rows) {
      const bar = this.bars.bar(row, forming);
      const what = this.bars.put(bar);
      if (what) changes.push({ bar: this.bars.byTime.get(bar.at), what });
      const end = startOf(this.timeframe, bar.at) + windowOf(this.timeframe);
      if (!forming && !(end <= this.newest)) this.newest = end;
    }
    return changes;
  }

  #follow(open, id) {
    const { series: symbol, timeframe } = this;
    const seconds = timeframe === "seconds";
    const sub = this.live.subscribe({ channel: "candles", symbol, timeframe, history: HISTORY, after: id ?? "" }, {
      snapshot: (rows) => {
        this.bars.clear();
        this.#next = null;
        this.newest = NaN;
        this.#take(rows);
        this.#tell("reset");
        this.#tell("loaded");
        if (rows.length) this.older();
        if (!isTicker(timeframe)) this.#followSeconds(open).catch(quiet);
      },
      rows: (rows) => {
        this.heardAt = Date.now();
        const changes = this.#take(rows);
        const gone = this.#dropFormed();
        if (seconds) this.#takeBig(rows);
        if (gone) this.#tell("older");
        if (changes.length) this.#tell("change", changes);
      },
      notice: (notice) => this.#note(notice),
      error: (error) => this.#tell("trouble", error.message),
    });
    open.subs.push(sub);
    if (!seconds) this.#followSeconds(open).catch(quiet);
  }

  /** Live seconds: the candle that forms, and big trades. */
  async #followSeconds(open) {
    if (!this.rolling || this.timeframe === "seconds") return;
    const { symbol, timeframe } = this;
    open.seconds?.close();
    const ask = { channel: "candles", symbol, timeframe: "seconds" };
    if (timeframe === "rolling") {
      open.seconds = this.live.subscribe(ask, { rows: (rows) => this.#takeBig(rows) });
      open.subs.push(open.seconds);
      return;
    }
    const forming = new Forming(timeframe, this.timeframes);
    const last = { symbol, timeframe: "seconds", limit: 1, columns: "time" };
    const newest = await this.api.get("/candles", last, open.abort.signal);
    if (open !== this.#open || newest.rows.length === 0) return;
    const at = seconds(newest.rows[0].time);
    if (!(at + 1 <= this.newest)) this.newest = at + 1;
    await forming.load(this.api, this.series, at, open.abort.signal);
    if (open !== this.#open) return;
    let snapshots = 0;
    const take = (rows, live) => {
      if (live) this.heardAt = Date.now();
      for (const row of rows) {
        if (!(seconds(row.time) + 1 <= this.newest)) this.newest = seconds(row.time) + 1;
        forming.takes(row);
      }
      this.#takeBig(rows);
      const row = forming.row();
      // A candle that is there already needs no provisional one; the first of all may well be one.
      if (row === null || !(forming.start > (this.bars.lastClosed?.at ?? -Infinity))) return;
      const changes = this.#take([row], true);
      if (changes.length) this.#tell("change", changes);
    };
    open.seconds?.close();
    open.seconds = this.live.subscribe(
      { ...ask, since: () => iso(Math.max(forming.covered, this.newest - FORMING_SECONDS)) },
      {
        // A second snapshot means that seconds may be missing in between: begin again.
        snapshot: (rows) => (snapshots++ ? this.#followSeconds(open).catch(quiet) : take(rows, false)),
        rows: (rows) => take(rows, true),
      },
    );
    open.subs.push(open.seconds);
  }

  /** A later row says that a provisional one will never be replaced: nothing was traded in it. */
  #dropFormed() {
    const closed = this.bars.lastClosed?.at;
    const gone = this.bars.list.filter((bar) => bar.forming && bar.at < closed);
    for (const bar of gone) this.bars.drop(bar.at);
    return gone.length > 0;
  }

  async #loadBig(open, until) {
    const first = this.bars.first;
    if (!first) return;
    const page = await this.api.get("/big-trades", {
      symbol: this.symbol, since: iso(startOf(this.timeframe, first.at)), limit: Math.min(MOST_BIG, this.mostRows),
      until: until !== undefined ? iso(until) : this.detached ? iso(this.bars.last.at + this.step) : "",
      columns: "time,big_trades,big_volume,ask_volume,bid_volume",
    }, open.abort.signal);
    if (open === this.#open) this.#takeBig(page.rows);
  }

  #takeBig(rows) {
    let any = false;
    for (const row of rows) {
      const at = seconds(row.time);
      if (!row.big_trades && !this.big.has(at)) continue;
      any = true;
      const vd = (row.ask_volume ?? 0) - (row.bid_volume ?? 0);
      const side = vd > 0 ? "buy" : vd < 0 ? "sell" : "";
      if (row.big_trades) this.big.set(at, { at, count: row.big_trades, volume: row.big_volume ?? 0, side });
      else this.big.delete(at);
    }
    if (any) this.#tell("big");
  }

  #note({ code, message }) {
    this.notice = code === "waiting" ? message : "";
    this.#tell("notice");
  }

  #tell(name, detail = undefined) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** An abandoned load is no trouble; any other goes to the console. */
function quiet(error) {
  if (error.name !== "AbortError") console.warn(error.message);
}

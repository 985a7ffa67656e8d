/**
 * The candle that has not closed yet, put together from those of shorter timeframes that have, and from live seconds.
 * It is provisional: what counts is the row that comes when it closes.
 */

import { iso, known, seconds } from "./format.js";
import { floorTo, isTicker, stepOf } from "./timeframes.js";

/** Seconds that a late trade may still change are kept apart; older ones are added up. */
const OPEN_SECONDS = 180;

const SUMS = ["volume", "trades", "ask_volume", "bid_volume", "unknown_volume", "vd"];

export class Forming {
  /** @param {string} timeframe @param {string[]} timeframes all there are */
  constructor(timeframe, timeframes) {
    this.step = stepOf(timeframe);
    this.ladder = timeframes
      .filter((name) => !isTicker(name) && stepOf(name) < this.step && this.step % stepOf(name) === 0)
      .sort((a, b) => stepOf(b) - stepOf(a));
    this.reset(NaN);
  }

  /** Begin with the candle that starts at `start`. */
  reset(start) {
    this.start = start;
    /** Up to where closed parts tell; seconds before are not needed. */
    this.covered = start;
    /** @type {object | null} */
    this.base = null;
    /** @type {Map<number, object>} */
    this.seconds = new Map();
  }

  /**
   * The closed parts, of each timeframe those since the last longer one.
   * @param {import("./api.js").Api} api @param {string} symbol @param {number} now market time
   * @param {AbortSignal} signal
   */
  async load(api, symbol, now, signal) {
    const start = floorTo(this.step, now);
    this.reset(start);
    const parents = [this.step, ...this.ladder.map(stepOf)];
    const columns = "timestamp_in,open,high,low,close,volume,trades,ask_volume,bid_volume,unknown_volume,vd,"
      + "cvd_close,quoted_spread,complete";
    // One step of the parent more: it may have ended without having been written yet.
    const pages = await Promise.all(this.ladder.map((timeframe, i) => {
      const since = iso(Math.max(start, floorTo(parents[i], now) - (i ? parents[i] : 0)));
      return api.get("/candles", { symbol, timeframe, since, columns, limit: 400, order: "oldest" }, signal);
    }));
    pages.forEach((page, i) => {
      for (const row of page.rows) {
        const at = seconds(row.timestamp_in);
        if (at < this.covered) continue;
        this.base = merged(this.base, { ...row, spread: row.quoted_spread });
        this.covered = at + stepOf(this.ladder[i]);
      }
    });
  }

  /** Whether a second belongs to it, or begins the next one. */
  takes(row) {
    const at = seconds(row.time);
    // A quiet second only carries the last price: it opens no candle.
    if (!known(row.close) || !row.trades) return false;
    const start = floorTo(this.step, at);
    if (!(start <= this.start)) this.reset(start);
    if (start !== this.start || at < this.covered) return false;
    const old = this.seconds.get(at);
    if (old && old.revision > row.revision) return false;
    this.seconds.set(at, { ...row, spread: row.avg_spread });
    if (this.seconds.size > 2 * OPEN_SECONDS) this.#fold();
    return true;
  }

  #fold() {
    const times = [...this.seconds.keys()].sort((a, b) => a - b).slice(0, -OPEN_SECONDS);
    for (const at of times) {
      this.base = merged(this.base, this.seconds.get(at));
      this.seconds.delete(at);
      this.covered = at + 1;
    }
  }

  /** The provisional row of `candles`, or null while nothing has been traded. */
  row() {
    let whole = this.base;
    for (const at of [...this.seconds.keys()].sort((a, b) => a - b)) whole = merged(whole, this.seconds.get(at));
    if (whole === null) return null;
    return { ...whole, timestamp_in: iso(this.start), quoted_spread: whole.spread, revision: 0, vwap: null };
  }
}

/** Of spreads at trades. */
function mean(a, b) {
  if (!known(a.spread) || !known(b.spread)) return a.spread ?? b.spread;
  const trades = (a.trades ?? 0) + (b.trades ?? 0);
  return trades ? (a.spread * (a.trades ?? 0) + b.spread * (b.trades ?? 0)) / trades : a.spread;
}

function merged(whole, part) {
  if (whole === null) return { ...part };
  const out = { ...whole };
  for (const name of SUMS) out[name] = (whole[name] ?? 0) + (part[name] ?? 0);
  // Of a second without trades only what it carries is known.
  if (known(part.high)) out.high = Math.max(whole.high, part.high);
  if (known(part.low)) out.low = Math.min(whole.low, part.low);
  for (const name of ["close", "cvd_close"]) out[name] = part[name] ?? whole[name];
  out.spread = mean(whole, part);
  out.complete = whole.complete && part.complete;
  return out;
}

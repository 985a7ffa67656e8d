/** The candles that the page holds of one symbol and timeframe: by time, of each the highest revision. */

import { seconds } from "./format.js";
import { spreadColumn, timeColumn } from "./timeframes.js";

/**
 * A row of the API with `at` (unix seconds of its time), `spread`, and `forming` (made here of seconds: provisional).
 * @typedef {Record<string, any> & {at: number, spread: number|null, forming: boolean}} Bar
 */

export class Bars {
  /** @param {string} timeframe */
  constructor(timeframe) {
    this.timeframe = timeframe;
    this.time = timeColumn(timeframe);
    this.spread = spreadColumn(timeframe);
    /** @type {Bar[]} ascending */
    this.list = [];
    /** @type {Map<number, Bar>} */
    this.byTime = new Map();
  }

  get first() {
    return this.list[0];
  }

  get last() {
    return this.list[this.list.length - 1];
  }

  /** The newest that is no provisional one. */
  get lastClosed() {
    for (let i = this.list.length - 1; i >= 0; i--) if (!this.list[i].forming) return this.list[i];
    return undefined;
  }

  clear() {
    this.list = [];
    this.byTime.clear();
  }

  /** @param {object} row @returns {Bar} */
  bar(row, forming = false) {
    return { ...row, at: seconds(row[this.time]), spread: row[this.spread] ?? null, forming };
  }

  /**
   * Takes a bar unless what is there is newer. A row of the store takes the place of a provisional one.
   * @param {Bar} bar @returns {"new" | "inserted" | "changed" | "corrected" | ""} what became of it
   */
  put(bar) {
    if (!Number.isFinite(bar.at)) return "";
    const old = this.byTime.get(bar.at);
    if (old === undefined) {
      const newest = this.list.length === 0 || bar.at > this.last.at;
      if (newest) this.list.push(bar);
      else this.list.splice(this.indexAt(bar.at) + 1, 0, bar);
      this.byTime.set(bar.at, bar);
      return newest ? "new" : "inserted";
    }
    if (bar.forming ? !old.forming : !old.forming && bar.revision < old.revision) return "";
    const corrected = !bar.forming && !old.forming && bar.revision > old.revision;
    // A message has all columns, a page only those that were asked for: keep what the other knows.
    Object.assign(old, bar);
    return corrected ? "corrected" : "changed";
  }

  /** @param {number} at */
  drop(at) {
    if (!this.byTime.delete(at)) return false;
    this.list.splice(this.indexAt(at), 1);
    return true;
  }

  /** Index of the last bar at or before an instant; -1: none. */
  indexAt(at) {
    let [low, high] = [0, this.list.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.list[middle].at <= at) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }
}

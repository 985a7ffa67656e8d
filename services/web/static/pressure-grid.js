/**
 * Option pressure as a grid of strikes and windows: pure, from rows of `pressure_metrics` and `pressure_rollups`.
 *
 * One cell may have several options (expirations; in "net" calls and puts): their volumes are added up, and the log
 * ratio is that of the sums, by the formula of the rows: ln((up + 1/2) / (down + 1/2)). `up` is what was bought, `down`
 * what was sold; in "net" `up` is what bets on a rise (calls bought, puts sold), and `down` on a fall.
 */

import { iso, seconds } from "./format.js";

/** Ten to one; colours reach no further. */
export const LIMIT = Math.log(10);
const BRIDGE = 6; // windows without any trade that are still drawn; a longer silence is a break in the axis

const keyOf = (row) => `${row.time_window}|${row.expiration}|${row.strike}|${row.option_type}`;

/** What is held of one underlying: of each key the highest revision. */
export class Book {
  constructor() {
    this.clear();
  }

  clear() {
    /** @type {Map<string, Map<string, any>>} window -> key -> row */
    this.windows = new Map();
    /** @type {Map<string, any>} window -> rollup */
    this.rollups = new Map();
    /** Windows of which rows may be missing: the oldest of a page that was cut by its limit. */
    this.cut = "";
    this.size = 0;
  }

  /** @param {any[]} rows of pressure_metrics */
  put(rows) {
    for (const row of rows) {
      let held = this.windows.get(row.time_window);
      if (!held) this.windows.set(row.time_window, (held = new Map()));
      const key = keyOf(row);
      const before = held.get(key);
      if (before && before.revision > row.revision) continue;
      if (!before) this.size++;
      held.set(key, row);
    }
  }

  /** @param {any[]} rows of pressure_rollups */
  putRollups(rows) {
    for (const row of rows) {
      const before = this.rollups.get(row.time_window);
      if (!before || before.revision <= row.revision) this.rollups.set(row.time_window, row);
    }
  }

  get oldest() {
    return [...this.windows.keys()].reduce((a, b) => (a && a < b ? a : b), "");
  }

  /** Leaves the newest windows, once more than `most` rows are held. */
  trim(most) {
    if (this.size <= most) return;
    for (const time of [...this.windows.keys()].sort()) {
      if (this.size <= most) break;
      this.size -= this.windows.get(time).size;
      this.windows.delete(time);
      this.rollups.delete(time);
      this.cut = "";
    }
  }

  /** Expirations that have rows, the nearest first. */
  expirations() {
    const found = new Set();
    for (const rows of this.windows.values()) for (const row of rows.values()) found.add(row.expiration);
    return [...found].sort();
  }
}

/**
 * @typedef {{time: string, strike: number, up: number, down: number, unknown: number, log: number,
 *   ratio: number|null, volume: number, premium: number, trades: number, confidence: number, sweeps: number,
 *   blocks: number, complete: boolean, revision: number, rows: any[]}} Cell
 * @typedef {{time: string, end: string, rollup: any|null, price: number|null, complete: boolean, silent: boolean,
 *   newDay: boolean, afterBreak: boolean}} Column
 * @typedef {{columns: Column[], strikes: number[], cells: Map<string, Cell>}} Grid
 */

/** The name of a cell in a grid. */
export const at = (time, strike) => `${time}|${strike}`;

/**
 * The grid of a book. `show`: `type` ("call", "put" or "net"), `expiration` (ISO, "": all).
 * @returns {Grid}
 */
export function gridOf(book, show) {
  const cells = new Map();
  const prices = new Map();
  const broken = new Set();
  const strikes = new Set();
  let length = 0;
  for (const [time, rows] of book.windows) {
    if (time === book.cut) continue;
    let nearest = "";
    for (const row of rows.values()) {
      length = row.window_seconds;
      if (!row.complete) broken.add(time);
      if (row.underlying_price !== null && (!nearest || row.expiration < nearest)) {
        nearest = row.expiration;
        prices.set(time, row.underlying_price);
      }
      if (show.expiration && row.expiration !== show.expiration) continue;
      if (show.type !== "net" && row.option_type !== (show.type === "call" ? "C" : "P")) continue;
      strikes.add(row.strike);
      const name = at(time, row.strike);
      const cell = cells.get(name);
      if (cell) cell.rows.push(row);
      else cells.set(name, { time, strike: row.strike, rows: [row] });
    }
  }
  for (const cell of cells.values()) sum(cell, show.type === "net");
  const times = [...book.windows.keys()].filter((time) => time !== book.cut).sort();
  return {
    columns: columnsOf(times, length, book, prices, broken),
    strikes: [...strikes].sort((a, b) => b - a),
    cells,
  };
}

/** Adds up the rows of a cell. */
function sum(cell, net) {
  const order = (row) => `${row.expiration}${row.option_type}`;
  cell.rows.sort((a, b) => (order(a) < order(b) ? -1 : 1));
  Object.assign(cell, {
    up: 0,
    down: 0,
    unknown: 0,
    premium: 0,
    trades: 0,
    sweeps: 0,
    blocks: 0,
    complete: true,
    revision: 0,
  });
  for (const row of cell.rows) {
    const fall = net && row.option_type === "P";
    cell.up += fall ? row.bid_volume : row.ask_volume;
    cell.down += fall ? row.ask_volume : row.bid_volume;
    cell.unknown += row.unknown_volume;
    cell.premium += row.premium;
    cell.trades += row.total_trades;
    cell.sweeps += row.sweeps;
    cell.blocks += row.blocks;
    cell.complete = cell.complete && row.complete;
    cell.revision = Math.max(cell.revision, row.revision);
  }
  const sided = cell.up + cell.down;
  cell.volume = sided + cell.unknown;
  cell.log = Math.log((cell.up + 0.5) / (cell.down + 0.5));
  cell.ratio = cell.down > 0 ? cell.up / cell.down : null;
  cell.confidence = sided > 0 ? (Math.min(cell.trades / 20, 1) * Math.abs(cell.up - cell.down)) / sided : 0;
}

/** Windows in order, with those between them in which nothing traded; a long silence is only marked. */
function columnsOf(times, length, book, prices, broken) {
  const columns = [];
  let last = null;
  let price = null;
  const add = (time, silent, afterBreak) => {
    const rollup = book.rollups.get(time) ?? null;
    price = afterBreak ? null : price;
    price = rollup?.underlying_price ?? prices.get(time) ?? price;
    const before = columns.at(-1)?.time;
    columns.push({
      time,
      end: iso(seconds(time) + length),
      rollup,
      price,
      silent,
      afterBreak,
      complete: !broken.has(time) && (rollup?.complete ?? true),
      newDay: before === undefined || before.slice(0, 10) !== time.slice(0, 10),
    });
  };
  for (const time of times) {
    const now = seconds(time);
    const missing = last === null || !length ? 0 : Math.round((now - last) / length) - 1;
    if (missing > 0 && missing <= BRIDGE) {
      for (let i = 1; i <= missing; i++) add(iso(last + i * length), true, false);
    }
    add(time, false, missing > BRIDGE);
    last = now;
  }
  return columns;
}

/** At most `most` strikes of a descending list: those nearest to a price. */
export function nearest(strikes, price, most) {
  if (strikes.length <= most) return strikes;
  let from = 0;
  if (price === null) from = Math.floor((strikes.length - most) / 2);
  else {
    const above = strikes.filter((strike) => strike > price).length;
    from = Math.min(Math.max(0, above - Math.floor(most / 2)), strikes.length - most);
  }
  return strikes.slice(from, from + most);
}

/** Where a price lies among descending strikes, in rows from the top (0: the middle of the first); null if outside. */
export function rowOfPrice(strikes, price) {
  if (price === null || strikes.length === 0 || price > strikes[0] || price < strikes[strikes.length - 1]) return null;
  let i = strikes.findIndex((strike) => strike <= price);
  if (strikes[i] === price) return i;
  i -= 1;
  return i + (strikes[i] - price) / (strikes[i] - strikes[i + 1]);
}

/** A cell in words, for people who listen. */
export function cellWords(cell, type) {
  const [up, down] = type === "net" ? ["bullish", "bearish"] : ["bought", "sold"];
  const lean = cell.log > 0.05 ? `more ${up}` : cell.log < -0.05 ? `more ${down}` : "even";
  return (
    `${lean}, log ratio ${cell.log.toFixed(2)}, ${up} ${cell.up}, ${down} ${cell.down}` +
    (cell.unknown ? `, unknown ${cell.unknown}` : "") +
    (cell.complete ? "" : ", incomplete")
  );
}

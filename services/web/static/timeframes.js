/** Timeframes as the API names them, and where each has its times and what the chart draws of it. */

const UNITS = { s: 1, m: 60, h: 3600, d: 86_400, w: 604_800 };
const SHARED = [
  "open", "high", "low", "close", "volume", "trades", "ask_volume", "bid_volume", "unknown_volume", "vd", "cvd_close",
  "vwap", "complete", "revision",
];

/** @param {string} name @returns {number} seconds between two rows; NaN for what is no timeframe */
export function stepOf(name) {
  if (name === "rolling" || name === "seconds") return 1;
  const match = /^([1-9]\d*)([smhdw])$/.exec(name);
  return match ? Number(match[1]) * UNITS[match[2]] : NaN;
}

/** Rolling and seconds rows are of tickers, all others of every symbol. */
export const isTicker = (name) => name === "rolling" || name === "seconds";

/** How long the window of a row is; where it begins, seen from the row's time. */
export const windowOf = (name) => (name === "rolling" ? 60 : stepOf(name));
export const startOf = (name, time) => (name === "rolling" ? time - 60 : time);

/** The column of a row's time. */
export const timeColumn = (name) => (isTicker(name) ? "time" : "timestamp_in");

/** The column of its spread. */
export const spreadColumn = (name) => (isTicker(name) ? "avg_spread" : "quoted_spread");

/** What the chart needs of every row. */
export function columnsOf(name) {
  if (isTicker(name)) return ["time", "symbol", ...SHARED, "avg_spread", "big_trades", "big_volume"];
  return ["timestamp_in", ...SHARED, "quoted_spread", "liquidated_long_volume", "liquidated_short_volume"];
}

/** What a button says. */
export const labelOf = (name) => ({ rolling: "1m rolling", seconds: "1s" })[name] ?? name;

/** What a screen reader, or a sentence, says. */
export function spokenOf(name) {
  if (name === "rolling") return "rolling one-minute candles, one each second";
  const unit = { s: "second", m: "minute", h: "hour", d: "day", w: "week" };
  const match = /^(\d+)([smhdw])$/.exec(labelOf(name));
  return match ? `${match[1]}-${unit[match[2]]} candles` : name;
}

/** The start of the fixed candle that holds an instant; weeks begin on Monday. */
export function floorTo(step, at) {
  const offset = step === UNITS.w ? 4 * UNITS.d : 0;
  return Math.floor((at - offset) / step) * step + offset;
}

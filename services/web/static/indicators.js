/** What can be drawn beside candles, volume, CVD and spread: which columns there are, and where each belongs. */

import { isTicker } from "./timeframes.js";

const ON_PRICE = /^(sma|ema|wma)_\d+$|^vwap$|^(mark|index)_price$|^bollinger_(upper|lower|middle)$/;
/** Beside the features: columns of the candles themselves. */
const OF_FIXED = ["vwap", "mark_price", "index_price", "open_interest", "funding_rate", "book_imbalance_5"];
const OF_ROLLING = [
  "vwap", "vd_ratio", "book_imbalance", "price_pct", "divergence", "max_trade_size", "session_cvd_close",
  "sum_bid_depth", "sum_ask_depth",
];
/** Features that are drawn together: column -> its pane. */
const TOGETHER = {
  macd: "MACD", macd_signal: "MACD", macd_hist: "MACD", momentum_3: "Momentum", momentum_5: "Momentum",
  volatility_5: "Volatility", volatility_10: "Volatility", volume_sma_5: "Volume average",
  volume_ema_5: "Volume average", sum_bid_depth: "Depth at trades", sum_ask_depth: "Depth at trades",
};
const GROUPS = [
  ["On the price", (name) => ON_PRICE.test(name)],
  ["Technical", (name) => /^(rsi|macd|bollinger|momentum|velocity|acceleration)/.test(name)],
  ["Volume", (name) => /volume|vwap|session_cvd/.test(name)],
  ["Volatility", (name) => /volatility|high_low|log_return|price_pct/.test(name)],
  ["Order flow and book", () => true],
];
const WORDS = { sma: "SMA", ema: "EMA", wma: "WMA", rsi: "RSI", macd: "MACD", vwap: "VWAP", vpin: "VPIN", vd: "VD" };
const CAPITALS = { cvd: "CVD", bid: "bid", ask: "ask" };

/** `ema_20` -> `EMA 20`, `order_flow_imbalance` -> `Order flow imbalance`. */
export function titleOf(name) {
  const words = name.split("_").map((word) => WORDS[word] ?? CAPITALS[word] ?? word);
  const text = words.join(" ");
  return text[0].toUpperCase() + text.slice(1);
}

export const onPrice = (name) => ON_PRICE.test(name);

/** The pane of one that is not on the price. */
export const paneOf = (name) => TOGETHER[name] ?? titleOf(name);

/** Whether rows of a timeframe have features. */
export const hasFeatures = (timeframe) => timeframe === "15s" || timeframe === "1m";

/**
 * What a menu offers for a timeframe.
 * @param {string} timeframe @param {string[]} features @returns {{group: string, names: string[]}[]}
 */
export function menuOf(timeframe, features) {
  const names = isTicker(timeframe) ? OF_ROLLING : hasFeatures(timeframe) ? [...features, ...OF_FIXED] : OF_FIXED;
  const left = new Set(names);
  const out = [];
  for (const [group, belongs] of GROUPS) {
    const found = [...left].filter(belongs);
    for (const name of found) left.delete(name);
    if (found.length) out.push({ group, names: found });
  }
  return out;
}

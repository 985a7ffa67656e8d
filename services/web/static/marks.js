/**
 * Marks on the chart in layers: big trades, liquidations, signals. Each is snapped to the candle that holds its time.
 * Big trades are drawn as bubbles (bubbles.js), all else here.
 */

import { number } from "./format.js";
import { startOf, windowOf } from "./timeframes.js";

const MOST = 400;
/** About the width of a letter of a label, pixels. */
const LETTER = 7;
/** Of the big trades the largest are labelled: those from this quantile on. */
const LABELLED = 0.95;

/**
 * `side` buy stands below the candle and points up, sell above it and points down; so the shape tells what the colour
 * tells. `strong` is drawn larger.
 * @typedef {{id: string, time: number, side: "buy"|"sell"|"", text?: string, strong?: boolean, shape?: string}} Mark
 */

export class Marks {
  /**
   * @param {any} series the price series @param {() => import("./bars.js").Bars} bars
   * @param {() => number} spacing pixels from candle to candle
   */
  constructor(series, bars, spacing) {
    this.bars = bars;
    this.spacing = spacing;
    this.colours = {};
    /** @type {Map<string, Mark[]>} */
    this.layers = new Map();
    this.hidden = new Set();
    this.shown = 0;
    this.#plugin = LightweightCharts.createSeriesMarkers(series, []);
  }

  #plugin;
  #due = 0;
  #drawnWith = 0;

  /** @param {string} layer @param {Mark[]} marks */
  set(layer, marks) {
    this.layers.set(layer, marks);
    this.refresh();
  }

  /** @param {string} layer @param {boolean} visible */
  show(layer, visible) {
    this.hidden[visible ? "delete" : "add"](layer);
    this.refresh();
  }

  /** Draw them anew, once for all that changes within a frame. */
  refresh() {
    if (this.#due) return;
    this.#due = requestAnimationFrame(() => {
      this.#due = 0;
      this.#draw();
    });
  }

  /** Candles may stand closer now, or further apart. */
  rescaled() {
    if (this.spacing() !== this.#drawnWith) this.refresh();
  }

  /** The marks of a layer, none while it is hidden. @param {string} layer */
  visible(layer) {
    return this.hidden.has(layer) ? [] : (this.layers.get(layer) ?? []);
  }

  #draw() {
    const bars = this.bars();
    const out = [];
    for (const layer of this.layers.keys()) {
      if (layer === "big") continue;
      const marks = this.visible(layer);
      const snapped = marks.map((mark) => [mark, barOf(bars, mark.time)]).filter(([, bar]) => bar !== undefined);
      for (const [mark, bar] of snapped.slice(-MOST)) out.push(this.#marker(layer, mark, bar));
    }
    out.sort((a, b) => a.time - b.time);
    this.#thin(out, bars);
    this.shown = out.length + this.visible("big").length;
    this.#plugin.setMarkers(out);
  }

  /** Of labels that would cover each other the earlier one. */
  #thin(markers, bars) {
    this.#drawnWith = this.spacing();
    const ends = { belowBar: -Infinity, aboveBar: -Infinity };
    for (const marker of markers) {
      if (!marker.text) continue;
      const x = bars.indexAt(marker.time) * this.#drawnWith;
      const half = (marker.text.length * LETTER) / 2;
      if (x - half < ends[marker.position]) marker.text = "";
      else ends[marker.position] = x + half + LETTER;
    }
  }

  #marker(layer, mark, bar) {
    const { up, down, muted } = this.colours;
    return {
      time: bar.at,
      id: `${layer} ${mark.id}`,
      position: mark.side === "buy" ? "belowBar" : "aboveBar",
      shape: mark.shape ?? (mark.side === "buy" ? "arrowUp" : mark.side === "sell" ? "arrowDown" : "circle"),
      color: mark.side === "buy" ? up : mark.side === "sell" ? down : muted,
      text: mark.text,
      size: mark.strong ? 1 : 0.8,
    };
  }
}

/** The bar whose window holds an instant; of rolling ones the first that has it. */
function barOf(bars, time) {
  const { timeframe, list } = bars;
  if (timeframe === "rolling") {
    const bar = list[bars.indexAt(time) + 1];
    return bar && startOf(timeframe, bar.at) <= time ? bar : undefined;
  }
  const bar = list[bars.indexAt(time)];
  return bar && time < bar.at + windowOf(timeframe) + Math.min(600, windowOf(timeframe)) ? bar : undefined;
}

/** Big trades as marks, those of one candle and side added up. @param {import("./market.js").Market} market */
export function bigMarks(market) {
  const sums = new Map();
  for (const big of market.big.values()) {
    const bar = barOf(market.bars, big.at);
    if (bar === undefined) continue;
    const key = `${bar.at} ${big.side}`;
    const sum = sums.get(key) ?? { id: key, time: big.at, bar: bar.at, side: big.side, count: 0, volume: 0 };
    sum.count += big.count;
    sum.volume += big.volume;
    sums.set(key, sum);
  }
  const all = [...sums.values()].sort((a, b) => a.time - b.time);
  const large = all.map((sum) => sum.volume).sort((a, b) => a - b)[Math.floor(all.length * LABELLED)] ?? 0;
  return all.map((sum) => ({ ...sum, text: sum.volume >= large ? number(Math.round(sum.volume)) : undefined }));
}

/** Liquidations of fixed candles: liquidated longs were sold, shorts bought back. */
export function liquidationMarks(bars) {
  const out = [];
  for (const bar of bars.list) {
    if (bar.liquidated_long_volume > 0) {
      const text = `L ${number(bar.liquidated_long_volume)}`;
      out.push({ id: `${bar.at} long`, time: bar.at, side: "sell", shape: "square", text });
    }
    if (bar.liquidated_short_volume > 0) {
      const text = `S ${number(bar.liquidated_short_volume)}`;
      out.push({ id: `${bar.at} short`, time: bar.at, side: "buy", shape: "square", text });
    }
  }
  return out;
}

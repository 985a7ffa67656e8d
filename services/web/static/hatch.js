/**
 * Drawn behind and over the candles: a hatched band where they are incomplete (a gap in what was received), hatched
 * bodies, and for a moment a frame around one that was corrected.
 */

import { known } from "./format.js";
import { barWidth } from "./stack.js";

const FLASH_MS = 1800;
const STRIPE = 7;

export class Hatch {
  /** @param {() => import("./bars.js").Bar[]} list in the order of the chart's points @param {() => boolean} still */
  constructor(list, still) {
    this.list = list;
    this.still = still;
    this.colours = { warn: "#b80", flash: "#fff", background: "#000" };
    /** @type {Map<number, number>} time of a bar -> when the flash began */
    this.#flashes = new Map();
    this.#views = [
      { zOrder: () => "bottom", renderer: () => this.#renderer((scope) => this.#bands(scope)) },
      { zOrder: () => "top", renderer: () => this.#renderer((scope) => this.#over(scope)) },
    ];
  }

  #flashes;
  #views;
  #chart = null;
  #series = null;
  #request = () => {};

  attached({ chart, series, requestUpdate }) {
    [this.#chart, this.#series, this.#request] = [chart, series, requestUpdate];
  }

  paneViews() {
    return this.#views;
  }

  /** A candle was corrected. */
  flash(at) {
    this.#flashes.set(at, performance.now());
    if (this.#flashes.size === 1) this.#animate();
  }

  #animate() {
    const now = performance.now();
    for (const [at, began] of this.#flashes) if (now - began > FLASH_MS) this.#flashes.delete(at);
    this.#request();
    if (this.#flashes.size === 0) return;
    if (this.still()) setTimeout(() => this.#animate(), FLASH_MS + 50);
    else requestAnimationFrame(() => this.#animate());
  }

  #renderer(draw) {
    return { draw: (target) => target.useBitmapCoordinateSpace(draw) };
  }

  /** Indices of the bars on the screen. */
  #visible() {
    const range = this.#chart.timeScale().getVisibleLogicalRange();
    const list = this.list();
    if (!range) return [0, -1, list];
    return [Math.max(0, Math.floor(range.from) - 1), Math.min(list.length - 1, Math.ceil(range.to) + 1), list];
  }

  #bands(scope) {
    const { context, bitmapSize, horizontalPixelRatio: h } = scope;
    const [from, to, list] = this.#visible();
    const half = this.#chart.timeScale().options().barSpacing / 2;
    for (let i = from; i <= to; i++) {
      if (list[i].complete !== false) continue;
      let end = i;
      while (end < to && list[end + 1].complete === false) end += 1;
      const left = Math.floor((this.#x(i) - half) * h);
      const right = Math.ceil((this.#x(end) + half) * h);
      context.save();
      context.globalAlpha = 0.1;
      context.fillStyle = this.colours.warn;
      context.fillRect(left, 0, Math.max(2, right - left), bitmapSize.height);
      context.globalAlpha = 0.45;
      stripes(context, left, 0, Math.max(2, right - left), bitmapSize.height, STRIPE * h, this.colours.warn, h);
      context.restore();
      i = end;
    }
  }

  #over(scope) {
    const { context, horizontalPixelRatio: h, verticalPixelRatio: v } = scope;
    const [from, to, list] = this.#visible();
    const spacing = this.#chart.timeScale().options().barSpacing;
    const width = barWidth(spacing);
    const now = performance.now();
    for (let i = from; i <= to; i++) {
      const bar = list[i];
      const began = this.#flashes.get(bar.at);
      if ((bar.complete !== false || width < 4) && began === undefined) continue;
      if (!known(bar.open) || !known(bar.close)) continue;
      const [x, y1, y2] = [this.#x(i), this.#y(Math.max(bar.open, bar.close)), this.#y(Math.min(bar.open, bar.close))];
      if (x === null || y1 === null || y2 === null) continue;
      const left = Math.round((x - width / 2) * h);
      if (bar.complete === false && width >= 4) {
        const top = Math.round(y1 * v);
        const height = Math.max(1, Math.round(y2 * v) - top);
        context.save();
        stripes(context, left, top, Math.round(width * h), height, 4 * h, this.colours.background, h * 1.5);
        context.restore();
      }
      if (began === undefined) continue;
      const age = Math.min(1, (now - began) / FLASH_MS);
      const grow = this.still() ? 3 : 3 + 6 * (1 - age) ** 3;
      const [top, bottom] = [this.#y(bar.high), this.#y(bar.low)];
      context.save();
      context.globalAlpha = this.still() ? 0.9 : 1 - age ** 2;
      context.strokeStyle = this.colours.flash;
      context.lineWidth = 2 * h;
      context.strokeRect(
        left - grow * h, (top - grow) * v, (width + 2 * grow) * h, (bottom - top + 2 * grow) * v,
      );
      context.restore();
    }
  }

  #x(index) {
    return this.#chart.timeScale().logicalToCoordinate(index);
  }

  #y(price) {
    return this.#series.priceToCoordinate(price);
  }
}

/** Diagonal lines inside a rectangle, all of one grid so that they do not crawl from one to the next. */
function stripes(context, left, top, width, height, gap, colour, thick) {
  context.beginPath();
  context.rect(left, top, width, height);
  context.clip();
  context.strokeStyle = colour;
  context.lineWidth = thick;
  context.beginPath();
  // Lines of x + y = c.
  for (let c = Math.floor((left + top) / gap) * gap; c <= left + width + top + height; c += gap) {
    context.moveTo(c - top - height, top + height);
    context.lineTo(c - top, top);
  }
  context.stroke();
}

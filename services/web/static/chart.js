/** The chart: candles with volume, CVD, spread and what was asked for, as the market has them. */

import { Bubbles } from "./bubbles.js";
import { clock, day, digitsOf, known, number, price, signed } from "./format.js";
import { Hatch } from "./hatch.js";
import { onPrice, paneOf, titleOf } from "./indicators.js";
import { bigMarks, liquidationMarks, Marks } from "./marks.js";
import { Stack } from "./stack.js";

const { createChart, createTextWatermark, CandlestickSeries, HistogramSeries, LineSeries } = LightweightCharts;
const { CrosshairMode, LineStyle, LineType } = LightweightCharts;

/** Fewer bars than this left of the screen: load older ones. */
const NEAR_EDGE = 60;
const MANY_CHANGES = 40;
const PRICE_SHARE = 0.62;
const LINES = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6"];

export class Chart extends EventTarget {
  /**
   * Events: "hover" (detail: the bar under the crosshair, or null), "mark" (detail: `{layer, id}`), "edge" (older bars
   * are wanted), "range" (what is visible has changed).
   * @param {HTMLElement} element @param {import("./market.js").Market} market @param {import("./theme.js").Theme} theme
   */
  constructor(element, market, theme) {
    super();
    this.element = element;
    this.market = market;
    this.theme = theme;
    this.digits = 2;
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.chart = createChart(element, {
      autoSize: true,
      crosshair: { mode: CrosshairMode.Normal },
      localization: { timeFormatter: (at) => this.#hoverTime(at), locale: "en-GB" },
      timeScale: { timeVisible: true, rightOffset: 6, minBarSpacing: 0.4, barSpacing: 8 },
      rightPriceScale: { scaleMargins: { top: 0.08, bottom: 0.24 }, minimumWidth: 72 },
      kineticScroll: { touch: !this.still.matches, mouse: false },
    });
    this.price = this.chart.addSeries(CandlestickSeries, { lastValueVisible: false, priceLineVisible: false }, 0);
    // A line of its own: the series' label would have the colour of a hollow candle, which is none.
    this.lastPrice = this.price.createPriceLine({
      price: 0, lineWidth: 1, lineStyle: LineStyle.Dotted, lineVisible: false, axisLabelVisible: false, title: "",
    });
    this.volume = this.chart.addCustomSeries(new Stack(), {
      priceScaleId: "volume", lastValueVisible: false, priceLineVisible: false,
      priceFormat: { type: "custom", formatter: number, minMove: 1e-8 },
    }, 0);
    this.volume.priceScale().applyOptions({ scaleMargins: { top: 0.82, bottom: 0 } });
    this.cvd = this.chart.addSeries(LineSeries, { ...small(signed), lineWidth: 2 }, 1);
    this.spread = this.chart.addSeries(LineSeries, { ...small(number), lineWidth: 1, lineType: LineType.WithSteps }, 2);
    /** Series -> its point of a bar. */
    this.points = new Map([
      [this.price, (bar) => this.#candle(bar)],
      [this.volume, stack],
      [this.cvd, (bar) => point(bar.at, bar.cvd_close)],
      [this.spread, (bar) => point(bar.at, bar.spread)],
    ]);
    /** @type {Map<string, any>} indicator -> its series */
    this.indicators = new Map();
    this.labels = [];
    this.hatch = new Hatch(() => this.market.bars.list, () => this.still.matches);
    this.price.attachPrimitive(this.hatch);
    const spacing = () => this.chart.timeScale().options().barSpacing;
    this.marks = new Marks(this.price, () => this.market.bars, spacing);
    this.bubbles = new Bubbles(this.marks, () => this.market.bars);
    this.price.attachPrimitive(this.bubbles);
    this.#listen();
    this.paint();
    requestAnimationFrame(() => this.#arrange());
  }

  #cursor = -1;
  #drawn = null;

  #listen() {
    const { market, chart } = this;
    market.addEventListener("reset", () => this.#reset());
    market.addEventListener("older", () => this.#all());
    market.addEventListener("change", (event) => this.#changes(event.detail));
    market.addEventListener("big", () => this.#big());
    chart.subscribeCrosshairMove(({ time, logical }) => {
      if (time === undefined) this.#cursor = -1;
      this.#tell("hover", time === undefined ? null : market.bars.list[logical] ?? null);
    });
    chart.subscribeClick(({ hoveredObjectId }) => {
      const [layer, ...id] = String(hoveredObjectId ?? "").split(" ");
      if (id.length) this.#tell("mark", { layer, id: id.join(" ") });
    });
    chart.timeScale().subscribeVisibleLogicalRangeChange((range) => {
      if (range && range.from < NEAR_EDGE && market.bars.list.length) this.#tell("edge");
      this.marks.rescaled();
      this.#tell("range");
    });
    this.theme.addEventListener("change", () => this.paint());
  }

  /** Everything is new: another symbol, or a fresh start. */
  #reset() {
    const { bars, step } = this.market;
    this.digits = -1;
    this.#precise(bars.list.slice(-200));
    this.chart.timeScale().applyOptions({ secondsVisible: step < 60, timeVisible: step < 86_400 });
    const key = `${this.market.symbol} ${this.market.timeframe} ${this.market.detached}`;
    this.#all();
    this.chart.clearCrosshairPosition();
    if (key !== this.#drawn && bars.list.length) {
      this.#drawn = key;
      this.price.priceScale().applyOptions({ autoScale: true });
      this.newest();
    }
  }

  /** As many decimals as any price so far has had. */
  #precise(bars) {
    const digits = digitsOf(bars.flatMap((bar) => [bar.open, bar.high, bar.low, bar.close]));
    if (digits <= this.digits) return;
    this.digits = digits;
    this.price.applyOptions({
      priceFormat: { type: "custom", formatter: (value) => price(value, digits), minMove: 10 ** -digits },
    });
  }

  #all() {
    const list = this.market.bars.list;
    for (const [series, of] of this.points) series.setData(list.map(of));
    this.#lastLabel();
    this.#liquidations();
    this.#big();
    this.marks.refresh();
  }

  #changes(changes) {
    this.#precise(changes.map(({ bar }) => bar));
    if (changes.length > MANY_CHANGES || changes.some(({ what }) => what === "inserted")) this.#all();
    else for (const { bar } of changes) this.#one(bar);
    this.#lastLabel();
    for (const { bar, what } of changes) if (what === "corrected") this.hatch.flash(bar.at);
    if (changes.some(({ bar }) => bar.liquidated_long_volume > 0 || bar.liquidated_short_volume > 0)) {
      this.#liquidations();
    }
    if (changes.some(({ what }) => what === "new" || what === "inserted")) {
      this.#big();
      this.marks.refresh();
    }
  }

  #one(bar) {
    const last = bar === this.market.bars.last;
    const index = last ? -1 : this.market.bars.indexAt(bar.at);
    for (const [series, of] of this.points) {
      const item = of(bar);
      if (last) series.update(item);
      // A point in the past can be changed in place, but not come or go.
      else if (isPoint(series.dataByIndex(index)) && isPoint(item)) series.update(item, true);
      else if (isPoint(series.dataByIndex(index)) || isPoint(item)) series.setData(this.market.bars.list.map(of));
    }
  }

  #lastLabel() {
    const bar = this.market.bars.last;
    const shown = known(bar?.close);
    const color = this.theme.colour(shown && bar.close < bar.open ? "--down" : "--up");
    this.lastPrice.applyOptions({
      price: shown ? bar.close : 0, color, axisLabelColor: color, axisLabelTextColor: this.theme.colour("--panel"),
      lineVisible: shown, axisLabelVisible: shown,
    });
  }

  #liquidations() {
    this.marks.set("liquidation", liquidationMarks(this.market.bars));
  }

  #big() {
    this.marks.set("big", bigMarks(this.market));
  }

  #candle(bar) {
    if (!known(bar.open) || !known(bar.high) || !known(bar.low) || !known(bar.close)) return { time: bar.at };
    const item = { time: bar.at, open: bar.open, high: bar.high, low: bar.low, close: bar.close };
    // A candle that has not closed is hollow.
    if (bar.forming) item.color = "rgba(0, 0, 0, 0)";
    return item;
  }

  /** @param {string[]} names the indicators to be drawn, no others */
  setIndicators(names) {
    for (const [name, series] of this.indicators) {
      if (names.includes(name)) continue;
      this.points.delete(series);
      this.chart.removeSeries(series);
      this.indicators.delete(name);
    }
    for (const name of names) if (!this.indicators.has(name)) this.#add(name);
    this.paint();
    requestAnimationFrame(() => this.#arrange());
  }

  #add(name) {
    const beside = [...this.indicators].find(([other]) => !onPrice(other) && paneOf(other) === paneOf(name))?.[1];
    const pane = onPrice(name) ? 0 : (beside?.getPane().paneIndex() ?? this.chart.panes().length);
    const bars = name === "macd_hist" || name === "divergence";
    const options = onPrice(name)
      ? { lineWidth: 1, lastValueVisible: false, priceLineVisible: false, crosshairMarkerVisible: false }
      : small(number);
    const series = this.chart.addSeries(bars ? HistogramSeries : LineSeries, { ...options, lineWidth: 1 }, pane);
    const of = (bar) => point(bar.at, bar[name]);
    this.indicators.set(name, series);
    this.points.set(series, of);
    series.setData(this.market.bars.list.map(of));
  }

  /** The price gets the larger part, the others share the rest. */
  #arrange() {
    const panes = this.chart.panes();
    const height = panes.reduce((sum, pane) => sum + pane.getHeight(), 0);
    if (height > 0) panes[0].setHeight(Math.round(height * Math.max(0.45, PRICE_SHARE - 0.05 * (panes.length - 3))));
  }

  /** Everything in the colours of the theme. */
  paint() {
    const c = (name) => this.theme.colour(name);
    const [up, down] = [c("--up"), c("--down")];
    this.chart.applyOptions({
      layout: {
        background: { type: "solid", color: c("--panel") }, textColor: c("--muted"), fontSize: 11,
        fontFamily: c("--font"), panes: { separatorColor: c("--line"), separatorHoverColor: c("--raised") },
      },
      grid: { vertLines: { color: c("--grid") }, horzLines: { color: c("--grid") } },
      crosshair: {
        vertLine: { color: c("--muted"), labelBackgroundColor: c("--label"), width: 1, style: LineStyle.Dashed },
        horzLine: { color: c("--muted"), labelBackgroundColor: c("--label"), width: 1, style: LineStyle.Dashed },
      },
      timeScale: { borderColor: c("--line") },
      rightPriceScale: { borderColor: c("--line") },
    });
    this.price.applyOptions({
      upColor: up, downColor: down, borderUpColor: up, borderDownColor: down, wickUpColor: up, wickDownColor: down,
    });
    this.volume.applyOptions({ buy: up, sell: down, unknown: c("--unknown") });
    this.cvd.applyOptions({ color: c("--accent") });
    this.spread.applyOptions({ color: c("--muted") });
    [...this.indicators.values()].forEach((series, i) => {
      const color = c(LINES[i % LINES.length]);
      series.applyOptions({ color: series.seriesType() === "Histogram" ? `${color}80` : color });
    });
    this.hatch.colours = { warn: c("--warn"), flash: c("--text"), background: c("--panel") };
    this.bubbles.font = c("--font");
    this.marks.colours = { up, down, muted: c("--muted") };
    this.marks.refresh();
    this.#lastLabel();
    this.#label();
  }

  /** Names the panes, each in its corner. */
  #label() {
    for (const label of this.labels) label.detach();
    const names = new Map([[1, "CVD"], [2, "Spread"]]);
    for (const [name, series] of this.indicators) {
      if (!onPrice(name)) names.set(series.getPane().paneIndex(), paneOf(name));
    }
    const panes = this.chart.panes();
    const look = { color: this.theme.colour("--muted"), fontSize: 11, fontFamily: this.theme.colour("--font") };
    this.labels = [...names].filter(([index]) => panes[index]).map(([index, text]) => (
      createTextWatermark(panes[index], { horzAlign: "left", vertAlign: "top", lines: [{ ...look, text: ` ${text}` }] })
    ));
  }

  /** On the price: name and colour of what is drawn there. */
  overlays() {
    return [...this.indicators].filter(([name]) => onPrice(name)).map(([name, series]) => ({
      name, title: titleOf(name), colour: series.options().color,
    }));
  }

  /** Whether the newest bar is on the screen. */
  get atEnd() {
    const range = this.chart.timeScale().getVisibleLogicalRange();
    return !range || range.to >= this.market.bars.list.length - 1;
  }

  /** The newest bars, at a width that can be read. */
  newest() {
    const scale = this.chart.timeScale();
    const length = this.market.bars.list.length;
    const fitting = Math.floor(this.element.clientWidth / 8);
    // Few candles are drawn wider, yet not as wide as the screen.
    const shown = Math.min(180, fitting, Math.max(40, length + 4));
    scale.setVisibleLogicalRange({ from: length - shown, to: length + 4 });
  }

  fit() {
    this.chart.timeScale().fitContent();
  }

  /** Moves so that an instant stands in the middle. */
  centre(at) {
    const scale = this.chart.timeScale();
    const range = scale.getVisibleLogicalRange();
    const width = range ? range.to - range.from : 120;
    const index = this.market.bars.indexAt(at);
    scale.setVisibleLogicalRange({ from: index - width / 2, to: index + width / 2 });
    this.#soon(() => this.#select(Math.max(0, this.market.bars.indexAt(at))));
  }

  /** Moves the crosshair by bars, from the newest one when there is none. @returns the bar it stands on */
  step(by) {
    const list = this.market.bars.list;
    if (!list.length) return null;
    const from = this.#cursor < 0 ? list.length - (by < 0 ? 0 : 1) : this.#cursor;
    return this.#select(Math.max(0, Math.min(list.length - 1, from + by)));
  }

  #select(index) {
    const bar = this.market.bars.list[index];
    if (!bar) return null;
    const scale = this.chart.timeScale();
    const range = scale.getVisibleLogicalRange();
    if (range && (index < range.from || index > range.to)) {
      const width = range.to - range.from;
      const from = index < range.from ? index - width * 0.1 : index - width * 0.9;
      scale.setVisibleLogicalRange({ from, to: from + width });
      this.#soon(() => this.#point(bar));
    } else this.#point(bar);
    this.#cursor = index;
    return bar;
  }

  #point(bar) {
    this.chart.setCrosshairPosition(bar.close ?? 0, bar.at, this.price);
    this.#tell("hover", bar);
  }

  /** After the chart has drawn itself: what was asked of its scale holds only then. */
  #soon(act) {
    requestAnimationFrame(() => requestAnimationFrame(act));
  }

  unselect() {
    this.#cursor = -1;
    this.chart.clearCrosshairPosition();
    this.#tell("hover", null);
  }

  /** @param {number} by bars to the right */
  scroll(by) {
    const scale = this.chart.timeScale();
    scale.scrollToPosition(scale.scrollPosition() + by, false);
  }

  /** @param {number} factor below 1 shows fewer bars */
  zoom(factor) {
    const scale = this.chart.timeScale();
    const range = scale.getVisibleLogicalRange();
    if (!range) return;
    const width = Math.max(10, (range.to - range.from) * factor);
    scale.setVisibleLogicalRange({ from: range.to - width, to: range.to });
  }

  #hoverTime(at) {
    const { step, timeframe } = this.market;
    if (step >= 86_400) return day(at);
    return `${day(at)} ${clock(at, step < 60)} UTC${timeframe === "rolling" ? " (60 s until)" : ""}`;
  }

  #tell(name, detail = undefined) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

const isPoint = (item) => item != null && (known(item.value) || known(item.open) || item.buy !== undefined);

const point = (time, value) => (known(value) ? { time, value } : { time });

function stack(bar) {
  const split = known(bar.ask_volume) && known(bar.bid_volume);
  const [buy, sell] = split ? [bar.ask_volume, bar.bid_volume] : [0, 0];
  const unknown = bar.unknown_volume ?? Math.max(0, (bar.volume ?? 0) - buy - sell);
  return { time: bar.at, buy, sell, unknown, forming: bar.forming };
}

/** Options of a series in a pane of its own. */
function small(formatter) {
  return {
    priceFormat: { type: "custom", formatter, minMove: 1e-8 }, priceLineVisible: false, crosshairMarkerRadius: 3,
  };
}

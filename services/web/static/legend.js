/** The line above the chart: the candle under the crosshair, or the newest one, in numbers; and the same in words. */

import { clock, day, known, number, price, signed, when } from "./format.js";
import { labelOf, spokenOf } from "./timeframes.js";

export class Legend {
  /**
   * @param {HTMLElement} element @param {import("./market.js").Market} market
   * @param {import("./chart.js").Chart} chart
   */
  constructor(element, market, chart) {
    Object.assign(this, { element, market, chart });
    this.hovered = null;
    this.#cells = new Map();
    this.#build();
    const later = () => this.refresh();
    for (const name of ["reset", "change", "older"]) market.addEventListener(name, later);
    chart.addEventListener("hover", ({ detail }) => {
      this.hovered = detail;
      this.refresh();
    });
  }

  #cells;
  #due = 0;

  #build() {
    this.head = part("strong", "legend-symbol");
    this.time = part("span", "legend-time");
    this.overlays = part("span", "legend-overlays");
    this.flags = part("span", "legend-flags");
    const list = part("span", "legend-values");
    for (const [key, title, long] of [
      ["open", "O", "open"], ["high", "H", "high"], ["low", "L", "low"], ["close", "C", "close"],
      ["change", "", "change from open to close"], ["volume", "V", "volume"], ["buy", "buy", "volume of buyers"],
      ["sell", "sell", "volume of sellers"], ["vd", "Δ", "buy less sell volume"],
      ["cvd", "CVD", "cumulative volume delta"], ["spread", "spread", "quoted spread"],
    ]) {
      const cell = part("span", `value ${key}`);
      const name = part("abbr", "");
      name.title = long;
      name.textContent = title;
      const text = part("span", "number");
      text.dataset.field = key;
      cell.append(name, text);
      list.append(cell);
      this.#cells.set(key, [cell, text]);
    }
    this.element.append(this.head, this.time, list, this.overlays, this.flags);
  }

  refresh() {
    if (this.#due) return;
    this.#due = requestAnimationFrame(() => {
      this.#due = 0;
      this.#draw();
    });
  }

  /** The bar that is told of. */
  get bar() {
    return (this.hovered && this.market.bars.byTime.get(this.hovered.at)) ?? this.market.bars.last ?? null;
  }

  #draw() {
    const { market, bar } = this;
    const contract = bar?.symbol && bar.symbol !== market.symbol ? ` (${bar.symbol})` : "";
    this.head.textContent = `${market.symbol ?? ""}${contract} · ${labelOf(market.timeframe ?? "")}`;
    this.time.textContent = bar ? windowText(bar, market) : "";
    const digits = this.chart.digits;
    const up = bar && bar.close >= bar.open;
    const change = bar && known(bar.close) && known(bar.open) ? bar.close - bar.open : null;
    const percent = change === null || !bar.open ? "" : ` (${((change / bar.open) * 100).toFixed(2)}%)`;
    this.#set("open", price(bar?.open, digits), up);
    this.#set("high", price(bar?.high, digits), up);
    this.#set("low", price(bar?.low, digits), up);
    this.#set("close", price(bar?.close, digits), up);
    const sign = change > 0 ? "+" : change < 0 ? "−" : "";
    const moved = change === null ? "" : `${sign}${price(Math.abs(change), digits)}${percent.replace("-", "−")}`;
    this.#set("change", moved, up);
    this.#set("volume", number(bar?.volume));
    this.#set("buy", number(bar?.ask_volume));
    this.#set("sell", number(bar?.bid_volume));
    this.#set("vd", signed(bar?.vd), bar?.vd >= 0);
    this.#set("cvd", signed(bar?.cvd_close));
    this.#set("spread", number(bar?.spread));
    this.#flag(bar);
    // What is computed of closed candles is not known of one that forms.
    const told = bar?.forming ? market.bars.lastClosed : bar;
    this.overlays.replaceChildren(...this.chart.overlays().map(({ name, title, colour }) => {
      const item = part("span", "overlay");
      const dot = part("i", "");
      dot.style.background = colour;
      item.append(dot, `${title} ${price(told?.[name], digits)}`);
      return item;
    }));
    Object.assign(this.element.dataset, {
      at: bar?.at ?? "", revision: bar?.revision ?? "", complete: bar?.complete ?? "", forming: bar?.forming ?? "",
    });
  }

  #set(key, text, up = undefined) {
    const [cell, value] = this.#cells.get(key);
    if (value.textContent !== text) value.textContent = text;
    if (up !== undefined) cell.dataset.side = up ? "up" : "down";
  }

  #flag(bar) {
    const flags = [];
    if (bar?.forming) flags.push(["forming", "forming", "Has not closed: put together from live seconds"]);
    else if (bar) flags.push(["rev", `rev ${bar.revision}`, bar.revision ? "Corrected since it closed" : "As it closed"]);
    if (bar && bar.complete === false) flags.push(["gap", "incomplete", "Something is missing in what was received"]);
    else if (bar && !bar.forming) flags.push(["whole", "complete", "No gap in its window"]);
    this.flags.replaceChildren(...flags.map(([name, text, title]) => {
      const item = part("span", `flag ${name}`);
      item.textContent = text;
      item.title = title;
      return item;
    }));
  }
}

function part(tag, name) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  return made;
}

/** When a bar was: of a rolling one its minute's end. */
function windowText(bar, { timeframe, step }) {
  if (timeframe === "rolling") return `${day(bar.at)}, 60 s to ${clock(bar.at)}`;
  return step >= 86_400 ? day(bar.at) : when(bar.at, step);
}

/** A candle in words. @param {import("./bars.js").Bar} bar */
export function spoken(bar, market, digits) {
  if (!bar) return "There is no candle yet.";
  const parts = [
    `${market.symbol}, ${spokenOf(market.timeframe)}, ${windowText(bar, market)} UTC`,
    `open ${price(bar.open, digits)}`, `high ${price(bar.high, digits)}`, `low ${price(bar.low, digits)}`,
    `close ${price(bar.close, digits)}`, `volume ${number(bar.volume)}`,
    `buy ${number(bar.ask_volume)}, sell ${number(bar.bid_volume)}`,
    known(bar.cvd_close) ? `cumulative delta ${number(bar.cvd_close).replace("-", "minus ")}` : "",
    known(bar.spread) ? `spread ${number(bar.spread)}` : "",
    bar.forming ? "still forming" : "", bar.complete === false ? "incomplete" : "",
    bar.revision > 0 ? `corrected, revision ${bar.revision}` : "",
  ];
  return `${parts.filter(Boolean).join(", ")}.`;
}

/** The newest candles as a table: what the canvas shows, for those who do not see it, or want the numbers. */

import { clock, day, number, price, signed, when } from "./format.js";
import { spokenOf } from "./timeframes.js";

const ROWS = 60;
const HEADS = [
  "Time (UTC)", "Open", "High", "Low", "Close", "Volume", "Buy", "Sell", "Delta", "CVD", "Spread", "Rev", "State",
];

export class Table {
  /**
   * @param {HTMLElement} element @param {import("./market.js").Market} market
   * @param {import("./chart.js").Chart} chart
   */
  constructor(element, market, chart) {
    Object.assign(this, { element, market, chart });
    for (const name of ["reset", "change", "older"]) market.addEventListener(name, () => this.refresh());
  }

  #due = 0;

  get visible() {
    return !this.element.hidden;
  }

  show(visible) {
    this.element.hidden = !visible;
    this.refresh();
  }

  refresh() {
    if (!this.visible || this.#due) return;
    this.#due = requestAnimationFrame(() => {
      this.#due = 0;
      this.#draw();
    });
  }

  #draw() {
    const { market, element } = this;
    const table = document.createElement("table");
    const caption = table.createCaption();
    caption.textContent = `${market.symbol}, ${spokenOf(market.timeframe)}: the newest ${ROWS}, newest first`;
    const head = table.createTHead().insertRow();
    for (const text of HEADS) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = text;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const bar of market.bars.list.slice(-ROWS).reverse()) this.#row(body.insertRow(), bar);
    const top = element.scrollTop;
    element.replaceChildren(table);
    element.scrollTop = top;
  }

  #row(row, bar) {
    const digits = this.chart.digits;
    const { step, timeframe } = this.market;
    const time = document.createElement("th");
    time.scope = "row";
    time.textContent = timeframe === "rolling" ? `${day(bar.at)} ${clock(bar.at)}` : when(bar.at, step);
    row.append(time);
    for (const text of [
      price(bar.open, digits), price(bar.high, digits), price(bar.low, digits), price(bar.close, digits),
      number(bar.volume), number(bar.ask_volume), number(bar.bid_volume), signed(bar.vd), signed(bar.cvd_close),
      number(bar.spread), bar.forming ? "" : String(bar.revision),
      [bar.forming ? "forming" : "", bar.complete === false ? "incomplete" : ""].filter(Boolean).join(", "),
    ]) row.insertCell().textContent = text;
    row.dataset.at = String(bar.at);
    if (bar.forming) row.className = "forming";
    if (bar.complete === false) row.classList.add("incomplete");
  }
}

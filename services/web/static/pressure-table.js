/** The map as a table: the same cells, for keyboards and screen readers. One cell is in the tab order, arrows move. */

import { at, cellWords } from "./pressure-grid.js";
import { dayOf, el, fixed, minuteOf, strikeText } from "./elements.js";

const MOVES = {
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  PageUp: [-5, 0],
  PageDown: [5, 0],
};

/**
 * @param {{columns: any[], strikes: number[], cells: Map<string, any>, type: string, caption: string,
 *   chosen: (column: number, row: number) => void, left: () => void}} what
 * @returns {HTMLTableElement}
 */
export function tableOf({ columns, strikes, cells, type, caption, chosen, left }) {
  const heads = columns.map((column, i) =>
    el(
      "th",
      { scope: "col", class: column.complete ? null : "broken" },
      i === 0 || column.newDay ? el("span", { class: "day", text: dayOf(column.time) }) : null,
      el("span", { text: minuteOf(column.time) }),
      column.complete ? null : el("span", { class: "sr", text: " incomplete" }),
    ),
  );
  const rollups = [
    ["Put/call", (rollup) => fixed(rollup.put_call_ratio, 2)],
    ["Net premium", (rollup) => fixed(rollup.net_premium / 1000, 0, true) + "k"],
  ].map(([name, tell]) =>
    el(
      "tr",
      { class: "rollup" },
      el("th", { scope: "row", text: name }),
      ...columns.map((column) => el("td", { text: column.rollup ? tell(column.rollup) : "" })),
    ),
  );
  const body = strikes.map((strike, row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", text: strikeText(strike) }),
      ...columns.map((column, i) => {
        const cell = cells.get(at(column.time, strike));
        return el("td", {
          class: cell ? `cell ${cell.complete ? "" : "broken"} ${leaning(cell.log)}` : "cell",
          text: cell ? fixed(cell.log, 1, true) : "",
          tabindex: "-1",
          "data-time": column.time,
          "data-strike": strike,
          "data-column": i,
          "data-row": row,
          "aria-label": cell ? cellWords(cell, type) : "nothing traded",
        });
      }),
    ),
  );
  const found = el(
    "table",
    { role: "grid", class: "pressure-table", "data-testid": "heatmap-table" },
    el("caption", {}, el("span", { class: "sr", text: caption })),
    el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "Strike" }), ...heads)),
    el("tbody", {}, ...rollups, ...body),
  );
  const cellAt = (row, column) => found.querySelector(`td[data-row="${row}"][data-column="${column}"]`);
  const last = cellAt(0, columns.length - 1);
  if (last) last.tabIndex = 0;
  found.addEventListener("focusin", (event) => {
    const cell = event.target.closest("td[data-row]");
    if (!cell) return;
    for (const other of found.querySelectorAll('td[tabindex="0"]')) other.tabIndex = -1;
    cell.tabIndex = 0;
    chosen(Number(cell.dataset.column), Number(cell.dataset.row));
  });
  found.addEventListener("focusout", (event) => !found.contains(event.relatedTarget) && left());
  found.addEventListener("click", (event) => event.target.closest("td[data-row]")?.focus());
  found.addEventListener("keydown", (event) => {
    if (event.key === "Escape") left();
    const cell = event.target.closest("td[data-row]");
    const edge = { Home: 0, End: columns.length - 1 }[event.key];
    if (!cell || (!MOVES[event.key] && edge === undefined)) return;
    event.preventDefault();
    const [down, right] = MOVES[event.key] ?? [0, 0];
    const row = Math.max(0, Math.min(strikes.length - 1, Number(cell.dataset.row) + down));
    const column = edge ?? Math.max(0, Math.min(columns.length - 1, Number(cell.dataset.column) + right));
    cellAt(row, column)?.focus();
  });
  return found;
}

const leaning = (log) => (log > 0.4 ? "up" : log < -0.4 ? "down" : "");

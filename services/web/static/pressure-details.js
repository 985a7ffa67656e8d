/** What is in a cell of the map, or in a window, as lists and a small table. */

import { el, expiryOf, fixed } from "./elements.js";
import { number, signed } from "./format.js";

/** A class for which way a number leans. */
export const sideOf = (value) => (value > 0 ? "up" : value < 0 ? "down" : "");

function list(pairs) {
  return el(
    "dl",
    { class: "facts" },
    ...pairs
      .filter(Boolean)
      .map(([name, value, side]) =>
        el("div", {}, el("dt", { text: name }), el("dd", { text: value, class: side ?? null })),
      ),
  );
}

/** What is in a cell. */
export function factsOf(cell, type) {
  const [up, down] = type === "net" ? ["Bullish", "Bearish"] : ["Bought (ask)", "Sold (bid)"];
  return list([
    ["Log ratio", fixed(cell.log, 2, true), sideOf(cell.log)],
    ["Pressure ratio", cell.ratio === null ? `none ${type === "net" ? "bearish" : "sold"}` : fixed(cell.ratio, 2)],
    [up, number(cell.up)],
    [down, number(cell.down)],
    cell.unknown > 0 ? ["Unknown side", number(cell.unknown)] : null,
    ["Premium", number(Math.round(cell.premium))],
    ["Confidence", fixed(cell.confidence, 2)],
    ["Trades", number(cell.trades)],
    ["Sweeps", number(cell.sweeps)],
    ["Blocks", number(cell.blocks)],
    ["Complete", cell.complete ? "yes" : "no: a gap, or not watched from its start"],
    ["Revision", String(cell.revision)],
  ]);
}

const KINDS = { C: "call", P: "put" };

/** The options in a cell, each with its own volumes and greeks. */
export function optionsOf(cell) {
  const heads = ["Option", "Ask", "Bid", "IV", "Delta"];
  return el(
    "table",
    { class: "plain" },
    el("caption", { text: cell.rows.length > 1 ? `The ${cell.rows.length} options in it` : "The option" }),
    el(
      "thead",
      {},
      el("tr", {}, ...heads.map((text, i) => el("th", { scope: "col", text, class: i ? "number" : null }))),
    ),
    el(
      "tbody",
      {},
      ...cell.rows.map((row) =>
        el(
          "tr",
          {},
          el("td", { text: `${expiryOf(row.expiration)} ${KINDS[row.option_type] ?? row.option_type}` }),
          ...[
            number(row.ask_volume),
            number(row.bid_volume),
            row.iv === null ? "–" : `${fixed(row.iv * 100, 1)} %`,
            fixed(row.delta, 2),
          ].map((text) => el("td", { class: "number", text })),
        ),
      ),
    ),
  );
}

/** What is in a whole window. */
export function rollupOf(rollup) {
  return list([
    ["Put/call ratio", fixed(rollup.put_call_ratio, 2)],
    ["Net premium", signed(Math.round(rollup.net_premium)), sideOf(rollup.net_premium)],
    ["Net of calls", signed(Math.round(rollup.net_call_premium))],
    ["Net of puts", signed(Math.round(rollup.net_put_premium))],
    ["Call pressure", fixed(rollup.call_pressure, 2, true)],
    ["Put pressure", fixed(rollup.put_pressure, 2, true)],
    ["Premium of all", number(Math.round(rollup.premium))],
    ["Calls / puts", `${number(rollup.call_volume)} / ${number(rollup.put_volume)}`],
    ["Options traded", number(rollup.strikes)],
    ["Trades", number(rollup.total_trades)],
  ]);
}

/** Puts the details beside a box (of the window), to the left of `edge` where there is room. */
export function placeBeside(details, box, edge) {
  const { offsetWidth: width, offsetHeight: height } = details;
  // Rather beside the whole map than over it.
  const outside = edge - width - 12;
  const [right, left] = [box.right + 10, outside >= 8 ? outside : box.left - width - 10];
  const fits = (x) => x >= 8 && x + width <= innerWidth - 8;
  const across = fits(left)
    ? left
    : fits(right)
      ? right
      : Math.max(8, Math.min(innerWidth - width - 8, (box.left + box.right - width) / 2));
  const beside = fits(left) || fits(right);
  const wanted = beside
    ? box.top - height / 2
    : box.bottom + 10 + height <= innerHeight
      ? box.bottom + 10
      : box.top - height - 10;
  details.style.left = `${across}px`;
  details.style.top = `${Math.max(8, Math.min(innerHeight - height - 8, wanted))}px`;
}

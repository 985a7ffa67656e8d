/** One signal in the list: a line that opens to why, and a button to acknowledge. */

import { dayOf, el, expiryOf, fixed, minuteOf, strikeText } from "./elements.js";
import { clock, seconds } from "./format.js";
import { whyOf } from "./signal-why.js";

const STATUS_ICONS = { emitted: "●", monitor: "◐", rejected: "✕", withdrawn: "↺" };

/** `VERY_HIGH` as people write it. */
export const words = (text) => text.toLowerCase().replaceAll("_", " ");

/**
 * The element of a signal, in place of what was in `before`; the focus stays where it was.
 * @param {{key: string, row: any, ack: any, today: boolean, open: boolean}} signal
 * @param {{toggle: () => void, focus: (toggle: HTMLElement) => void, acknowledge: () => void, chart: () => void}} act
 * @param {{li: HTMLElement, toggle: HTMLElement}} [before]
 */
export function itemOf({ key, row, ack, today, open }, act, before) {
  const focused = before && before.li.contains(document.activeElement) ? document.activeElement.dataset.testid : "";
  const item = { li: before?.li ?? el("li", { class: "signal", "data-testid": "signal", "data-key": key }) };
  Object.assign(item.li.dataset, {
    status: row.status,
    grade: row.grade,
    underlying: row.underlying,
    direction: row.direction,
    acked: String(Boolean(ack)),
    today: String(today),
  });
  const buy = row.direction === "BUY";
  const bar = el("i");
  bar.style.width = `${Math.max(0, Math.min(1, row.score)) * 100}%`;
  item.toggle = el(
    "button",
    {
      type: "button",
      class: "toggle",
      tabindex: before?.toggle.tabIndex ?? "-1",
      "aria-expanded": String(open),
      "data-testid": "signal-toggle",
      on: {
        click: act.toggle,
        focus: () => act.focus(item.toggle),
      },
    },
    el(
      "span",
      { class: "time" },
      el("span", { class: "date", text: `${dayOf(row.time_window)} ` }),
      minuteOf(row.time_window),
    ),
    el("span", { class: "option" }, el("b", { text: row.underlying }), ` ${contract(row)}`),
    el("span", { class: `dir ${buy ? "up" : "down"}`, text: buy ? "▲ BUY" : "▼ SELL" }),
    el("span", { class: `grade ${row.grade.toLowerCase()}`, text: words(row.grade) }),
    el(
      "span",
      { class: "score" },
      el("span", { class: "sr", text: "score " }),
      el("span", { text: fixed(row.score, 2) }),
      el("span", { class: "gauge", "aria-hidden": "true" }, bar),
    ),
    el(
      "span",
      { class: `status ${row.status}` },
      el("i", { "aria-hidden": "true", text: STATUS_ICONS[row.status] ?? "" }),
      ` ${row.status}`,
    ),
  );
  const done = ack
    ? el(
        "span",
        { class: "acked", title: ackWords(ack) },
        el("i", { "aria-hidden": "true", text: "✓ " }),
        el("span", { class: "sr", text: "acknowledged by " }),
        ack.by,
      )
    : el("button", {
        type: "button",
        class: "small",
        "data-testid": "signal-ack",
        "aria-label": `Acknowledge ${title(row)}`,
        text: "Ack",
        on: { click: act.acknowledge },
      });
  item.li.replaceChildren(el("div", { class: "line" }, item.toggle, done));
  if (open) {
    item.li.append(
      whyOf(row),
      el(
        "div",
        { class: "actions" },
        el("button", {
          type: "button",
          class: "small",
          "data-testid": "signal-chart",
          text: "Show on the chart",
          on: { click: act.chart },
        }),
        ack ? el("span", { class: "hint", text: ackWords(ack) }) : null,
      ),
    );
  }
  if (focused) (item.li.querySelector(`[data-testid="${focused}"]`) ?? item.toggle).focus();
  return item;
}

/** When its window ended, unix seconds. */
export const endOf = (row) => seconds(row.time_window) + row.window_seconds;

/** The option in few characters, `5100 P 27 Nov 26`; a plug-in's may be of none. */
export const contract = (row) =>
  row.option_type ? `${strikeText(row.strike)} ${row.option_type} ${expiryOf(row.expiration)}` : row.source;

/** A signal in one short line. */
export const title = (row) => `${row.underlying} ${contract(row)} ${minuteOf(row.time_window)}`;

function ackWords(ack) {
  const at = typeof ack.at === "number" ? ack.at / 1000 : seconds(ack.at);
  return `acknowledged by ${ack.by} at ${clock(at)} UTC`;
}

/** The open alerts: what happened, how grave it is, and a button to acknowledge. Asked for every few seconds. */

import { el, put } from "./elements.js";
import { clock, day, number } from "./format.js";
import { recall, remember } from "./store.js";

const EVERY_MS = 10_000;
const ICONS = { INFO: "i", WARNING: "!", CRITICAL: "!!", EMERGENCY: "!!!" };
const RANK = { EMERGENCY: 0, CRITICAL: 1, WARNING: 2, INFO: 3 };

/**
 * @param {any} app
 * @param {() => string} name who acknowledges; "" when nobody has said so (and was asked to)
 */
export function alertsOf(app, name) {
  const list = el("ol", { class: "alerts", "data-testid": "alerts-list" });
  const error = el("p", { class: "notice", role: "status", hidden: true });
  const count = el("span", { class: "count" });
  const element = el(
    "details",
    { class: "open-alerts", hidden: true, open: recall("alerts.open", true) },
    el("summary", {}, "Open alerts ", count),
    error,
    list,
  );
  element.addEventListener("toggle", () => remember("alerts.open", element.open));
  let told = "";

  const fail = (problem) => {
    error.hidden = false;
    put(error, "text", problem.message);
  };

  async function acknowledge(alert) {
    const by = name();
    if (!by) return;
    try {
      await app.api.post(`/alerts/${encodeURIComponent(alert.id)}/ack`, { by });
      error.hidden = true;
      app.announce(`Acknowledged: ${alert.title}`);
      await refresh();
    } catch (problem) {
      fail(problem);
    }
  }

  function show(alerts) {
    const open = alerts.filter((alert) => !alert.acked_by);
    open.sort((a, b) => RANK[a.severity] - RANK[b.severity] || b.last_ms - a.last_ms);
    const now = JSON.stringify(open.map((alert) => [alert.id, alert.count, alert.last_ms]));
    if (now === told) return;
    told = now;
    element.hidden = open.length === 0;
    put(count, "text", String(open.length));
    const focused = document.activeElement?.closest?.("li[data-id]")?.dataset.id;
    list.replaceChildren(
      ...open.map((alert) =>
        el(
          "li",
          {
            class: `alert ${alert.severity.toLowerCase()}`,
            "data-testid": "alert",
            "data-id": alert.id,
            "data-severity": alert.severity,
          },
          el(
            "span",
            { class: "what" },
            el(
              "span",
              { class: "badge" },
              el("i", { "aria-hidden": "true", text: ICONS[alert.severity] ?? "!" }),
              alert.severity,
            ),
            " ",
            el("b", { text: alert.title }),
          ),
          el("span", { class: "about", title: alert.text, text: `${timesOf(alert)} · ${alert.text}` }),
          el("button", {
            type: "button",
            class: "small",
            "data-testid": "alert-ack",
            text: "Ack",
            "aria-label": `Acknowledge: ${alert.title}`,
            on: { click: () => acknowledge(alert) },
          }),
        ),
      ),
    );
    if (focused)
      (list.querySelector(`li[data-id="${CSS.escape(focused)}"] button`) ?? list.querySelector("button"))?.focus();
  }

  async function refresh() {
    try {
      const { alerts } = await app.api.get("/alerts");
      show(alerts);
      error.hidden = true;
    } catch (problem) {
      if (!element.hidden) fail(problem);
    }
  }

  setInterval(() => document.visibilityState === "visible" && app.state.connection === "live" && refresh(), EVERY_MS);
  refresh();
  return { element, refresh };
}

function timesOf(alert) {
  const at = alert.last_ms / 1000;
  const repeated = (alert.count ?? 1) > 1 ? `${number(alert.count)} ×, last ` : "";
  return `${repeated}${day(at)} ${clock(at)} UTC`;
}

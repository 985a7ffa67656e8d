/**
 * The strip that says how the pipeline is: one chip for each thing that can be wrong, and what is behind them on demand.
 *
 * Each chip tells by its word and icon what its colour tells. What is shown comes from the channel `pipeline`, about once
 * a second; when nothing has come for a while the strip says so instead of looking well.
 */

import { el, put, soon } from "./elements.js";
import { span } from "./format.js";
import { CHIPS, ICONS, RANK } from "./pipeline-chips.js";
import { detailsOf } from "./pipeline-details.js";
import { recall, remember } from "./store.js";

const STALE_SECONDS = 6;

/** @param {HTMLElement} element @param {any} app */
export function mount(element, app) {
  element.classList.add("pipeline");
  const chips = new Map(CHIPS.map(([name, title]) => [name, chipOf(name, title)]));
  const overall = el("b", { class: "overall" });
  const summary = el("span", { class: "overall-words" });
  const details = el("div", {
    class: "pipeline-details",
    id: "pipeline-details",
    "data-testid": "pipeline-details",
    hidden: true,
  });
  const toggle = el(
    "button",
    {
      type: "button",
      class: "strip",
      "data-testid": "pipeline-toggle",
      "aria-controls": "pipeline-details",
      on: { click: () => open(details.hidden) },
    },
    el("span", { class: "sr", text: "Pipeline: " }),
    overall,
    summary,
    ...[...chips.values()].map((chip) => chip.node),
    el("span", { class: "chevron", "aria-hidden": "true" }),
  );
  element.dataset.testid = "pipeline-strip";
  element.append(toggle, details);
  let heard = performance.now();
  let spoken = "";
  let drawn = "";

  const render = soon(() => {
    const now = app.state.pipeline;
    const age = (performance.now() - heard) / 1000;
    const stale = now !== null && now !== undefined && (age > STALE_SECONDS || app.state.connection !== "live");
    let worst = "rest";
    for (const [name, , judge] of CHIPS) {
      const found = now ? judge(now) : { state: "waiting", text: "–" };
      chips.get(name).show(found);
      if (RANK.indexOf(found.state) > RANK.indexOf(worst)) worst = found.state;
    }
    // A chip that knows nothing (yet) makes the strip not old.
    const state = !now ? "waiting" : stale ? "stale" : worst === "stale" ? "warn" : worst;
    element.dataset.state = state;
    put(overall, "text", ICONS[state] ?? "");
    put(overall, "class", `overall ${state}`);
    const words = {
      ok: "All well",
      rest: "At rest",
      warn: "Look here",
      bad: "Trouble",
      waiting: "Waiting for the pipeline",
      stale: `Old: nothing heard for ${span(age)}`,
    }[state];
    put(summary, "text", words);
    // The state in words for those who listen, only when it changes.
    const said = state === "stale" ? "stale" : state;
    if (spoken && spoken !== said) app.announce(`Pipeline: ${state === "stale" ? "no news" : words}`);
    spoken = said;
    const made = details.hidden || !now ? "" : JSON.stringify(now);
    if (made && made !== drawn) fillDetails(now);
    drawn = made;
  });

  function fillDetails(now) {
    const focused = details.querySelector(":focus")?.getAttribute("aria-label");
    const tops = [...details.querySelectorAll(".scroll")].map((node) => [
      node.getAttribute("aria-label"),
      node.scrollLeft,
    ]);
    details.replaceChildren(detailsOf(now));
    for (const [label, left] of tops) {
      const node = details.querySelector(`.scroll[aria-label="${CSS.escape(label)}"]`);
      if (node) node.scrollLeft = left;
      if (node && focused === label) node.focus();
    }
  }

  function open(wanted) {
    details.hidden = !wanted;
    toggle.setAttribute("aria-expanded", String(wanted));
    remember("pipeline.open", wanted);
    drawn = "";
    render();
  }

  app.state.addEventListener("pipeline", () => {
    heard = performance.now();
    render();
  });
  app.state.addEventListener("connection", render);
  setInterval(render, 2000);
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || details.hidden) return;
    open(false);
    toggle.focus();
  });
  open(recall("pipeline.open", false));
}

function chipOf(name, title) {
  const icon = el("i", { "aria-hidden": "true" });
  const value = el("span", { class: "value" });
  const meter = el("span", { class: "meter", "aria-hidden": "true", hidden: true }, el("i"));
  const node = el(
    "span",
    { class: "chip", "data-testid": `chip-${name}` },
    icon,
    el("span", { class: "name", text: title }),
    " ",
    value,
    meter,
  );
  return {
    node,
    /** @param {import("./pipeline-chips.js").Chip} found */
    show(found) {
      put(node, "data-state", found.state);
      put(icon, "text", ICONS[found.state] ?? "");
      put(value, "text", found.text);
      put(node, "title", found.why ?? null);
      meter.hidden = found.share === undefined;
      if (found.share !== undefined) meter.firstChild.style.width = `${Math.min(1, found.share) * 100}%`;
    },
  };
}

/** What the heat map's panel is made of: its controls, the stage, the legend. */

import { choice, el } from "./elements.js";

const TYPES = [
  ["net", "Net"],
  ["call", "Calls"],
  ["put", "Puts"],
];
const MEASURES = [
  ["volume", "By volume"],
  ["premium", "By premium"],
];

/**
 * @param {{type: string, measure: string}} show what is chosen to begin with
 * @param {Record<string, any>} act what each control does; `canvas`: handlers of the canvas's events
 */
export function partsOf(show, act) {
  const pick = choice("Underlying", "heatmap-underlying", [], "", act.choose);
  const expiration = choice("Expiry", "heatmap-expiration", [["", "All"]], "", act.expire);
  const measure = choice("Size of the squares", "heatmap-size", MEASURES, show.measure, act.measure);
  const types = el(
    "fieldset",
    { class: "segments", "data-testid": "heatmap-type" },
    el("legend", { class: "sr", text: "Options" }),
    ...TYPES.map(([value, text]) =>
      el(
        "label",
        {},
        el("input", {
          type: "radio",
          name: "heatmap-type",
          value,
          checked: value === show.type,
          on: { change: () => act.type(value) },
        }),
        el("span", { text }),
      ),
    ),
  );
  const button = (text, id, act, label) =>
    el("button", { type: "button", "data-testid": id, text, "aria-label": label ?? null, on: { click: act } });
  const every = button("All strikes", "heatmap-strikes", act.strikes);
  const view = button("Table", "heatmap-view", act.view);
  const older = button("‹", "heatmap-older", act.older, "Older windows");
  const newer = button("›", "heatmap-newer", act.newer, "Newer windows");
  const newest = button("Live", "heatmap-live", act.newest, "Newest windows");
  const summary = el("p", { class: "summary", "data-testid": "heatmap-summary" });
  const notice = el("p", { class: "notice", role: "status", hidden: true, "data-testid": "heatmap-notice" });
  const empty = el("p", { class: "empty", hidden: true, "data-testid": "heatmap-empty" });
  const canvas = el("canvas", {
    tabindex: "0",
    role: "application",
    "aria-roledescription": "heat map",
    "data-testid": "heatmap-canvas",
    on: act.canvas,
  });
  const grid = el("div", { class: "scroll", hidden: true });
  const stage = el("div", { class: "stage" }, canvas, grid, empty);
  const [legend, legendEnds] = legendOf();
  const details = el("section", {
    class: "heatmap-details",
    popover: "manual",
    "aria-label": "Chosen cell",
    "data-testid": "heatmap-details",
  });
  const children = [
    el(
      "div",
      { class: "controls" },
      el("h2", { text: "Option pressure" }),
      pick.label,
      el("span", { class: "group" }, older, newer, newest, view),
    ),
    el("div", { class: "controls" }, types, expiration.label, measure.label, every),
    notice,
    summary,
    stage,
    legend,
    details,
  ];
  return {
    pick,
    expirations: expiration.select,
    every,
    view,
    older,
    newer,
    newest,
    summary,
    notice,
    empty,
    canvas,
    grid,
    stage,
    legend,
    legendEnds,
    details,
    children,
  };
}

function legendOf() {
  const ends = [el("span"), el("span")];
  const note = (mark, text) => el("span", { class: "note" }, el("i", { class: mark, "aria-hidden": "true" }), text);
  const legend = el(
    "div",
    { class: "map-legend", "data-testid": "heatmap-legend" },
    el("span", { class: "scale" }, ends[0], el("i", { class: "gradient", "aria-hidden": "true" }), ends[1]),
    note("sizes", "size: share of the largest"),
    note("hatched", "incomplete"),
    note("price", "underlying"),
    el("span", { class: "hint", text: "Point, tap or use the arrow keys for what is in a cell." }),
  );
  return [legend, ends];
}

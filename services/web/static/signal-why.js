/** Why a signal is what it is: its score step by step, in words and numbers. */

import { dayOf, el, expiryOf, fixed, minuteOf } from "./elements.js";
import { known, number } from "./format.js";

const BASELINES = {
  key_time: (n) => `Compared with ${n} earlier windows of this option at this time of day.`,
  key: (n) => `Compared with ${n} earlier windows of this option at any time of day (too few at this one).`,
  moneyness: (n) => `Compared with ${n} earlier windows of options as far from the money (too few of this option).`,
  insufficient: (n) => `Nothing to compare with yet (${n} earlier windows): how unusual it is counts as 0.`,
};

/** Name, whether it is a share that a bar can show, digits, and what it means. */
const PARTS = [
  ["raw", true, 2, "What the window itself says: 0.4 significance + 0.3 trend + 0.2 concentration + 0.1 persistence"],
  ["significance", true, 2, "Strength of the log ratio, volume against its 95th percentile, confidence"],
  ["trend", true, 2, "Slope of the last three log ratios; above 0 goes the signal's way"],
  ["concentration", true, 2, "How one-sided the volume is: 0 even, 1 all on one side"],
  ["persistence", true, 2, "Share of the last three windows on the same side"],
  ["base", true, 2, "How unusual it is against the baseline: half from z, half from the percentile"],
  ["z", false, 2, "Robust z of the log ratio; beyond 2 is unusual"],
  ["percentile", false, 1, "Percent of the baseline's log ratios below this one"],
  ["z_volume", false, 2, "Robust z of the volume"],
  ["volume_percentile", false, 1, "Percent of the baseline's volumes below this one"],
  ["volume_95", false, 1, "95th percentile of the baseline's volumes, contracts"],
  ["market_maker", true, 2, "Straddle score: above 0.21 is watched, above 0.30 rejected; halves the score at 1"],
  ["cluster_size", false, 0, "Neighbouring strikes on the same side, this one included"],
  ["cluster_factor", false, 1, "0.9 alone, 1.1 with one neighbour, 1.2 with more"],
];

const words = (name) => name.replaceAll("_", " ");

/** What the score is made of, as one line; empty for a plug-in's without components. */
export function formula(signal) {
  const { raw, base, market_maker: maker, cluster_factor: factor } = signal;
  if (![raw, base, maker, factor].every(known)) return "";
  const f = (value) => fixed(value, 2);
  return `(½ × raw ${f(raw)} + ½ × base ${f(base)}) × (1 − ½ × market maker ${f(maker)}) × cluster ${fixed(factor, 1)} = ${f(signal.score)}`;
}

/** Where a share lies between 0 (the middle, where it may be negative) and 1. */
function bar(value) {
  const inner = el("i");
  inner.style.width = `${Math.min(1, Math.abs(value)) * 100}%`;
  return el("span", { class: `gauge ${value < 0 ? "negative" : ""}`, "aria-hidden": "true" }, inner);
}

/** The explanation of a row of `signals`. */
export function whyOf(signal) {
  const facts = [
    ["Window", `${dayOf(signal.time_window)} ${minuteOf(signal.time_window)} UTC, ${number(signal.window_seconds)} s`],
    ["Types", signal.types.map(words).join(", ") || words(signal.type), "wide"],
    signal.option_type ? ["Expires", `${expiryOf(signal.expiration)} ${minuteOf(signal.expiration)} UTC`] : null,
    known(signal.log_ratio) ? ["Log ratio", fixed(signal.log_ratio, 2, true)] : null,
    known(signal.volume) ? ["Volume", `${number(signal.volume)} contracts`] : null,
    known(signal.premium) ? ["Premium", number(Math.round(signal.premium))] : null,
    known(signal.underlying_price) ? ["Underlying", number(signal.underlying_price)] : null,
    known(signal.moneyness) ? ["Moneyness", fixed(signal.moneyness, 4)] : null,
    ["Source", signal.source],
    ["Complete", signal.complete ? "yes" : "no: a gap touches the window"],
    ["Revision", String(signal.revision)],
  ].filter(Boolean);
  const parts = PARTS.filter(([name]) => known(signal[name]));
  const baseline = BASELINES[signal.baseline]?.(number(signal.baseline_size));
  const how = formula(signal);
  return el(
    "div",
    { class: "why", "data-testid": "signal-why" },
    signal.reason
      ? el("p", { class: "reason" }, el("b", { text: `${capital(signal.status)}: ` }), signal.reason)
      : null,
    baseline ? el("p", { text: baseline }) : null,
    el(
      "dl",
      { class: "facts" },
      ...facts.map(([name, value, wide]) =>
        el("div", { class: wide ?? null }, el("dt", { text: name }), el("dd", { text: value })),
      ),
    ),
    how ? el("p", { class: "formula" }, el("b", { text: "Score " }), how) : null,
    parts.length
      ? el(
          "div",
          { class: "scroll", tabindex: "0", role: "group", "aria-label": "Components of the score" },
          el(
            "table",
            { class: "plain components" },
            el(
              "thead",
              { class: "sr" },
              el("tr", {}, ...["Component", "Value", "Meaning"].map((text) => el("th", { scope: "col", text }))),
            ),
            el(
              "tbody",
              {},
              ...parts.map(([name, share, digits, meaning]) =>
                el(
                  "tr",
                  { "data-component": name },
                  el("th", { scope: "row", text: words(name) }),
                  el(
                    "td",
                    { class: "number" },
                    share ? bar(signal[name]) : null,
                    el("span", { text: fixed(signal[name], digits) }),
                  ),
                  el("td", { class: "meaning", text: meaning }),
                ),
              ),
            ),
          ),
        )
      : el("p", { class: "hint", text: "This source does not tell its components." }),
  );
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).toLowerCase();

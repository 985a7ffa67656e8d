/** What is behind the strip: small tables of the feeds, streams, workers, counters, and what each feed cost. */

import { el, fixed, lasting, table } from "./elements.js";
import { number, span } from "./format.js";
import { ICONS, feedState } from "./pipeline-chips.js";

const mark = (state, text) =>
  el("span", { class: `state ${state}` }, el("i", { "aria-hidden": "true", text: ICONS[state] ?? "" }), ` ${text}`);
const left = (text) => ({ text });
const right = (text) => ({ text, class: "number" });

/** @param {any} now the pipeline's object @returns {DocumentFragment} */
export function detailsOf(now) {
  const out = document.createDocumentFragment();
  const troubles = [
    ["Redis", now.redis],
    ["Store", now.store],
  ].filter(([, said]) => said && said !== "ok");
  for (const [name, said] of troubles) out.append(el("p", { class: "trouble" }, el("b", { text: `${name}: ` }), said));
  out.append(
    table(
      "pipeline-feeds",
      "Feeds",
      [left("Feed"), left("State"), right("Newest event"), left("Detail")],
      now.feeds.map((feed) => [
        feed.feed,
        mark(feedState(feed), feed.silent ? `silent (${feed.state})` : feed.state),
        feed.watermark_age_seconds === null ? "–" : `${lasting(feed.watermark_age_seconds)} ago`,
        feed.detail || "–",
      ]),
    ),
    table(
      "pipeline-streams",
      "Streams",
      [
        left("Stream"),
        right("Records/s"),
        right("Records"),
        right("Held"),
        right("MiB"),
        right("Lag"),
        right("Behind"),
        left("Slowest"),
      ],
      now.streams.map((stream) => [
        stream.topic,
        stream.records_per_second === null ? "–" : number(Math.round(stream.records_per_second)),
        number(stream.records),
        number(stream.entries),
        fixed(stream.bytes / 2 ** 20, 1),
        lasting(stream.lag_seconds),
        number(stream.lag_records),
        stream.slowest ?? "–",
      ]),
    ),
    table(
      "pipeline-workers",
      "Workers",
      [left("Worker"), left("Service"), left("State"), right("Heard"), left("Partitions")],
      now.workers.map((worker) => [
        worker.worker,
        worker.service,
        mark(worker.healthy ? "ok" : "bad", worker.healthy ? "alive" : worker.alive ? worker.why : "dead"),
        `${span(worker.age_seconds)} ago`,
        partitionsOf(worker.partitions),
      ]),
    ),
    table(
      "pipeline-counters",
      "Counters",
      [left("Stage"), left("What"), right("Records")],
      Object.entries(now.counters).flatMap(([stage, counts]) =>
        Object.entries(counts).map(([name, value]) => [stage, name.replaceAll("_", " "), number(value)]),
      ),
    ),
  );
  if (now.usage.length) {
    out.append(
      table(
        "pipeline-usage",
        "Cost today",
        [left("Feed"), left("State"), right("Cost"), right("Budget"), right("MiB")],
        now.usage.map((row) => [
          row.feed,
          row.state,
          `$${row.cost_usd.toFixed(4)}`,
          row.budget_usd ? `$${number(row.budget_usd)}` : "none",
          fixed(row.bytes / 2 ** 20, 1),
        ]),
      ),
    );
  }
  return out;
}

/** `0–7, 9`. */
function partitionsOf(list) {
  const parts = [];
  for (const value of [...list].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[1] === value - 1) last[1] = value;
    else parts.push([value, value]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ") || "–";
}

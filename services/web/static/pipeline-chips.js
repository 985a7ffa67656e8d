/** What each chip of the pipeline's strip says of the pipeline's object: a state, a few words, and why. */

import { lasting } from "./elements.js";
import { number, seconds, span } from "./format.js";

const LAG_WARN = 5;
const LAG_BAD = 60;
export const ICONS = { ok: "✓", warn: "!", bad: "✕", rest: "–", stale: "?", waiting: "…" };
/** States from the best to the worst. */
export const RANK = ["rest", "ok", "waiting", "warn", "stale", "bad"];
// Of a feed: it has nothing to say, and that is in order; or it gave up.
const RESTING = ["ended", "closed"];
const LOST = ["failed"];

/** @typedef {{state: string, text: string, why?: string, share?: number}} Chip */

/** How a feed is, in one word of the strip's. */
export function feedState(feed) {
  if (feed.silent || LOST.includes(feed.state)) return "bad";
  if (RESTING.includes(feed.state)) return "rest";
  return feed.state === "connected" ? "ok" : "warn";
}

/** @returns {Chip} */
function feeds(now) {
  if (!now.feeds.length)
    return { state: now.redis === "ok" ? "warn" : "stale", text: "none", why: "no feed has told of itself" };
  const states = now.feeds.map(feedState);
  const worst = states.reduce((a, b) => (RANK.indexOf(b) > RANK.indexOf(a) ? b : a));
  const ages = now.feeds
    .filter((feed) => feedState(feed) === "ok" && feed.watermark_age_seconds !== null)
    .map((feed) => feed.watermark_age_seconds);
  const odd = now.feeds.filter((feed) => !["ok", "rest"].includes(feedState(feed)));
  const why = now.feeds.map((feed) => `${feed.feed}: ${feed.silent ? "silent" : feed.state}`).join(", ");
  if (odd.length) {
    const [first] = odd;
    return {
      state: worst,
      text:
        odd.length > 1
          ? `${odd.length} of ${states.length} not live`
          : `${first.feed} ${first.silent ? "silent" : first.state}`,
      why,
    };
  }
  const text = `${states.length} ${now.feeds[0].state}`;
  return {
    state: worst,
    text: ages.length ? `${states.filter((state) => state === "ok").length} live, ${lasting(Math.max(...ages))}` : text,
    why,
  };
}

function lag(now) {
  if (now.lag_seconds === null) return { state: "stale", text: "unknown" };
  const slow = now.streams.filter((stream) => stream.slowest).sort((a, b) => b.lag_seconds - a.lag_seconds)[0];
  const state = now.lag_seconds >= LAG_BAD ? "bad" : now.lag_seconds >= LAG_WARN ? "warn" : "ok";
  return { state, text: lasting(now.lag_seconds), why: slow ? `${slow.slowest} on ${slow.topic}` : "nobody is behind" };
}

function workers(now) {
  const dead = now.workers.filter((worker) => !worker.alive);
  if (!now.workers.length) return { state: now.redis === "ok" ? "warn" : "stale", text: "none" };
  const alive = now.workers.length - dead.length;
  const stuck = now.workers.filter((worker) => worker.alive && !worker.healthy);
  if (stuck.length && !dead.length)
    return {
      state: "bad",
      text: `${alive} alive, ${stuck.length} stuck`,
      why: stuck.map((worker) => `${worker.worker}: ${worker.why}`).join("; "),
    };
  if (!dead.length) return { state: "ok", text: `${alive} alive` };
  // A worker that stopped leaves its last heartbeat; another one of its service may do its work.
  const lost = dead.filter((worker) => !now.workers.some((other) => other.alive && other.service === worker.service));
  return {
    state: lost.length ? "bad" : "warn",
    text: `${alive} alive, ${dead.length} dead`,
    why: dead.map((worker) => worker.worker).join(", "),
  };
}

function rate(now) {
  const known = now.streams.filter((stream) => stream.records_per_second !== null);
  const ticks = known.find((stream) => stream.topic === "ticks") ?? known[0];
  if (!ticks) return { state: now.redis === "ok" ? "rest" : "stale", text: "–" };
  return {
    state: ticks.records_per_second > 0 ? "ok" : "rest",
    text: `${number(Math.round(ticks.records_per_second))}/s`,
    why: `on the stream ${ticks.topic}`,
  };
}

function gaps(now) {
  const n = now.gaps.last_hour;
  if (n === null || n === undefined) return { state: "stale", text: "unknown" };
  const newest = now.gaps.newest;
  return {
    state: n ? "warn" : "ok",
    text: number(n),
    why: newest ? `newest: ${newest.feed}, ${newest.start.slice(0, 19)}Z, ${newest.reason}` : "none ever",
  };
}

function letters(now) {
  if (now.dead_letters === null || now.dead_letters === undefined) return { state: "stale", text: "unknown" };
  return { state: now.dead_letters ? "warn" : "ok", text: number(now.dead_letters) };
}

function cost(now) {
  if (!now.usage.length) return { state: "rest", text: "none" };
  const total = now.usage.reduce((sum, row) => sum + row.cost_usd, 0);
  const budgets = now.usage.filter((row) => row.budget_usd > 0);
  const share = Math.max(0, ...budgets.map((row) => row.cost_usd / row.budget_usd));
  const stopped = now.usage.some((row) => row.state === "stopped");
  const budget = budgets.length ? Math.max(...budgets.map((row) => row.budget_usd)) : 0;
  return {
    state: stopped ? "bad" : share >= 0.6 ? "warn" : "ok",
    share: budgets.length ? share : undefined,
    text: `$${total.toFixed(2)}${budget ? ` of $${number(budget)}` : ""}`,
    why: stopped ? "a feed was stopped at its budget" : undefined,
  };
}

function stores(now) {
  const odd = [
    ["Redis", now.redis],
    ["store", now.store],
  ].filter(([, said]) => said !== undefined && said !== "ok");
  if (odd.length) {
    const names = odd.map(([name]) => name).join(" and ");
    return { state: "bad", text: `no ${names}`, why: odd.map(([name, said]) => `${name}: ${said}`).join("; ") };
  }
  const old = now.newest ? seconds(now.time) - seconds(now.newest) : null;
  const why = old === null ? "the store has no candle" : `newest candle ${span(Math.max(0, old))} ago`;
  return { state: "ok", text: "ok", why };
}

/** Name, title and judge of each chip, in their order. */
export const CHIPS = [
  ["feeds", "Feeds", feeds],
  ["lag", "Lag", lag],
  ["workers", "Workers", workers],
  ["rate", "Records", rate],
  ["gaps", "Gaps 1 h", gaps],
  ["letters", "Dead letters", letters],
  ["cost", "Cost today", cost],
  ["store", "Redis, store", stores],
];

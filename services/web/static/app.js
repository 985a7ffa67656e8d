/**
 * The page: reads where it stands from the URL, draws the chart, then mounts the panels.
 *
 * A panel is a module with `mount(element, app)`, called once, after the first candles are drawn. `app` has:
 *
 * - `app.api.get(path, params?) -> Promise<object>`, `app.api.post(path, body)`; paths below `/api/v1` are written
 *   without it (`"/signals"`). Both throw `ApiError` (`status`, `code`, `message`: one line to show as it is). A 401 is
 *   handled by the page (it asks for the token); null and "" among the parameters are left out.
 * - `app.live.subscribe({channel, symbol, timeframe, history, since, after}, handlers) -> {close()}`; all but `channel`
 *   are optional. `handlers`, all optional: `snapshot(rows)` (what was held before is void), `rows(rows, skipped)`,
 *   `notice({code, message})`, `error({code, message})` (this subscription was refused), `state(name)` (the
 *   connection's, as below). After a lost connection it goes on where it was by itself.
 * - `app.state`, an EventTarget: `symbol` (an entry of /instruments: `name`, `underlying`, …; or null), `timeframe`,
 *   `theme` ("dark" or "light"), `palette` ("blue" or "green"), `connection` ("connecting", "live", "reconnecting",
 *   "offline", "denied"), `pipeline` (the newest object of the channel `pipeline`, or null: subscribe to it no second
 *   time), `meta` (of /meta). Events: "symbol", "timeframe", "theme" (also of the palette), "connection", "pipeline";
 *   and "mark" (detail `{layer, id}`) when somebody clicks a mark on the chart. `app.state.now()` is the server's time.
 * - `app.format`: the module format.js.
 * - `app.announce(text)`: has a screen reader say it, politely.
 * - `app.theme.colour(name) -> string`: a colour variable of style.css, resolved for a canvas: `colour("--up")`. The
 *   variables: --bg --panel --raised --line --text --muted --accent --up --down --unknown --ok --warn --bad --focus.
 * - `app.chart.mark(layer, marks)`: shows marks on the chart, in place of the layer's former ones. A mark:
 *   `{id, time, side, text, strong}`; `time` in unix seconds (of a signal: its window's end), `side` "buy", "sell" or
 *   "", `text` short. They are snapped to candles, and shown when the candles of that time are.
 *   `app.chart.goTo(time) -> Promise`: moves the chart there, loading what it needs.
 *
 * `window.tapeline` is this `app`, for people with a console and for tests.
 */

import { Api } from "./api.js";
import { Chart } from "./chart.js";
import * as format from "./format.js";
import { menuOf } from "./indicators.js";
import { Legend, spoken } from "./legend.js";
import { Live } from "./live.js";
import { Market } from "./market.js";
import { drawIndicators, drawKeys, drawView, tameMenus } from "./menus.js";
import { Picker } from "./picker.js";
import { State, asked, place } from "./state.js";
import { recall, remember } from "./store.js";
import { Table } from "./table.js";
import { Theme } from "./theme.js";
import { isTicker, labelOf, spokenOf, stepOf, windowOf } from "./timeframes.js";

const $ = (id) => document.getElementById(id);
const DEFAULT_TIMEFRAME = "1m";
const PANELS = [["pressure", "./heatmap.js"], ["signals", "./signals.js"], ["pipeline", "./pipeline.js"]];
const PATIENCE_MS = 1500;
/** Beyond the time in which a row is due: it has to be made and stored. */
const LATE_SECONDS = 8;

// A token that the server took is in a cookie by now; one that is still here was refused, and must not stay in sight.
const refused = new URLSearchParams(location.search).has("token");
if (refused) history.replaceState(null, "", location.pathname);
const state = new State();
const theme = new Theme();
const api = new Api(wantToken);
const live = new Live(async () => {
  try {
    await api.get("/meta");
    return true;
  } catch (error) {
    return error.status !== 401;
  }
});
const market = new Market(api, live);
const chart = new Chart($("chart"), market, theme);
const legend = new Legend($("legend"), market, chart);
const table = new Table($("table"), market, chart);
const picker = new Picker($("symbol"), $("symbols"), api, (instrument) => go(instrument, state.timeframe));

const app = {
  api, live, state, format, announce, theme,
  chart: {
    mark: (layer, marks) => chart.marks.set(layer, marks),
    async goTo(at) {
      await market.reach(at);
      chart.centre(at);
    },
  },
  /** For tests and people with a console. */
  get rows() {
    return market.bars.list.length;
  },
  get last() {
    return market.bars.last;
  },
  get marks() {
    return chart.marks.shown;
  },
  market, view: chart, ready: false, firstChartMs: 0,
};
window.tapeline = app;

async function start() {
  Object.assign(state, { theme: theme.name, palette: theme.palette });
  const { symbol, timeframe } = asked();
  const meta = api.get("/meta");
  listen();
  let first = symbol;
  if (!first) {
    const known = await patiently(() => meta, () => api.get("/meta"));
    first = known.default_symbol ?? (await api.get("/instruments", { limit: 1 })).instruments[0]?.name ?? "";
  }
  // Candles need no more than the two names: what else is known of them comes meanwhile.
  const chosen = Number.isFinite(stepOf(timeframe)) ? timeframe : DEFAULT_TIMEFRAME;
  const shown = first ? open({ name: first, rolling: null, underlying: null }, chosen, false) : nothing();
  state.meta = await patiently(() => meta, () => api.get("/meta"));
  market.timeframes = state.meta.timeframes;
  market.mostRows = state.meta.limits?.max_rows ?? market.mostRows;
  drawTimeframes();
  drawMenus();
  drawKeys($("keys"), state.meta.timeframes);
  if (first) identify(first);
  // The panels come after the first candles, but do not wait for a store that is away.
  await Promise.race([shown, new Promise((resolve) => setTimeout(resolve, PATIENCE_MS))]);
  await mountPanels();
  app.ready = true;
}

/** A server that does not answer yet will; what it refuses is said. */
async function patiently(now, again) {
  for (let ask = now; ; ask = again) {
    try {
      return await ask();
    } catch (error) {
      if (error.status !== 401) say("The server does not answer", `${error.message} Trying again.`);
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

async function mountPanels() {
  live.subscribe({ channel: "pipeline" }, { snapshot: pipelineIs, rows: pipelineIs });
  const mounted = PANELS.map(async ([id, module]) => (await import(module)).mount($(id), app));
  for (const { status, reason } of await Promise.allSettled(mounted)) {
    if (status === "rejected") console.error(reason);
  }
}

function pipelineIs(rows) {
  if (rows.length) state.setPipeline(rows[rows.length - 1]);
}

// What is shown.

/** Another symbol or timeframe, as the user asks for it. */
function go(instrument, timeframe) {
  if (instrument.name === state.symbol?.name && timeframe === state.timeframe) return;
  const fits = instrument.rolling === false && isTicker(timeframe) ? DEFAULT_TIMEFRAME : timeframe;
  open(instrument, fits, true);
  if (instrument.rolling === null) identify(instrument.name);
  announce(`${instrument.name}, ${spokenOf(fits)}`);
}

async function open(instrument, timeframe, step) {
  const before = [state.symbol, state.timeframe];
  Object.assign(state, { symbol: instrument, timeframe });
  picker.show(instrument.name);
  place(instrument.name, timeframe, themeOfUrl(), step);
  document.title = `${instrument.name} ${labelOf(timeframe)} · Tapeline`;
  if (before[0]?.name !== instrument.name) state.tell("symbol");
  if (before[1] !== timeframe) state.tell("timeframe");
  drawTimeframes();
  drawMenus();
  chart.setIndicators(indicators());
  market.extra = indicators();
  say("", "");
  const names = state.meta?.timeframes ?? [timeframe];
  const { exchange } = instrument;
  await market.show(instrument.name, timeframe, names, { rolling: instrument.rolling !== false, exchange });
  checkEmpty();
}

/** What the instruments say of a name that came from the URL. */
async function identify(name) {
  let found;
  try {
    const { instruments } = await api.get("/instruments", { q: name, limit: 200 });
    found = instruments.find((one) => one.name === name);
  } catch {
    return; // The chart says what is wrong.
  }
  if (state.symbol?.name !== name) return;
  state.symbol = found ?? { name, underlying: null, rolling: null, unknown: true };
  // Several exchanges may have a symbol of this name: with the one that is on the bus it is asked for again.
  if (found?.exchange && trouble && !market.bars.list.length) open(found, state.timeframe, false);
  else market.setRolling(state.symbol.rolling !== false);
  state.tell("symbol");
  drawTimeframes();
  checkEmpty();
}

function drawTimeframes() {
  const names = state.meta?.timeframes ?? [];
  const box = $("timeframes");
  if (box.childElementCount !== names.length) {
    box.replaceChildren(...names.map((name, i) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: labelOf(name), title: spokenOf(name) });
      button.dataset.timeframe = name;
      if (i < 9) button.setAttribute("aria-keyshortcuts", String(i + 1));
      button.addEventListener("click", () => state.symbol && go(state.symbol, name));
      return button;
    }));
  }
  for (const button of box.children) {
    const on = button.dataset.timeframe === state.timeframe;
    button.setAttribute("aria-pressed", String(on));
    if (on) button.scrollIntoView({ block: "nearest", inline: "nearest" });
    button.disabled = isTicker(button.dataset.timeframe) && state.symbol?.rolling === false;
  }
}

/** The chosen indicators that this timeframe has. */
function indicators() {
  const chosen = recall("indicators", []);
  const offered = menuOf(state.timeframe, state.meta?.features ?? chosen).flatMap(({ names }) => names);
  return chosen.filter((name) => offered.includes(name));
}

function drawMenus() {
  drawIndicators($("indicators"), state.timeframe, state.meta?.features ?? [], indicators(), async (names) => {
    const others = recall("indicators", []).filter((name) => !$(`indicator-${name}`));
    remember("indicators", [...others, ...names]);
    chart.setIndicators(names);
    market.extra = names;
    await market.fill(names).catch((error) => error.name !== "AbortError" && announce(error.message));
    legend.refresh();
  });
  drawView($("view"), theme, chart.marks, { help: () => $("help").showModal(), panels });
}

function panels() {
  const hidden = document.body.classList.toggle("no-panels");
  remember("panels", !hidden);
}

// Words in place of a chart.

function say(title, text, ...actions) {
  const box = $("message");
  box.hidden = !title;
  box.replaceChildren();
  if (!title) return;
  const heading = Object.assign(document.createElement("h2"), { textContent: title });
  const words = Object.assign(document.createElement("p"), { textContent: text });
  box.append(heading, words, ...actions);
}

function button(text, pressed) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", pressed);
  return made;
}

function nothing() {
  const retry = button("Look again", () => location.reload());
  say("There is no market data yet", "Start a feed: “tapeline demo” shows a synthetic market, “tapeline doctor” "
    + "says what a real one still needs. This page shows it as soon as there is any.", retry);
  const wait = setInterval(async () => {
    const found = await api.get("/instruments", { limit: 1 }).catch(() => ({ instruments: [] }));
    if (state.symbol || found.instruments.length) clearInterval(wait);
    if (!state.symbol && found.instruments.length) go(found.instruments[0], DEFAULT_TIMEFRAME);
  }, 3000);
}

function checkEmpty() {
  if (market.bars.list.length || !state.symbol || trouble) {
    if (!trouble) say("", "");
    return;
  }
  const { name, unknown } = state.symbol;
  const search = button("Search a symbol", () => picker.focus());
  if (unknown) {
    say(`No symbol “${name}”`, "No feed has told of it, and the store has no candles of it.", search);
  } else {
    const step = windowOf(state.timeframe);
    const first = step > 60 ? ` The first one comes at the end of its ${format.span(step)}.` : "";
    say(`No ${labelOf(state.timeframe)} candles of ${name} yet`, `They are shown here as they come.${first}`, search);
  }
}

let trouble = "";
/** What was last said of the connection, without numbers: a screen reader needs no count of seconds. */
let said = "";

function listen() {
  market.addEventListener("trouble", ({ detail }) => {
    trouble = detail;
    if (detail && !market.bars.list.length) say("No candles", detail, button("Try now", () => reopen()));
    if (!detail) checkEmpty();
    drawConnection();
  });
  market.addEventListener("loaded", () => {
    if (!app.firstChartMs && market.bars.list.length) {
      requestAnimationFrame(() => requestAnimationFrame(() => (app.firstChartMs = performance.now())));
    }
    checkEmpty();
    $("market").classList.toggle("detached", market.detached);
  });
  for (const name of ["reset", "change", "notice"]) market.addEventListener(name, drawConnection);
  market.addEventListener("change", () => !$("message").hidden && checkEmpty());
  chart.addEventListener("edge", () => market.older());
  chart.addEventListener("range", () => $("market").classList.toggle("away", !chart.atEnd || market.detached));
  chart.addEventListener("mark", ({ detail }) => state.tell("mark", detail));
  live.addEventListener("state", () => {
    state.connection = live.state;
    state.tell("connection");
    if (live.state === "denied") wantToken();
    drawConnection();
  });
  state.addEventListener("pipeline", drawConnection);
  theme.addEventListener("change", () => {
    Object.assign(state, { theme: theme.name, palette: theme.palette });
    if (themeOfUrl()) place(state.symbol?.name ?? "", state.timeframe, theme.name, false);
    drawMenus();
    state.tell("theme");
  });
  addEventListener("popstate", () => {
    const { symbol, timeframe } = asked();
    const chosen = Number.isFinite(stepOf(timeframe)) ? timeframe : DEFAULT_TIMEFRAME;
    if (symbol && (symbol !== state.symbol?.name || chosen !== state.timeframe)) {
      const same = symbol === state.symbol?.name;
      open(same ? state.symbol : { name: symbol, rolling: null, underlying: null }, chosen, false);
      identify(symbol);
    }
  });
  setInterval(drawConnection, 1000);
  document.body.classList.toggle("no-panels", !recall("panels", true));
  tameMenus();
  buttons();
  document.addEventListener("keydown", keys);
  $("chart").addEventListener("keydown", chartKeys);
}

const themeOfUrl = () => new URLSearchParams(location.search).get("theme") ? theme.name : "";

function reopen() {
  if (state.symbol) open(state.symbol, state.timeframe, false);
}

// How it stands with the connection, and how old the newest row is.

/** `[state, text]`: ok, wait or bad. */
function standing() {
  if (live.state === "offline") return ["bad", "offline: reconnects with the network"];
  if (live.state === "reconnecting") return ["wait", `reconnecting${age()}`];
  if (live.state === "denied") return ["bad", "a token is needed"];
  if (live.state === "connecting") return ["wait", "connecting"];
  if (trouble && !market.bars.list.length) return ["bad", "no history: trying again"];
  if (trouble) return ["wait", "live, older history failed"];
  if (market.detached) return ["wait", "history: Now goes back to live"];
  if (market.notice) return ["wait", market.notice];
  if (!market.bars.list.length) return ["wait", "no rows yet"];
  const late = lateness();
  if (late === 0) return ["ok", "live"];
  const feeds = state.pipeline?.feeds ?? [];
  const closed = feeds.length > 0 && feeds.every((feed) => feed.state === "closed" || feed.state === "ended");
  if (closed) return ["wait", `${feeds[0].state === "closed" ? "market closed" : "the recording has ended"}${age()}`];
  if (state.symbol?.rolling === false && flowing(feeds)) return ["wait", `quiet${age()}`];
  return ["bad", `stale${age()}`];
}

/** Whether the feeds tell that time goes on: then a contract without rows has no trades. */
function flowing(feeds) {
  const told = Date.now() - state.heardAt < LATE_SECONDS * 1000;
  return told && feeds.some((feed) => feed.state === "connected" && feed.watermark_age_seconds < LATE_SECONDS);
}

/** Seconds since the newest row, as soon as they are more than a row takes; else 0. */
function lateness() {
  const heard = market.heardAt ? (Date.now() - market.heardAt) / 1000 : state.now() - market.newest;
  const seconds = state.symbol?.rolling ? 1 : windowOf(state.timeframe);
  return heard > seconds + LATE_SECONDS ? heard : 0;
}

function age() {
  if (!market.bars.list.length) return "";
  const heard = market.heardAt ? (Date.now() - market.heardAt) / 1000 : state.now() - market.newest;
  return heard >= 2 ? `: last row ${format.span(heard)} ago` : "";
}

function drawConnection() {
  const [level, text] = standing();
  const box = $("connection");
  box.dataset.state = level;
  box.dataset.connection = live.state;
  $("market").classList.toggle("stale", level === "bad" || live.state === "reconnecting");
  const words = $("connection-text");
  if (words.textContent !== text) words.textContent = text;
  const short = level === "ok" ? "live" : text.split(":")[0];
  if (said && short !== said) announce(short);
  said = short;
  box.title = level === "ok" ? `Newest: ${format.when(market.newest, 1)} UTC` : trouble || live.reason || text;
}

function announce(text) {
  const box = $("announcer");
  box.textContent = "";
  // The same words twice are said twice only if they went away in between.
  requestAnimationFrame(() => (box.textContent = text));
}

function wantToken() {
  const box = $("token");
  if (box.open) return;
  $("token-refused").hidden = !refused;
  box.showModal();
}

// Buttons and keys.

function toggleTable() {
  table.show(!table.visible);
  $("table-button").setAttribute("aria-pressed", String(table.visible));
  $("market").classList.toggle("with-table", table.visible);
}

async function toNow() {
  await market.now();
  chart.unselect();
  chart.newest();
}

function buttons() {
  $("table-button").addEventListener("click", toggleTable);
  $("now").addEventListener("click", toNow);
  $("fit").addEventListener("click", () => chart.fit());
}

const sayNewest = () => announce(spoken(market.bars.last, market, chart.digits));

const SHORTCUTS = {
  "/": () => picker.focus(), n: toNow, f: () => chart.fit(), t: toggleTable, d: () => theme.toggle(), p: panels,
  s: sayNewest, "?": () => $("help").showModal(),
};

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest?.("input, textarea, select, dialog")) return;
  const timeframe = /^[1-9]$/.test(event.key) ? state.meta?.timeframes[Number(event.key) - 1] : undefined;
  const does = SHORTCUTS[event.key.toLowerCase()];
  if (!does && !timeframe) return;
  event.preventDefault();
  if (does) does();
  else if (state.symbol && !(isTicker(timeframe) && state.symbol.rolling === false)) go(state.symbol, timeframe);
}

function chartKeys(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9 }[event.key];
  if (event.key === "Escape") chart.unselect();
  else if (event.key === "+" || event.key === "=") chart.zoom(0.8);
  else if (event.key === "-") chart.zoom(1.25);
  else if (step === undefined) return;
  else if (event.shiftKey) chart.scroll(step * 10);
  else announce(spoken(chart.step(step), market, chart.digits));
  event.preventDefault();
}

start();

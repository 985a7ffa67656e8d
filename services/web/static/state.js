/** What the page shows, and where it stands; the URL holds symbol, timeframe and theme. */

import { recall, remember } from "./store.js";

export class State extends EventTarget {
  constructor() {
    super();
    /** @type {{name: string, underlying: string | null, rolling: boolean | null} & Record<string, any> | null} */
    this.symbol = null;
    this.timeframe = "";
    this.theme = "dark";
    this.palette = "blue";
    this.connection = "connecting";
    /** @type {Record<string, any> | null} */
    this.pipeline = null;
    /** When the pipeline was last heard of, this machine's ms. */
    this.heardAt = 0;
    /** @type {Record<string, any> | null} */
    this.meta = null;
  }

  #ahead = 0;

  /** Server time, unix seconds; this machine's clock may be wrong. */
  now() {
    return Date.now() / 1000 + this.#ahead;
  }

  /** @param {Record<string, any>} pipeline */
  setPipeline(pipeline) {
    this.heardAt = Date.now();
    this.pipeline = pipeline;
    const at = Date.parse(pipeline.time) / 1000;
    if (Number.isFinite(at)) this.#ahead = at - Date.now() / 1000;
    this.tell("pipeline");
  }

  tell(name, detail = undefined) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** Symbol and timeframe as the URL asks for them, or as they were last. */
export function asked() {
  const query = new URLSearchParams(location.search);
  const last = recall("last", {}) ?? {};
  return {
    symbol: query.get("symbol") ?? last.symbol ?? "", timeframe: query.get("timeframe") ?? last.timeframe ?? "",
  };
}

/**
 * @param {string} symbol @param {string} timeframe @param {string} theme "" leaves it out
 * @param {boolean} step whether it is a new entry of the history
 */
export function place(symbol, timeframe, theme, step) {
  const query = new URLSearchParams({ symbol, timeframe });
  if (theme) query.set("theme", theme);
  // A colon is legal in a query, and `deribit:BTC-PERPETUAL` is easier to read with it.
  const url = `${location.pathname}?${query.toString().replaceAll("%3A", ":")}`;
  if (url !== location.pathname + location.search) history[step ? "pushState" : "replaceState"](null, "", url);
  remember("last", { symbol, timeframe });
}

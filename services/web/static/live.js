/**
 * One WebSocket for the whole page. It opens at once, comes back by itself, and each subscription goes on behind the
 * last id that it had. What the server sends is passed on as it is: a `snapshot` voids what was there before.
 */

const PING_MS = 5_000;
const SILENT_MS = 12_000;
const FIRST_MS = 400;
const LONGEST_MS = 10_000;
const UNAUTHORIZED = 4001;
const TOO_MANY = 4029;

/**
 * @typedef {{channel: string, symbol?: string, timeframe?: string, history?: number, since?: string | (() => string),
 *   after?: string}} Ask `since` as a function is asked anew whenever the subscription starts again.
 * @typedef {{snapshot?: (rows: object[]) => void, resumed?: () => void,
 *   rows?: (rows: object[], skipped: number) => void, notice?: (notice: object) => void,
 *   error?: (error: object) => void, state?: (name: string) => void}} Handlers
 */

export class Live extends EventTarget {
  /** @param {() => Promise<boolean>} allowed whether the server lets this page in, asked when a connection fails */
  constructor(allowed = async () => true) {
    super();
    this.state = "connecting";
    this.reason = "";
    this.allowed = allowed;
    this.#subs = new Map();
    this.#next = 1;
    this.#fails = 0;
    this.#heard = 0;
    addEventListener("online", () => this.#hurry());
    addEventListener("offline", () => this.#lost("offline", "This device is offline."));
    addEventListener("pageshow", (event) => event.persisted && this.#hurry());
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.#awake());
    setInterval(() => this.#beat(), PING_MS);
    this.#open();
  }

  /** @type {Map<string, {ask: Ask, handlers: Handlers, after: string}>} */ #subs;
  #next;
  #fails;
  #heard;
  /** @type {WebSocket | null} */ #socket = null;
  #timer = 0;

  /** @param {Ask} ask @param {Handlers} handlers @returns {{close: () => void}} */
  subscribe(ask, handlers) {
    const sub = `s${this.#next++}`;
    this.#subs.set(sub, { ask, handlers, after: ask.after ?? "" });
    if (this.state === "live") this.#subscribe(sub);
    return {
      close: () => {
        if (this.#subs.delete(sub)) this.#send({ op: "unsubscribe", sub });
      },
    };
  }

  /** Forget the waiting time and try now. */
  retry() {
    this.#fails = 0;
    this.#hurry();
  }

  #subscribe(sub) {
    const { ask, after } = this.#subs.get(sub);
    const { since, ...rest } = ask;
    const message = { op: "subscribe", sub, ...rest, after };
    // Said even beside a place: where the place cannot be honoured, a snapshot of this comes.
    if (since) message.since = typeof since === "function" ? since() : since;
    if (!after) delete message.after;
    this.#send(message);
  }

  #send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #open() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (navigator.onLine === false) return this.#say("offline", "This device is offline.");
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/api/v1/ws`);
    this.#socket = socket;
    this.#heard = Date.now();
    socket.onopen = () => {
      this.#heard = Date.now();
      this.#say("live", "");
      for (const sub of this.#subs.keys()) this.#subscribe(sub);
    };
    socket.onmessage = (event) => {
      this.#heard = Date.now();
      this.#fails = 0;
      this.#hear(JSON.parse(event.data));
    };
    socket.onclose = (event) => {
      if (this.#socket === socket) this.#closed(event.code, event.reason);
    };
  }

  #hear(message) {
    const found = this.#subs.get(message.sub ?? "");
    if (message.op === "error" && !message.sub) console.warn(`live: ${message.message}`);
    if (!found) return;
    if (message.id) found.after = message.id;
    const { handlers } = found;
    if (message.op === "snapshot") handlers.snapshot?.(message.rows);
    else if (message.op === "rows") handlers.rows?.(message.rows, message.skipped ?? 0);
    else if (message.op === "resumed") handlers.resumed?.();
    else if (message.op === "notice") handlers.notice?.(message);
    else if (message.op === "error") handlers.error?.(message);
  }

  async #closed(code, reason) {
    this.#socket = null;
    const denied = code === UNAUTHORIZED || !(await this.allowed());
    if (this.#socket !== null) return;
    if (denied) return this.#say("denied", reason || "A token is needed.");
    this.#lost("reconnecting", reason || "The connection was lost.", code === TOO_MANY ? LONGEST_MS : 0);
  }

  /** Not connected: say so, and come back after a while that grows and is never the same for all pages. */
  #lost(state, reason, least = 0) {
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    this.#say(state, reason);
    const wait = Math.max(least, Math.min(LONGEST_MS, FIRST_MS * 2 ** this.#fails));
    this.#fails += 1;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#open(), wait * (0.5 + Math.random() / 2));
  }

  #hurry() {
    if (this.#socket === null) this.#open();
  }

  /** A page that slept cannot trust its socket: only an answer tells. */
  #awake() {
    if (this.#socket === null) return this.#hurry();
    if (Date.now() - this.#heard > SILENT_MS) return this.#lost("reconnecting", "This page was asleep.");
    return this.#send({ op: "ping", t: Date.now() });
  }

  #beat() {
    if (this.#socket === null) return;
    if (Date.now() - this.#heard > SILENT_MS) this.#lost("reconnecting", "The server fell silent.");
    else this.#send({ op: "ping", t: Date.now() });
  }

  #say(state, reason) {
    const changed = state !== this.state;
    [this.state, this.reason] = [state, reason];
    if (!changed) return;
    this.dispatchEvent(new Event("state"));
    for (const { handlers } of this.#subs.values()) handlers.state?.(state);
  }
}

/** Numbers and instants as people read them. Times are UTC, unix seconds unless a name says otherwise. */

const NONE = "–";
const DAYS = 86_400;
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/** Whether a value is a number that can be drawn. */
export const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Unix seconds of an ISO text; NaN for none. */
export const seconds = (text) => (text ? Date.parse(text) / 1000 : NaN);

/** ISO text of unix seconds, to the second: `2026-11-21T14:31:00Z`. */
export const iso = (at) => `${new Date(Math.floor(at) * 1000).toISOString().slice(0, 19)}Z`;

/** Decimals that the prices need, at most 8. */
export function digitsOf(prices) {
  let most = 0;
  for (const price of prices) {
    if (!known(price)) continue;
    const text = price.toFixed(8).replace(/0+$/, "");
    most = Math.max(most, text.length - text.indexOf(".") - 1);
  }
  return Math.min(8, most);
}

/** A price with fixed decimals and thin grouping: `6,012.25`. */
export function price(value, digits = 2) {
  if (!known(value)) return NONE;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Any quantity, short: `1,234`, `12.3k`, `4.56M`, `0.0123`. */
export function number(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e9) return `${trim(value / 1e9)}B`;
  if (size >= 1e6) return `${trim(value / 1e6)}M`;
  if (size >= 1e5) return `${trim(value / 1e3)}k`;
  if (size === 0 || Number.isInteger(value)) return value.toLocaleString("en-US");
  if (size >= 100) return value.toLocaleString("en-US", { maximumFractionDigits: 1 });
  return value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
}

/** As `number`, always with its sign: `+12.5`, `−3`. */
export function signed(value) {
  if (!known(value)) return NONE;
  return value > 0 ? `+${number(value)}` : value < 0 ? `−${number(-value)}` : "0";
}

const trim = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 3 });

/** `14:31` or `14:31:05`. */
export function clock(at, withSeconds = true) {
  if (!known(at)) return NONE;
  return new Date(at * 1000).toISOString().slice(11, withSeconds ? 19 : 16);
}

/** `21 Nov 2026`. */
export function day(at) {
  if (!known(at)) return NONE;
  const date = new Date(at * 1000);
  return `${date.getUTCDate()} ${MONTHS[date.getUTCMonth()]} ${date.getUTCFullYear()}`;
}

/** Date and time as far as they are needed: a day's candle has no clock. */
export function when(at, step = 60) {
  return step >= DAYS ? day(at) : `${day(at)} ${clock(at, step < 60)}`;
}

/** A duration: `8 s`, `12 min`, `3 h`, `2 d`. */
export function span(length) {
  const size = Math.max(0, Math.round(length));
  if (size < 90) return `${size} s`;
  if (size < 5400) return `${Math.round(size / 60)} min`;
  if (size < 2 * DAYS) return `${Math.round(size / 3600)} h`;
  return `${Math.round(size / DAYS)} d`;
}

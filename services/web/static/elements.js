/** Small helpers of the panels: elements made in script (text is never parsed as HTML), and what all of them show. */

import { known, span } from "./format.js";

/**
 * An element. Attributes as in HTML; `class`, `text`, `on` (event -> handler), and a property where the value is no
 * text (`disabled: true`, `hidden: false`). Children: nodes, texts; null is left out.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Node|string|null|undefined)} children
 * @returns {any}
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (typeof value === "boolean" && name in node) node[name] = value;
    else node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets a property or attribute only when it differs, so that a screen reader is not told twice. */
export function put(node, name, value) {
  if (name === "text") {
    if (node.textContent !== value) node.textContent = value;
  } else if (value === null) {
    node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) {
    node.setAttribute(name, String(value));
  }
}

/** A select of `[value, text]` pairs with a visible label. */
export function choice(label, id, options, value, onchange) {
  const select = el("select", { "data-testid": id, on: { change: () => onchange(select.value) } });
  fill(select, options, value);
  return { select, label: el("label", { class: "field" }, el("span", { text: label }), select) };
}

/** The options of a select, in place of the former ones; keeps what was chosen where it is still there. */
export function fill(select, options, value = select.value) {
  const same =
    select.options.length === options.length &&
    options.every(([v, text], i) => {
      const option = select.options[i];
      return option.value === v && option.textContent === text;
    });
  if (!same) select.replaceChildren(...options.map(([v, text]) => el("option", { value: v, text })));
  select.value = options.some(([v]) => v === value) ? value : (options[0]?.[0] ?? "");
}

/** A table from a list of heads (`{text, class}`) and of rows of texts or nodes. */
export function table(id, caption, heads, rows) {
  const cell = (tag, content, head, attributes = {}) =>
    el(tag, { class: head.class ?? null, ...attributes }, content instanceof Node ? content : String(content ?? "–"));
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    el(
      "table",
      { class: "plain", "data-testid": id },
      el("caption", { text: caption }),
      el("thead", {}, el("tr", {}, ...heads.map((head) => cell("th", head.text, head, { scope: "col" })))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((content, i) => cell("td", content, heads[i]))))),
    ),
  );
}

/** A number with so many digits behind the point, "–" when undefined; `sign`: with a plus. */
export function fixed(value, digits = 0, sign = false) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  const text = size.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  if (Number(size.toFixed(digits)) === 0) return text;
  return (value < 0 ? "−" : sign ? "+" : "") + text;
}

/** A strike as people write it: without a needless ".0". */
export const strikeText = (strike) => strike.toLocaleString("en-US", { maximumFractionDigits: 6, useGrouping: false });

// Of an instant as the stores tell it (`2026-11-21T14:31:00Z`): `21 Nov`, `14:31`, `18 Dec 26`.
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
export const dayOf = (text) => `${Number(text.slice(8, 10))} ${MONTHS[Number(text.slice(5, 7)) - 1]}`;
export const minuteOf = (text) => text.slice(11, 16);
export const expiryOf = (text) => `${dayOf(text)} ${text.slice(2, 4)}`;

/** A duration with tenths where it is short. */
export const lasting = (length) =>
  !known(length) ? "–" : length < 9.95 ? `${Math.max(0, length).toFixed(1)} s` : span(length);

/** Runs `work` once in the next frame, however often it is asked to. */
export function soon(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    const run = () => {
      if (!asked) return;
      asked = false;
      work();
    };
    // A hidden page has no frames; what tests and screen readers ask for must be there all the same.
    if (document.hidden) setTimeout(run, 0);
    else requestAnimationFrame(run);
  };
}

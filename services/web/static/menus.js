/** The menus of the top bar: indicators, view; and the help with its keys. */

import { hasFeatures, menuOf, titleOf } from "./indicators.js";
import { isTicker, labelOf } from "./timeframes.js";

const KEYS = [
  ["/", "search a symbol"], ["← →", "candle by candle (chart focused)"],
  ["Shift + ← →", "scroll"], ["+ −", "zoom"], ["Home, End", "oldest loaded, newest"],
  ["N", "to the newest candle"], ["F", "fit all loaded candles"], ["S", "say the newest candle (screen reader)"], ["T", "table of candles"],
  ["D", "dark or light"], ["P", "panels"], ["?", "this help"], ["Esc", "close; no candle selected"],
];
const SIGNS = [
  ["○ below, above", "big trades of buyers, of sellers; the number is their volume"],
  ["▲ ▼ with text", "a signal: buy, sell"],
  ["■ L, S", "liquidated longs, shorts"],
  ["hatched", "incomplete: something was not received"],
  ["hollow", "forming: not closed yet"],
  ["a frame that fades", "corrected in place by a late trade"],
];

/** One open menu at a time; Escape and a click elsewhere close it. */
export function tameMenus() {
  const menus = [...document.querySelectorAll("details.menu")];
  const close = (but) => menus.forEach((menu) => menu !== but && menu.removeAttribute("open"));
  document.addEventListener("pointerdown", (event) => close(event.target.closest?.("details.menu")));
  for (const menu of menus) {
    menu.addEventListener("toggle", () => menu.open && close(menu));
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      menu.removeAttribute("open");
      menu.querySelector("summary").focus();
    });
    menu.addEventListener("focusout", (event) => {
      if (event.relatedTarget && !menu.contains(event.relatedTarget)) menu.removeAttribute("open");
    });
  }
}

/**
 * @param {HTMLElement} element @param {string} timeframe @param {string[]} features @param {string[]} chosen
 * @param {(names: string[]) => void} changed
 */
export function drawIndicators(element, timeframe, features, chosen, changed) {
  element.replaceChildren();
  const picked = new Set(chosen);
  if (!isTicker(timeframe) && !hasFeatures(timeframe)) {
    element.append(text("p", "note", "Features are computed for 15s and 1m candles."));
  }
  for (const { group, names } of menuOf(timeframe, features)) {
    const set = document.createElement("fieldset");
    set.append(text("legend", "", group));
    for (const name of names) {
      set.append(check(`indicator-${name}`, titleOf(name), picked.has(name), (on) => {
        picked[on ? "add" : "delete"](name);
        changed([...picked]);
      }));
    }
    element.append(set);
  }
  const clear = document.createElement("button");
  clear.type = "button";
  clear.textContent = "None";
  clear.addEventListener("click", () => {
    changed([]);
    drawIndicators(element, timeframe, features, [], changed);
  });
  element.append(clear);
}

/**
 * @param {HTMLElement} element @param {import("./theme.js").Theme} theme @param {import("./marks.js").Marks} marks
 * @param {{help: () => void, panels: () => void}} actions
 */
export function drawView(element, theme, marks, actions) {
  element.replaceChildren(
    choice("theme", "Theme", [["dark", "Dark"], ["light", "Light"]], theme.name, (name) => theme.set(name)),
    choice("palette", "Up and down", [["blue", "Blue, orange"], ["green", "Green, red"]], theme.palette,
      (name) => theme.setPalette(name)),
  );
  const shown = document.createElement("fieldset");
  shown.append(text("legend", "", "Marks"));
  for (const [layer, title] of [["big", "Big trades"], ["liquidation", "Liquidations"], ["signals", "Signals"]]) {
    shown.append(check(`marks-${layer}`, title, !marks.hidden.has(layer), (on) => marks.show(layer, on)));
  }
  element.append(shown, button("Panels (P)", actions.panels), button("Keys and signs (?)", actions.help));
}

/** @param {HTMLElement} list */
export function drawKeys(list, timeframes) {
  list.replaceChildren();
  for (const [key, does] of KEYS) list.append(text("dt", "", key), text("dd", "", does));
  const names = timeframes.slice(0, 9).map((name, i) => `${i + 1}: ${labelOf(name)}`).join(", ");
  list.append(text("dt", "", "1 … 9"), text("dd", "", names));
  for (const [sign, means] of SIGNS) list.append(text("dt", "", sign), text("dd", "", means));
}

function choice(name, title, options, now, changed) {
  const set = document.createElement("fieldset");
  set.className = "choice";
  set.append(text("legend", "", title));
  for (const [value, label] of options) {
    const item = document.createElement("label");
    const checked = value === now;
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value, checked });
    input.addEventListener("change", () => changed(value));
    item.append(input, label);
    set.append(item);
  }
  return set;
}

function check(id, title, checked, changed) {
  const item = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "checkbox", id, checked });
  input.addEventListener("change", () => changed(input.checked));
  item.append(input, title);
  return item;
}

function button(title, pressed) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: title });
  made.addEventListener("click", pressed);
  return made;
}

function text(tag, name, content) {
  return Object.assign(document.createElement(tag), { className: name, textContent: content });
}

/** Draws option pressure on a canvas: two lanes per window (put/call ratio, net premium) over the map of the strikes. */

import { LIMIT, at, rowOfPrice } from "./pressure-grid.js";
import { dayOf, minuteOf, strikeText } from "./elements.js";
import { number, seconds } from "./format.js";

const LANE = 26;
const GAP = 7;
const AXIS = 20;
const FONT = "11px system-ui, sans-serif";

/** @typedef {{left: number, right: number, top: number, cell: number, line: number, width: number, height: number,
 *   lanes: {ratio: number, net: number}}} Layout */

/** Where everything goes, in CSS pixels. @returns {Layout} */
export function layoutOf(width, columns, strikes) {
  const narrow = width < 520;
  const left = narrow ? 52 : 66;
  const right = narrow ? 6 : 60;
  const room = Math.max(40, width - left - right);
  const cell = Math.min(room / Math.max(1, columns), narrow ? 30 : 44);
  const line = strikes > 28 ? 14 : narrow && strikes > 12 ? 15 : narrow || strikes > 16 ? 17 : 21;
  const ratio = 4;
  const net = ratio + LANE + GAP;
  const top = net + LANE + GAP + 2;
  return { left, right, top, cell, line, width, height: top + strikes * line + AXIS, lanes: { ratio, net } };
}

/** How many windows fit. */
export const columnsThatFit = (width) => {
  const narrow = width < 520;
  return Math.max(4, Math.floor((width - (narrow ? 58 : 126)) / (narrow ? 16 : 22)));
};

/** The place under a point, or null. */
export function hit(layout, x, y, columns, strikes) {
  const column = Math.floor((x - layout.left) / layout.cell);
  if (column < 0 || column >= columns) return null;
  const row = Math.floor((y - layout.top) / layout.line);
  return { column, row: row < 0 ? -1 : row < strikes ? row : -1 };
}

/** Colours of the map, resolved from the page's variables. */
export function coloursOf(theme) {
  const names = ["panel", "line", "text", "muted", "up", "down", "unknown", "focus", "accent"];
  return Object.fromEntries(names.map((name) => [name, theme.colour(`--${name}`)]));
}

const parsed = new Map();

/** Red, green, blue of any CSS colour. */
function rgb(text) {
  if (!parsed.has(text)) {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    parsed.set(text, [...context.getImageData(0, 0, 1, 1).data].slice(0, 3));
  }
  return parsed.get(text);
}

function mix(from, to, share) {
  const [a, b] = [rgb(from), rgb(to)];
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(",")})`;
}

/** The colour of a log ratio: grey at 0, and as far from it to either side. */
export function ratioColour(log, c) {
  const grey = mix(c.panel, c.muted, 0.45);
  return mix(grey, log > 0 ? c.up : c.down, Math.min(Math.abs(log) / LIMIT, 1));
}

function hatch(context, colour) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 12;
  const t = tile.getContext("2d");
  t.strokeStyle = colour;
  t.lineWidth = 2;
  for (const shift of [-12, 0, 12]) {
    t.beginPath();
    t.moveTo(shift - 1, 13);
    t.lineTo(shift + 13, -1);
    t.stroke();
  }
  const pattern = context.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(0.5));
  return pattern;
}

/** The weight that fills a cell: nearly the largest, so that one giant does not make all others dots. */
export function fullWeight(cells, measure) {
  const weights = cells.map((cell) => cell[measure]).sort((a, b) => a - b);
  return weights.length ? Math.max(weights[Math.floor((weights.length - 1) * 0.97)], Number.MIN_VALUE) : 1;
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {{columns: any[], strikes: number[], cells: Map<string, any>, measure: "volume"|"premium",
 *   cursor: {column: number, row: number}|null, focused: boolean, colours: any, layout: Layout}} what
 */
export function draw(canvas, what) {
  const { columns, strikes, cells, colours: c, layout } = what;
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(layout.width * scale), Math.round(layout.height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${layout.height}px`;
  }
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, layout.width, layout.height);
  g.font = FONT;
  g.textBaseline = "middle";
  const x = (i) => layout.left + i * layout.cell;
  const bottom = layout.top + strikes.length * layout.line;
  const end = x(columns.length);

  // Frames, lines of the strikes, and the labels to the left.
  g.fillStyle = mix(c.panel, c.line, 0.35);
  for (const top of [layout.lanes.ratio, layout.lanes.net]) g.fillRect(layout.left, top, end - layout.left, LANE);
  g.fillRect(layout.left, layout.top, end - layout.left, bottom - layout.top);
  g.fillStyle = c.panel;
  for (let row = 1; row < strikes.length; row++) {
    g.fillRect(layout.left, Math.round(layout.top + row * layout.line) - 0.5, end - layout.left, 1);
  }
  g.textAlign = "right";
  g.fillStyle = c.muted;
  const every = layout.line >= 14 ? 1 : 2;
  strikes.forEach((strike, row) => {
    if (row % every === 0) g.fillText(strikeText(strike), layout.left - 6, layout.top + (row + 0.5) * layout.line);
  });

  const broken = hatch(g, mix(c.panel, c.muted, 0.55));
  columns.forEach((column, i) => {
    if (column.complete) return;
    g.fillStyle = broken;
    for (const [top, height] of [
      [layout.lanes.ratio, LANE],
      [layout.lanes.net, LANE],
      [layout.top, bottom - layout.top],
    ]) {
      g.fillRect(x(i), top, layout.cell, height);
    }
  });

  drawCells(g, what, x);
  drawRatio(g, what, x);
  drawNet(g, what, x);
  drawAxis(g, what, x, bottom);
  drawPrice(g, what, x, bottom);
  drawCursor(g, what, x, bottom);
}

function drawCells(g, { columns, strikes, cells, measure, colours: c, layout }, x) {
  const shown = [];
  columns.forEach((column, i) => {
    strikes.forEach((strike, row) => {
      const cell = cells.get(at(column.time, strike));
      if (cell) shown.push([i, row, cell]);
    });
  });
  const full = fullWeight(
    shown.map(([, , cell]) => cell),
    measure,
  );
  const slash = hatch(g, c.panel);
  for (const [i, row, cell] of shown) {
    const [left, top] = [x(i) + 0.5, layout.top + row * layout.line + 0.5];
    const [w, h] = [layout.cell - 1, layout.line - 1];
    const colour = ratioColour(cell.log, c);
    g.fillStyle = mix(c.panel, colour, 0.3);
    g.fillRect(left, top, w, h);
    const share = 0.3 + 0.7 * Math.sqrt(Math.min(Math.max(cell[measure], 0) / full, 1));
    const [sw, sh] = [Math.max(3, w * share), Math.max(3, h * share)];
    const box = [left + (w - sw) / 2, top + (h - sh) / 2, sw, sh];
    g.fillStyle = colour;
    g.beginPath();
    g.roundRect(...box, Math.min(2, sw / 4));
    g.fill();
    if (!cell.complete) {
      g.fillStyle = slash;
      g.fill();
    }
    // Plus and minus say the same as the colour.
    if (Math.abs(cell.log) >= 0.4 && sw >= 9 && sh >= 8) {
      const [mx, my] = [left + w / 2, top + h / 2];
      g.strokeStyle = c.panel;
      g.lineWidth = 1.5;
      g.beginPath();
      g.moveTo(mx - 3, my);
      g.lineTo(mx + 3, my);
      if (cell.log > 0) {
        g.moveTo(mx, my - 3);
        g.lineTo(mx, my + 3);
      }
      g.stroke();
    }
  }
}

function laneLabel(g, layout, top, text, below, c) {
  g.textAlign = "right";
  g.fillStyle = c.text;
  g.fillText(text, layout.left - 6, top + LANE / 2 - (below ? 6 : 0));
  g.fillStyle = c.muted;
  if (below) g.fillText(below, layout.left - 6, top + LANE / 2 + 7);
}

/** Put/call ratio: a line on a scale of powers of two around 1, dots where no line can be. */
function drawRatio(g, { columns, colours: c, layout }, x) {
  const top = layout.lanes.ratio;
  const middle = top + LANE / 2;
  laneLabel(g, layout, top, "Put/call", "8 … ⅛", c);
  g.strokeStyle = c.muted;
  g.lineWidth = 1;
  g.setLineDash([2, 3]);
  g.beginPath();
  g.moveTo(layout.left, middle);
  g.lineTo(x(columns.length), middle);
  g.stroke();
  g.setLineDash([]);
  g.strokeStyle = g.fillStyle = c.accent;
  g.lineWidth = 1.75;
  let before = null;
  columns.forEach((column, i) => {
    const ratio = column.rollup?.put_call_ratio;
    if (column.afterBreak) before = null;
    if (ratio === null || ratio === undefined) {
      before = null;
      return;
    }
    const share = Math.max(-3, Math.min(3, Math.log2(Math.max(ratio, 1e-9)))) / 3;
    const point = [x(i) + layout.cell / 2, middle - share * (LANE / 2 - 3)];
    if (before) {
      g.beginPath();
      g.moveTo(...before);
      g.lineTo(...point);
      g.stroke();
    }
    g.beginPath();
    g.arc(...point, 2, 0, 2 * Math.PI);
    g.fill();
    before = point;
  });
}

/** Net premium: bars from the middle, up is bullish. */
function drawNet(g, { columns, colours: c, layout }, x) {
  const top = layout.lanes.net;
  const middle = top + LANE / 2;
  const most = Math.max(...columns.map((column) => Math.abs(column.rollup?.net_premium ?? 0)), 0);
  laneLabel(g, layout, top, layout.left < 60 ? "Net pr." : "Net prem.", most ? `±${number(most)}` : "", c);
  columns.forEach((column, i) => {
    const value = column.rollup?.net_premium;
    if (!value || !most) return;
    const height = Math.max(1, (Math.abs(value) / most) * (LANE / 2 - 2));
    const width = Math.max(2, Math.min(layout.cell - 3, 18));
    g.fillStyle = value > 0 ? c.up : c.down;
    g.fillRect(x(i) + (layout.cell - width) / 2, value > 0 ? middle - height : middle, width, height);
  });
  g.fillStyle = c.muted;
  g.fillRect(layout.left, middle - 0.5, x(columns.length) - layout.left, 1);
}

function drawAxis(g, { columns, colours: c, layout }, x, bottom) {
  const taken = [];
  const label = (i, text, colour) => {
    const width = g.measureText(text).width;
    const middle = Math.min(Math.max(x(i) + layout.cell / 2, layout.left + width / 2), layout.width - width / 2 - 2);
    const [from, to] = [middle - width / 2 - 8, middle + width / 2 + 8];
    if (taken.some(([a, b]) => from < b && to > a)) return;
    taken.push([from, to]);
    g.textAlign = "center";
    g.fillStyle = colour;
    g.fillText(text, middle, bottom + AXIS / 2 + 1);
  };
  columns.forEach((column, i) => {
    if (i > 0 && (column.afterBreak || column.newDay)) {
      g.strokeStyle = c.muted;
      g.lineWidth = 1;
      g.setLineDash(column.afterBreak ? [3, 3] : []);
      g.beginPath();
      g.moveTo(Math.round(x(i)) - 0.5, layout.lanes.ratio);
      g.lineTo(Math.round(x(i)) - 0.5, bottom);
      g.stroke();
      g.setLineDash([]);
    }
    if (column.newDay)
      label(
        i,
        `${dayOf(column.time)} ${layout.cell * columns.length > 300 ? minuteOf(column.time) : ""}`.trim(),
        c.text,
      );
  });
  const step = Math.max(1, Math.ceil(48 / layout.cell));
  columns.forEach((column, i) => {
    const length = seconds(column.end) - seconds(column.time) || 1;
    if (Math.round(seconds(column.time) / length) % step === 0) label(i, minuteOf(column.time), c.muted);
  });
}

/** The underlying's price over the strikes, and what it is at the end. */
function drawPrice(g, { columns, strikes, colours: c, layout }, x) {
  const pieces = [[]];
  let last = null;
  columns.forEach((column, i) => {
    const row = rowOfPrice(strikes, column.price);
    if (column.afterBreak || row === null) pieces.push([]);
    if (row === null) return;
    last = { price: column.price, y: layout.top + (row + 0.5) * layout.line };
    pieces.at(-1).push([x(i) + layout.cell / 2, last.y]);
  });
  g.lineJoin = g.lineCap = "round";
  for (const [colour, width] of [
    [c.panel, 5],
    [c.text, 2],
  ]) {
    g.strokeStyle = g.fillStyle = colour;
    g.lineWidth = width;
    for (const points of pieces) {
      g.beginPath();
      points.forEach((point, i) => (i ? g.lineTo(...point) : g.moveTo(...point)));
      if (points.length === 1) g.arc(...points[0], width / 2, 0, 2 * Math.PI);
      g.stroke();
    }
  }
  if (!last || layout.right < 50) return;
  const text = last.price.toLocaleString("en-US", { maximumFractionDigits: 2, useGrouping: false });
  const left = x(columns.length) + 4;
  g.fillStyle = c.text;
  g.beginPath();
  g.roundRect(left, last.y - 8, g.measureText(text).width + 8, 16, 3);
  g.fill();
  g.fillStyle = c.panel;
  g.textAlign = "left";
  g.fillText(text, left + 4, last.y + 0.5);
}

function drawCursor(g, { cursor, focused, colours: c, layout }, x, bottom) {
  if (!cursor) return;
  g.strokeStyle = mix(c.panel, c.text, 0.6);
  g.lineWidth = 1;
  g.strokeRect(x(cursor.column) + 0.5, layout.lanes.ratio - 1.5, layout.cell - 1, bottom - layout.lanes.ratio + 2);
  if (cursor.row < 0) return;
  const box = [x(cursor.column) - 0.5, layout.top + cursor.row * layout.line - 0.5, layout.cell + 1, layout.line + 1];
  g.strokeStyle = focused ? c.focus : c.text;
  g.lineWidth = focused ? 3 : 2;
  g.strokeRect(...box);
}

/** Big trades beside their candles: buyers below, sellers above, the larger the volume the larger the bubble. */

const [LEAST, MOST] = [2, 9];

/** Of labels that would cover each other the one of the larger volume. */
function apart(labels, widthOf) {
  const kept = [];
  for (const label of [...labels].sort((a, b) => b.volume - a.volume)) {
    const width = widthOf(label.text) + 4;
    const free = ({ x, y, width: other }) => Math.abs(x - label.x) > (width + other) / 2 || Math.abs(y - label.y) > 12;
    if (kept.every(free)) kept.push({ ...label, width });
  }
  return kept;
}

export class Bubbles {
  /**
   * @param {import("./marks.js").Marks} marks whose layer "big" is drawn
   * @param {() => import("./bars.js").Bars} bars
   */
  constructor(marks, bars) {
    Object.assign(this, { marks, bars });
    this.font = "sans-serif";
    this.#views = [{
      zOrder: () => "bottom",
      renderer: () => ({ draw: (target) => target.useBitmapCoordinateSpace((scope) => this.#draw(scope)) }),
    }];
  }

  #views;
  #chart = null;
  #series = null;

  attached({ chart, series, requestUpdate }) {
    [this.#chart, this.#series, this.request] = [chart, series, requestUpdate];
  }

  paneViews() {
    return this.#views;
  }

  #draw({ context, horizontalPixelRatio: h, verticalPixelRatio: v }) {
    const marks = this.marks.visible("big");
    const scale = this.#chart.timeScale();
    const range = scale.getVisibleLogicalRange();
    if (!marks.length || !range) return;
    const { up, down, muted } = this.marks.colours;
    const { byTime, list } = this.bars();
    const first = list[Math.max(0, Math.floor(range.from))]?.at;
    const last = list[Math.min(list.length - 1, Math.ceil(range.to))]?.at;
    const largest = Math.max(...marks.map((mark) => mark.volume));
    context.font = `${10 * h}px ${this.font}`;
    context.textAlign = "center";
    const labels = [];
    for (const { bar: at, side, volume, text } of marks) {
      const bar = byTime.get(at);
      if (!bar || at < first || at > last) continue;
      const radius = LEAST + (MOST - LEAST) * Math.sqrt(volume / largest);
      const below = side === "buy";
      const edge = this.#series.priceToCoordinate(below ? bar.low : bar.high);
      const x = scale.timeToCoordinate(at);
      if (edge === null || x === null) continue;
      const y = below ? edge + radius + 3 : edge - radius - 3;
      context.fillStyle = context.strokeStyle = side === "buy" ? up : side === "sell" ? down : muted;
      context.lineWidth = h;
      context.beginPath();
      context.arc(x * h, y * v, radius * h, 0, 2 * Math.PI);
      context.globalAlpha = 0.4;
      context.fill();
      context.globalAlpha = 1;
      context.stroke();
      if (text) labels.push({ text, volume, x, y: below ? y + radius + 11 : y - radius - 4, colour: context.fillStyle });
    }
    for (const { text, x, y, colour } of apart(labels, (text) => context.measureText(text).width / h)) {
      context.fillStyle = colour;
      context.fillText(text, x * h, y * v);
    }
  }
}

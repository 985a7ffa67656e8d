/** A series of the chart: volume as stacked bars of buyers, sellers and unknown aggressors. */

export class Stack {
  #data = null;
  #options = null;

  /** A data item: `{time, buy, sell, unknown, forming}`. */
  defaultOptions() {
    return { buy: "#00f", sell: "#f80", unknown: "#888" };
  }

  priceValueBuilder(item) {
    return [0, item.buy + item.sell + item.unknown];
  }

  isWhitespace(item) {
    return item.buy === undefined;
  }

  update(data, options) {
    this.#data = data;
    this.#options = options;
  }

  renderer() {
    return { draw: (target, toY) => target.useBitmapCoordinateSpace((scope) => this.#draw(scope, toY)) };
  }

  #draw({ context, horizontalPixelRatio: h, verticalPixelRatio: v }, toY) {
    const range = this.#data?.visibleRange;
    if (!range) return;
    const width = Math.max(1, Math.floor(barWidth(this.#data.barSpacing) * h));
    const options = this.#options;
    for (let i = range.from; i < range.to; i++) {
      const { x, originalData: item } = this.#data.bars[i];
      const left = Math.round(x * h - width / 2);
      let below = 0;
      context.globalAlpha = item.forming ? 0.35 : 0.6;
      for (const [part, colour] of [["buy", options.buy], ["sell", options.sell], ["unknown", options.unknown]]) {
        if (!item[part]) continue;
        const [bottom, top] = [toY(below) * v, toY(below + item[part]) * v];
        context.fillStyle = colour;
        context.fillRect(left, Math.round(top), width, Math.max(1, Math.round(bottom) - Math.round(top)));
        below += item[part];
      }
    }
    context.globalAlpha = 1;
  }
}

/** Of a bar and of a candle, in CSS pixels. */
export const barWidth = (spacing) => Math.max(1, spacing < 4 ? spacing * 0.9 : spacing * 0.8 - 1);

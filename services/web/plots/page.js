/* The page of a plot in one file: draws the data of #data with Lightweight Charts. Nothing is loaded. */
(function () {
  "use strict";
  const LC = window.LightweightCharts;
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const box = document.getElementById("chart");
  const legend = document.getElementById("legend");
  const spoken = document.getElementById("spoken");
  const { bars, heat, signals } = data;
  const count = bars.time.length;

  // -- themes -----------------------------------------------------------------------------------
  /** @type {Record<string, Record<string, string>>} */
  const THEMES = data.themes;
  if (!root.dataset.theme) {
    root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  }
  const theme = () => THEMES[root.dataset.theme];

  // -- the axis: a time for each slot, also for those without a bar --------------------------------
  const times = new Array(data.slots);
  data.stretches.forEach(([first, slot, length], k) => {
    for (let i = 0; i < length; i++) times[slot + i] = first + i * data.step;
    const next = data.stretches[k + 1];
    for (let i = slot + length; next && i < next[1]; i++) times[i] = times[slot + length - 1] + (i - slot - length + 1) * data.step;
  });
  const barAt = new Int32Array(data.slots).fill(-1);
  bars.slot.forEach((slot, i) => { barAt[slot] = i; });
  /** Points of a series: a value for each bar, a blank for each slot without. */
  const points = (value) => times.map((time, slot) => {
    const found = barAt[slot] < 0 ? null : value(barAt[slot]);
    return found === null ? { time } : Object.assign({ time }, found);
  });
  // A point's colour is that of the line behind it. No line leads to where there were no bars: what happened meanwhile is not known.
  const one = (column) => (i) => {
    if (column[i] === null) return null;
    const hole = bars.slot[i + 1] - bars.slot[i] > data.breakSlots;
    return hole ? { value: column[i], color: "transparent" } : { value: column[i] };
  };
  const price = (v) => (Math.abs(v) < 1 ? String(+v.toFixed(8)) : (+v.toFixed(4)).toLocaleString("en-US", { maximumFractionDigits: 4 }));
  const amount = (v) => {
    const [size, letter] = [[1e9, " B"], [1e6, " M"], [1e3, " k"]].find(([s]) => Math.abs(v) >= s) || [1, ""];
    return +(v / size).toPrecision(4) + letter;
  };
  const utc = (seconds) => new Date(seconds * 1000).toISOString().replace("T", " ").slice(0, seconds % 60 ? 19 : 16);

  // -- the chart ----------------------------------------------------------------------------------
  const chart = LC.createChart(box, {
    width: box.clientWidth,
    height: 400,
    localization: { timeFormatter: (t) => utc(t) + " UTC", priceFormatter: price },
    timeScale: { timeVisible: data.step < 86400, secondsVisible: data.step < 60, rightOffset: 1, minBarSpacing: 0.002 },
    crosshair: { mode: LC.CrosshairMode.Normal },
  });
  const plain = { lastValueVisible: false, priceLineVisible: false };
  const amounts = { priceFormat: { type: "custom", formatter: amount, minMove: 0.0001 } };
  const names = [];
  let pane = 0;
  const heights = [];
  // Filled once the panes have their heights: an empty chart is laid out at once, a full one is not.
  const filling = [];
  const fill = (series, made) => filling.push(() => series.setData(made()));
  const add = (type, options, index) => chart.addSeries(type, Object.assign({}, plain, options), index);

  const candles = add(LC.CandlestickSeries, { lastValueVisible: true, priceLineVisible: true, priceFormat: { type: "custom", formatter: price, minMove: 1e-8 } }, 0);
  fill(candles, () => points((i) => ({ open: bars.open[i], high: bars.high[i], low: bars.low[i], close: bars.close[i] })));
  candles.priceScale().applyOptions({ scaleMargins: { top: 0.06, bottom: 0.08 } });
  heights.push(4.6);
  pane += 1;
  const sold = (i) => bars.sell[i];
  const bought = (i) => bars.sell[i] + bars.buy[i];
  const all = (i) => bars.sell[i] + bars.buy[i] + bars.unknown[i];
  const volume = [["unknown", all], ["up", bought], ["down", sold]].map(([colour, top]) => {
    const series = add(LC.HistogramSeries, amounts, pane);
    fill(series, () => points((i) => ({ value: top(i) })));
    return [series, colour];
  });
  names.push([pane, "volume: sold, bought, unknown"]);
  heights.push(1.25);
  let cvd = null;
  if (bars.cvd.some((v) => v !== null)) {
    cvd = add(LC.LineSeries, Object.assign({ lineWidth: 2, crosshairMarkerVisible: false }, amounts), ++pane);
    fill(cvd, () => points(one(bars.cvd)));
    names.push([pane, "CVD: bought less sold volume, cumulative"]);
    heights.push(1.5);
  }

  // -- what the library does not draw: cells, hatches, marks, breaks --------------------------------
  const painters = [];
  /** Draw on a series' pane: paint(g, x, y, spacing, colours, height) in CSS pixels; x of a place on the axis. */
  function paintOn(series, zOrder, paint) {
    const scale = chart.timeScale();
    let update = () => {};
    series.attachPrimitive({
      attached: (p) => { update = p.requestUpdate; },
      updateAllViews: () => {},
      paneViews: () => [{
        zOrder: () => zOrder,
        renderer: () => ({
          draw: (target) => target.useMediaCoordinateSpace(({ context: g, mediaSize }) => {
            const zero = scale.logicalToCoordinate(0);
            if (zero === null) return;
            const spacing = scale.options().barSpacing;
            g.save();
            paint(g, (slot) => zero + (slot - 0.5) * spacing, (v) => series.priceToCoordinate(v), spacing, theme(), mediaSize);
            g.restore();
          }),
        }),
      }],
    });
    painters.push(() => update());
  }
  /** Diagonal lines over a rectangle. */
  function hatch(g, x, y, w, h, colour) {
    g.save();
    g.beginPath();
    g.rect(x, y, w, h);
    g.clip();
    g.strokeStyle = colour;
    g.lineWidth = 1;
    g.beginPath();
    for (let d = Math.floor((x - h) / 5) * 5; d < x + w; d += 5) {
      g.moveTo(d, y + h);
      g.lineTo(d + h, y);
    }
    g.stroke();
    g.restore();
  }
  const seen = (x0, x1, size) => x1 >= 0 && x0 <= size.width;
  const incomplete = bars.complete.flatMap((whole, i) => (whole ? [] : [i]));
  /** Incomplete bars as outlines with hatches; with `over` hatched over what is there. */
  function paintIncomplete(bottom, top, over) {
    return (g, x, y, spacing, t, size) => {
      for (const i of incomplete) {
        const x0 = x(bars.slot[i]);
        if (!seen(x0, x0 + spacing, size)) continue;
        g.globalAlpha = 0.16;
        g.fillStyle = t.faint;
        g.fillRect(x0, 0, spacing, size.height);
        g.globalAlpha = 1;
        const [a, b] = [y(top(i)), y(bottom(i))];
        const w = Math.max(1, spacing * 0.76);
        const colour = bars.close[i] >= bars.open[i] ? t.up : t.down;
        if (over) {
          hatch(g, x0, a, spacing, b - a, t.back);
          continue;
        }
        g.fillStyle = t.back;
        g.fillRect(x0 + (spacing - w) / 2, a, w, Math.max(1, b - a));
        hatch(g, x0 + (spacing - w) / 2, a, w, Math.max(1, b - a), colour);
        g.strokeStyle = colour;
        g.strokeRect(x0 + (spacing - w) / 2, a, w, Math.max(1, b - a));
      }
    };
  }
  paintOn(candles, "top", paintIncomplete((i) => Math.min(bars.open[i], bars.close[i]), (i) => Math.max(bars.open[i], bars.close[i])));
  paintOn(volume[2][0], "top", paintIncomplete(() => 0, all, true));
  function paintBreaks(g, x, y, spacing, t, size) {
    g.strokeStyle = t.faint;
    g.setLineDash([4, 4]);
    g.globalAlpha = data.breaks.length > 12 ? 0.35 : 1;
    data.breaks.forEach((slot) => {
      const at = x(slot + data.breakSlots / 2);
      if (!seen(at, at, size)) return;
      g.beginPath();
      g.moveTo(at, 0);
      g.lineTo(at, size.height);
      g.stroke();
    });
  }
  function triangle(g, x, y, r, down, fill, edge) {
    const s = down ? 1 : -1;
    g.beginPath();
    g.moveTo(x, y + s * r);
    g.lineTo(x - r, y - s * r);
    g.lineTo(x + r, y - s * r);
    g.closePath();
    g.fillStyle = fill;
    g.fill();
    g.lineWidth = 1.2;
    g.strokeStyle = edge;
    g.stroke();
  }
  const mostBig = Math.max(1e-9, ...data.bigTrades.map((m) => m.volume));
  paintOn(candles, "top", (g, x, y, spacing, t, size) => {
    for (const m of data.bigTrades) {
      const at = x(bars.slot[m.bar] + 0.5);
      if (!seen(at - 12, at + 12, size)) continue;
      g.beginPath();
      g.arc(at, y(m.price), 4 + 6 * Math.sqrt(m.volume / mostBig), 0, 7);
      g.lineWidth = 1.6;
      g.strokeStyle = m.side > 0 ? t.up : m.side < 0 ? t.down : t.unknown;
      g.stroke();
    }
    [[bars.longLiquidated, bars.low, 9, t.down], [bars.shortLiquidated, bars.high, -9, t.up]].forEach(([of, edge, away, colour]) => {
      g.strokeStyle = colour;
      g.lineWidth = 1.4;
      of.forEach((v, i) => {
        const at = x(bars.slot[i] + 0.5);
        if (!v || !seen(at, at, size)) return;
        const h = y(edge[i]) + away;
        g.beginPath();
        g.moveTo(at - 3, h - 3);
        g.lineTo(at + 3, h + 3);
        g.moveTo(at - 3, h + 3);
        g.lineTo(at + 3, h - 3);
        g.stroke();
      });
    });
    for (const s of signals) {
      const at = x(bars.slot[s.bar] + 0.5);
      if (!seen(at - 8, at + 8, size)) continue;
      const down = s.direction === "SELL";
      const h = y(down ? bars.high[s.bar] : bars.low[s.bar]) + (down ? -16 : 16);
      triangle(g, at, h, 5, down, s.status === "emitted" ? (down ? t.down : t.up) : t.back, down ? t.down : t.up);
    }
  });
  const mix = (a, b, share) => {
    const part = (c, k) => parseInt(c.slice(1 + 2 * k, 3 + 2 * k), 16);
    return "rgb(" + [0, 1, 2].map((k) => Math.round(part(a, k) + (part(b, k) - part(a, k)) * share)).join(",") + ")";
  };
  const colourOf = (t, ratio) => mix(t.middle, ratio > 0 ? t.up : t.down, Math.min(1, Math.abs(ratio) / heat.limit));
  const paintUnwhole = (g, x, t, size) => heat.complete.forEach((whole, k) => {
    const [x0, x1] = [x(heat.left[k]), x(heat.right[k])];
    if (!whole && seen(x0, x1, size)) hatch(g, x0, 0, x1 - x0, size.height, t.faint);
  });
  /** Values at columns of the heat map, as points at the slots where `at` says each belongs. */
  const columnPoints = (value, at) => {
    const made = times.map((time) => ({ time }));
    heat.left.forEach((_, k) => {
      const slot = Math.min(data.slots - 1, Math.max(0, at(k)));
      if (value(k) === null) return;
      const across = data.breaks.some((b) => heat.left[k] < b && b <= heat.left[k + 1]);
      made[slot] = Object.assign({ time: times[slot], value: value(k) }, across ? { color: "transparent" } : {});
    });
    return made;
  };
  const lines = [];
  for (const kind of heat ? Object.keys(heat.cells) : []) {
    const [low, high] = heat.view[kind];
    const line = add(LC.LineSeries, {
      lineWidth: 2, crosshairMarkerVisible: false, lineVisible: heat.price.some((p) => p !== null),
      priceFormat: { type: "custom", formatter: price, minMove: 1e-8 },
      autoscaleInfoProvider: () => ({ priceRange: { minValue: low, maxValue: high } }),
    }, ++pane);
    line.priceScale().applyOptions({ scaleMargins: { top: 0.13, bottom: 0.02 } });
    fill(line, () => columnPoints((k) => (heat.price.some((p) => p !== null) ? heat.price[k] : low), (k) => Math.ceil(heat.right[k]) - 1));
    lines.push([line, kind]);
    paintOn(line, "bottom", (g, x, y, spacing, t, size) => {
      for (const [row, k, ratio] of heat.cells[kind]) {
        const [x0, x1] = [x(heat.left[k]), x(heat.right[k])];
        if (!seen(x0, x1, size)) continue;
        const half = heat.heights[row] / 2;
        const [y0, y1] = [y(heat.strikes[row] + half), y(heat.strikes[row] - half)];
        const gap = x1 - x0 > 6 ? 1 : 0;
        g.fillStyle = colourOf(t, ratio);
        g.fillRect(x0, y0, Math.max(1, x1 - x0 - gap), Math.max(1, y1 - y0 - gap));
      }
      paintUnwhole(g, x, t, size);
    });
    paintOn(line, "top", (g, x, y, spacing, t, size) => {
      for (const s of signals) {
        if (s.optionType !== kind || s.column === null) continue;
        const at = x((heat.left[s.column] + heat.right[s.column]) / 2);
        if (seen(at - 6, at + 6, size)) triangle(g, at, y(s.strike), 4, s.direction === "SELL", t.text, t.back);
      }
    });
    names.push([pane, `${data.underlying} ${kind === "C" ? "calls" : "puts"} by strike, with its price`]);
    heights.push(1.9);
  }
  if (heat) {
    const net = add(LC.LineSeries, Object.assign({
      lineVisible: false, crosshairMarkerVisible: false,
      autoscaleInfoProvider: (original) => {
        const found = original();
        const most = found ? Math.max(Math.abs(found.priceRange.minValue), Math.abs(found.priceRange.maxValue)) || 1 : 1;
        return { priceRange: { minValue: -most, maxValue: most } };
      },
    }, amounts), ++pane);
    fill(net, () => columnPoints((k) => heat.netPremium[k] || 0, (k) => Math.floor(heat.left[k])));
    paintOn(net, "bottom", (g, x, y, spacing, t, size) => {
      const zero = y(0);
      heat.netPremium.forEach((v, k) => {
        const [x0, x1] = [x(heat.left[k]), x(heat.right[k])];
        if (!v || !seen(x0, x1, size)) return;
        g.fillStyle = v > 0 ? t.up : t.down;
        g.fillRect(x0 + (x1 - x0) * 0.07, Math.min(zero, y(v)), Math.max(1, (x1 - x0) * 0.86), Math.max(1, Math.abs(y(v) - zero)));
      });
      g.fillStyle = t.faint;
      g.fillRect(0, zero, size.width, 1);
      paintUnwhole(g, x, t, size);
    });
    lines.push([net, ""]);
    names.push([pane, "net premium: calls less puts, bought less sold"]);
    heights.push(1);
  }
  chart.panes().forEach((p, k) => paintOn(p.getSeries()[0], "bottom", paintBreaks));

  // -- colours, heights, names ----------------------------------------------------------------------
  const labels = names.map(([index, text]) => [LC.createTextWatermark(chart.panes()[index], { horzAlign: "left", vertAlign: "top", lines: [] }), text]);
  function dress() {
    const t = theme();
    chart.applyOptions({
      layout: { background: { type: LC.ColorType.Solid, color: t.back }, textColor: t.faint, fontFamily: "system-ui, sans-serif", panes: { separatorColor: t.grid, separatorHoverColor: t.grid } },
      grid: { vertLines: { color: t.grid }, horzLines: { color: t.grid } },
      rightPriceScale: { borderColor: t.grid, minimumWidth: 76 },
      timeScale: { borderColor: t.grid },
      crosshair: { vertLine: { color: t.faint, labelBackgroundColor: t.faint }, horzLine: { color: t.faint, labelBackgroundColor: t.faint } },
    });
    candles.applyOptions({ upColor: t.up, downColor: t.down, borderVisible: false, wickUpColor: t.up, wickDownColor: t.down });
    volume.forEach(([series, colour]) => series.applyOptions({ color: t[colour] }));
    if (cvd) cvd.applyOptions({ color: t.line });
    lines.forEach(([series]) => series.applyOptions({ color: t.line }));
    labels.forEach(([label, text]) => label.applyOptions({ lines: [{ text, color: t.text, fontSize: 12, fontFamily: "system-ui, sans-serif" }] }));
    painters.forEach((update) => update());
    document.getElementById("theme").textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
  }
  const wanted = heights.reduce((a, b) => a + b, 0);
  box.style.height = Math.max(420, Math.round(wanted * 72)) + "px";
  /** Lay the panes out; each can be given its height only once the one before is laid out. */
  function share() {
    const height = box.clientHeight;
    for (let round = 0; round < 3; round++) {
      chart.panes().forEach((p, k) => {
        chart.resize(box.clientWidth, height - 1, true);
        p.setHeight(((height - 30 - heights.length) * heights[k]) / wanted);
        chart.resize(box.clientWidth, height, true);
      });
    }
  }

  // -- the legend -------------------------------------------------------------------------------------
  let current = count - 1;
  const text = (node, ...parts) => {
    node.replaceChildren();
    parts.forEach(([name, value]) => {
      const of = document.createElement("span");
      of.textContent = name + " ";
      const is = document.createElement("b");
      is.textContent = value + "  ";
      node.append(of, is);
    });
  };
  function told(i) {
    const parts = [["", utc(bars.time[i]) + " UTC"]];
    [["open", "O"], ["high", "H"], ["low", "L"], ["close", "C"]].forEach(([name, letter]) => parts.push([letter, price(bars[name][i])]));
    parts.push(["volume", amount(all(i))], ["bought", amount(bars.buy[i])], ["sold", amount(bars.sell[i])]);
    if (bars.unknown[i]) parts.push(["unknown", amount(bars.unknown[i])]);
    if (bars.cvd[i] !== null) parts.push(["CVD", amount(bars.cvd[i])]);
    if (!bars.complete[i]) parts.push(["", "incomplete"]);
    const big = data.bigTrades.find((m) => m.bar === i);
    if (big) parts.push(["big trades", `${big.trades}, ${amount(big.volume)}`]);
    if (bars.longLiquidated[i]) parts.push(["longs liquidated", amount(bars.longLiquidated[i])]);
    if (bars.shortLiquidated[i]) parts.push(["shorts liquidated", amount(bars.shortLiquidated[i])]);
    const [best, ...more] = signals.filter((s) => s.bar === i).sort((a, b) => b.score - a.score);
    if (best) parts.push(["signal", `${best.label} ${best.score.toFixed(2)} ${best.grade}${more.length ? ` and ${more.length} more` : ""}`]);
    if (heat) {
      const k = heat.left.findIndex((left, c) => left <= bars.slot[i] && bars.slot[i] < heat.right[c]);
      if (k >= 0 && heat.netPremium[k] !== null) parts.push(["net premium", amount(heat.netPremium[k])]);
    }
    return parts;
  }
  function cell(param) {
    const found = lines.find(([, kind], k) => kind && param.paneIndex === chart.panes().length - lines.length + k);
    if (!found || !param.point || param.logical === undefined) return null;
    const strike = found[0].coordinateToPrice(param.point.y);
    const hit = heat.cells[found[1]].find(([row, k]) =>
      heat.left[k] <= param.logical + 0.5 && param.logical + 0.5 < heat.right[k] && Math.abs(heat.strikes[row] - strike) <= heat.heights[row] / 2);
    return hit ? [`${found[1]} ${heat.strikes[hit[0]]} log ratio`, hit[2].toFixed(2)] : null;
  }
  const show = (i, ...more) => text(legend, ...told(i), ...more.filter(Boolean));
  chart.subscribeCrosshairMove((param) => {
    const i = param.logical === undefined ? -1 : barAt[param.logical] ?? -1;
    if (i >= 0) current = i;
    show(i >= 0 ? i : count - 1, cell(param));
  });

  // -- keys ---------------------------------------------------------------------------------------------
  function go(i) {
    current = Math.min(count - 1, Math.max(0, i));
    const slot = bars.slot[current];
    const range = chart.timeScale().getVisibleLogicalRange();
    if (range && (slot < range.from || slot > range.to)) {
      const width = range.to - range.from;
      const from = slot < range.from ? slot - 1 : slot + 1 - width;
      chart.timeScale().setVisibleLogicalRange({ from, to: from + width });
    }
    chart.setCrosshairPosition(bars.close[current], times[slot], candles);
    show(current);
    spoken.textContent = told(current).map((p) => p.join(" ").trim()).join(", ");
  }
  function zoom(by) {
    const range = chart.timeScale().getVisibleLogicalRange();
    if (!range) return;
    const middle = Math.min(range.to, Math.max(range.from, bars.slot[current]));
    chart.timeScale().setVisibleLogicalRange({ from: middle - (middle - range.from) * by, to: middle + (range.to - middle) * by });
  }
  function turn() {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    dress();
  }
  document.getElementById("theme").addEventListener("click", turn);
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 10 : 1;
    const keys = {
      ArrowLeft: () => go(current - far), ArrowRight: () => go(current + far), Home: () => go(0), End: () => go(count - 1),
      "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), 0: () => chart.timeScale().fitContent(),
      t: turn, Escape: () => { chart.clearCrosshairPosition(); show(count - 1); },
    };
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });

  dress();
  share();
  filling.forEach((run) => run());
  chart.timeScale().fitContent();
  show(count - 1);
  new ResizeObserver(() => {
    const range = chart.timeScale().getVisibleLogicalRange();
    chart.resize(box.clientWidth, box.clientHeight, true);
    if (range) chart.timeScale().setVisibleLogicalRange(range);
  }).observe(box);
  root.dataset.drawn = "yes";
})();

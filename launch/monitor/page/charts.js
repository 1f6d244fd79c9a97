// Charts over steps (uPlot) and distributions (SVG). A chart is an element's id and what to read from the run.
import uPlot from "/uplot/uPlot.esm.js";
import { color, element, keyItem, number, replace } from "/dom.js";

const HEIGHT = 168;
const MAX_BARS = 90; // more steps than that are drawn as areas
const INTEGERS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000];
const all = [];

export function redrawAll() {
  for (const chart of all) chart.rebuild();
}

export const axisStyle = () => ({
  stroke: color("muted"), font: "11px Inter", ticks: { show: false }, gap: 6,
  grid: { stroke: color("grid"), width: 1 }, border: { show: false },
});

/**
 * A chart over steps. series: label, color (a variable of page.css), values(data), and dots, stepped, second (its own
 * axis). stack(data) gives series that lie on one another. zero, floor: the axis begins there. none: said without data.
 */
export function stepChart(id, spec) {
  const host = document.getElementById(id);
  const key = host.parentElement.querySelector(".key");
  const title = host.parentElement.querySelector("h2").textContent;
  const chart = { plot: null, data: null, step: 0, shape: "" };
  host.setAttribute("role", "img");

  const lines = () => (spec.stack ? spec.stack(chart.data) : spec.series)
    .map((line) => ({ ...line, column: typeof line.values === "function" ? line.values(chart.data) : line.values }))
    .filter((line) => line.column?.some((value) => value != null));

  function table(drawn) {
    const steps = chart.data.columns.step;
    if (!spec.stack) return [steps, ...drawn.map((line) => line.column)];
    const sums = [];
    for (const line of drawn) sums.push(line.column.map((value, i) => value + (sums.at(-1)?.[i] ?? 0)));
    return [steps, ...sums.reverse()]; // the highest first: each covers the lower part of the one before
  }

  function build() {
    chart.plot?.destroy();
    chart.plot = null;
    const drawn = chart.data?.columns.step.length ? lines() : [];
    chart.shape = drawn.map((line) => line.label).join() + (chart.data?.columns.step.length > MAX_BARS);
    if (!drawn.length) {
      replace(host, element("p", { class: "empty" }, chart.data?.columns.step.length && spec.none ? spec.none : "No step is finished yet."));
      legend();
      return;
    }
    replace(host);
    const few = chart.data.columns.step.length < 40;
    const shown = spec.stack ? drawn.toReversed() : drawn;
    const second = drawn.some((line) => line.second);
    const bars = spec.stack && chart.data.columns.step.length <= MAX_BARS;
    chart.plot = new uPlot({
      width: host.clientWidth, height: HEIGHT, padding: [8, second ? 0 : 10, 0, 0], legend: { show: false },
      cursor: { sync: { key: "steps" }, y: false, drag: { x: false, y: false }, points: { show: !spec.stack, size: 6 } },
      scales: {
        x: { time: false, range: (_, low, high) => (bars ? [low - 0.6, high + 0.6] : low === high ? [low - 1, high + 1] : [low, high]) },
        y: { range: (_, low, high) => span(low, high, spec) },
        z: { range: (_, low, high) => [0, Math.max(1, high * 1.15)] },
      },
      axes: [
        { ...axisStyle(), grid: { show: false }, incrs: INTEGERS, size: 26, space: 46 },
        { ...axisStyle(), size: 46, space: 34, values: (_, ticks) => ticks.map((tick) => short(tick)) },
        ...(second ? [{ ...axisStyle(), scale: "z", side: 1, size: 34, grid: { show: false }, incrs: INTEGERS, stroke: color("accent") }] : []),
      ],
      series: [{}, ...shown.map((line) => ({
        label: line.label, scale: line.second ? "z" : "y", width: bars ? 0 : line.dots ? 0 : 1.6,
        stroke: color(line.color), fill: spec.stack ? color(line.color) : undefined,
        spanGaps: !spec.stack, points: { show: line.dots || (few && !spec.stack && !line.stepped), size: line.dots ? 7 : 5, fill: color(line.color), width: 0 },
        paths: bars ? uPlot.paths.bars({ size: [0.74, 26], align: 0 }) : line.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
      }))],
      hooks: { drawClear: [(plot) => mark(plot)], setCursor: [legend] },
    }, table(drawn), host);
    chart.plot.over.addEventListener("click", () => {
      const at = chart.plot.cursor.idx;
      if (at != null) document.dispatchEvent(new CustomEvent("choose", { detail: chart.data.columns.step[at] }));
    });
    legend();
  }

  function mark(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    const x = plot.valToPos(chart.step, "x", true);
    if (chart.step && x >= bbox.left && x <= bbox.left + bbox.width) {
      ctx.fillStyle = color("accent", 0.13);
      const pitch = bbox.width / Math.max(1, chart.data.columns.step.length);
      const width = devicePixelRatio * Math.max(6, spec.stack ? Math.min(38, pitch / devicePixelRatio) : 0);
      ctx.fillRect(x - width / 2, bbox.top, width, bbox.height);
    }
    for (const [level, value] of Object.entries(spec.thresholds?.() ?? {})) {
      const y = plot.valToPos(value, "y", true);
      if (y < bbox.top) continue;
      ctx.strokeStyle = color(level);
      ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.lineWidth = devicePixelRatio;
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.fillStyle = color(level);
      ctx.font = `${10.5 * devicePixelRatio}px Inter`;
      ctx.textAlign = "right";
      ctx.textBaseline = "bottom";
      ctx.fillText(`${level} ${value}`, bbox.left + bbox.width, y - 2 * devicePixelRatio);
    }
    ctx.restore();
  }

  /** The key: each series with its value under the pointer, or at the step shown. */
  function legend() {
    const drawn = chart.data?.columns.step.length ? lines() : [];
    const hovered = chart.plot?.cursor.idx;
    const at = hovered ?? chart.data?.columns.step.indexOf(chart.step) ?? -1;
    const whole = spec.stack && at >= 0 ? drawn.reduce((sum, line) => sum + line.column[at], 0) : 0;
    const items = drawn.filter((line) => !whole || line.column[at] >= 0.005 * whole).map((line) => {
      const value = at >= 0 ? line.column[at] : null;
      return keyItem(line.label, line.color, value == null ? "" : number(value, line.digits ?? spec.digits) + (spec.unit ?? ""), { thin: !spec.stack && !line.dots });
    });
    replace(key, ...items);
    host.setAttribute("aria-label", `${title} by step. ${items.length ? `At step ${chart.data.columns.step[at] ?? "?"}: ${items.map((item) => item.textContent).join(", ")}` : "Nothing yet"}`);
  }

  const api = {
    update(data) {
      chart.data = data;
      const drawn = data.columns.step.length ? lines() : [];
      if (!chart.plot || chart.shape !== drawn.map((line) => line.label).join() + (data.columns.step.length > MAX_BARS)) build();
      else chart.plot.setData(table(drawn));
      legend();
    },
    select(step) {
      chart.step = step;
      chart.plot?.redraw(false);
      legend();
    },
    rebuild: build,
  };
  new ResizeObserver(() => chart.plot?.setSize({ width: host.clientWidth, height: HEIGHT })).observe(host);
  all.push(api);
  return api;
}

function span(low, high, { zero, floor, thresholds }) {
  if (low == null) return [0, 1];
  const limits = Object.values(thresholds?.() ?? {});
  if (limits.length) high = Math.max(high, limits[0] * 1.15);
  const from = zero ? Math.min(0, low) : floor !== undefined ? Math.min(floor, low) : low;
  const room = (high - from || Math.abs(high) || 1) * 0.08;
  return [zero || floor !== undefined ? from : from - room, high + room];
}

export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return String(+value.toPrecision(4));
}

/** A distribution, {edges, counts}, as bars. */
export function barChart(id, hist, { label, digits, none }) {
  const host = document.getElementById(id);
  if (!hist?.counts?.length) {
    replace(host, element("p", { class: "empty" }, none));
    return;
  }
  const width = host.clientWidth, left = 34, base = HEIGHT - 26, top = 10;
  const most = Math.max(...hist.counts, 1);
  const each = (width - left - 4) / hist.counts.length;
  const total = hist.counts.reduce((sum, count) => sum + count, 0);
  const bars = hist.counts.map((count, i) => {
    const height = ((base - top) * count) / most;
    const bar = element("svg:rect", { x: left + i * each + 1, y: base - height, width: Math.max(1, each - 2), height, rx: Math.min(2, each / 4) });
    bar.append(element("svg:title", {}, `${short(hist.edges[i])} to ${short(hist.edges[i + 1])}: ${count} ${label}`));
    return bar;
  });
  const tick = (i, anchor) => element("svg:text", { x: left + i * each, y: HEIGHT - 8, "text-anchor": anchor }, number(hist.edges[i], digits));
  const middle = Math.round(hist.counts.length / 2);
  const ticks = [tick(0, "start"), ...(hist.counts.length > 3 ? [tick(middle, "middle")] : []), tick(hist.counts.length, "end")];
  const scale = element("svg:text", { x: left - 8, y: top + 4, "text-anchor": "end" }, String(most));
  const zero = element("svg:text", { x: left - 8, y: base, "text-anchor": "end" }, "0");
  const ground = element("svg:line", { x1: left, x2: width - 4, y1: base + 0.5, y2: base + 0.5 });
  replace(host, element("svg:svg", { class: "bars", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${total} ${label} between ${short(hist.edges[0])} and ${short(hist.edges.at(-1))}` }, ground, ...bars, ...ticks, scale, zero));
}

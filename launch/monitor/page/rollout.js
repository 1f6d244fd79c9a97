// One step on one clock: how many sequences run, what every worker does, and what it drafts with.
import uPlot from "/uplot/uPlot.esm.js";
import { axisStyle } from "/charts.js";
import { color, element, get, keyItem, number, replace } from "/dom.js";

const GUTTER = 64, RIGHT = 10, HEIGHT = 210;
const MAX_MARKS = 24; // switches of strategy drawn as lines with names; more than that are ticks above the curve
const $ = (id) => document.getElementById(id);
let shown = { step: 0, standing: "", curve: null, lanes: null, whole: 1, end: 1, plot: null, waits: false };
let rolloutsOnly = false;

$("zoom").onclick = () => {
  rolloutsOnly = !rolloutsOnly;
  $("zoom").setAttribute("aria-pressed", String(rolloutsOnly));
  if (shown.curve) draw();
};

/** standing: what is to be said of a step that is not finished. */
export async function drawRollout(step, standing, signal) {
  const [curve, lanes] = step
    ? await Promise.all([get(`/api/curve?step=${step}`, signal), get(`/api/lanes?step=${step}`, signal)])
    : [{ time: [], strategies: [] }, { spans: [], workers: [], seconds: {} }];
  const begin = Math.min(curve.begin ?? Infinity, lanes.begin ?? Infinity);
  const shiftCurve = (curve.begin ?? begin) - begin, shiftLanes = (lanes.begin ?? begin) - begin;
  const time = curve.time.map((at) => at + shiftCurve);
  const strategies = curve.strategies.map(([worker, from, to, name]) => [worker, from + shiftCurve, to + shiftCurve, name]);
  const spans = lanes.spans.map(([lane, kind, from, to]) => [lane, lanes.kinds[kind], from + shiftLanes, to + shiftLanes]);
  const whole = spans.reduce((last, span) => Math.max(last, span[3]), time.at(-1) ?? 1e-3);
  shown = { ...shown, step, standing, curve: { ...curve, time, strategies }, lanes: { ...lanes, spans }, whole };
  draw();
}

function draw() {
  shown.end = (rolloutsOnly && shown.curve.time.at(-1)) || shown.whole;
  note();
  drawCurve();
  drawLanes();
}

function note() {
  const { step, standing, curve, whole } = shown;
  $("rollout-title").textContent = step ? `Rollouts of step ${step}` : "Rollouts";
  const parts = [];
  if (curve.time.length) parts.push(`${number(curve.finished.at(-1), 0)} of ${number(curve.total, 0)} finished`, `${number(curve.tokens.at(-1), 0)} tokens`);
  if (curve.time.length || shown.lanes.spans.length) parts.push(`${number(whole, 1)} s`);
  if (standing) parts.push(standing);
  $("rollout-note").textContent = parts.join("  ·  ");
}

function drawCurve() {
  const host = $("curve"), { curve } = shown;
  $("zoom").hidden = !curve.time.length;
  const waits = curve.waiting?.some((count) => count > 0) ?? false;
  if (shown.plot && curve.time.length && waits === shown.waits) {
    shown.plot.setData([curve.time, curve.running, curve.waiting]); // it keeps its pointer
    key(shown.plot);
    return describe();
  }
  shown.plot?.destroy();
  shown.plot = null;
  shown.waits = waits;
  if (!curve.time.length) {
    replace(host, element("p", { class: "empty" }, "The rollouts of this step were not recorded."));
    replace($("curve-key"));
    return;
  }
  replace(host);
  const fill = (plot) => {
    const gradient = plot.ctx.createLinearGradient(0, plot.bbox.top, 0, plot.bbox.top + plot.bbox.height);
    gradient.addColorStop(0, color("decode", 0.28));
    gradient.addColorStop(1, color("decode", 0.06));
    return gradient;
  };
  shown.plot = new uPlot({
    width: host.clientWidth, height: HEIGHT, padding: [18, RIGHT, 0, 0], legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: { x: { time: false, range: () => [0, shown.end] }, y: { range: (_, low, high) => [0, Math.max(1, high * 1.06)] } },
    axes: [
      { ...axisStyle(), grid: { show: false }, size: 26, space: 70, values: (_, ticks) => ticks.map((tick) => `${+tick.toFixed(2)} s`) },
      { ...axisStyle(), size: GUTTER, space: 40, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] },
    ],
    series: [
      {},
      { stroke: color("decode"), width: 1.6, fill, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
      { stroke: color("muted"), width: 1.2, dash: [4, 4], show: waits, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
    ],
    hooks: { draw: [drawMarks], setCursor: [key] },
  }, [curve.time, curve.running, curve.waiting], host);
  key(shown.plot);
  describe();
}

function describe() {
  const most = shown.curve.running.reduce((high, count) => Math.max(high, count), 0);
  $("curve").setAttribute("aria-label", `Sequences running: at most ${most}, over ${number(shown.end, 1)} seconds; ${switches().length} switches of strategy`);
}

/** Forget the chart: the colours have changed. */
export function forgetCurve() {
  shown.plot?.destroy();
  shown.plot = null;
}

/** Where the strategy of the first worker that samples changes: [time, strategy]. */
function switches() {
  const first = Math.min(...shown.curve.strategies.map(([worker]) => worker));
  const of = shown.curve.strategies.filter(([worker]) => worker === first);
  return of.slice(1).map(([, from, , name]) => [from, name]);
}

function drawMarks(plot) {
  const { ctx, bbox } = plot, px = devicePixelRatio, marks = switches();
  const many = marks.length > MAX_MARKS;
  ctx.save();
  ctx.font = `${10.5 * px}px Inter`;
  ctx.textBaseline = "bottom";
  ctx.textAlign = "left";
  let free = -Infinity;
  for (const [at, name] of marks) {
    const x = Math.round(plot.valToPos(at, "x", true));
    ctx.strokeStyle = color(sourceOf(name) === "off" ? "faint" : sourceOf(name));
    ctx.setLineDash(many ? [] : [2 * px, 3 * px]);
    ctx.lineWidth = px;
    ctx.beginPath();
    ctx.moveTo(x, many ? bbox.top - 6 * px : bbox.top);
    ctx.lineTo(x, many ? bbox.top : bbox.top + bbox.height);
    ctx.stroke();
    if (many) continue;
    const width = ctx.measureText(name).width;
    const from = Math.min(x - 1 * px, bbox.left + bbox.width - width);
    if (from < free) continue;
    ctx.fillStyle = color("muted");
    ctx.fillText(name, from, bbox.top - 2 * px);
    free = from + width + 10 * px;
  }
  ctx.restore();
}

const sourceOf = (strategy) => strategy.split(" ")[0];

function key(plot) {
  const { curve } = shown;
  const at = plot.cursor.idx ?? null;
  const value = (column) => (at === null ? null : String(column[at]));
  const items = [keyItem("running", "decode", value(curve.running), { thin: true })];
  if (shown.waits) items.push(keyItem("waiting", "muted", value(curve.waiting), { thin: true }));
  if (at !== null) items.push(element("span", {}, `at ${number(curve.time[at], 2)} s`));
  replace($("curve-key"), ...items);
  const hair = document.querySelector("#lanes .hair");
  if (hair) {
    hair.hidden = !(plot.cursor.left >= 0);
    hair.style.left = `${GUTTER + plot.cursor.left}px`;
  }
}

// ------------------------------------------------------------------ lanes

function drawLanes() {
  const host = $("lanes"), { lanes, curve, end } = shown;
  const drafting = [...new Set(curve.strategies.map(([worker]) => worker))].sort((a, b) => a - b);
  const workers = lanes.workers.length ? lanes.workers : drafting;
  const tall = workers.length > 16 ? 10 : 20, strip = workers.length > 16 ? 0 : 5, gap = workers.length > 16 ? 3 : 9;
  const pitch = tall + strip + gap + (strip ? 2 : 0);
  const width = host.clientWidth, height = workers.length * pitch, px = devicePixelRatio;
  if (!workers.length) {
    replace(host);
    replace($("lane-key"));
    replace($("strategy-key"));
    return;
  }
  const canvas = element("canvas", { width: Math.round(width * px), height: Math.round(height * px) });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const hair = element("div", { class: "hair" });
  hair.hidden = true;
  replace(host, canvas, hair);
  const ctx = canvas.getContext("2d");
  ctx.scale(px, px);
  const x = (seconds) => GUTTER + Math.min(1, seconds / end) * (width - GUTTER - RIGHT);
  ctx.font = "11px Inter";
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  workers.forEach((worker, row) => {
    ctx.fillStyle = color("grid");
    ctx.fillRect(GUTTER, row * pitch, width - GUTTER - RIGHT, tall);
    ctx.fillStyle = color("muted");
    if (tall > 12 || row % 2 === 0) ctx.fillText(worker < 0 ? "driver" : `worker ${worker}`, GUTTER - 8, row * pitch + tall / 2);
  });
  const fills = Object.fromEntries((lanes.kinds ?? []).map((kind) => [kind, color(kind)]));
  for (const [lane, kind, from, to] of lanes.spans) {
    if (from >= end) continue;
    // whole pixels: gaps narrower than one would show as hairlines
    const left = Math.floor(x(from) * px) / px;
    ctx.fillStyle = fills[kind];
    ctx.fillRect(left, lane * pitch, Math.max(1, Math.ceil(x(to) * px) / px - left), tall);
  }
  const found = new Set();
  for (const [worker, from, to, name] of strip ? curve.strategies : []) {
    const source = sourceOf(name);
    found.add(source);
    ctx.fillStyle = color(source, source === "off" ? 1 : 0.35 + 0.65 * Math.min(1, depthOf(name) / 8));
    ctx.fillRect(x(from), workers.indexOf(worker) * pitch + tall + 2, Math.max(0.5, x(to) - x(from)), strip);
  }
  canvas.onmousemove = (event) => tip(event, { workers, pitch, tall, x });
  canvas.onmouseleave = () => ($("tip").hidden = true);
  keys(found);
  host.setAttribute("aria-label", `What ${workers.length} workers do: ${[...$("lane-key").children].map((item) => item.textContent).join(", ")}`);
}

const depthOf = (strategy) => Number(/ d(\d+)/.exec(strategy)?.[1] ?? 0);

function keys(sources) {
  const { seconds } = shown.lanes;
  const whole = Object.values(seconds).reduce((sum, value) => sum + value, 0);
  const kinds = Object.entries(seconds).sort((a, b) => b[1] - a[1]);
  replace($("lane-key"), ...kinds.map(([kind, value]) => keyItem(kind, kind, `${number((100 * value) / whole, value / whole < 0.01 ? 1 : 0)} %`)));
  const names = { off: "no drafts", suffix: "suffix", eagle: "eagle", sparse: "itself, sparse" };
  replace($("strategy-key"), ...[...sources].map((source) => keyItem(names[source] ?? source, source, null, { thin: true })));
}

function tip(event, { workers, pitch, tall, x }) {
  const box = event.target.getBoundingClientRect();
  const at = event.clientX - box.left, down = event.clientY - box.top;
  const row = Math.floor(down / pitch), onLane = down - row * pitch <= tall;
  const covers = ([lane, , from, to]) => lane === row && x(from) <= at && at <= Math.max(x(to), x(from) + 1);
  const strategy = ([worker, from, to]) => worker === workers[row] && x(from) <= at && at <= x(to);
  const found = onLane ? shown.lanes.spans.find(covers) : shown.curve.strategies.find(strategy);
  const label = $("tip");
  label.hidden = !found;
  if (!found) return;
  label.textContent = onLane ? `${found[1]} ${number(found[3] - found[2], 2)} s` : `drafts: ${found[3]}`;
  label.style.left = `${Math.min(event.clientX + 12, innerWidth - 180)}px`;
  label.style.top = `${event.clientY + 14}px`;
}

new ResizeObserver(() => {
  if (!shown.lanes) return;
  shown.plot?.setSize({ width: $("curve").clientWidth, height: HEIGHT });
  drawLanes();
}).observe($("curve"));

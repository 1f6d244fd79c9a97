// The page: what the hub tells, which step is shown, and who draws it. Files are read by the hub alone.
import { barChart, redrawAll, stepChart } from "/charts.js";
import { age, byHand, get, number } from "/dom.js";
import { drawFigures, drawEvents, showState } from "/header.js";
import { drawRollout, forgetCurve } from "/rollout.js";
import { forgetSamples, showSamples } from "/samples.js";

const REPLAY_MS = 700;
const $ = (id) => document.getElementById(id);

const run = { state: null, stale: true, columns: { step: [] }, phases: {}, evals: [], shown: 0, following: true, playing: 0 };

const reading = (key, label, color, extra = {}) => ({ label, color, values: (data) => data.columns[key], ...extra });
const charts = [
  stepChart("reward", { digits: 3, zero: true, series: [
    reading("reward_mean", "rollouts", "accent"),
    { label: "held-out", color: "good", dots: true, values: evalColumn },
  ] }),
  stepChart("accept", { digits: 2, floor: 1, none: "No step is finished yet.", series: [
    reading("accept_length", "all", "ink"),
    reading("accept_length_suffix", "suffix", "suffix"),
    reading("accept_length_eagle", "eagle", "eagle"),
    reading("accept_length_sparse", "itself, sparse", "sparse"),
  ] }),
  stepChart("breakdown", { digits: 1, unit: " s", zero: true, stack: phaseSeries }),
  stepChart("drift", { digits: 4, zero: true, thresholds: () => run.state?.thresholds, series: [
    reading("prob_diff_mean", "mean probability difference", "accent"),
  ] }),
  stepChart("head", { digits: 2, floor: 1, none: "Not judged yet.", series: [
    reading("drafter_accept_length", "learning", "faint"),
    reading("drafter_served_accept_length", "served", "drafter"),
  ] }),
  stepChart("head-loss", { digits: 3, none: "It has not learned yet.", series: [
    reading("drafter_loss", "loss", "drafter"),
    reading("drafter_version", "version served", "accent", { second: true, stepped: true, digits: 0 }),
  ] }),
  stepChart("share", { digits: 0, unit: " %", zero: true, none: "Nothing was drafted.", series: [
    percent("draft_share_suffix", "suffix", "suffix"), percent("draft_share_eagle", "eagle", "eagle"),
    percent("draft_share_sparse", "itself, sparse", "sparse"),
  ] }),
  stepChart("speed", { digits: 0, zero: true, series: [reading("tokens_per_s", "tokens/s", "accent")] }),
  stepChart("loss", { digits: 4, series: [reading("loss", "loss", "accent")] }),
  stepChart("entropy", { digits: 3, unit: " nats", zero: true, series: [reading("entropy", "a token", "accent")] }),
];

function percent(key, label, color) {
  return { label, color, values: (data) => data.columns[key]?.map((share) => (share == null ? null : 100 * share)) };
}

function evalColumn(data) {
  const rewards = new Map(data.evals.map((record) => [record.step, record.reward_mean]));
  return data.columns.step.map((step) => rewards.get(step) ?? null);
}

function phaseSeries(data) {
  const names = Object.keys(data.phases).filter((name) => data.phases[name].some((seconds) => seconds > 0));
  const order = ["rollout", "reward", "drafter", "train", "sync", "checkpoint", "eval", "other"];
  return order.filter((name) => names.includes(name)).map((name) => ({ label: name, color: name, values: data.phases[name] }));
}

const finished = () => run.state?.step ?? 0;
const newest = () => Math.max(finished(), run.state?.drawn_steps.at(-1)?.[1] ?? 0);

// ------------------------------------------------------------------ what is shown

let loading = new AbortController();
async function show(step) {
  run.shown = Math.min(Math.max(step, newest() ? 1 : 0), newest());
  const slider = $("slider");
  slider.max = Math.max(1, newest());
  slider.value = run.shown;
  slider.setAttribute("aria-valuetext", `step ${run.shown} of ${newest()}`);
  $("step").textContent = run.shown ? `step ${run.shown}` : "–";
  $("previous").disabled = run.shown <= 1;
  $("next").disabled = run.shown >= newest();
  $("follow").setAttribute("aria-pressed", String(run.following));
  const whole = Math.min(run.shown, finished());
  for (const chart of charts) chart.select(whole);
  loading.abort();
  loading = new AbortController();
  const { signal } = loading;
  try {
    const standing = run.shown <= finished() ? "" : run.state.alive ? "under way" : "never finished";
    await Promise.all([drawRollout(run.shown, standing, signal), showRecord(whole, signal), showSamples(whole, signal)]);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
}

let record = null;
async function showRecord(step, signal) {
  if (!step) return;
  if (record?.step !== step) record = await get(`/api/steps?step=${step}`, signal);
  drawFigures(record, run.state.thresholds);
  barChart("reward-hist", record.reward_hist, { label: "rollouts", digits: 2, none: "Rewards were not counted in this run." });
  barChart("length-hist", record.response_len_hist, { label: "rollouts", digits: 0, none: "Lengths were not counted in this run." });
  const mean = (value, digits, unit) => (value == null ? "" : `mean ${number(value, digits)}${unit}`);
  document.querySelector("#rewards-title + p").textContent = mean(record.reward_mean, 3, "");
  document.querySelector("#lengths-title + p").textContent = mean(record.response_len_mean, 0, " tokens");
}

export function go(step) {
  run.following = step >= newest();
  return byHand(show(step));
}

function play(on) {
  clearInterval(run.playing);
  run.playing = 0;
  $("play").setAttribute("aria-pressed", String(on));
  $("play").textContent = on ? "Pause" : "Replay";
  if (!on) return;
  if (run.shown >= newest()) go(1);
  run.playing = setInterval(() => (run.shown < newest() ? go(run.shown + 1) : play(false)), REPLAY_MS);
}

// ------------------------------------------------------------------ what arrives

async function loadSteps() {
  const last = run.columns.step.at(-1) ?? 0;
  const more = await get(`/api/steps?after=${last}`);
  const had = run.columns.step.length;
  const count = more.columns.step?.length ?? 0;
  run.columns = joined(run.columns, more.columns, had, count, null);
  run.phases = joined(run.phases, more.phases, had, count, 0);
  run.evals = more.evals;
  document.body.classList.toggle("no-drafter", !run.columns.drafter_version);
  for (const chart of charts) chart.update(run);
}

function joined(known, more, had, count, missing) {
  const names = new Set([...Object.keys(known), ...Object.keys(more)]);
  return Object.fromEntries([...names].map((name) => [name, [
    ...(known[name] ?? Array(had).fill(missing)), ...(more[name] ?? Array(count).fill(missing)),
  ]]));
}

let work = Promise.resolve();
function take(message) {
  const { state, changed, cut } = message;
  const first = run.stale || cut;
  run.stale = false;
  if (cut) {
    Object.assign(run, { columns: { step: [] }, phases: {}, evals: [] });
    record = null;
    forgetSamples();
  }
  run.state = state;
  showState(state);
  const isNew = (...names) => first || names.some((name) => changed.includes(name));
  // one after the other: two answers to the same question would both be appended
  work = work.then(async () => {
    if (isNew("steps", "evals")) await loadSteps();
    if (isNew("events")) drawEvents((await get("/api/events?last=200")).events);
    if (run.following ? isNew("steps", "curve", "lanes") : first || (run.shown > finished() && isNew("curve", "lanes"))) {
      await show(run.following ? newest() : run.shown);
    } else if (isNew("steps")) {
      $("slider").max = Math.max(1, newest());
      $("next").disabled = run.shown >= newest();
    }
    document.body.dataset.seen = state.now;
  }).catch((error) => {
    run.stale = true; // what was not answered is asked for again with the next word
    if (error.name !== "Unanswered") reportError(error);
  });
}

function listen() {
  const source = new EventSource("/events");
  source.onmessage = (event) => take(JSON.parse(event.data));
  source.onopen = () => (run.stale = true); // whatever was missed meanwhile is asked for again
  source.onerror = () => showState(run.state && { ...run.state, state: "gone" });
}

// ------------------------------------------------------------------ what people do

function keys(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("select, input, [role=listbox]")) return;
  const to = { ArrowLeft: run.shown - 1, ArrowRight: run.shown + 1, Home: 1, End: newest() }[event.key];
  if (to !== undefined) {
    play(false);
    go(to);
  } else if (event.key === " " && !event.target.closest("button, [tabindex]")) {
    play(!run.playing);
  } else return;
  event.preventDefault();
}

function switchTheme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  redraw();
}

function redraw() {
  redrawAll();
  forgetCurve();
  byHand(show(run.shown));
}

$("previous").onclick = () => go(run.shown - 1);
$("next").onclick = () => go(run.shown + 1);
$("follow").onclick = () => { play(false); go(newest()); };
$("play").onclick = () => play(!run.playing);
$("slider").oninput = (event) => { play(false); go(Number(event.target.value)); };
$("theme").onclick = switchTheme;
document.addEventListener("keydown", keys);
document.addEventListener("choose", (event) => { play(false); go(event.detail); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
setInterval(() => run.state && ($("age").textContent = age(Date.now() / 1000 - run.state.updated)), 1000);
await document.fonts.load("12px Inter");
listen();

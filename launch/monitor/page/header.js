// Where the run stands: the header, the alarms, the figures of a step, the events.
import { age, clock, element, number, replace } from "/dom.js";

const $ = (id) => document.getElementById(id);
const BAD = new Set(["drafter_off", "drift", "recovery"]);

export function showState(state) {
  if (!state) return;
  document.title = `${state.run || "Paceline"} · step ${state.step}`;
  $("run").textContent = state.run || "Paceline";
  const draft = state.source === "off" ? "no drafts" : `drafts ${state.source}`;
  const parts = [state.model, state.task, draft, state.workers > 1 ? `${state.workers} workers` : ""];
  $("about").textContent = parts.filter(Boolean).join("  ·  ");
  const gone = state.state === "gone";
  $("state").textContent = gone ? "no connection" : state.state;
  $("state").dataset.state = state.state;
  $("progress").textContent = `${number(state.step, 0)} of ${number(state.total_steps, 0)}`;
  $("time-name").textContent = state.alive ? "Time left" : "Took";
  const seconds = state.alive ? state.eta_s : state.begun && state.updated - state.begun;
  $("time").textContent = seconds == null ? "–" : clock(seconds);
  $("age").textContent = age(state.now - state.updated);
  $("path").textContent = `${state.path} on ${state.host}, attempt ${state.attempt}`;
  const alarms = gone ? [{ level: "warn", text: "the hub does not answer; `paceline monitor RUN` opens the run again" }] : state.alarms;
  replace($("alarms"), ...alarms.map(({ level, text }) => element("p", { class: level }, text)));
}

export function drawFigures(record, thresholds) {
  const drift = record.prob_diff_mean;
  const level = drift > thresholds.alarm ? "alarm" : drift > thresholds.warn ? "warn" : "";
  const figures = [
    ["Reward", number(record.reward_mean, 3), record.reward_std == null ? "" : `± ${number(record.reward_std, 2)}`],
    ["Step time", number(record.seconds, 1), "s"],
    ["Tail of the rollouts", number(record.seconds_tail, 1), record.seconds_tail == null ? "" : "s"],
    ["Tokens a second", number(record.tokens_per_s, 0), ""],
    ["Accept length", number(record.accept_length, 2), ""],
    ["Mean length", number(record.response_len_mean, 0), `max ${number(record.response_len_max, 0)}`],
    ["Truncated", number(100 * record.truncated_fraction, 1), "%"],
    ["Probability difference", number(drift, 4), level, level],
  ];
  replace($("figures"), ...figures.map(([name, value, small, kind = ""]) => element("div", kind ? { class: kind } : {},
    element("dt", {}, name), element("dd", {}, value, ...(small ? [element("small", {}, small)] : [])))));
}

export function drawEvents(events) {
  $("events-note").textContent = events.length ? `${events.length}` : "none yet";
  replace($("events"), ...events.toReversed().map((event) => {
    const { time, event: kind, attempt, ...rest } = event;
    const bad = BAD.has(kind) || (kind === "exit" && rest.code) || /lost|fault|crash|fail|died|nan/.test(kind);
    const when = element("time", { datetime: time, class: "muted", title: time }, time.slice(11, 19));
    const text = Object.entries(rest).filter(([key]) => key !== "path").map(([key, value]) => said(key, value)).join(", ");
    return element("li", bad ? { class: "bad" } : {}, when,
      element("span", {}, element("b", {}, kind.replaceAll("_", " ")), ` ${kind === "attempt" ? attempt : text}`));
  }));
}

function said(key, value) {
  const rounded = typeof value === "number" && !Number.isInteger(value) ? +value.toPrecision(3) : value;
  const shown = typeof rounded === "object" ? JSON.stringify(rounded) : String(rounded);
  return key === "reason" ? shown : `${key.replaceAll("_", " ")} ${shown}`;
}

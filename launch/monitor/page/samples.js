// A step's rollouts: a list, and one in full with the accepted drafts coloured.
import { byHand, element, get, number, replace } from "/dom.js";

const PAGE = 50;
const LONG = 120; // characters of a question that are shown at once
const $ = (id) => document.getElementById(id);
const at = { step: 0, loaded: null, offset: 0, row: null, total: 0 };

export async function showSamples(step, signal) {
  if (step === at.loaded) return;
  Object.assign(at, { step, offset: 0, row: null, loaded: null });
  await list(signal);
  at.loaded = step; // only now: what was called off is asked for again
}

/** What was loaded holds no more. */
export function forgetSamples() {
  at.loaded = null;
}

async function list(signal) {
  const { step } = at;
  const page = step ? await get(`/api/samples?step=${step}&offset=${at.offset}&limit=${PAGE}&order=${$("order").value}`, signal) : { total: 0, rows: [] };
  at.total = page.total;
  const last = Math.min(at.offset + PAGE, page.total);
  $("samples-title").textContent = step ? `Samples of step ${step}` : "Samples";
  $("samples-note").textContent = page.total ? `${at.offset + 1} to ${last} of ${page.total}` : "";
  $("samples-back").disabled = at.offset === 0;
  $("samples-on").disabled = last >= page.total;
  replace($("sample-list"), ...page.rows.map(item));
  if (page.rows.length) await open(page.rows[0].row, signal);
  else replace($("sample"), element("p", { class: "muted" }, step ? "No samples of this step were kept." : "No step is finished yet."));
}

function item(row) {
  const made = element("li", { role: "option", id: `row-${row.row}`, "aria-selected": "false", tabindex: "-1" },
    element("span", { class: "line" }, row.text.trim() || "(nothing)"), element("b", {}, number(row.reward, 2)),
    element("span", { class: "line muted" }, row.question), element("span", { class: "muted" }, `${row.num_tokens} tok`));
  made.onclick = () => byHand(open(row.row));
  return made;
}

async function open(row, signal) {
  at.row = row;
  for (const item of $("sample-list").children) {
    const chosen = item.id === `row-${row}`;
    item.setAttribute("aria-selected", String(chosen));
    item.tabIndex = chosen ? 0 : -1;
  }
  const sample = await get(`/api/samples?step=${at.step}&row=${row}`, signal);
  if (at.row === row) draw(sample);
}

function draw(sample) {
  const facts = [
    ["reward", number(sample.reward, 3)], ["advantage", number(sample.advantage, 2)], ["answer", sample.answer],
    ["tokens", number(sample.num_tokens, 0)], ["drafted", `${number((100 * sample.accepted) / Math.max(1, sample.num_tokens), 0)} %`],
    ["accept length", number(sample.num_tokens / Math.max(1, sample.forwards), 2)], ["ended by", sample.finish === "length" ? "its length" : "itself"],
    ...((sample.sampled_under ?? "dense") === "dense" ? [] : [["attention", sample.sampled_under]]),
  ];
  const text = sample.pieces.length
    ? sample.pieces.map(([piece, drafted]) => (drafted ? element("mark", {}, piece) : piece))
    : [sample.text];
  const note = sample.plain || "accepted drafts: written by the drafter, sampled by the policy";
  replace($("sample"),
    element("dl", { class: "facts" }, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    question(sample.question), element("pre", { dir: "auto" }, ...text),
    element("p", { class: "note" }, ...(sample.plain ? [] : [element("span", { class: "swatch" })]), note));
  $("sample").scrollTop = 0;
}

/** A long question opens on demand: what is looked for is the answer. */
function question(asked) {
  if (asked.length < LONG && !asked.includes("\n")) return element("p", { class: "question" }, asked);
  return element("details", { class: "question" }, element("summary", {}, asked.replaceAll(/\s+/g, " ").slice(0, LONG)), element("pre", {}, asked));
}

function turn(pages) {
  at.offset = Math.max(0, at.offset + pages * PAGE);
  byHand(list());
}

$("order").onchange = () => { at.offset = 0; byHand(list()); };
$("samples-back").onclick = () => turn(-1);
$("samples-on").onclick = () => turn(1);
$("sample-list").onkeydown = (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const items = [...$("sample-list").children];
  const next = items[items.findIndex((item) => item.tabIndex === 0) + step];
  if (next) {
    next.focus();
    next.click();
  }
};

// Small things every part of the page uses: elements, numbers, requests.

export function element(name, attributes = {}, ...children) {
  const made = name.includes(":")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children); // strings become text: what a model wrote is never markup
  return made;
}

export function replace(parent, ...children) {
  parent.replaceChildren(...children);
}

export async function get(url, signal) {
  try {
    const answer = await fetch(url, { signal });
    if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error(`${url}: ${error.message}`), { name: "Unanswered" });
  }
}

/** What someone asked for by hand; where the hub does not answer, the header says so already. */
export function byHand(work) {
  return work.catch((error) => {
    if (error.name !== "Unanswered") throw error;
  });
}

export function number(value, digits) {
  if (value == null) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function clock(seconds) {
  const whole = Math.round(seconds);
  const two = (value) => String(value).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

export function age(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.floor(seconds / length)} ${unit} ago`;
  }
  return `${Math.max(0, Math.round(seconds))} s ago`;
}

const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);

/** A colour of page.css as it is in the theme at hand, for canvases. */
export function color(name, alpha = 1) {
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  return alpha === 1 ? found : found.replace(/rgba?\(([^)]+)\)/, (_, parts) => `rgba(${parts.split(",").slice(0, 3)},${alpha})`);
}

export function keyItem(label, colour, value, { thin = false } = {}) {
  const swatch = element("i", thin ? { class: "thin" } : {});
  swatch.style.background = `var(--${colour})`;
  return element("span", {}, swatch, label, ...(value == null ? [] : [element("b", {}, value)]));
}

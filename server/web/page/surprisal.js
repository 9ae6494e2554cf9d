// The section Surprisal: scores a text and shows a heat map of its tokens, with arrow keys to move between them.

import { Failure, call, events } from "./api.js";
import { Inspector, NATS_PER_BIT } from "./inspector.js";
import { Job, bindKeys } from "./job.js";

const MAX_BYTES = 32768; // about 10,000 tokens, each an element of the page
const FULL_BITS = 12; // the surprisal with the hottest colour
const RETURN = ["tokens", "top", "entropy", "memory_share"];
const NUM_TOP = 8;

const $ = (id) => document.getElementById(id);
const passage = $("passage");
const heat = $("heat");
const numBytes = (text) => new TextEncoder().encode(text).length;

/** Set up the section. Returns measure(text), which enters a text and scores it. */
export function setUpSurprisal() {
  const map = new HeatMap();
  const job = new Job({
    form: $("surprisal-form"),
    button: $("surprisal-run"),
    status: $("surprisal-status"),
    error: $("surprisal-error"),
    work: (signal) => score(map, signal),
    stopped: () => `Stopped after ${map.tokens.length.toLocaleString("en")} tokens`,
  });
  bindKeys($("surprisal"), job);
  passage.addEventListener("input", showSize);
  showSize();
  return (text) => {
    passage.value = text;
    showSize();
    $("surprisal").scrollIntoView();
    $("surprisal-run").focus({ preventScroll: true });
    job.restart();
  };
}

function showSize() {
  const size = numBytes(passage.value);
  const limit = MAX_BYTES.toLocaleString("en");
  $("passage-size").textContent = `${size.toLocaleString("en")} of at most ${limit} bytes`;
  $("passage-size").classList.toggle("over", size > MAX_BYTES);
}

async function score(map, signal) {
  const inputs = passage.value;
  const size = numBytes(inputs);
  if (size > MAX_BYTES) {
    throw new Failure(
      `This text has ${size.toLocaleString("en")} bytes; the page shows at most ${MAX_BYTES.toLocaleString("en")}. ` +
        "POST /score takes a text of any length.",
    );
  }
  map.clear();
  $("surprisal-figures").hidden = true;
  $("surprisal-status").textContent = "Waiting for the server";
  const body = JSON.stringify({ inputs, return: RETURN, top: NUM_TOP, stream: true });
  const response = await call("score", { body, signal });
  let reply = null;
  for await (const event of events(response)) {
    map.add(event.tokens ?? []);
    $("surprisal-status").textContent = `${Math.round((100 * event.index) / Math.max(event.num_tokens, 1))} %`;
    reply = event.reply ?? reply;
  }
  if (!reply) throw new Failure("The stream ended before the text did.");
  showFigures(reply);
  return "Done";
}

function showFigures(reply) {
  const decimal = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  $("figure-bits").textContent = decimal(reply.bits_per_byte, 3);
  $("figure-bits").dataset.exact = reply.bits_per_byte;
  $("figure-perplexity").textContent = decimal(reply.perplexity, 1);
  $("figure-scored").textContent = reply.num_tokens.toLocaleString("en");
  $("figure-bytes").textContent = reply.num_bytes.toLocaleString("en");
  $("surprisal-figures").hidden = false;
}

/** The heat map: one element for each token. The Tab key reaches only one of them. */
class HeatMap {
  tokens = [];
  current = null; // the element that has or last had the focus

  constructor() {
    this.inspector = new Inspector();
    heat.addEventListener("pointerover", (event) => this.inspect(event.target));
    heat.addEventListener("pointerleave", () => this.inspect(this.current));
    heat.addEventListener("focusin", (event) => this.choose(event.target));
    heat.addEventListener("keydown", (event) => this.moveFocus(event));
  }

  clear() {
    this.tokens = [];
    this.current = null;
    heat.replaceChildren();
    heat.hidden = $("heat-legend").hidden = true;
    this.inspector.clear();
  }

  add(tokens) {
    const fragment = document.createDocumentFragment();
    for (const token of tokens) {
      fragment.append(element(token, this.tokens.length));
      this.tokens.push(token);
    }
    heat.append(fragment);
    heat.hidden = $("heat-legend").hidden = !this.tokens.length;
    if (!this.current && heat.firstChild) heat.firstChild.tabIndex = 0;
  }

  inspect(target) {
    const token = this.tokens[target?.dataset.index];
    if (token) this.inspector.show(token);
  }

  choose(target) {
    (this.current ?? heat.firstChild).tabIndex = -1;
    this.current?.setAttribute("aria-selected", "false");
    this.current = target;
    target.tabIndex = 0;
    target.setAttribute("aria-selected", "true");
    this.inspect(target);
  }

  moveFocus(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const from = event.target;
    const steps = {
      ArrowLeft: () => from.previousSibling,
      ArrowRight: () => from.nextSibling,
      ArrowUp: () => onNextLine(from, "previousSibling"),
      ArrowDown: () => onNextLine(from, "nextSibling"),
      Home: () => heat.firstChild,
      End: () => heat.lastChild,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    steps[event.key]()?.focus();
  }
}

function element({ text, logprob }, index) {
  const span = document.createElement("span");
  span.textContent = text;
  span.dataset.index = index;
  span.tabIndex = -1;
  span.role = "option";
  span.ariaSelected = "false";
  if (!text) span.className = "part"; // part of a character that a later token completes
  else if (text.includes("\n")) span.className = "break";
  if (!text.trim()) span.ariaLabel = text ? JSON.stringify(text) : "part of a character";
  if (logprob !== null) span.style.setProperty("--h", Math.min(-logprob / NATS_PER_BIT / FULL_BITS, 1).toFixed(3));
  return span;
}

/** Returns the nearest token on the line above or below. */
function onNextLine(from, step) {
  const rectOf = (token) => token.getClientRects()[0] ?? token.getBoundingClientRect();
  const start = rectOf(from);
  const isOnOtherLine = (rect) => Math.abs(rect.top - start.top) > start.height / 2;
  let line = null;
  let best = null;
  let distance = Infinity;
  for (let token = from[step]; token; token = token[step]) {
    const rect = rectOf(token);
    if (!isOnOtherLine(rect)) continue;
    line ??= rect.top;
    if (Math.abs(rect.top - line) > rect.height / 2) break;
    if (Math.abs(rect.left - start.left) < distance) [best, distance] = [token, Math.abs(rect.left - start.left)];
  }
  return best;
}

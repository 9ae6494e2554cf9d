// The section that generates: its fields become a request, the events of the answer become text.

import { Failure, call, events } from "./api.js";
import { Job, bindKeys } from "./job.js";

const NUMBER = /^-?\d+(\.\d+)?([eE][-+]?\d+)?$/;
const ENDINGS = {
  length: "Done: as many tokens as asked for",
  eos_token: "Done: the model ended the text",
  stop_sequence: "Done: a stop text was reached",
  cancelled: "Ended: somebody cancelled the request",
  timeout: "Ended: the server's time limit has passed",
  shutdown: "Ended: the server shuts down",
};
const MODES = {
  sample: "The next token is drawn: a probable one is likely, a rare one is possible.",
  greedy: "Always the most probable token. Nothing is drawn, so the text is the same each time.",
};

const $ = (id) => document.getElementById(id);
const form = $("generate-form");
const output = $("output");

/** Set the section up. `measure(text)` is what the button that leads to the next section does. */
export function setUpGenerate({ measure }) {
  const run = new Run();
  const job = new Job({
    form,
    button: $("generate-run"),
    status: $("generate-status"),
    error: $("generate-error"),
    work: (signal) => run.work(signal),
    stopped: () => "Stopped",
  });
  bindKeys($("generate"), job);
  for (const radio of form.elements.mode) radio.addEventListener("change", showMode);
  showMode();
  $("keep-seed").addEventListener("click", () => {
    form.elements.seed.value = run.seed;
    form.elements.mode.value = "sample";
    showMode();
    job.start();
  });
  $("measure-output").addEventListener("click", () => measure(output.textContent));
}

/** Say what the chosen mode does, and disable the fields that it has no use for. */
export function showMode() {
  const mode = form.elements.mode.value;
  $("mode-note").textContent = MODES[mode];
  for (const input of form.elements) if ("sampling" in input.dataset) input.disabled = mode === "greedy";
}

/** One generation after the other, and what is shown of it. */
class Run {
  seed = "";

  async work(signal) {
    const { body, ...asked } = this.request();
    const began = performance.now();
    $("generate-status").textContent = "Waiting for the server";
    const response = await call("generate", { body, signal });
    this.reset({ ...asked, began }); // not before: what is refused leaves the text before it where it is
    let last;
    try {
      for await (const event of events(response)) {
        this.add(event);
        last = event;
      }
    } finally {
      this.show();
      $("after").hidden = false;
    }
    if (!last?.details) throw new Failure("The stream ended before the text did.");
    this.unshown = last.generated_text.slice(this.text.length); // part of a character, if anything
    this.show();
    return ENDINGS[last.details.finish_reason] ?? last.details.finish_reason;
  }

  /** What the fields ask for; `body` is JSON. Numbers are sent digit by digit as typed: a seed may have 64 bits. */
  request() {
    const prompt = $("prompt").value;
    const isGreedy = form.elements.mode.value === "greedy";
    const fields = [...form.elements].filter((input) => input.type === "number" && !input.disabled);
    const parameters = fields.filter((input) => input.value || input.validity.badInput).map((input) => {
      const digits = input.value.replace(/^(-?)0*(?=\d)/, "$1").replace(/^(-?)\./, "$10."); // 007 and .5 are no JSON
      if (!NUMBER.test(digits)) throw new Failure(`${input.name}: this is not a number`);
      return [input.name, digits];
    });
    const given = Object.fromEntries(parameters);
    if (!given.max_new_tokens) given.max_new_tokens = "null";
    if (!isGreedy) {
      given.seed ??= drawSeed(); // here and not by the server, so that a text that was stopped can be repeated too
      if (Number(given.temperature ?? 1) !== 0) given.do_sample = "true";
    }
    const json = Object.entries(given).map(([name, value]) => `${JSON.stringify(name)}:${value}`);
    const body = `{"inputs":${JSON.stringify(prompt)},"stream":true,"parameters":{${json.join(",")}}}`;
    return { body, prompt, seed: given.seed ?? "" };
  }

  reset({ prompt, seed, began }) {
    Object.assign(this, { seed, began });
    this.count = 0;
    this.first = this.latest = null;
    this.unshown = "";
    this.text = document.createTextNode("");
    const before = document.createElement("span");
    before.className = "prompt";
    before.textContent = prompt;
    output.replaceChildren(before, this.text);
    output.hidden = $("generate-figures").hidden = false;
    $("after").hidden = true;
    $("keep-seed").hidden = !this.seed;
    for (const id of ["figure-tokens", "figure-rate", "figure-first"]) $(id).textContent = "–";
    $("figure-seed").textContent = seed || "none: greedy";
  }

  add({ token }) {
    if (!token) return;
    this.latest = performance.now();
    if (!this.count) {
      this.first = this.latest;
      $("generate-status").textContent = "Generating";
    }
    this.count += 1;
    if (!this.unshown) requestAnimationFrame(() => this.show());
    this.unshown += token.text;
  }

  /** Once a frame, for a fast server sends many tokens in one. */
  show() {
    const isAtEnd = output.scrollTop + output.clientHeight >= output.scrollHeight - 4;
    this.text.appendData(this.unshown);
    this.unshown = "";
    if (isAtEnd) output.scrollTop = output.scrollHeight;
    $("figure-tokens").textContent = this.count.toLocaleString("en");
    if (this.count) $("figure-first").textContent = `${Math.round(this.first - this.began)} ms`;
    if (this.count > 1) $("figure-rate").textContent = rate(this.count - 1, this.latest - this.first);
  }
}

function rate(count, milliseconds) {
  return milliseconds > 0 ? Math.round((1000 * count) / milliseconds).toLocaleString("en") : "–";
}

/** Below 2^53, as the server's. */
function drawSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return String((high % 2 ** 21) * 2 ** 32 + low);
}

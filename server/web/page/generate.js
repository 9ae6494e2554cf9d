// The section Generate: turns its fields into a request, and the events of the stream into text.

import { Failure, call, events } from "./api.js";
import { Job, bindKeys } from "./job.js";

const NUMBER = /^-?\d+(\.\d+)?([eE][-+]?\d+)?$/;
const ENDINGS = {
  length: "Done: the requested number of tokens",
  eos_token: "Done: the model ended the text",
  stop_sequence: "Done: the text reached a stop string",
  cancelled: "Ended: the request was cancelled",
  timeout: "Ended: the time limit of the server has passed",
  shutdown: "Ended: the server is shutting down",
};
const MODES = {
  sample: "Draws each token at random from the model's distribution.",
  greedy: "Always takes the most probable token, so the text is the same each time.",
};

const $ = (id) => document.getElementById(id);
const form = $("generate-form");
const output = $("output");

/** Set up the section. `measure(text)` scores a text in the section Surprisal. */
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

/** Explain the chosen mode, and disable the fields that it ignores. */
export function showMode() {
  const mode = form.elements.mode.value;
  $("mode-note").textContent = MODES[mode];
  for (const input of form.elements) if ("sampling" in input.dataset) input.disabled = mode === "greedy";
}

/** The shown generation. Each new generation replaces the one before it. */
class Run {
  seed = "";

  async work(signal) {
    const { body, ...shown } = this.request();
    const began = performance.now();
    $("generate-status").textContent = "Waiting for the server";
    const response = await call("generate", { body, signal });
    this.reset({ ...shown, began }); // only now, so that a refused request leaves the previous text
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
    this.unshown = last.generated_text.slice(this.text.length); // an incomplete character at the end, if any
    this.show();
    return ENDINGS[last.details.finish_reason] ?? last.details.finish_reason;
  }

  /** Returns the request; `body` is JSON text. Numbers keep the typed digits, because a seed may have 64 bits. */
  request() {
    const prompt = $("prompt").value;
    const isGreedy = form.elements.mode.value === "greedy";
    const fields = [...form.elements].filter((input) => input.type === "number" && !input.disabled);
    const entries = fields.filter((input) => input.value || input.validity.badInput).map((input) => {
      const digits = input.value.replace(/^(-?)0*(?=\d)/, "$1").replace(/^(-?)\./, "$10."); // 007 and .5 are not JSON
      if (!NUMBER.test(digits)) throw new Failure(`${input.name}: this is not a number`);
      return [input.name, digits];
    });
    const parameters = Object.fromEntries(entries);
    if (!parameters.max_new_tokens) parameters.max_new_tokens = "null";
    if (!isGreedy) {
      parameters.seed ??= drawSeed(); // drawn here, so that a stopped text can be repeated too
      if (Number(parameters.temperature ?? 1) !== 0) parameters.do_sample = "true";
    }
    const json = Object.entries(parameters).map(([name, value]) => `${JSON.stringify(name)}:${value}`);
    const body = `{"inputs":${JSON.stringify(prompt)},"stream":true,"parameters":{${json.join(",")}}}`;
    return { body, prompt, seed: parameters.seed ?? "" };
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

  /** Shows the new tokens. Runs once per frame, because a fast server sends many tokens within one frame. */
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

/** Returns a random seed below 2^53, like the seeds that the server draws. */
function drawSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return String((high % 2 ** 21) * 2 ** 32 + low);
}

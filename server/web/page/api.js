// Talks to the server: JSON out, JSON or server-sent events in, errors as the server words them. Knows no section.
// Addresses are relative, so that the page also works behind a proxy's prefix.

const KEY = "allattn.key"; // for as long as the tab lives
const VISIBLE = /^[\x21-\x7e]+$/;

const form = document.querySelector("#key-form");
const field = document.querySelector("#key");
const note = document.querySelector("#key-note");
let asking = null; // a promise, while the user is asked for a key

/** What the server refused, or why it could not be asked. */
export class Failure extends Error {}

/** POST `body` (JSON text), or GET without one. Returns a response that is fine, or throws Failure or AbortError. */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, { body, signal, key });
    if (response.ok) return response;
    const message = await wording(response);
    signal?.throwIfAborted(); // it may have been, while the words were read
    if (response.status !== 401) throw new Failure(message);
    if (sessionStorage.getItem(KEY) === key) await ask(message, signal); // else another call has asked meanwhile
  }
}

async function send(path, { body, signal, key }) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
}

async function wording(response) {
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` (try again in ${wait} s)` : "";
  try {
    return (await response.json()).error.message + again;
  } catch {
    return `The answer was ${response.status} ${response.statusText}${again}`; // a proxy's, not the server's
  }
}

/** Show the field for the key, and wait until there is one. */
function ask(message, signal) {
  note.textContent = sessionStorage.getItem(KEY) ? `This key is not known. ${message}` : message;
  form.hidden = false;
  field.focus();
  asking ??= new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      const key = field.value.trim();
      if (!VISIBLE.test(key)) { // what a header cannot hold is not sent, nor kept
        note.textContent = "A key has visible ASCII characters and no spaces.";
        return;
      }
      sessionStorage.setItem(KEY, key);
      form.hidden = true;
      field.value = "";
      asking = null;
      resolve();
    };
  });
  const aborted = new Promise((_, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([asking, aborted]);
}

/** The events of a stream, parsed. Throws Failure for an error event, or where the connection breaks. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue; // a ping
        const event = JSON.parse(block.slice(6));
        if (event.error) throw new Failure(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The connection broke off.");
  }
}

// The client of the server's API: sends JSON, reads JSON or server-sent events. Knows no section of the page.
// Addresses are relative, so that the page also works behind a proxy's prefix.

const KEY = "allattn.key"; // in sessionStorage, which lasts as long as the tab
const VISIBLE = /^[\x21-\x7e]+$/;

const form = document.querySelector("#key-form");
const field = document.querySelector("#key");
const note = document.querySelector("#key-note");
let keyRequest = null; // a promise, while the page asks the user for a key

/** An error for the user: the server refused a request or cannot be reached. */
export class Failure extends Error {}

/** POST `body` (JSON text), or GET without a body. Returns a successful response; throws Failure or AbortError. */
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, { body, signal, key });
    if (response.ok) return response;
    const message = await errorMessage(response);
    signal?.throwIfAborted(); // the user may have stopped the request meanwhile
    if (response.status !== 401) throw new Failure(message);
    if (sessionStorage.getItem(KEY) === key) await askForKey(message, signal); // otherwise another call has stored a new key
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

async function errorMessage(response) {
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` (try again in ${wait} s)` : "";
  try {
    return (await response.json()).error.message + again;
  } catch {
    return `The response was ${response.status} ${response.statusText}${again}`; // a proxy's response has no error object
  }
}

/** Show the field for the API key and wait until the user has entered a key. */
function askForKey(message, signal) {
  note.textContent = sessionStorage.getItem(KEY) ? `This key is not known. ${message}` : message;
  form.hidden = false;
  field.focus();
  keyRequest ??= new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      const key = field.value.trim();
      if (!VISIBLE.test(key)) { // a header cannot hold other characters
        note.textContent = "A key consists of visible ASCII characters without spaces.";
        return;
      }
      sessionStorage.setItem(KEY, key);
      form.hidden = true;
      field.value = "";
      keyRequest = null;
      resolve();
    };
  });
  const aborted = new Promise((_, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([keyRequest, aborted]);
}

/** Yields the parsed events of a stream. Throws Failure for an error event or a broken connection. */
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
    throw new Failure("The connection was lost.");
  }
}

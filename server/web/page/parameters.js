// The fields of the sampling form, made from what the server says of each parameter. Knows no request.

import { call } from "./api.js";

const INITIAL = { temperature: 0.8, max_new_tokens: 200 }; // elsewhere a field is empty, which is the server's default
const FIRST = ["seed", "max_new_tokens"]; // shown at once, beside those that ask for sampling
const EMPTY = { seed: "drawn", max_new_tokens: "no limit", temperature: "1" }; // what an empty field means

/** Make a field for each parameter. */
export async function showParameters() {
  const parameters = await (await call("playground/parameters.json")).json();
  const isFirst = (one) => one.asks_for_sampling || FIRST.includes(one.name);
  fill("parameters", parameters.filter(isFirst));
  fill("more-parameters", parameters.filter((one) => !isFirst(one)));
}

function fill(id, parameters) {
  document.getElementById(id).replaceChildren(...parameters.map(field));
}

function field({ name, description, type, default: value, minimum, asks_for_sampling: draws }) {
  const label = document.createElement("label");
  label.htmlFor = name;
  label.textContent = wording(name);
  const input = document.createElement("input");
  Object.assign(input, {
    id: name,
    name,
    type: "number",
    step: type === "integer" ? "1" : "0.05",
    min: minimum ?? "",
    placeholder: EMPTY[name] ?? (value === null ? "off" : String(value)),
  });
  input.setAttribute("form", "generate-form");
  input.setAttribute("aria-describedby", `${name}-note`);
  input.setAttribute("value", INITIAL[name] ?? "");
  if (draws || name === "seed") input.dataset.sampling = "";
  const note = document.createElement("p");
  note.id = `${name}-note`;
  note.className = "note";
  note.textContent = description;
  const box = document.createElement("div");
  box.className = "field";
  box.append(label, input, note);
  return box;
}

/** top_k reads Top k. */
function wording(name) {
  const words = name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

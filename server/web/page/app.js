// Puts the page together: the facts at its top, the theme, and the three sections.

import { call } from "./api.js";
import { setUpGenerate, showMode } from "./generate.js";
import { showParameters } from "./parameters.js";
import { showSpans } from "./spans.js";
import { setUpSurprisal } from "./surprisal.js";

const THEME = "allattn.theme";
const THEMES = ["auto", "light", "dark"];

const $ = (id) => document.getElementById(id);

function setUpTheme() {
  const root = document.documentElement;
  const show = () => { $("theme").textContent = `Theme: ${root.dataset.theme ?? "auto"}`; };
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    try { localStorage.setItem(THEME, next); } catch { /* storage is refused: it lasts as long as the page */ }
    show();
  });
  show();
}

async function showForm() {
  try {
    await showParameters();
    showMode();
  } catch (error) {
    $("generate-error").textContent = error.message;
    $("generate-error").hidden = false;
  }
}

async function showModel() {
  try {
    const info = await (await call("info")).json();
    $("facts").textContent = facts(info).join(" · ");
    showSpans(await (await call("model/spans")).json(), info);
  } catch (error) {
    $("spans-error").textContent = error.message;
    $("spans-error").hidden = false;
  }
}

function facts({ model, engine }) {
  const { config } = model;
  const test = model.training.splits?.test?.bits_per_byte;
  return [
    model.name,
    `${(model.num_parameters / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 })} M parameters`,
    `${config.num_layers} layers of ${config.num_heads} heads`,
    ...(engine ? [`${engine.dtype} on ${engine.device}`] : []),
    ...(test ? [`${test.toFixed(2)} bits per byte on its test set`] : []),
  ];
}

setUpTheme();
setUpGenerate({ measure: setUpSurprisal() });
showForm();
showModel();

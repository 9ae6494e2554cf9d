// The panel that shows the figures of one scored token.

export const NATS_PER_BIT = Math.LN2;

const $ = (id) => document.getElementById(id);
const bits = (nats) => `${(nats / NATS_PER_BIT).toFixed(2)} bits`;

/** Returns a token's text in quotes, so that line breaks, tabs and an empty text are visible. */
export function quote(text) {
  return JSON.stringify(text);
}

function percent(probability) {
  if (probability >= 0.9995) return "100 %";
  if (probability >= 0.001) return `${(100 * probability).toFixed(1)} %`;
  return `${(100 * probability).toExponential(1)} %`;
}

/** The panel beside the heat map. */
export class Inspector {
  clear() {
    $("inspector-hint").hidden = false;
    $("inspector-token").hidden = $("inspector-more").hidden = true;
  }

  show(token) {
    const isScored = token.logprob !== null;
    $("inspector-hint").hidden = true;
    $("inspector-token").hidden = false;
    $("token-text").textContent = token.text ? quote(token.text) : "part of a character";
    $("token-id").textContent = `id ${token.id}`;
    $("token-first").hidden = isScored;
    $("token-figures").hidden = $("inspector-more").hidden = !isScored;
    if (!isScored) return;
    $("token-bits").textContent = bits(-token.logprob);
    $("token-logprob").textContent = `${token.logprob.toFixed(2).replace("-", "−")} nats`;
    $("token-probability").textContent = percent(Math.exp(token.logprob));
    $("token-rank").textContent = token.rank ? (token.rank + 1).toLocaleString("en") : "1 (first)";
    $("token-entropy").textContent = bits(token.entropy);
    $("token-top").replaceChildren(...token.top.map((top) => alternative(top, token.id)));
    $("token-memory").replaceChildren(...token.memory_share.map(layer));
  }
}

function alternative({ id, text, logprob }, actual) {
  const row = document.createElement("li");
  const [code, share, bar] = ["code", "span", "i"].map((name) => document.createElement(name));
  code.textContent = quote(text);
  share.textContent = percent(Math.exp(logprob));
  bar.style.setProperty("--v", Math.exp(logprob).toFixed(4));
  row.classList.toggle("actual", id === actual);
  row.append(code, share, bar);
  return row;
}

function layer(share, index) {
  const item = document.createElement("li");
  const [bar, value, name] = ["i", "span", "b"].map((tag) => document.createElement(tag));
  bar.style.setProperty("--v", share.toFixed(4));
  value.textContent = `${Math.round(100 * share)} %`;
  name.textContent = index;
  item.title = item.ariaLabel = `layer ${index}: ${value.textContent}`;
  item.append(value, bar, name);
  return item;
}

// The section Spans: how far each head looks back, and the memory this takes.

const ITEM_BYTES = { float32: 4, bfloat16: 2, float16: 2 };

const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");

/** Draw the reply of /model/spans; `info` has the head size and the number format. */
export function showSpans(reply, info) {
  const { spans, max_span, num_heads } = reply;
  const headBytes = (2 * info.model.config.width / num_heads) * ITEM_BYTES[info.engine?.dtype]; // key and value of one token
  const shortest = Math.min(...spans.flat());
  const heatOf = scale(shortest, max_span);
  const layers = spans.map((heads) => heads.reduce((sum, span) => sum + span, 0) * headBytes);
  const most = Math.max(...layers);
  const head = row("th", ["Layer", ...Array.from({ length: num_heads }, (_, i) => `Head ${i}`), "Keys and values"]);
  for (const cell of head.children) cell.scope = "col";
  const body = spans.map((heads, i) => {
    const line = row("td", ["", ...heads.map(number), size(layers[i])]);
    line.firstChild.replaceWith(cellOf("th", i));
    line.firstChild.scope = "row";
    heads.forEach((span, h) => line.children[h + 1].style.setProperty("--h", heatOf(span).toFixed(3)));
    line.lastChild.append(bar(layers[i] / most));
    return line;
  });
  const table = $("spans-table");
  table.createTHead().replaceChildren(head);
  (table.tBodies[0] ?? table.createTBody()).replaceChildren(...body);
  table.classList.toggle("many", num_heads > 6);
  const legend = $("spans-legend");
  legend.firstChild.textContent = `${number(shortest)} tokens`;
  legend.lastChild.textContent = `${number(max_span)} tokens, log scale`;
  legend.hidden = false;
  showCost(reply, headBytes);
}

/** Show the memory of a stream, and the memory it would take if every head had the longest span. */
function showCost({ spans, max_span, num_layers, num_heads, num_persistent, state_bytes_per_row }, headBytes) {
  const full = num_layers * num_heads * max_span * headBytes;
  const pairs = [
    ["One stream", size(state_bytes_per_row)],
    ["With the maximum span in every head", size(full)],
    ["Longest span", `${number(Math.max(...spans.flat()))} tokens`],
    ["Persistent vectors", `${number(num_persistent)} a head`],
  ];
  $("spans-figures").replaceChildren(...pairs.map(([name, value]) => pair(name, value)));
  $("spans-note").textContent =
    "The state never grows: a stream of a million tokens takes the same memory as a stream of ten. Rings are a little " +
    "longer than spans, so it is more than the sum of keys and values. Persistent vectors are weights and not part of it.";
}

/** Returns a function that maps a span to 0 (shortest) to 1 (longest) on a logarithmic scale. */
function scale(shortest, longest) {
  const range = Math.log(longest / shortest);
  return (span) => (range > 0 ? Math.log(span / shortest) / range : 1);
}

function size(bytes) {
  if (!Number.isFinite(bytes)) return "–";
  const [unit, unitBytes] = bytes >= 2 ** 20 ? ["MiB", 2 ** 20] : ["KiB", 2 ** 10];
  return `${(bytes / unitBytes).toLocaleString("en", { maximumSignificantDigits: 3 })} ${unit}`;
}

function row(name, texts) {
  const line = document.createElement("tr");
  line.append(...texts.map((text) => cellOf(name, text)));
  return line;
}

function cellOf(name, text) {
  const cell = document.createElement(name);
  cell.textContent = text;
  return cell;
}

function bar(share) {
  const element = document.createElement("i");
  element.style.setProperty("--v", share.toFixed(4));
  return element;
}

function pair(name, value) {
  const group = document.createElement("div");
  group.append(cellOf("dt", name), cellOf("dd", value));
  return group;
}

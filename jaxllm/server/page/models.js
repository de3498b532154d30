// The models of a pool: how far each is, who is on the device, and the latest switches.

const SHOWN = 5;
let card = null;

function line(kind, text, parent) {
  const element = document.createElement(kind);
  element.textContent = text;
  parent.append(element);
  return element;
}

const bytes = (n) => n === null ? "" : n >= 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e6).toFixed(1)} MB`;

function where(model, current) {
  if (model.error) return `failed: ${model.error}`;
  if (model.state === "absent") return "not loaded";
  if (model.state !== "ready") return model.stage ? `${model.state}: ${model.stage}` : model.state;
  if (model.id === current) return "running";
  return model.place === "device" ? "on the device" : `in ${model.place === "host" ? "host memory" : "files"}`;
}

// `pool` is what `GET /running` says; a server of one model has none.
export function showModels(place, pool) {
  if (!card) {
    card = document.createElement("figure");
    card.id = "pool";
    place.prepend(card);
  }
  const caption = document.createElement("figcaption"), used = pool.device_bytes;
  line("span", "Models", caption);
  line("b", `${bytes(used.used)} of ${bytes(used.limit)}`, caption);
  const list = document.createElement("table"), now = Date.now() / 1000;
  for (const model of [...pool.running, ...pool.absent]) {
    const row = document.createElement("tr");
    row.className = model.id === pool.current ? "current" : "";
    line("td", model.id, row);
    line("td", where(model, pool.current), row).title = where(model, pool.current);
    line("td", model.requests ? `${model.requests} request${model.requests > 1 ? "s" : ""}` : "", row);
    line("td", bytes(model.weight_bytes), row);
    list.append(row);
  }
  const switches = document.createElement("ol");
  for (const one of pool.switches.slice(-SHOWN).reverse()) {
    const ago = Math.max(0, now - one.time);
    line("li", `${one.left ?? "nobody"} → ${one.model}, ${(one.seconds * 1000).toFixed(0)} ms, ${ago.toFixed(0)} s ago`, switches);
  }
  card.replaceChildren(caption, list, switches);
}

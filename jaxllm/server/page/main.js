// The page: what buttons and keys do, and one answer at a time.

import { answer, models, withoutThoughts } from "./api.js";
import { CHARTS, watch } from "./charts.js";
import { Log } from "./log.js";
import { Conversations, settings } from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty"];
const KEPT = [...NUMBERS, "max", "system", "thinking", "stop"];
const conversations = new Conversations();
const log = new Log($("log"), $("down"), { regenerate, resume, edit });
let current = conversations.all[0] ?? conversations.fresh();
let running = null;  // {controller, conversation} of the answer that is coming
let editing = null;  // index of the message that the next one replaces

function sampling() {
  const body = {};
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  if ($("max").value !== "") body.max_tokens = Number($("max").value);
  if ($("stop").value) body.stop = [$("stop").value];
  if ($("thinking").value) body.chat_template_kwargs = { enable_thinking: $("thinking").value === "on" };
  if (!$("models").hidden) body.model = $("models").value;
  return body;
}

function history(conversation) {
  const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  return [...system, ...conversation.messages.map((m) => ({ role: m.role, content: m.text }))];
}

// One answer into `message`, the last of `conversation`, whichever conversation is shown meanwhile.
async function run(conversation, message, extra = {}) {
  const messages = history(conversation), controller = new AbortController(), settled = sampling();
  if (!message.text) messages.pop();
  running?.controller.abort();
  const mine = running = { controller, conversation };
  $("send").textContent = "Stop";
  $("speed").textContent = "";
  message.end = message.note = undefined;
  message.limit = settled.max_tokens;
  const started = performance.now(), before = message.text, thoughts = message.thinking ?? "";
  let text = "", first = 0, tokens = 0;
  try {
    for await (const piece of answer({ ...settled, messages, ...extra }, controller.signal)) {
      first ||= piece.text || piece.thinking ? performance.now() : 0;
      if (piece.thinking) message.thinking = (message.thinking ?? "") + piece.thinking;
      if (piece.text) grow(piece.text);
      if (piece.end) message.end = piece.end;
      if (piece.tokens) tokens = piece.tokens;
      log.grow(message);
    }
    if (running === mine && first) $("speed").textContent = speed(first - started, performance.now() - first, tokens);
  } catch (error) {
    message.end = error.name === "AbortError" ? "stopped" : "error";
    if (message.end === "error") message.note = error.message;
  }
  if (running === mine) {
    running = null;
    $("send").textContent = "Send";
  }
  conversations.save(conversation);
  log.refresh(message, false);
  listAll();

  function grow(piece) {
    text += piece;
    const parts = before ? { text, thinking: "" } : withoutThoughts(text);
    message.text = before + parts.text;
    if (parts.thinking) message.thinking = thoughts + parts.thinking;
  }
}

function speed(first, rest, tokens) {
  const then = tokens > 1 && rest > 0 ? ` · ${((tokens - 1) / rest * 1000).toFixed(1)} tokens/s` : "";
  return `first token ${first.toFixed(0)} ms${then}`;
}

function ask(question) {
  if (editing !== null) current.messages.splice(editing);
  stopEditing();
  current.messages.push({ role: "user", text: question });
  begin();
}

function begin() {
  const message = { role: "assistant", text: "" };
  current.messages.push(message);
  conversations.save(current);
  show(current);
  log.refresh(message, true);
  run(current, message);
}

function regenerate() {
  if (running) return;
  current.messages.pop();
  begin();
}

function resume() {
  if (running) return;
  const message = current.messages.at(-1);
  run(current, message, { add_generation_prompt: false, continue_final_message: true });
  log.refresh(message, true);
}

function edit(index) {
  running?.controller.abort();
  editing = index;
  $("editing").hidden = false;
  $("text").value = current.messages[index].text;
  fit();
  $("text").focus();
}

function stopEditing() { editing = null; $("editing").hidden = true; }

function show(conversation) {
  current = conversation;
  log.show(conversation);
  listAll();
}

function open(conversation) {
  running?.controller.abort();
  running = null;
  $("send").textContent = "Send";
  $("speed").textContent = "";
  stopEditing();
  document.body.classList.remove("list");
  show(conversation);
  $("text").focus();
}

function listAll() {
  const rows = conversations.all.map((conversation) => {
    const row = document.createElement("div"), name = document.createElement("button"), remove = document.createElement("button");
    row.className = conversation.id === current.id ? "current" : "";
    name.className = "open"; name.textContent = conversation.title; name.title = conversation.title;
    name.addEventListener("click", () => open(conversation));
    remove.className = "delete"; remove.textContent = "×"; remove.ariaLabel = `Delete ${conversation.title}`;
    remove.addEventListener("click", () => {
      conversations.delete(conversation);
      if (conversation.id === current.id) open(conversations.fresh()); else listAll();
    });
    row.append(name, remove);
    return row;
  });
  const hint = document.createElement("p");
  hint.textContent = rows.length ? "" : "No conversations yet.";
  $("list").replaceChildren(...rows, hint);
}

function fit() {
  const area = $("text");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function submit() {
  if (running) { running.controller.abort(); return; }
  const question = $("text").value.trim();
  if (!question) return;
  $("text").value = "";
  fit();
  ask(question);
}

function fold(charts) {
  document.body.classList.toggle("no-charts", !charts);
  $("show-charts").ariaExpanded = String(charts);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("text").addEventListener("input", fit);
$("text").addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return;  // Enter chooses a word of the input method
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  if (!running) submit();
});
document.addEventListener("keydown", (event) => {
  if (event.isComposing || $("settings").open) return;
  if (event.key === "Escape") {
    if (running) running.controller.abort();
    else if (editing !== null) { stopEditing(); $("text").value = ""; fit(); }
    document.body.classList.remove("list");
  } else if (event.altKey && event.code === "KeyN") { event.preventDefault(); open(conversations.fresh()); }
});
$("reset").addEventListener("click", () => open(conversations.fresh()));
$("cancel").addEventListener("click", () => { stopEditing(); $("text").value = ""; fit(); });
$("show-list").addEventListener("click", () => {
  $("show-list").ariaExpanded = String(document.body.classList.toggle("list"));
});
document.querySelector("main").addEventListener("click", () => document.body.classList.remove("list"));
$("show-charts").addEventListener("click", () => {
  fold(document.body.classList.contains("no-charts"));
  keep();
  look();
});
$("show-settings").addEventListener("click", () => $("settings").showModal());
$("close-settings").addEventListener("click", () => $("settings").close());
$("forget").addEventListener("click", () => {
  if (!confirm("Delete all conversations kept in this browser?")) return;
  for (const conversation of [...conversations.all]) conversations.delete(conversation);
  open(conversations.fresh());
});

function keep() {
  const values = Object.fromEntries(KEPT.map((name) => [name, $(name).value]));
  settings.save({ ...values, charts: !document.body.classList.contains("no-charts") });
}
const saved = settings.load();
for (const name of KEPT) {
  if (typeof saved[name] === "string") $(name).value = saved[name];
  $(name).addEventListener("change", keep);
}
fold(saved.charts ?? matchMedia("(min-width: 821px)").matches);
addEventListener("beforeunload", () => { if (running) conversations.save(running.conversation); });

models().then((names) => {
  $("model").textContent = names[0];
  if (names.length < 2) return;
  $("model").hidden = true;
  $("models").hidden = false;
  $("models").replaceChildren(...names.map((name) => new Option(name)));
}).catch(() => { /* the state says it */ });
show(current);
const look = watch($("charts"), $("state"), () => !document.body.classList.contains("no-charts"));
if (matchMedia("(max-width: 820px)").matches) $("text").placeholder = "Ask something";
globalThis.jaxllm = { charts: CHARTS };

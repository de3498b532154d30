// The conversation on the screen: one element per message, which follows the text while it grows.

import { copyButton, rendered, smallButton } from "./markdown.js";

const ENDS = { length: (m) => `The answer was cut at max tokens${m.limit ? ` (${m.limit})` : ""}.`, stopped: () => "Stopped.",
               content_filter: () => "The answer was filtered." };
const NEAR = 40;  // pixels from the end that count as reading the end

export class Log {
  // `actions`: regenerate(), resume(), edit(index)
  constructor(element, down, actions) {
    this.element = element;
    this.actions = actions;
    this.follows = true;
    this.placed = 0;  // where `scroll` has put it: anything above is where the reader went
    this.down = down;
    element.addEventListener("scroll", () => { this.notice(); this.showDown(); });
    down.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.scroll()).observe(element);
  }

  distance() { return this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight; }
  showDown() { this.down.hidden = this.distance() < NEAR; }
  toEnd() {
    this.follows = true;
    this.placed = 0;
    this.scroll();
  }
  notice() {
    if (this.distance() < NEAR) this.follows = true;
    else if (this.element.scrollTop < this.placed - 1) this.follows = false;
  }
  // The event of a reader's scroll may come after the next piece of text, so the place itself is looked at.
  scroll() {
    this.notice();
    if (this.follows) {
      this.element.scrollTop = this.element.scrollHeight;
      this.placed = this.element.scrollTop;
    }
    this.showDown();
  }

  show(conversation) {
    this.conversation = conversation;
    this.views = [];
    this.follows = true;
    this.placed = 0;
    this.element.replaceChildren();
    if (!conversation.messages.length) {
      const hint = document.createElement("p");
      hint.textContent = "What you write here goes to this server only, and is kept in this browser.";
      this.element.append(hint);
    }
    conversation.messages.forEach((message) => this.add(message));
  }

  add(message) {
    if (!this.views.length) this.element.replaceChildren();
    const view = new View(message, this.views.length, this.actions);
    this.views.at(-1)?.setLast(false);
    this.views.push(view);
    this.element.append(view.element);
    view.update(false);
    this.scroll();
    return view;
  }

  // The message that grows. Parsing takes longer the longer it is: a fifth of the time at most goes into it.
  grow(message) {
    if (this.timer) return;
    const wait = Math.max(40, 4 * (this.cost ?? 0));
    this.timer = setTimeout(() => this.refresh(message, true), wait);
  }

  refresh(message, running) {
    clearTimeout(this.timer);
    this.timer = null;
    const view = this.views.find((view) => view.message === message);
    if (!view) return;  // another conversation is shown by now
    const start = performance.now();
    view.update(running);
    this.scroll();
    this.cost = performance.now() - start;
  }
}

class View {
  constructor(message, index, actions) {
    Object.assign(this, { message, index, actions, last: true });
    this.element = document.createElement("article");
    this.element.className = `message ${message.role}`;
    this.element.ariaLabel = message.role === "user" ? "You" : "Answer";
    this.body = document.createElement("div");
    this.body.className = "body";
    this.element.append(this.body);
  }

  setLast(last) { this.last = last; this.update(false); }

  update(running) {
    const { message, element } = this;
    element.classList.toggle("running", running);
    element.classList.toggle("error", message.end === "error");
    element.ariaBusy = String(running);
    if (message.role === "user") this.body.textContent = message.text;
    else {
      if (this.shown !== message.text) this.body.replaceChildren(rendered(message.text));
      this.shown = message.text;
      this.showThinking(running);
    }
    element.querySelectorAll(":scope > .note, :scope > .actions").forEach((old) => old.remove());
    if (!running) this.finish();
  }

  showThinking(running) {
    const { message } = this;
    if (!message.thinking) return;
    if (!this.thinking) {
      this.thinking = document.createElement("details");
      this.thinking.className = "thinking";
      this.thinking.append(document.createElement("summary"), document.createElement("div"));
      this.body.before(this.thinking);
    }
    const [summary, text] = this.thinking.children;
    summary.textContent = running && !message.text ? "Thinking…" : "Thoughts";
    text.textContent = message.thinking.trim();
  }

  finish() {
    const { message } = this;
    const note = message.note ?? ENDS[message.end]?.(message) ?? (message.role === "assistant" && !message.text ? "(no text)" : null);
    if (note) {
      const line = document.createElement("p");
      line.className = message.end === "error" ? "note bad" : "note";
      line.textContent = note;
      this.element.append(line);
    }
    const row = document.createElement("div");
    row.className = "actions";
    if (message.text) row.append(copyButton(() => message.text));
    if (message.role === "user") row.append(smallButton("edit", () => this.actions.edit(this.index)));
    else if (this.last) {
      row.append(smallButton("regenerate", this.actions.regenerate));
      if (message.text && ["length", "stopped", "error"].includes(message.end)) row.append(smallButton("continue", this.actions.resume));
    }
    this.element.append(row);
  }
}

// Conversations and settings, kept in this browser. Where it keeps nothing (private windows), they last as long as the page.

const PREFIX = "jaxllm.conversation.", SETTINGS = "jaxllm.settings";

function read(key) {
  try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
}

function write(key, value) {
  try { localStorage.setItem(key, JSON.stringify(value)); return true; } catch { return false; }
}

export const settings = { load: () => read(SETTINGS) ?? {}, save: (values) => write(SETTINGS, values) };

// A conversation: {id, title, updated, messages}; a message: {role, text, thinking, end, note}.
export class Conversations {
  constructor() {
    this.all = [];
    let keys = [];
    try { keys = Object.keys(localStorage); } catch { /* nothing is kept */ }
    for (const key of keys.filter((key) => key.startsWith(PREFIX))) {
      const found = read(key);
      if (Array.isArray(found?.messages)) this.all.push(found);
    }
    this.all.sort((a, b) => b.updated - a.updated);
  }

  fresh() {
    return { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "", updated: 0, messages: [] };
  }

  save(conversation) {
    if (!conversation.messages.length || conversation.deleted) return;
    const first = conversation.messages.find((message) => message.role === "user");
    conversation.title = (first?.text ?? "").trim().replace(/\s+/g, " ").slice(0, 60) || "empty";
    conversation.updated = Date.now();
    this.all = [conversation, ...this.all.filter((other) => other.id !== conversation.id)];
    // The oldest make room when the browser's store is full.
    while (!write(PREFIX + conversation.id, conversation) && this.all.length > 1) this.delete(this.all.at(-1));
  }

  delete(conversation) {
    conversation.deleted = true;  // an answer that is still coming must not bring it back
    this.all = this.all.filter((other) => other.id !== conversation.id);
    try { localStorage.removeItem(PREFIX + conversation.id); } catch { /* nothing is kept */ }
  }
}

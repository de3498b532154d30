// The server's API: one streamed answer as a sequence of pieces.

export async function models() {
  return (await (await fetch("v1/models")).json()).data.map((model) => model.id);
}

// Yields {text}, {thinking}, {end} and {tokens}; throws an Error whose message is the server's.
export async function* answer(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", signal, headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw new Error(await reason(response));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) yield { tokens: event.usage.completion_tokens };
    const choice = event.choices?.[0];
    if (!choice) continue;
    const { content, reasoning_content, reasoning } = choice.delta;
    if (reasoning_content || reasoning) yield { thinking: reasoning_content || reasoning };
    if (content) yield { text: content };
    if (choice.finish_reason) yield { end: choice.finish_reason };
  }
}

async function reason(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// Where the server leaves them in the text: what stands between <think> and </think>, and the rest.
export function withoutThoughts(text) {
  const open = text.match(/^\s*<think>/);
  if (!open) return { text, thinking: "" };
  const end = text.indexOf("</think>");
  if (end < 0) return { text: "", thinking: text.slice(open[0].length) };
  return { text: text.slice(end + 8).trimStart(), thinking: text.slice(open[0].length, end) };
}

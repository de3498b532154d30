// Markdown that a model wrote -> elements. Nothing of it can run, load anything or leave its place.

import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const TAGS = ("p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li a " +
              "table thead tbody tr th td input").split(" ");
const NO_ADDRESS = ["start", "align", "type", "checked", "disabled"];
const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true, breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),  // tags outside of code are shown, as the model wrote them
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,  // never fetched
  },
});

export function rendered(text) {
  const fragment = DOMPurify.sanitize(marked.parse(text), {
    ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "class", ...NO_ADDRESS], ADD_URI_SAFE_ATTR: NO_ADDRESS,
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, RETURN_DOM_FRAGMENT: true,
  });
  for (const input of fragment.querySelectorAll("input")) {
    if (input.type !== "checkbox") input.remove();
    else input.disabled = true;
  }
  for (const link of fragment.querySelectorAll("a")) { link.target = "_blank"; link.rel = "noopener noreferrer"; }
  for (const code of fragment.querySelectorAll("pre > code")) addHead(code);
  return fragment;
}

function addHead(code) {
  const head = document.createElement("div"), language = document.createElement("span");
  language.textContent = code.className.match(/language-(\S+)/)?.[1] ?? "";
  head.append(language, copyButton(() => code.textContent));
  code.before(head);
}

// A button whose word is drawn by the style sheet, so that it is no part of the text around it.
export function smallButton(label, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "small";
  button.dataset.label = label;
  button.ariaLabel = label;
  button.addEventListener("click", act);
  return button;
}

export function copyButton(text) {
  const button = smallButton("copy", async () => {
    button.dataset.label = (await copied(text())) ? "copied" : "not allowed";
    setTimeout(() => { button.dataset.label = "copy"; }, 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {  // only https and this machine may use the clipboard; the old way works elsewhere
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

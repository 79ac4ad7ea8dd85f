// What a conversation looks like: an element for each message, made from the templates of index.html.

import { Markup } from "./markup.js";

class Turn {
  constructor(template, message) {
    this.message = message;
    this.element = document.getElementById(template).content.firstElementChild.cloneNode(true);
  }

  find(selector) {
    return this.element.querySelector(selector);
  }
}

/** What the user wrote, with a form to write it anew: `onChange(text)`. */
export class Question extends Turn {
  constructor(message, { onChange }) {
    super("question", message);
    this.find(".text").textContent = message.content;
    const form = this.find(".edit");
    const input = form.querySelector("textarea");
    this.find(".change").addEventListener("click", () => {
      input.value = message.content;
      this.#edit(true);
      input.focus();
    });
    form.querySelector(".cancel").addEventListener("click", () => this.#edit(false));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (input.value.trim()) onChange(input.value.trim());
    });
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) {
        event.stopPropagation(); // it stops no answer
        this.#edit(false);
      }
    });
    sendOnEnter(input);
  }

  #edit(on) {
    this.find(".edit").hidden = !on;
    this.find(".text").hidden = this.find(".change").hidden = on;
    if (!on) this.find(".change").focus();
  }
}

/** An answer, shown as it grows: at most once a frame, however many pieces arrive. */
export class Answer extends Turn {
  #markup;
  #reasoning = 0; // characters shown
  #frame = 0;
  #say;

  constructor(message, { onAgain, say }) {
    super("answer", message);
    this.#markup = new Markup(this.find(".text"));
    this.#say = say;
    this.find(".again").addEventListener("click", onAgain);
    this.find(".copy").addEventListener("click", () => copy(message.content).then(() => this.#copied()));
    this.element.ariaBusy = "true";
  }

  grow() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      const blocks = this.#show(false);
      if (blocks.length) this.#say(blocks.join("\n"));
    });
  }

  /** Shows all of it, with what there is to say about how it ended. */
  end() {
    cancelAnimationFrame(this.#frame);
    const { content, note, figures } = this.message;
    const blocks = this.#show(true);
    this.element.ariaBusy = "false";
    this.find(".copy").hidden = !content;
    this.find(".again").textContent = note?.failed ? "Try again" : "Regenerate";
    this.find(".figures").textContent = figures ?? "";
    this.find(".note").hidden = !note;
    this.find(".note").textContent = note?.text ?? "";
    this.find(".note").classList.toggle("failed", Boolean(note?.failed));
    this.#say([...blocks, note?.text ?? figures ?? ""].join("\n"));
  }

  /** Shows what there is and returns the texts of the blocks that became complete. */
  #show(complete) {
    const { model, content, reasoning } = this.message;
    this.find(".who").textContent = model;
    if (reasoning.length > this.#reasoning) {
      this.find(".reasoning").hidden = false;
      this.find(".reasoning div").append(reasoning.slice(this.#reasoning));
      this.#reasoning = reasoning.length;
    }
    return this.#markup.update(content, complete).map((node) => node.textContent);
  }

  #copied() {
    this.find(".copy").textContent = "Copied";
    this.#say("Copied");
    setTimeout(() => (this.find(".copy").textContent = "Copy"), 2000);
  }
}

export const touch = matchMedia("(pointer: coarse)");

/** Makes Enter send a textarea's form. Not where it confirms a character, and not on a screen without Shift+Enter. */
export function sendOnEnter(textarea) {
  textarea.addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // Safari ends a composition before the event
    if (event.key !== "Enter" || event.shiftKey || composing || touch.matches) return;
    event.preventDefault();
    textarea.form.requestSubmit();
  });
}

/** Copies a text. Without HTTPS, as between two machines of a network, only the older way exists. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const put = (event) => {
      event.preventDefault();
      event.clipboardData.setData("text/plain", text);
    };
    document.addEventListener("copy", put, { once: true });
    document.execCommand("copy");
  }
}

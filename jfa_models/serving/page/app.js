// One conversation with a model: what was said, what is being answered, and the controls around it.

import * as api from "./api.js";
import { Answer, Question, sendOnEnter, touch } from "./turns.js";

const by = (id) => document.getElementById(id);
const [composer, input, settings, model] = ["composer", "input", "settings", "model"].map(by);
const scroller = document.querySelector("main");

const CUT_OFF = { text: "The connection ended before the answer did.", failed: true };

let models = [];
let turns = []; // of the conversation, in order
let running = null; // the AbortController of the answer that is being written

// What survives: settings until they are changed, the conversation and the key until the tab is closed

const stored = {
  get(storage, key) {
    try {
      return JSON.parse(window[storage].getItem(key));
    } catch {
      return null; // a browser may forbid to store anything
    }
  },
  set(storage, key, value) {
    try {
      window[storage].setItem(key, JSON.stringify(value));
    } catch {
      // the page works without
    }
  },
};

const saveTurns = () => stored.set("sessionStorage", "jfa.turns", turns.map((turn) => turn.message));
const saveSettings = () => stored.set("localStorage", "jfa.settings", Object.fromEntries(new FormData(settings)));

// The conversation

function add(message) {
  const turn =
    message.role === "user"
      ? new Question(message, { onChange: (text) => ask(text, turn) })
      : new Answer(message, { onAgain: () => answer(turn), say });
  turns.push(turn);
  by("turns").append(turn.element);
  by("welcome").hidden = true;
  return turn;
}

/** Takes a turn and all after it out of the conversation. */
function drop(turn) {
  stop();
  const at = turns.indexOf(turn);
  for (const one of turns.splice(at < 0 ? turns.length : at)) one.element.remove();
}

/** Sends a message, in the place of another turn if there is one. */
function ask(text, replaced) {
  drop(replaced);
  add({ role: "user", content: text });
  answer();
}

/** Answers the last question; `replaced` is an answer to it that is given up. */
async function answer(replaced) {
  drop(replaced);
  const run = (running = new AbortController());
  const message = { role: "assistant", model: model.value, content: "", reasoning: "" };
  message.note = CUT_OFF; // unless it ends below: the page may be left before
  const messages = history();
  const turn = add(message);
  turn.grow();
  busy(true);
  saveTurns();
  latest();
  focusInput();
  try {
    if (!models.length) await load(run.signal);
    message.model = model.value;
    const request = { model: model.value, messages, ...sampling() };
    const response = await withKey((key) => api.complete(request, key, run.signal));
    message.note = await write(message, response, () => turn.grow());
  } catch (error) {
    message.note = run.signal.aborted ? { text: "Stopped." } : { text: error.message, failed: true };
  }
  if (!turns.includes(turn)) return; // given up for another
  turn.end();
  saveTurns();
  if (running === run) stop();
}

/** Writes the pieces of a response into a message, and returns the note on how it ended, if there is one. */
async function write(message, response, grew) {
  let finish, usage, first;
  try {
    for await (const piece of api.pieces(response)) {
      if (piece.content || piece.reasoning) first ??= performance.now();
      message.content += piece.content;
      message.reasoning += piece.reasoning;
      finish = piece.finish ?? finish;
      usage = piece.usage ?? usage;
      grew();
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof api.ApiError) throw error;
    finish = null; // the connection broke, or what came was no JSON
  }
  if (!finish) return CUT_OFF;
  if (usage) message.figures = figures(usage.completion_tokens, (performance.now() - first) / 1000);
  return finish === "length" ? { text: "The answer reached its limit of tokens." } : null;
}

/** "120 tokens, 31.5 a second". The first one came at second 0, and what came at once has no speed. */
function figures(tokens, seconds) {
  const count = `${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`;
  const rate = (tokens - 1) / seconds;
  return tokens > 1 && seconds > 0.1 ? `${count}, ${rate.toFixed(rate < 100 ? 1 : 0)} a second` : count;
}

/** The messages to send: a question whose answer failed becomes part of the next, since roles must alternate. */
function history() {
  const messages = [];
  const system = settings.elements.system.value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const { role, content } of turns.map((turn) => turn.message)) {
    if (!content) continue;
    if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  return messages;
}

/** The sampling parameters that were set; the others are the server's. */
function sampling() {
  const fields = [...settings.elements].filter((field) => field.type === "number" && field.value !== "");
  return Object.fromEntries(fields.map((field) => [field.name, field.valueAsNumber]));
}

function stop() {
  running?.abort();
  running = null;
  busy(false);
}

function busy(on) {
  by("send").hidden = on;
  by("stop").hidden = !on;
}

/** Where the focus goes when the control that had it is gone. On a screen it would open a keyboard. */
function focusInput() {
  if (!touch.matches) input.focus();
}

function say(text) {
  by("status").textContent = text;
}

// The server: its models, and the key that it may ask for

async function load(signal) {
  models = await withKey((key) => api.models(key, signal));
  const name = ({ id, parent }) => (parent ? `${id}, adapter of ${parent}` : id);
  model.replaceChildren(...models.map((one) => new Option(name(one), one.id)));
  const chosen = stored.get("localStorage", "jfa.model");
  if (models.some(({ id }) => id === chosen)) model.value = chosen;
  model.hidden = models.length < 2;
  welcome();
}

function welcome(problem) {
  const chosen = models.find(({ id }) => id === model.value);
  const [title, text] = document.querySelectorAll("#welcome h2, #welcome p");
  title.textContent = chosen?.id ?? "jfa";
  document.title = chosen ? `${chosen.id} · jfa` : "jfa";
  const context = chosen?.max_model_len && `A conversation may hold ${chosen.max_model_len.toLocaleString("en")} tokens.`;
  text.textContent = problem ?? context ?? "";
  text.classList.toggle("failed", Boolean(problem));
  by("welcome").hidden = turns.length > 0;
}

/** Calls with the key, and asks for one as often as the server refuses it. */
async function withKey(use) {
  for (;;) {
    try {
      return await use(stored.get("sessionStorage", "jfa.key"));
    } catch (error) {
      if (error.status !== 401) throw error;
      const key = await askKey(error.message);
      if (!key) throw error;
      stored.set("sessionStorage", "jfa.key", key);
    }
  }
}

function askKey(reason) {
  const dialog = by("key-dialog");
  const field = dialog.querySelector("input");
  dialog.querySelector("p").textContent = reason;
  dialog.returnValue = field.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" && field.value.trim()), { once: true });
  });
}

// The scroller stays at the end while the reader is there: it leaves by scrolling up and returns by scrolling down.

let atEnd = true;
let lastTop = 0;

const left = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;

function follow() {
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  by("latest").hidden = left() < 8;
}

function latest() {
  atEnd = true;
  follow();
}

scroller.addEventListener("scroll", () => {
  if (left() < 8) atEnd = true;
  else if (scroller.scrollTop < lastTop) atEnd = false;
  lastTop = scroller.scrollTop;
  by("latest").hidden = left() < 8;
});
by("turns").addEventListener("click", (event) => {
  if (event.target.closest("summary, .change")) atEnd = false; // what opens stays where it was opened
});
const sizes = new ResizeObserver(follow); // a frame's new text, a keyboard that opens, a window that is turned
sizes.observe(scroller);
sizes.observe(by("turns"));

// The controls

sendOnEnter(input);
composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running) return;
  input.value = "";
  ask(text);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) stop();
});
by("stop").addEventListener("click", () => {
  stop();
  focusInput();
});
by("latest").addEventListener("click", () => {
  latest();
  focusInput();
});
by("new").addEventListener("click", () => {
  drop(turns[0]);
  saveTurns();
  welcome();
  focusInput();
});
by("open-settings").addEventListener("click", () => by("settings-dialog").showModal());
settings.addEventListener("input", saveSettings);
settings.addEventListener("reset", () => setTimeout(saveSettings)); // the fields are emptied after the event
model.addEventListener("change", () => {
  stored.set("localStorage", "jfa.model", model.value);
  welcome();
});
window.addEventListener("pagehide", saveTurns);

for (const [name, value] of Object.entries(stored.get("localStorage", "jfa.settings") ?? {})) {
  if (settings.elements[name]) settings.elements[name].value = value;
}
for (const message of stored.get("sessionStorage", "jfa.turns") ?? []) add(message).end?.();
say(""); // what was there before is no news
welcome();
latest();
load().catch((error) => welcome(error.message));

// A model's Markdown as DOM nodes: paragraphs, headings, lists, code, emphasis and links to http(s).
//
// All that a model writes becomes text nodes. The only attributes are the address of a link, the number that a list
// starts with and the language of a code block. Whatever the text is, the time is about linear in it and the depth of
// the nodes is bounded.

const DEEPEST = 8; // lists in lists, and emphasis in emphasis; what is deeper stays as it was written

const FENCE = /^(\s*)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+)(.*)$/;

const ESCAPE = /\\[\\`*_#]/;
const RUN = /`+|\*+|_+/;
const LINK = /\[(?<label>[^[\]]*)\]\((?<address>https?:\/\/(?:[^\s()<>]|\([^\s()<>]*\))+)(?:\s+"[^"]*")?\)/;
const ADDRESS = /https?:\/\/[^\s<>"'`()[\]*]*[^\s<>"'`()[\]*.,;:!?_]/;
const TOKEN = new RegExp([ESCAPE, RUN, LINK, ADDRESS].map((one) => one.source).join("|"), "g");

/** Shows a text that grows: blocks that can no longer change are left alone, only those after them are made anew. */
export class Markup {
  #parent;
  #settled = 0; // characters of the source
  #tail = []; // nodes of the blocks after them

  constructor(parent) {
    this.#parent = parent;
  }

  /** Shows `source`, which starts with the one shown before, and returns the nodes of the blocks that settled. */
  update(source, complete = false) {
    const lines = source.slice(this.#settled).split("\n");
    const blocks = [...read(lines, 0)];
    // A block is settled if the line that ends it is complete, which the last one is not.
    const settled = complete ? blocks : blocks.filter(({ next }) => next < lines.length - 1);
    const nodes = blocks.map(({ node }, at) => renew(this.#tail[at], node));
    for (const old of this.#tail.slice(nodes.length)) old.remove();
    this.#parent.append(...nodes.slice(this.#tail.length));
    this.#tail = nodes.slice(settled.length);
    if (settled.length) {
      const ended = lines.slice(0, settled.at(-1).next);
      this.#settled += ended.reduce((sum, line) => sum + line.length + 1, 0);
    }
    return nodes.slice(0, settled.length);
  }
}

/** Puts a node in the place of an old one. Code that grows keeps its node, and with it selection and scroll. */
function renew(old, node) {
  if (!old) return node;
  if (old.tagName === "PRE" && node.tagName === "PRE") {
    const [shown, text] = [old.textContent, node.textContent];
    if (text.startsWith(shown) && old.dataset.language === node.dataset.language) {
      old.firstChild.append(text.slice(shown.length));
      return old;
    }
  }
  old.replaceWith(node);
  return node;
}

// Blocks

/** The blocks of lines: {node, next}, where lines[next] is the line that shows where the block ends. */
function* read(lines, depth) {
  for (let at = past(lines, 0); at < lines.length; ) {
    const block = fence(lines, at) ?? heading(lines, at) ?? list(lines, at, depth) ?? paragraph(lines, at);
    yield block;
    at = past(lines, block.next);
  }
}

function fence(lines, at) {
  const [, indent, mark, language] = lines[at].match(FENCE) ?? [];
  if (!mark) return null;
  const ends = (line) => line.trim().length >= mark.length && line.trim().replaceAll(mark[0], "") === "";
  let next = at + 1;
  while (next < lines.length && !ends(lines[next])) next++;
  const code = lines.slice(at + 1, next).map((line) => dedent(line, indentation(indent)));
  const node = element("pre", element("code", code.join("\n")));
  if (language.trim()) node.dataset.language = language.trim().split(/\s/)[0];
  return { node, next: Math.min(next + 1, lines.length) };
}

function heading(lines, at) {
  const [, marks, text] = lines[at].match(HEADING) ?? [];
  if (!marks) return null;
  const level = Math.min(6, marks.length + 2); // h1 is the page, h2 the name above an answer
  return { node: inline(element(`h${level}`), text.trim()), next: at + 1 };
}

function list(lines, at, depth) {
  const first = item(lines[at]);
  if (!first || depth === DEEPEST) return null;
  const node = element(first.number === undefined ? "ul" : "ol");
  if (first.number !== undefined) node.start = first.number;
  const inside = (line) => indentation(line) > first.indent + 1;
  let next = at;
  for (let one = first; one?.kind === first.kind && one.indent <= first.indent + 1; one = item(lines[next])) {
    const content = [one.text];
    for (next++; next < lines.length; next++) {
      const ahead = past(lines, next); // blank lines belong to the item if the line after them does
      const belongs = ahead < lines.length && (inside(lines[ahead]) || (ahead === next && !begins(lines[ahead])));
      if (!belongs) {
        next = ahead;
        break;
      }
      content.push(...lines.slice(next, ahead), dedent(lines[ahead], one.width));
      next = ahead;
    }
    node.append(element("li", ...Array.from(read(content, depth + 1), (block) => block.node)));
  }
  return { node, next };
}

function paragraph(lines, at) {
  const interrupts = (line) => begins(line) && !(item(line)?.number > 1); // "in\n1984. It was" is a sentence
  let next = at + 1;
  while (next < lines.length && !blank(lines[next]) && !interrupts(lines[next])) next++;
  return { node: inline(element("p"), lines.slice(at, next).join("\n").trim()), next };
}

function item(line) {
  const [all, indent, marker, , text] = line?.match(ITEM) ?? [];
  if (all === undefined) return null;
  const number = parseInt(marker);
  return {
    indent: indentation(indent),
    kind: marker.at(-1),
    number: Number.isNaN(number) ? undefined : number,
    width: indentation(indent) + all.length - indent.length - text.length,
    text,
  };
}

const blank = (line) => line.trim() === "";
const begins = (line) => FENCE.test(line) || HEADING.test(line) || ITEM.test(line);
const margin = (line) => line.match(/^\s*/)[0];
const indentation = (line) => margin(line).replaceAll("\t", "    ").length;
const dedent = (line, width) =>
  width ? margin(line).replaceAll("\t", "    ").slice(width) + line.trimStart() : line;

/** The first line that is not blank, from `at` on. */
function past(lines, at) {
  while (at < lines.length && blank(lines[at])) at++;
  return at;
}

// Inside of a block

/** Appends a text with its code, emphasis and links. A mark stays text until its partner is found. */
function inline(parent, text, linked = false) {
  const open = []; // marks that may begin emphasis: {node, mark, size}
  const tokens = new RegExp(TOKEN);
  let from = 0;
  for (let match; (match = tokens.exec(text)); from = tokens.lastIndex) {
    const [token] = match;
    const { label, address } = match.groups;
    if (match.index > from) parent.append(text.slice(from, match.index));
    if (token[0] === "\\") {
      parent.append(token[1]);
    } else if (token[0] === "`") {
      const end = closing(text, tokens.lastIndex, token.length);
      if (end < 0) {
        parent.append(token);
      } else {
        const code = text.slice(tokens.lastIndex, end);
        const padded = code.startsWith(" ") && code.endsWith(" ") && !blank(code); // `` `x` `` holds backticks
        parent.append(element("code", padded ? code.slice(1, -1) : code));
        tokens.lastIndex = end + token.length;
      }
    } else if (token[0] === "*" || token[0] === "_") {
      emphasis(parent, open, token, text[match.index - 1] ?? " ", text[tokens.lastIndex] ?? " ");
    } else {
      parent.append((!linked && link(address ?? token, label ?? token)) || token);
    }
  }
  parent.append(text.slice(from));
  return parent;
}

/** Where the next run of exactly `length` backticks begins, or -1. */
function closing(text, from, length) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run; (run = runs.exec(text)); ) if (run[0].length === length) return run.index;
  return -1;
}

/** Closes what a run of marks between two characters can close, then opens what it can open. */
function emphasis(parent, open, run, before, after) {
  const mark = run[0];
  const word = (character) => /[0-9A-Za-z]/.test(character); // 2*3*4 and snake_case are no emphasis, a**b**c is
  const apart = mark === "*" && run.length > 1;
  let left = run.length;
  if (left <= 3 && !/\s/.test(before) && (apart || !word(after))) {
    for (let at; left && (at = open.findLastIndex((one) => one.mark === mark && one.size <= left)) >= 0; ) {
      const [{ node, size }] = open.splice(at);
      const strong = element(size === 2 ? "strong" : "em");
      while (node.nextSibling) strong.append(node.nextSibling);
      node.replaceWith(strong);
      left -= size;
    }
  }
  const opens = left <= 3 && !/\s/.test(after) && (apart || !word(before));
  while (left) {
    const size = opens ? Math.min(left, 2) : left;
    const node = document.createTextNode(mark.repeat(size));
    parent.append(node);
    if (opens && open.length < DEEPEST) open.push({ node, mark, size });
    left -= size;
  }
}

function link(address, label) {
  if (!URL.canParse(address)) return null;
  const node = inline(element("a"), label, true);
  node.href = address; // LINK and ADDRESS let nothing but http: and https: through
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

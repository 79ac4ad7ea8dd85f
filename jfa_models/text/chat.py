"""Chat templates: Jinja in Hugging Face's dialect."""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    *,
    continue_final_message: bool | str = False,
) -> str:
    """Renders a template with messages and values such as `add_generation_prompt`.

    Contents fit any template: a list of parts {"type": "text", "text": ...} is a list where a template loops over it,
    and their texts, joined by newlines, where it takes a text; a text is a list of one part for a template that only
    loops; a content that is missing or None is undefined (None for a template that tests whether it is none), and ""
    where a template takes a text. As in transformers, other keys that are None are left out, and `reasoning` and
    `thinking` are other names of `reasoning_content`.

    Args:
      continue_final_message: end the text within the content of the last message (or within the field of this name).

    Raises:
      ValueError: the template is faulty, fails on these messages, or refuses them with a message of its own; a part is
        not text; there are no messages; or the template does not write the last message.
    """
    compiled, reads = _compile(template)
    if not messages:
        raise ValueError('a conversation must have at least one message, {"role": "user", "content": ...}')
    plain = [_for_template(message, reads) for message in messages]
    last = mark = ""
    if continue_final_message:
        # more digits, which no filter changes, than the text can have, eight of them in a date
        mark = "7" * (9 + f"{template}{plain}{values}".count("7"))
        last = _mark_end(plain, continue_final_message, mark)
    try:
        text = compiled.render({**values, "messages": plain})
    except _RefusedError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(
            f"the model's chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error
    return _cut_at_end(text, last, mark) if continue_final_message else text


class _RefusedError(Exception):
    """A template called raise_exception."""


class _Parts(list[Any]):
    """The content of a message as a list of parts, which acts as their text where a template takes a text."""

    @property
    def _text(self) -> str:
        return "\n".join(part["text"] for part in self)

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: Any) -> Any:
        return self._text + other if isinstance(other, str) else super().__add__(other)

    def __radd__(self, other: str) -> str:
        return other + self._text

    def __contains__(self, other: object) -> bool:
        return other in self._text if isinstance(other, str) else super().__contains__(other)

    def __eq__(self, other: object) -> bool:
        return other == self._text if isinstance(other, str) else super().__eq__(other)

    def count(self, other: Any) -> int:
        return self._text.count(other) if isinstance(other, str) else super().count(other)

    def index(self, other: Any, *bounds: Any) -> int:
        return self._text.index(other, *bounds) if isinstance(other, str) else super().index(other, *bounds)

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:  # methods of texts, such as strip
        return getattr(self._text, name)


class _Undefined(jinja2.Undefined):
    """Undefined, and "" where it is a message's content that a template takes as a text."""

    def __add__(self, other: Any) -> Any:
        return other if self._is_content else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return other if self._is_content else super().__radd__(other)

    def __getattr__(self, name: str) -> Any:
        return getattr("", name) if self._is_content and not name.startswith("_") else super().__getattr__(name)

    @property
    def _is_content(self) -> bool:
        return self._undefined_name == "content"


# Names of what a model thought before its answer; the first is the one that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Filters that take the elements of a content that is a list of parts.
_FILTERS_OF_LISTS = ("selectattr", "rejectattr", "map")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the model wrote, for training; the text is the body's."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Reads(NamedTuple):
    """How a template reads the contents of messages."""

    lists_only: bool  # it loops over contents, and neither writes one nor tests whether it is a text
    none: bool  # it tests whether a content is None


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> tuple[jinja2.Template, _Reads]:
    """The template, and how it reads contents."""
    # templates come from checkpoints, so they run in a sandbox
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Undefined,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        tree = environment.parse(template)
        return environment.from_string(template), _read_contents(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is faulty in line {error.lineno}: {error.message}; "
            "pass a working one as chat_template, or put a chat_template.jinja next to tokenizer.json"
        ) from error


def _read_contents(tree: jinja2.nodes.Template) -> _Reads:
    # a content is read by itself, or through a variable that was set to it
    names = {
        each.target.name
        for each in tree.find_all(jinja2.nodes.Assign)
        if isinstance(each.target, jinja2.nodes.Name) and _is_content(each.node)
    }

    def reads(node: jinja2.nodes.Node) -> bool:
        kinds = (jinja2.nodes.Getattr, jinja2.nodes.Getitem, jinja2.nodes.Name)
        return any(_is_content(each) or getattr(each, "name", None) in names for each in _all(node, kinds))

    def reads_parts(node: jinja2.nodes.Node) -> bool:
        return any(each.name in _FILTERS_OF_LISTS and reads(each) for each in _all(node, jinja2.nodes.Filter))

    # content.split() is the result of a call, not a list of parts
    loops = [each.iter for each in tree.find_all(jinja2.nodes.For) if not any(_all(each.iter, jinja2.nodes.Call))]
    written = [each for output in tree.find_all(jinja2.nodes.Output) for each in output.nodes]
    tests = list(tree.find_all(jinja2.nodes.Test))
    in_loops = any(map(reads, loops)) or reads_parts(tree)
    as_text = any(test.name == "string" for test in tests) or any(reads(x) and not reads_parts(x) for x in written)
    return _Reads(
        lists_only=in_loops and not as_text,
        none=any(test.name == "none" and _is_content(test.node) for test in tests),
    )


def _all(node: jinja2.nodes.Node, kinds: Any) -> Iterator[Any]:
    """The nodes of these kinds in an expression, itself included."""
    return itertools.chain([node] if isinstance(node, kinds) else [], node.find_all(kinds))


def _is_content(node: jinja2.nodes.Node) -> bool:
    match node:
        case jinja2.nodes.Getattr(attr="content"):
            return True
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value="content")):
            return True
    return False


def _for_template(message: Mapping[str, Any], reads: _Reads) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'a message must be {{"role": ..., "content": ...}}, got {message!r}')
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    content = found.get("content")
    if content is None:
        return found | ({"content": None} if reads.none and "content" in message else {})
    if isinstance(content, str):
        return found | {"content": _Parts([{"type": "text", "text": content}]) if reads.lists_only else content}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"the content of a message must be a text or a list of parts, got {content!r}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'a part of a message must be {{"type": "text", "text": ...}}, got {part!r}')
    return found | {"content": _Parts(dict(part) for part in content)}


def _mark_end(messages: Sequence[dict[str, Any]], field: bool | str, mark: str) -> str:
    """Appends a mark to the last message's text, and a space that shows whether texts are trimmed; returns the text."""
    name = field if isinstance(field, str) else "content"
    value = messages[-1].get(name)
    if not isinstance(value, str | _Parts) or value == []:
        raise ValueError(f"continue_final_message: the last message has no {name} to continue, got {messages[-1]!r}")
    if isinstance(value, _Parts):
        text = value[-1]["text"]
        value[-1]["text"] = f"{text}{mark} "
        return text
    same = _REASONING if name in _REASONING else (name,)
    messages[-1].update({key: f"{value}{mark} " for key in same if messages[-1].get(key) == value})
    return value


def _cut_at_end(text: str, last: str, mark: str) -> str:
    before, found, after = text.rpartition(mark)
    # a template may write a message twice; if it trims texts, it would have trimmed this one at its end
    before = before.replace(f"{mark} ", "") if after.startswith(" ") else re.sub(rf"\s*{mark}", "", before).rstrip()
    if not found or last.strip() not in before:
        raise ValueError("continue_final_message: the model's chat template does not write the last message as it is")
    return before


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on. The parameters are those of transformers.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)

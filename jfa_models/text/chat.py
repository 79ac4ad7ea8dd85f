"""Chat templates: Jinja in Hugging Face's dialect."""

import datetime
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


def render(template: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    """Renders a template with messages and values such as `add_generation_prompt`.

    The content of a message may be a text, None (no text), or a list of parts {"type": "text", "text": ...}. A template
    that does not loop over contents gets the texts, joined by newlines; one that reads contents in loops only gets a
    text as a list of one part; one that does not test for None gets "".

    Raises:
      ValueError: the template is faulty, fails on these messages, or refuses them with a message of its own; or a part
        is not text.
    """
    compiled, reads = _compile(template)
    plain = [_with_content(message, reads) for message in messages]
    try:
        return compiled.render({**values, "messages": plain})
    except _RefusedError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(
            f"the model's chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error


# Filters that take the elements of a content that is a list of parts.
_FILTERS_OF_LISTS = ("selectattr", "rejectattr", "map")


class _RefusedError(Exception):
    """A template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the model wrote, for training; the text is the body's."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Reads(NamedTuple):
    """What contents of messages a template is written for."""

    lists: bool  # it loops over a content
    texts: bool  # it writes a content, or tests whether it is a text
    none: bool  # it tests whether a content is None


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> tuple[jinja2.Template, _Reads]:
    """The template, and what contents it is written for."""
    # templates come from checkpoints, so they run in a sandbox
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        tree = environment.parse(template)
        return environment.from_string(template), _read_contents(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the model's chat template is faulty in line {error.lineno}: {error.message}; "
            "put a working chat_template.jinja next to tokenizer.json"
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
    return _Reads(
        lists=any(map(reads, loops)) or reads_parts(tree),
        texts=any(test.name == "string" for test in tests)
        or any(reads(each) and not reads_parts(each) for each in written),
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


def _with_content(message: Mapping[str, Any], reads: _Reads) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'a message must be {{"role": ..., "content": ...}}, got {message!r}')
    content = message.get("content")
    if content is None:
        return {**message, "content": None if reads.none else ""}
    if isinstance(content, str):
        in_parts = reads.lists and not reads.texts
        return {**message, "content": [{"type": "text", "text": content}]} if in_parts else dict(message)
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of a message must be a text or a list of parts, got {content!r}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'a part of a message must be {{"type": "text", "text": ...}}, got {part!r}')
    return dict(message) if reads.lists else {**message, "content": "\n".join(part["text"] for part in content)}


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)

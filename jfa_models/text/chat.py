"""Chat templates: Jinja in Hugging Face's dialect."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


def render(template: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    """Renders a template with messages and values such as `add_generation_prompt`.

    The content of a message may be a text, None (no text), or a list of parts {"type": "text", "text": ...}. A template
    that does not loop over contents gets the texts, joined by newlines; one that does not test for None, "".

    Raises:
      ValueError: the template is faulty, fails on these messages, or refuses them with a message of its own; or a part
        is not text.
    """
    compiled, reads_lists, tests_none = _compile(template)
    plain = [_with_content(message, as_list=reads_lists, keep_none=tests_none) for message in messages]
    try:
        return compiled.render({**values, "messages": plain})
    except _RefusedError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(
            f"the model's chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error


class _RefusedError(Exception):
    """A template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the model wrote, for training; the text is the body's."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> tuple[jinja2.Template, bool, bool]:
    """The template, whether it reads contents that are lists, and whether it tests for contents that are None."""
    # templates come from checkpoints, so they run in a sandbox
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        tree = environment.parse(template)
        tests_none = any(each.name == "none" and _is_content(each.node) for each in tree.find_all(jinja2.nodes.Test))
        return environment.from_string(template), _loops_over_content(tree), tests_none
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the model's chat template is faulty in line {error.lineno}: {error.message}; "
            "put a working chat_template.jinja next to tokenizer.json"
        ) from error


def _loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether a loop runs over a message's content, or over a variable that was set to it."""
    names = {
        each.target.name
        for each in tree.find_all(jinja2.nodes.Assign)
        if isinstance(each.target, jinja2.nodes.Name) and _is_content(each.node)
    }
    return any(
        _reads_content(each.iter) or (isinstance(each.iter, jinja2.nodes.Name) and each.iter.name in names)
        for each in tree.find_all(jinja2.nodes.For)
    )


def _reads_content(node: jinja2.nodes.Node) -> bool:
    """Whether an expression is a content, filtered or sliced; not the result of a call, such as content.split()."""
    if node.find(jinja2.nodes.Call):
        return False
    return _is_content(node) or any(map(_is_content, node.find_all((jinja2.nodes.Getattr, jinja2.nodes.Getitem))))


def _is_content(node: jinja2.nodes.Node) -> bool:
    match node:
        case jinja2.nodes.Getattr(attr="content"):
            return True
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value="content")):
            return True
    return False


def _with_content(message: Mapping[str, Any], *, as_list: bool, keep_none: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'a message must be {{"role": ..., "content": ...}}, got {message!r}')
    content = message.get("content")
    if content is None:
        return {**message, "content": None if keep_none else ""}
    if isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of a message must be a text or a list of parts, got {content!r}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'a part of a message must be {{"type": "text", "text": ...}}, got {part!r}')
    return dict(message) if as_list else {**message, "content": "\n".join(part["text"] for part in content)}


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)

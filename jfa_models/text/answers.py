"""What a chat model wrote, taken apart while it grows: its reasoning, its answer, and its calls of tools.

How a model marks these parts is known from its chat template alone, which writes earlier turns in the same form.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

THINK, THINK_END = "<think>", "</think>"
# What opens calls of tools in a template's text, and what closes them. Llama 3 writes a bare object, mostly without the
# mark before it, which is a special token; Mistral's calls end with the text.
_CALL_MARKS = (
    ("[TOOL_CALLS]", None),
    ("<|tool_call|>", "<|/tool_call|>"),
    ("<tool_call>", "</tool_call>"),
    ("<|python_tag|>", None),
)
_BARE = "<|python_tag|>"
_OPENING = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
# the same as far as a text has got; a text that this does not match is no call with its name first
_OPENING_SO_FAR = re.compile(
    r'\{\s*(?:"(?:n(?:a(?:m(?:e(?:"\s*(?::\s*(?:"(?:[^"\\]|\\.)*(?:"\s*(?:,\s*(?:"\w*(?:"\s*(?::\s*)?)?)?)?)?)?)?)?)?)?)?)?)?$'
)
_NAMED = re.compile(r"\s*([\w.-]+)\[ARGS\]\s*(?=\{)")  # Mistral's newer form: the name, then the arguments
_NAMED_SO_FAR = re.compile(r"[\w.-]+(\[(A(R(G(S(\]\s*)?)?)?)?)?)?")
_BETWEEN_CALLS = " \t\r\n,;[]"

Kind = Literal["reasoning", "content", "call", "arguments"]


class Piece(NamedTuple):
    """A part of an answer, in the order of the text.

    kind "call" opens the call of the function that `text` names; pieces of kind "arguments" are the JSON text of the
    arguments of the last call.
    """

    kind: Kind
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """How a model marks the parts of its answers.

    Attributes:
      thinks: it writes its reasoning between THINK and THINK_END.
      takes_tools: the template can describe tools.
      call_mark, call_end: what opens and closes calls; None: there is no such mark.
      is_bare: an answer that begins with an object that has a name and arguments is a call, without a mark.
    """

    thinks: bool = False
    takes_tools: bool = False
    call_mark: str | None = None
    call_end: str | None = None
    is_bare: bool = False

    @classmethod
    def of(cls, template: str) -> "AnswerForm":
        """The form that a chat template shows."""
        takes_tools = re.search(r"\btools\b", template) is not None
        mark, end = next((marks for marks in _CALL_MARKS if marks[0] in template), (None, None))
        is_bare = takes_tools and (mark == _BARE or (mark is None and '"parameters"' in template))
        return cls(
            thinks=THINK_END in template,
            takes_tools=takes_tools,
            call_mark=mark if takes_tools else None,
            call_end=end if takes_tools else None,
            is_bare=is_bare,
        )

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks: a tokenizer may take them for special tokens, whose text is usually left out."""
        found = (THINK, THINK_END) if self.thinks else ()
        return (*found, *(mark for mark in (self.call_mark, self.call_end) if mark is not None))


class AnswerParser:
    """Takes an answer apart as it grows. The pieces of one kind, joined, do not depend on how the text was cut."""

    def __init__(self, form: AnswerForm, *, is_thinking: bool = False, with_tools: bool = True):
        """
        Args:
          is_thinking: the prompt ends within the reasoning.
          with_tools: look for calls.
        """
        self._mark = form.call_mark if with_tools else None
        self._end = form.call_end
        self._rest = ""  # not yet decided
        self._raw = ""  # of the calls since the last mark that are not certain yet
        self._state = "start" if form.thinks and not is_thinking else "think" if is_thinking else "answer"
        self._may_be_bare = form.is_bare and with_tools
        self._is_bare = False  # in a call without a mark
        self._scan: _Json | None = None
        self._trims = False  # white space after the reasoning, and after calls, is no content

    def push(self, text: str) -> Iterator[Piece]:
        """The pieces that are certain with this text added."""
        self._rest += text
        while (found := self._step(is_last=False)) is not None:
            yield from found

    def finish(self) -> Iterator[Piece]:
        """The remaining pieces, at the end of the answer."""
        while self._rest or self._raw:
            found = self._step(is_last=True)
            if found is None:
                break
            yield from found

    def _step(self, *, is_last: bool) -> list[Piece] | None:
        """The next pieces, maybe none; None: nothing can be decided yet."""
        return getattr(self, f"_in_{self._state}")(is_last)

    def _in_start(self, is_last: bool) -> list[Piece] | None:
        text = self._rest.lstrip()
        if text.startswith(THINK):
            self._state, self._rest = "think", text[len(THINK) :]
            return []
        if THINK.startswith(text) and not is_last:
            return None
        self._state = "answer"
        return []

    def _in_think(self, is_last: bool) -> list[Piece] | None:
        before, found, after = self._rest.partition(THINK_END)
        if found:
            self._state, self._rest, self._trims = "answer", after, True
            return [Piece("reasoning", before)] if before else []
        return self._all_but(_overlap(self._rest, THINK_END) * (not is_last), "reasoning")

    def _in_answer(self, is_last: bool) -> list[Piece] | None:
        if self._trims or self._may_be_bare:
            text = self._rest.lstrip()
            if not text:
                return None if self._may_be_bare or not is_last else self._all_but(0, None)
            if self._trims:
                self._rest, self._trims = text, False
            if self._may_be_bare:
                self._may_be_bare = False
                if text[0] == "{":
                    self._state, self._raw, self._rest = "call", self._rest[: -len(text)], text
                    self._is_bare = True
                    return []
        if self._mark is None:
            return self._all_but(0, "content")
        before, found, after = self._rest.partition(self._mark)
        if found:
            self._state, self._raw, self._rest = "calls", self._mark, after
            return [Piece("content", before.rstrip())] if before.strip() else []
        certain = self._rest[: len(self._rest) - _overlap(self._rest, self._mark)].rstrip()  # no space before a mark
        return self._all_but((len(self._rest) - len(certain)) * (not is_last), "content")

    def _in_calls(self, is_last: bool) -> list[Piece] | None:
        """Between calls."""
        text = self._rest.lstrip(" \t\r\n,;]")
        if self._mark is not None and text.startswith(self._mark):
            text = text[len(self._mark) :]
        elif self._mark is not None and self._mark.startswith(text) and not is_last:
            return None
        text = text.lstrip(_BETWEEN_CALLS)
        if self._end is not None and text.startswith(self._end):
            self._state, self._raw, self._rest, self._trims = "answer", "", text[len(self._end) :], True
            return []
        if text.startswith("{"):
            self._state, self._raw, self._rest = "call", self._raw + self._rest[: -len(text)], text
            return []
        if named := _NAMED.match(text):
            self._raw, self._rest = "", text[named.end() :]
            self._state, self._scan = "arguments", _Json()
            return [Piece("call", named[1])]
        undecided = not text or (self._end or "").startswith(text) or _NAMED_SO_FAR.fullmatch(text)
        if undecided and not is_last:
            return None
        if not text:
            self._rest = self._raw = ""
            return []
        return self._give_up()

    def _in_call(self, is_last: bool) -> list[Piece] | None:
        """In an object whose name is not known yet."""
        if opening := _OPENING.match(self._rest):
            self._raw, self._rest = "", self._rest[opening.end() :]
            self._state, self._scan = "arguments", _Json(closes=2)
            return [Piece("call", _name(opening[1]))]
        if self._is_bare:  # only its beginning tells it from an answer in JSON
            return None if _OPENING_SO_FAR.match(self._rest) and not is_last else self._give_up()
        end = _Json().end(self._rest)
        if end is None:
            return self._give_up() if is_last else None
        pieces = _whole_call(self._rest[:end])
        if pieces is None:
            return self._give_up()
        self._state, self._raw, self._rest = "calls", "", self._rest[end:]
        return pieces

    def _in_arguments(self, is_last: bool) -> list[Piece] | None:
        assert self._scan is not None
        if not self._rest:
            return None
        inner, end = self._scan.take(self._rest)
        text, self._rest = self._rest[:inner], self._rest[end:]
        if self._scan.is_done:
            self._state, self._scan = "calls", None
        return [Piece("arguments", text)] if text else []

    def _give_up(self) -> list[Piece]:
        """What looked like a call is text."""
        text, self._raw, self._rest, self._state = self._raw + self._rest, "", "", "answer"
        self._mark = None  # the rest is text, too: a model that breaks the form once is not read further
        return [Piece("content", text)] if text else []

    def _all_but(self, num_kept: int, kind: Kind | None) -> list[Piece] | None:
        at = len(self._rest) - num_kept
        text, self._rest = self._rest[:at], self._rest[at:]
        if not text:
            return None
        return [] if kind is None else [Piece(kind, text)]


class _Json:
    """Finds where a JSON value that begins with a brace ends, in pieces of text."""

    def __init__(self, closes: int = 1):
        """closes: how many closing braces end it; with 2, it stands in an object, and only the inner part is wanted."""
        self._depth = closes - 1
        self._inner_depth = closes - 1
        self._in_string = self._is_escaped = False
        self._inner_is_done = self.is_done = False

    def take(self, text: str) -> tuple[int, int]:
        """How many characters of a text belong to the value, and how many to it and to what surrounds it."""
        inner = None
        if self._inner_is_done:
            inner = 0
        for place, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._inner_is_done and self._depth == self._inner_depth:
                    self._inner_is_done, inner = True, place + 1
                if self._depth <= 0:
                    self.is_done = True
                    return (place + 1 if inner is None else inner), place + 1
        return (len(text) if inner is None else inner), len(text)

    def end(self, text: str) -> int | None:
        """Where the value at the beginning of a text ends; None: not in this text."""
        _, end = self.take(text)
        return end if self.is_done else None


def _name(quoted: str) -> str:
    try:
        return json.loads(quoted)
    except ValueError:
        return quoted[1:-1]


def _whole_call(text: str) -> list[Piece] | None:
    """The pieces of an object in any order of its keys; None: it is no call."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    call = call.get("function", call) if isinstance(call.get("function", call), dict) else call
    name = call.get("name")
    if not isinstance(name, str):
        return None
    arguments: Any = call.get("arguments", call.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return [Piece("call", name), Piece("arguments", text)]


def _overlap(text: str, mark: str) -> int:
    """The length of the longest suffix of a text that is a beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message in the form that templates take: the arguments of its calls are objects, not JSON text.

    Raises:
      ValueError: arguments are not JSON of an object.
    """
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [_call_for_template(call) for call in calls]}


def _call_for_template(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'a tool call must be {{"function": {{"name": ..., "arguments": ...}}}}, got {call!r}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"the arguments of the call of {function['name']!r} must be the JSON text of an object, "
            f"got {function['arguments']!r}"
        )
    return {**call, "function": {**function, "arguments": dict(arguments)}}

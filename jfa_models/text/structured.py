"""What an answer must look like: a JSON schema, a regular expression, a choice, or a grammar.

Nothing here imports JAX, NumPy or llguidance; `text.guided` turns these parameters into masks of tokens.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

KINDS = ("json", "regex", "choice", "grammar", "json_object")
_NAMES = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
_SCHEMA = "a JSON schema: a dictionary, its JSON text, or a class with model_json_schema()"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of a request's output. Names and meanings are those of vLLM; exactly one kind must be given.

    Attributes:
      json: a JSON schema, as a dictionary, as JSON text, or as a class with `model_json_schema()` such as pydantic's;
        stored as compact JSON text with the keys in their order, which is the order of an answer's properties.
      regex: a regular expression that the whole output matches, in the syntax of Rust's regex crate.
      choice: the output is one of these strings; stored as a tuple.
      grammar: a context-free grammar in llguidance's dialect of Lark.
      json_object: True: any JSON object.
      disable_any_whitespace: for json and json_object: no white space between the tokens of JSON.
      whitespace_pattern: for json and json_object: a regular expression for the white space that may stand between two
        tokens of JSON; None: a space, or a line break with up to 40 spaces or 10 tabs after it.

    Raises:
      ValueError: no kind is given or more than one, or a value is not of its kind; the message names it.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"StructuredOutputsParams takes exactly one of {_NAMES}, got {got}; describe one form")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name, example in (("regex", "'[0-9]+'"), ("grammar", '\'start: "yes" | "no"\'')):
            if (text := getattr(self, name)) is not None:
                if not isinstance(text, str) or not text:
                    raise ValueError(f"{name} must be a non-empty string, got {text!r}; for example {example}")
                _check_unicode(name, text)
        if self.json_object is not None and self.json_object is not True:
            raise ValueError(f"json_object must be True, got {self.json_object!r}; omit it for another kind")
        self._check_whitespace(given[0])

    def _check_whitespace(self, kind: str) -> None:
        if not isinstance(self.disable_any_whitespace, bool):
            raise ValueError(
                f"disable_any_whitespace must be True or False, got {self.disable_any_whitespace!r}; "
                "use True for compact JSON"
            )
        pattern = self.whitespace_pattern
        if pattern is not None and (not isinstance(pattern, str) or not pattern):
            raise ValueError(
                f"whitespace_pattern must be a non-empty string, got {pattern!r}; "
                "use disable_any_whitespace=True for compact JSON"
            )
        chosen = [n for n in ("disable_any_whitespace", "whitespace_pattern") if getattr(self, n) not in (False, None)]
        if chosen and kind not in ("json", "json_object"):
            raise ValueError(
                f"{chosen[0]} applies to json and json_object, and {kind} is given; write the white space into it"
            )
        if len(chosen) == 2:
            raise ValueError("disable_any_whitespace and whitespace_pattern exclude each other; use only one")
        if pattern is not None:
            _check_unicode("whitespace_pattern", pattern)

    @property
    def kind(self) -> str:
        """The name of the kind that is given, one of KINDS."""
        return next(name for name in KINDS if getattr(self, name) is not None)


def _schema_text(schema: Any) -> str:
    """A schema as compact JSON text, with its keys in their order."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema, object_pairs_hook=_without_doubles)
        except _DoubleKeyError as error:
            raise ValueError(f"json: the schema has the key {error.args[0]!r} twice in one object; keep one") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json must be {_SCHEMA}, but the text is not JSON ({error})") from None
    elif isinstance(schema, type) and callable(getattr(schema, "model_json_schema", None)):
        schema = schema.model_json_schema()  # type: ignore[attr-defined]
    if not isinstance(schema, Mapping):
        advice = "; use json_object=True for any object" if isinstance(schema, bool) else ""
        raise ValueError(f"json must be {_SCHEMA}, got {schema!r}{advice}")
    try:
        plain = _plain(schema, "#")
        text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise ValueError("json: the schema is nested too deeply or contains itself; use $ref for recursion") from None
    _check_unicode("json", text)
    return text


class _DoubleKeyError(Exception):
    pass


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DoubleKeyError(key)
        found[key] = value
    return found


def _plain(value: Any, path: str) -> Any:
    """The value made of dictionaries, lists and scalars, as json.loads returns them."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"json: the keys of a schema must be strings, got {key!r} at {path}; write it as one")
        return {key: _plain(entry, step(path, key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, step(path, place)) for place, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"json: the schema has {value!r} at {path}, and JSON has finite numbers only; leave it out")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(
        f"json: the schema has {value!r} at {path}, which JSON has no form for; use strings, numbers, booleans, None, "
        "lists and dictionaries"
    )


def step(path: str, key: str | int) -> str:
    """The JSON pointer to an entry of what another pointer leads to."""
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str | bytes | Mapping) or not isinstance(choices, Sequence):
        raise ValueError(f"choice must be a list of strings, got {choices!r}; for example ['yes', 'no']")
    if not choices:
        raise ValueError("choice must have at least one string, got an empty list; for example ['yes', 'no']")
    for text in choices:
        if not isinstance(text, str) or not text:
            raise ValueError(f"choice must contain non-empty strings, got {text!r}; write numbers as strings")
        _check_unicode("choice", text)
    if len({*choices}) < len(choices):
        double = next(text for place, text in enumerate(choices) if text in choices[:place])
        raise ValueError(f"choice must contain different strings, got {double!r} twice; keep one")
    return tuple(choices)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode at character {error.start}, {text[error.start]!r}; give it in UTF-8"
        ) from None

"""JSON schemas before llguidance sees them: what asks for nothing is dropped, what it cannot enforce is refused.

llguidance 1.9.1 ignores some keywords without a word, refuses others even where they ask for nothing, and names no
place in its errors. Here each keyword is enforced, dropped because a validator would not enforce it either, or refused
with the JSON pointer to it.
"""

import copy
import json
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from jfa_models.text.structured import step

FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)  # of strings, that llguidance enforces
LARGEST = 2**53  # numbers go through float64
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_COUNTS_OF_CONTAINS = ("minContains", "maxContains")

# Where the schemas within a schema stand.
_MAPS = ("properties", "patternProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_DEFINITIONS = ("$defs", "definitions")

_ENFORCED = {*_MAPS, *_LISTS, *_SINGLE, *_BOUNDS, *_COUNTS, "$ref", "const", "enum", "type", "required", "pattern"}
_NAMES = {*_DEFINITIONS, "$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary"}
# of JSON Schema and OpenAPI: they describe, and ask for nothing; a discriminator only repeats the branches' consts
_DESCRIBING = {
    *("title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly"),
    *("externalDocs", "xml", "discriminator"),
}
_UNCHECKED = {"contentEncoding", "contentMediaType", "contentSchema"}  # annotations, by JSON Schema 2020-12
_WITHOUT_SUPPORT = (
    *("not", "if", "then", "else", "contains", *_COUNTS_OF_CONTAINS, "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas"),
    *("unevaluatedProperties", "unevaluatedItems", "uniqueItems", "$dynamicRef", "$recursiveRef"),
)
_IN_PLACE = {"$ref", "allOf", "anyOf", "oneOf", "if", "$dynamicRef"}  # what may evaluate properties beside a schema's
_MAX_TRIALS = 400  # compilations to find the place of an error


def prepare(schema: dict[str, Any], *, root: str = "#") -> dict[str, Any]:
    """A schema with the same meaning as far as llguidance enforces it.

    Args:
      root: what messages call the schema itself.

    Raises:
      ValueError: a keyword cannot be enforced, or has a value of the wrong kind; the message has the path.

    Warns:
      UserWarning: a keyword that only annotates, or is unknown, is not enforced; the message has the path.
    """
    if isinstance(schema.get("schema"), dict) and not schema.keys() & _ENFORCED:
        raise ValueError(
            f"the JSON schema has no keyword but has one named schema at {step(root, 'schema')}; "
            "pass that schema itself"
        )
    schema = copy.deepcopy(schema)
    walk = _Walk(schema, root)
    walk.run()
    for path, text in walk.ignored.items():
        warnings.warn(f"JSON schema: {path} is not enforced: {text}", stacklevel=6)  # where compile was called
    return schema


class _Walk:
    """Changes a schema in place, so that pointers into it stay valid. Definitions are reached by references only."""

    def __init__(self, schema: dict[str, Any], root: str) -> None:
        self.schema = schema
        self.root = root
        self.ignored: dict[str, str] = {}  # by path
        self._seen: set[int] = set()
        self._todo: list[tuple[Any, str]] = [(schema, root)]
        self._has_ids = any(
            isinstance(node.get("$id"), str) for node, path in _objects(schema, root) if node is not schema
        )
        self._unknown: list[str] = []
        self._reached: set[str] = set()  # paths that references go through

    def run(self) -> None:
        while self._todo:
            node, path = self._todo.pop()
            self._visit(node, path)
        for path in self._unknown:
            if path not in self._reached:
                self.ignored[path] = "it is no keyword of JSON Schema 2020-12; remove it, or mend its spelling"

    def _visit(self, node: Any, path: str) -> None:
        if isinstance(node, bool) or id(node) in self._seen:
            return
        if not isinstance(node, dict):
            raise ValueError(f"a JSON schema must be an object or a boolean, got {node!r} at {path}")
        self._seen.add(id(node))
        for name in _COUNTS:
            if isinstance(node.get(name), float) and node[name].is_integer():
                node[name] = int(node[name])
        self._drop_what_asks_for_nothing(node)
        self._name_by_patterns(node)
        for name in _WITHOUT_SUPPORT:
            if name in node:
                raise ValueError(
                    f"the JSON schema cannot be enforced at {step(path, name)}: {name} is not supported; "
                    "remove it, and check the answer for it"
                )
        self._check_numbers(node, path)
        self._check_format(node, path)
        for name in list(node):
            if name == "x-guidance":
                raise ValueError(
                    f"the JSON schema must not set llguidance's options at {step(path, name)}; "
                    "use disable_any_whitespace or whitespace_pattern"
                )
            if name in _UNCHECKED:
                self.ignored[step(path, name)] = "it only annotates, by JSON Schema 2020-12; check the answer for it"
            elif name not in _ENFORCED | _NAMES | _DESCRIBING | {"nullable", "format"} and not name.startswith("x-"):
                self._unknown.append(step(path, name))
        self._follow(node, path)
        for name in _MAPS:
            if isinstance(node.get(name), dict):
                self._todo += [(entry, step(step(path, name), key)) for key, entry in node[name].items()]
        for name in (*_LISTS, *_SINGLE):
            if isinstance(node.get(name), list):
                self._todo += [(entry, step(step(path, name), place)) for place, entry in enumerate(node[name])]
            elif name in node and name in _SINGLE:
                self._todo.append((node[name], step(path, name)))
        if "nullable" in node:
            self._or_null(node, path)

    def _drop_what_asks_for_nothing(self, node: dict[str, Any]) -> None:
        def drop(name: str, asks_for_nothing: bool) -> None:
            if name in node and asks_for_nothing:
                del node[name]

        no_array = "type" in node and "array" not in _types(node)
        no_object = "type" in node and "object" not in _types(node)
        drop("uniqueItems", node.get("uniqueItems") is False or no_array or _at_most_one_item(node))
        drop("not", node.get("not") is False)
        drop("then", "if" not in node or _is_anything(node.get("then")))
        drop("else", "if" not in node or _is_anything(node.get("else")))
        drop("if", "then" not in node and "else" not in node)
        drop("contains", no_array or (node.get("minContains") == 0 and "maxContains" not in node))
        for name in _COUNTS_OF_CONTAINS:
            drop(name, "contains" not in node)
        names = node.get("propertyNames")
        drop("propertyNames", no_object or _is_anything(names) or names == {"type": "string"})
        for name in ("dependentRequired", "dependentSchemas", "dependencies"):
            entries = node.get(name)
            is_empty = isinstance(entries, dict) and all(_is_anything(each) or each == [] for each in entries.values())
            drop(name, is_empty or no_object)
        least, required = node.get("minProperties"), node.get("required")
        drop(
            "minProperties",
            least == 0 or (isinstance(required, list) and _is_at_most(least, len({*map(str, required)}))),
        )
        self._unevaluated(node, no_array, no_object)

    def _name_by_patterns(self, node: dict[str, Any]) -> None:
        """Translates propertyNames with a pattern or an enum, as of pydantic's dict[Literal["a", "b"], int]."""
        names = node.get("propertyNames")
        if isinstance(names, dict) and names.keys() <= _DESCRIBING | {"$ref"} and isinstance(names.get("$ref"), str):
            names = self._resolve(urllib.parse.unquote(names["$ref"].removeprefix("#")))[0]
        if not isinstance(names, dict) or node.keys() & {"properties", "patternProperties"}:
            return
        asked = names.keys() - _DESCRIBING - {"type"}
        if names.get("type", "string") != "string" or len(asked) != 1:
            return
        [kind] = asked
        texts = names["enum"] if kind == "enum" else [names[kind]]
        if kind not in ("enum", "const", "pattern") or not texts or not all(isinstance(text, str) for text in texts):
            return
        pattern = texts[0] if kind == "pattern" else f"^({'|'.join(map(_escaped, texts))})$"
        node["patternProperties"] = {pattern: node.pop("additionalProperties", True)}
        node["additionalProperties"] = False
        del node["propertyNames"]

    def _unevaluated(self, node: dict[str, Any], no_array: bool, no_object: bool) -> None:
        """Without a schema beside it that evaluates more, what is unevaluated is what is additional."""
        for name, additional, unneeded in (
            ("unevaluatedProperties", "additionalProperties", no_object),
            ("unevaluatedItems", "items", no_array),
        ):
            if name not in node:
                continue
            if unneeded or _is_anything(node[name]) or (additional in node and not isinstance(node[additional], list)):
                del node[name]
            elif not node.keys() & (_IN_PLACE | {"dependentSchemas", "contains", additional}):
                node[additional] = node.pop(name)

    def _check_numbers(self, node: dict[str, Any], path: str) -> None:
        for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if isinstance(flag := node.get(exclusive), bool):  # of draft 4 and OpenAPI 3.0
                del node[exclusive]
                if flag and bound in node:
                    node[exclusive] = node.pop(bound)
        for name in (*_BOUNDS, "const", "enum"):
            for value, place in _scalars(node.get(name), step(path, name)):
                if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGEST:
                    raise ValueError(
                        f"the JSON schema cannot be enforced at {place}: {value} is beyond 2**53, where numbers are "
                        "not exact; use a smaller number, or a string"
                    )

    def _check_format(self, node: dict[str, Any], path: str) -> None:
        if "format" not in node:
            return
        name, place = node["format"], step(path, "format")
        if not isinstance(name, str):
            raise ValueError(f"the JSON schema must have a string at {place}, got {name!r}")
        if "type" in node and "string" not in _types(node):
            del node["format"]  # int32, double: no validator reads them
        elif name == "password":
            del node["format"]  # it tells how to show the text
        elif name not in FORMATS:
            del node["format"]
            self.ignored[place] = f"the format {name!r} is unknown here; use a pattern, or check the answer for it"

    def _or_null(self, node: dict[str, Any], path: str) -> None:
        """Translates OpenAPI's `nullable`, which llguidance ignores."""
        flag = node.pop("nullable")
        if not isinstance(flag, bool):
            raise ValueError(f"the JSON schema must have a boolean at {step(path, 'nullable')}, got {flag!r}")
        if not flag:
            return
        if "type" in node and not node.keys() & {"const", "enum", "anyOf", "oneOf", "allOf", "$ref"}:
            types = _types(node)
            node["type"] = types if "null" in types else [*types, "null"]
            return
        outer = {name: node[name] for name in node if name in _NAMES | _DESCRIBING}
        inner = {name: node[name] for name in node if name not in outer}
        node.clear()
        node.update(outer)
        if inner:
            node["anyOf"] = [inner, {"type": "null"}]

    def _follow(self, node: dict[str, Any], path: str) -> None:
        """Visits what `$ref` points to."""
        if not isinstance(ref := node.get("$ref"), str):
            return
        base, _, fragment = ref.partition("#")
        if self._has_ids:  # a reference may mean any part
            for definitions in (each for part, _ in _objects(self.schema, "#") for each in map(part.get, _DEFINITIONS)):
                if isinstance(definitions, dict):
                    self._todo += [(entry, step(path, "$ref")) for entry in definitions.values()]
            return
        place = step(path, "$ref")
        own = str(self.schema.get("$id", "")).partition("#")[0]
        if base and base != own:
            raise ValueError(f"the JSON schema refers to another document at {place}, {ref!r}; copy it under $defs")
        fragment = urllib.parse.unquote(fragment)
        if fragment and not fragment.startswith("/"):
            anchors = ("$anchor", "$dynamicAnchor", "$id", "id")
            found = [
                (part, where)
                for part, where in _objects(self.schema, self.root)
                if any(part.get(name) in (fragment, f"#{fragment}") for name in anchors)
            ]
            target, where = found[0] if found else (None, "")
        else:
            target, where = self._resolve(fragment)
        if not isinstance(target, dict | bool):
            raise ValueError(f"the JSON schema has nothing to refer to at {place}: {ref!r}; define it under $defs")
        self._todo.append((target, where))

    def _resolve(self, pointer: str) -> tuple[Any, str]:
        target: Any = self.schema
        path = self.root
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            path = step(path, key)
            self._reached.add(path)
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                return None, path
        return target, path


def _types(node: dict[str, Any]) -> list[Any]:
    types = node.get("type", [])
    return list(types) if isinstance(types, list) else [types]


def _escaped(text: str) -> str:
    """A regular expression for a text."""
    return re.sub(r"[\\^$.|?*+()\[\]{}/&~-]", lambda match: f"\\x{ord(match[0]):02x}", text)


def _is_anything(schema: Any) -> bool:
    return schema is True or schema == {} or (isinstance(schema, dict) and schema.keys() <= _DESCRIBING)


def _is_at_most(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value <= limit


def _at_most_one_item(node: dict[str, Any]) -> bool:
    return _is_at_most(node.get("maxItems"), 1)


def _scalars(value: Any, path: str) -> Iterator[tuple[Any, str]]:
    """The strings, numbers and so on within a value, with their paths."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _scalars(entry, step(path, key))
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from _scalars(entry, step(path, place))
    else:
        yield value, path


def _objects(value: Any, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """All objects within a value, which may be schemas, with their paths."""
    if isinstance(value, dict):
        yield value, path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        if key not in ("const", "enum"):
            yield from _objects(entry, step(path, key))


def allows_other_names(schema: dict[str, Any]) -> bool:
    """Whether an object may have properties beside those that the schema names."""
    return any(
        node.get("additionalProperties") is not False and any(node.get(name) for name in _MAPS)
        for node, _ in _objects(schema, "#")
    )


def place_of_control_character(schema: dict[str, Any], root: str = "#") -> str:
    """The path of a text or name that JSON can only write as \\u00xx; "" if there is none."""
    for node, path in _objects(schema, root):
        for name in ("const", "enum", "properties"):
            value = node.get(name)
            names = value if name == "properties" and isinstance(value, dict) else {}
            texts = [(key, step(step(path, name), key)) for key in names]
            texts += [] if name == "properties" else list(_scalars(value, step(path, name)))
            for text, place in texts:
                if isinstance(text, str) and re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", text):
                    return place
    return ""


def place_of_error(schema: dict[str, Any], error_of: Callable[[dict[str, Any]], str]) -> str:
    """The JSON pointer to the part of a schema that causes an error.

    A part is at fault if the error changes once anything is allowed there.

    Args:
      error_of: compiles a schema and returns the text of its error, "" if there is none.
    """
    schema = copy.deepcopy(schema)
    wanted = error_of(schema)
    if "oneOf" in wanted and (place := _place_of_one_of(schema, error_of, wanted)):
        return place
    trials = 0

    def changes(container: Any, key: Any) -> bool:
        nonlocal trials
        trials += 1
        if trials > _MAX_TRIALS:
            return False
        kept = container[key]
        container[key] = True
        try:
            return error_of(schema) != wanted
        finally:
            container[key] = kept

    def alone(slots: list[tuple[Any, Any, str]], chosen: int) -> bool:
        """Whether the error stays when all the other parts allow anything."""
        nonlocal trials
        trials += 1
        if trials > _MAX_TRIALS:
            return False
        kept = [container[key] for container, key, _ in slots]
        for place, (container, key, _) in enumerate(slots):
            container[key] = kept[place] if place == chosen else True
        try:
            return error_of(schema) == wanted
        finally:
            for (container, key, _), value in zip(slots, kept, strict=True):
                container[key] = value

    node: Any = schema
    path = "#"
    while isinstance(node, dict):
        slots = [slot for slot in _slots(node, path) if not isinstance(slot[0][slot[1]], bool)]
        at_fault = next((slot for slot in slots if changes(slot[0], slot[1])), None)
        if at_fault is None and len(slots) > 1:
            at_fault = next((slot for place, slot in enumerate(slots) if alone(slots, place)), None)
            for slot in slots if at_fault is not None else ():
                if slot is not at_fault:
                    slot[0][slot[1]] = True
        if at_fault is None:
            break
        container, key, path = at_fault
        node = container[key]
    if isinstance(node, dict) and not wanted.startswith("Unsatisfiable"):
        for name in [name for name in node if name not in _MAPS and name not in _NAMES]:
            kept = dict(node)
            del node[name]
            error = error_of(schema)
            node.clear()
            node.update(kept)
            if error != wanted:
                return step(path, name)
    return path


def _place_of_one_of(schema: dict[str, Any], error_of: Callable[[dict[str, Any]], str], wanted: str) -> str:
    """The first oneOf that causes the error also when all the others are anyOf; "" if none does."""
    found = [(node, path) for node, path in _objects(schema, "#") if isinstance(node.get("oneOf"), list)]
    for node, path in found[:_MAX_TRIALS]:
        others = [other for other, _ in found if other is not node and "anyOf" not in other]
        for other in others:
            other["anyOf"] = other.pop("oneOf")
        error = error_of(schema)
        for other in others:
            other["oneOf"] = other.pop("anyOf")
        if error == wanted:
            return step(path, "oneOf")
    return ""


def _slots(node: dict[str, Any], path: str) -> list[tuple[Any, Any, str]]:
    """(container, key, path) of the schemas within a schema, its definitions first."""
    found: list[tuple[Any, Any, str]] = []
    for name in (*_DEFINITIONS, *_MAPS, *_LISTS, *_SINGLE):
        value = node.get(name)
        if isinstance(value, dict) and name not in _SINGLE:
            found += [(value, key, step(step(path, name), key)) for key in value]
        elif isinstance(value, list):
            found += [(value, place, step(step(path, name), place)) for place in range(len(value))]
        elif isinstance(value, dict):
            found.append((node, name, step(path, name)))
    return found


# A text, a comment, a regular expression, a JSON schema, or a special token of a Lark grammar.
_LARK = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|%json\b\s*(?=\{)|<\[[^\]\n]*\]>|<[^\s<>]+>')


def lark_schemas(grammar: str) -> list[tuple[int, int, dict[str, Any]]]:
    """(start, end, schema) of the schemas that a Lark grammar includes by %json."""
    found = []
    place = 0
    while match := _LARK.search(grammar, place):
        place = match.end()
        if match[0].startswith("%json"):
            try:
                schema, end = json.JSONDecoder().raw_decode(grammar, place)
            except ValueError:
                continue  # llguidance has a message for it
            found.append((place, end, schema))
            place = end
    return found


def lark_special_tokens(grammar: str) -> list[str]:
    """The special tokens that a Lark grammar names, such as `<|im_end|>` or `<[151645]>`."""
    skipped = [(start, end) for start, end, _ in lark_schemas(grammar)]
    return [
        match[0]
        for match in _LARK.finditer(grammar)
        if match[0].startswith("<") and not any(start <= match.start() < end for start, end in skipped)
    ]

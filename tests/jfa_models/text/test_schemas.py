"""JSON schemas before llguidance sees them: what is dropped, translated, reported and refused, and with which path."""

import copy
import re
import warnings

import pytest

from jfa_models.text.schemas import lark_schemas, lark_special_tokens, place_of_error, prepare

TEXT = {"type": "string"}
NULL = {"type": "null"}
WORDS = {"title": "T", "description": "d", "default": 1, "examples": [1], "$comment": "c", "deprecated": True} | {
    "readOnly": True,
    "writeOnly": True,
    "discriminator": {"propertyName": "kind"},
    "example": 1,
    "x-order": 3,
}


def prepared(schema):
    before = copy.deepcopy(schema)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = prepare(schema)
    assert schema == before, "the given schema was changed"
    return result


@pytest.mark.parametrize(
    ("schema", "same_as"),
    [
        ({"uniqueItems": False, "items": {"uniqueItems": False}}, {"items": {}}),
        ({"type": "string", "uniqueItems": True}, TEXT),
        ({"maxItems": 1, "uniqueItems": True}, {"maxItems": 1}),
        ({"not": False}, {}),
        ({"then": False}, {}),
        ({"if": False}, {}),
        ({"if": {"type": "string"}, "then": True, "else": {}}, {}),
        ({"minContains": 3, "maxContains": 4}, {}),
        ({"contains": False, "minContains": 0}, {}),
        ({"type": "object", "contains": False}, {"type": "object"}),
        ({"propertyNames": True}, {}),
        ({"propertyNames": TEXT}, {}),
        ({"type": "string", "propertyNames": False}, TEXT),
        ({"dependentRequired": {"a": []}, "dependentSchemas": {"a": True}, "dependencies": {}}, {}),
        ({"unevaluatedProperties": True, "unevaluatedItems": {}}, {}),
        ({"unevaluatedProperties": False}, {"additionalProperties": False}),
        ({"unevaluatedProperties": False, "additionalProperties": TEXT}, {"additionalProperties": TEXT}),
        ({"prefixItems": [TEXT], "unevaluatedItems": False}, {"prefixItems": [TEXT], "items": False}),
        ({"minProperties": 0}, {}),
        ({"required": ["a", "b"], "minProperties": 2}, {"required": ["a", "b"]}),
        ({"minLength": 2.0, "maxItems": 3.0}, {"minLength": 2, "maxItems": 3}),
        ({"type": "integer", "format": "int32"}, {"type": "integer"}),
        ({"type": ["number", "null"], "format": "double"}, {"type": ["number", "null"]}),
        ({"type": "string", "format": "password"}, TEXT),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"minimum": 3, "exclusiveMinimum": True}, {"exclusiveMinimum": 3}),
        ({"maximum": 3, "exclusiveMaximum": False}, {"maximum": 3}),
        ({"nullable": False}, {}),
        ({"nullable": True}, {}),
        ({"type": "string", "minLength": 2, "nullable": True}, {"type": ["string", "null"], "minLength": 2}),
        ({"type": ["string", "null"], "nullable": True}, {"type": ["string", "null"]}),
        (
            {"type": "string", "enum": ["a"], "nullable": True, "title": "T"},
            {"title": "T", "anyOf": [{"type": "string", "enum": ["a"]}, NULL]},
        ),
        (
            {"properties": {"a": {"$ref": "#/$defs/A", "nullable": True}}, "$defs": {"A": TEXT}},
            {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/A"}, NULL]}}, "$defs": {"A": TEXT}},
        ),
        (
            {"propertyNames": {"enum": ["a", "b.c"]}, "additionalProperties": TEXT},
            {"patternProperties": {r"^(a|b\x2ec)$": TEXT}, "additionalProperties": False},
        ),
        (
            {"propertyNames": {"$ref": "#/$defs/Key"}, "$defs": {"Key": {"type": "string", "pattern": "^k"}}},
            {
                "patternProperties": {"^k": True},
                "additionalProperties": False,
                "$defs": {"Key": {"type": "string", "pattern": "^k"}},
            },
        ),
        (WORDS, WORDS),
    ],
)
def test_what_asks_for_nothing_is_dropped_and_the_rest_translated(schema, same_as):
    assert prepared(schema) == same_as


def test_a_faulty_definition_matters_only_where_it_is_used():
    definitions = {"$defs": {"unused": {"not": {}, "foo": 1}, "used": {"items": {"uniqueItems": False}}}}
    result = prepared({"$ref": "#/$defs/used", **definitions})
    assert result["$defs"] == {"unused": {"not": {}, "foo": 1}, "used": {"items": {}}}
    with pytest.raises(ValueError, match=re.escape("#/$defs/unused/not: not is not supported")):
        prepare({"properties": {"a": {"$ref": "#/$defs/unused"}}, **definitions})


def test_a_schema_may_be_anywhere_that_a_reference_goes():
    schema = {"components": {"schemas": {"A": {"uniqueItems": False}}}, "$ref": "#/components/schemas/A"}
    assert prepared(schema) == {"components": {"schemas": {"A": {}}}, "$ref": "#/components/schemas/A"}
    schema = {
        "$defs": {"a/b%": {"$anchor": "x", "uniqueItems": False}},
        "$ref": "#/$defs/a~1b%25",
        "items": {"$ref": "#x"},
    }
    assert prepared(schema)["$defs"] == {"a/b%": {"$anchor": "x"}}
    schema = {"$id": "http://a/b", "$defs": {"c": {"uniqueItems": False}}, "$ref": "http://a/b#/$defs/c"}
    assert prepared(schema)["$defs"] == {"c": {}}
    schema = {"$id": "http://a/b", "$defs": {"c": {"$id": "c", "uniqueItems": False}}, "$ref": "c"}
    assert prepared(schema)["$defs"] == {"c": {"$id": "c"}}
    prepared({"properties": {"child": {"$ref": "#"}}})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "string", "format": "iri"},
            "#/format is not enforced: the format 'iri' is unknown here; use a pattern",
        ),
        ({"items": {"format": "int32"}}, "#/items/format is not enforced: the format 'int32' is unknown here"),
        ({"type": "string", "format": "byte"}, "#/format is not enforced: the format 'byte' is unknown here"),
        ({"contentEncoding": "base64"}, "#/contentEncoding is not enforced: it only annotates, by JSON Schema 2020-12"),
        ({"contentMediaType": "a/b"}, "#/contentMediaType is not enforced: it only annotates"),
        ({"contentSchema": {}}, "#/contentSchema is not enforced: it only annotates"),
        (
            {"properties": {"a/b": {"minlength": 3}}},
            "#/properties/a~1b/minlength is not enforced: it is no keyword of JSON Schema 2020-12; remove it, or mend",
        ),
    ],
)
def test_what_only_annotates_is_reported(schema, message):
    with pytest.warns(UserWarning, match=re.escape(f"JSON schema: {message}")):
        prepare(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        *(
            (
                {"properties": {"a": {name: value}}},
                f"cannot be enforced at #/properties/a/{name}: {name} is not supported",
            )
            for name, value in {
                "uniqueItems": True,
                "not": {},
                "contains": {},
                "propertyNames": {"maxLength": 3},
                "dependentRequired": {"a": ["b"]},
                "dependentSchemas": {"a": False},
                "dependencies": {"a": ["b"]},
                "$dynamicRef": "#x",
            }.items()
        ),
        ({"if": {}, "then": False}, "#/if: if is not supported; remove it, and check the answer for it"),
        ({"allOf": [TEXT], "unevaluatedProperties": False}, "#/unevaluatedProperties: unevaluatedProperties is not"),
        (
            {"properties": {"a": {}}, "propertyNames": {"enum": ["a"]}},
            "#/propertyNames: propertyNames is not supported",
        ),
        (
            {"maximum": 2**53 + 1},
            "#/maximum: 9007199254740993 is beyond 2**53, where numbers are not exact; use a smaller",
        ),
        ({"minimum": -(2**63)}, "#/minimum: -9223372036854775808 is beyond 2**53"),
        ({"exclusiveMaximum": 1e300}, "#/exclusiveMaximum: 1e+300 is beyond 2**53"),
        ({"const": {"a": [2**60]}}, "#/const/a/0: 1152921504606846976 is beyond 2**53"),
        ({"items": {"enum": ["x", 2**60]}}, "#/items/enum/1: 1152921504606846976 is beyond 2**53"),
        ({"properties": {"a": 5}}, "a JSON schema must be an object or a boolean, got 5 at #/properties/a"),
        ({"anyOf": [{}, "x"]}, "a JSON schema must be an object or a boolean, got 'x' at #/anyOf/1"),
        ({"format": 5}, "the JSON schema must have a string at #/format, got 5"),
        ({"nullable": "yes"}, "the JSON schema must have a boolean at #/nullable, got 'yes'"),
        ({"items": {"x-guidance": {}}}, "must not set llguidance's options at #/items/x-guidance; use disable_any_"),
        (
            {"$ref": "#/$defs/A"},
            "the JSON schema has nothing to refer to at #/$ref: '#/$defs/A'; define it under $defs",
        ),
        ({"$ref": "#/allOf/7", "allOf": [{}]}, "nothing to refer to at #/$ref: '#/allOf/7'"),
        ({"$ref": "#nowhere"}, "nothing to refer to at #/$ref: '#nowhere'"),
        ({"items": {"$ref": "http://a/b"}}, "refers to another document at #/items/$ref, 'http://a/b'; copy it under"),
        (
            {"name": "answer", "strict": True, "schema": {"type": "object"}},
            "the JSON schema has no keyword but has one named schema at #/schema; pass that schema itself",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_path(schema, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(schema)


def test_numbers_up_to_2_to_the_53_pass():
    schema = {"minimum": -(2**53), "maximum": 2**53, "const": True}
    assert prepared(schema) == schema


def faults(schema):
    """Stands for a compiler: the first fault that it meets, following references."""

    def first(node):
        if not isinstance(node, dict):
            return ""
        if "bad" in node:
            return f"bad {node['bad']}"
        if "$ref" in node:
            return first(schema["$defs"][node["$ref"].rpartition("/")[2]])
        branches = node.get("oneOf", [])
        if len([branch for branch in branches if isinstance(branch, dict)]) > 1:
            return "oneOf is not supported"
        children = [*node.get("properties", {}).values(), node.get("items"), *node.get("anyOf", []), *branches]
        return next(filter(None, map(first, children)), "")

    return first(schema)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"bad": 1}, "#/bad"),
        ({"properties": {"a": {}, "b": {"items": {"bad": 1}}}}, "#/properties/b/items/bad"),
        ({"properties": {"a": {"bad": 1}, "b": {"bad": 1}}}, "#/properties/a/bad"),  # neither alone changes the error
        ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"items": {"bad": 1}}}}, "#/$defs/A/items/bad"),
        ({"anyOf": [{}, {"bad": 2}]}, "#/anyOf/1/bad"),
        ({"properties": {"a": {"oneOf": [{}]}, "b": {"oneOf": [{}, {}]}}}, "#/properties/b/oneOf"),
        ({"properties": {"a": {"oneOf": [{}, {}]}, "b": {"oneOf": [{}, {}]}}}, "#/properties/a/oneOf"),
    ],
)
def test_the_place_of_an_error_is_found(schema, place):
    before = copy.deepcopy(schema)
    assert place_of_error(schema, faults) == place
    assert schema == before


def test_schemas_and_special_tokens_of_a_lark_grammar():
    grammar = r"""
start: "<|a|>%json {" /<b>\/%json {/ x <|c|> <[5,7-9]> // <|d|> %json {}
x: %json {"const": "<|e|>"} | %json {"type": "null"}
y: %json { broken
"""
    assert [schema for _, _, schema in lark_schemas(grammar)] == [{"const": "<|e|>"}, NULL]
    assert [grammar[start:end] for start, end, _ in lark_schemas(grammar)][1] == '{"type": "null"}'
    assert lark_special_tokens(grammar) == ["<|c|>", "<[5,7-9]>"]

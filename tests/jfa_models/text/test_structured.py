"""Parameters of guided decoding: what they accept, how they are stored, and the messages for what they refuse."""

import json
import pickle
import re
import subprocess
import sys

import pydantic
import pytest

from jfa_models.text.structured import StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_a_schema_is_stored_as_text_with_its_keys_in_order():
    params = StructuredOutputsParams(json=SCHEMA)
    assert params.json == '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}}}'
    assert params.kind == "json"
    assert params == StructuredOutputsParams(json=json.dumps(SCHEMA, indent=2))
    assert hash(params) == hash(StructuredOutputsParams(json=params.json))
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}
    assert params != StructuredOutputsParams(json=turned)


def test_a_class_with_a_schema_gives_it():
    assert json.loads(StructuredOutputsParams(json=Person).json) == Person.model_json_schema()


def test_tuples_are_lists_and_text_is_kept():
    assert StructuredOutputsParams(json={"enum": ("é", 1.0, None)}).json == '{"enum":["é",1.0,null]}'


@pytest.mark.parametrize(
    "given",
    [
        {"json": SCHEMA},
        {"regex": "a+"},
        {"choice": ["yes", "no"]},
        {"grammar": 'start: "a"'},
        {"json_object": True, "disable_any_whitespace": True},
        {"json": SCHEMA, "whitespace_pattern": " ?"},
    ],
)
def test_parameters_are_hashable_and_survive_pickling(given):
    params = StructuredOutputsParams(**given)
    copied = pickle.loads(pickle.dumps(params))
    assert copied == params and hash(copied) == hash(params)
    assert params.kind == next(iter(given))
    with pytest.raises(AttributeError):
        params.regex = "b"


def test_choices_are_a_tuple():
    assert StructuredOutputsParams(choice=["yes", "no"]).choice == ("yes", "no")


def itself():
    schema = {}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {},
            "StructuredOutputsParams takes exactly one of json, regex, choice, grammar or json_object, got none of "
            "them; describe one form",
        ),
        ({"json": {}, "regex": "a"}, "got json and regex; describe one form"),
        ({"json": "{'a': 1}"}, "json must be a JSON schema: a dictionary, its JSON text, or a class with model_json_"),
        ({"json": "{'a': 1}"}, "but the text is not JSON (Expecting property name"),
        (
            {"json": [1]},
            "json must be a JSON schema: a dictionary, its JSON text, or a class with model_json_schema(), ",
        ),
        ({"json": "[1]"}, "got [1]"),
        ({"json": True}, "got True; use json_object=True for any object"),
        ({"json": int}, "got <class 'int'>"),
        ({"json": '{"a": 1, "a": 2}'}, "the schema has the key 'a' twice in one object; keep one"),
        ({"json": {"properties": {1: {}}}}, "the keys of a schema must be strings, got 1 at #/properties; write it as"),
        ({"json": {"a/b": {"const": {1}}}}, "the schema has {1} at #/a~1b/const, which JSON has no form for; use"),
        ({"json": {"maximum": float("inf")}}, "the schema has inf at #/maximum, and JSON has finite numbers only"),
        ({"json": '{"maximum": 1e999}'}, "the schema has inf at #/maximum, and JSON has finite numbers only"),
        ({"json": itself()}, "json: the schema is nested too deeply or contains itself; use $ref for recursion"),
        ({"json": {"const": "\ud800"}}, "json is not valid Unicode at character 10, '\\ud800'; give it in UTF-8"),
        ({"regex": 5}, "regex must be a non-empty string, got 5; for example '[0-9]+'"),
        ({"regex": ""}, "regex must be a non-empty string, got ''"),
        ({"regex": "a\ud800"}, "regex is not valid Unicode at character 1, '\\ud800'; give it in UTF-8"),
        ({"grammar": b"x"}, "grammar must be a non-empty string, got b'x'; for example 'start: \"yes\" | \"no\"'"),
        ({"choice": "yes"}, "choice must be a list of strings, got 'yes'; for example ['yes', 'no']"),
        ({"choice": {"a": 1}}, "choice must be a list of strings, got {'a': 1}"),
        ({"choice": []}, "choice must have at least one string, got an empty list; for example ['yes', 'no']"),
        ({"choice": ["1", 2]}, "choice must contain non-empty strings, got 2; write numbers as strings"),
        ({"choice": [""]}, "choice must contain non-empty strings, got ''"),
        ({"choice": ["a", "b", "a"]}, "choice must contain different strings, got 'a' twice; keep one"),
        ({"choice": ["\ud800"]}, "choice is not valid Unicode at character 0"),
        ({"json_object": False}, "json_object must be True, got False; omit it for another kind"),
        ({"json_object": "yes"}, "json_object must be True, got 'yes'"),
        (
            {"json_object": True, "disable_any_whitespace": 1},
            "disable_any_whitespace must be True or False, got 1; use True for compact JSON",
        ),
        (
            {"json": {}, "whitespace_pattern": ""},
            "whitespace_pattern must be a non-empty string, got ''; use disable_any_whitespace=True for compact JSON",
        ),
        ({"json": {}, "whitespace_pattern": "\ud800"}, "whitespace_pattern is not valid Unicode"),
        (
            {"regex": "a", "whitespace_pattern": " ?"},
            "whitespace_pattern applies to json and json_object, and regex is given; write the white space into it",
        ),
        ({"choice": ["a"], "disable_any_whitespace": True}, "disable_any_whitespace applies to json and json_object"),
        (
            {"json": {}, "whitespace_pattern": " ?", "disable_any_whitespace": True},
            "disable_any_whitespace and whitespace_pattern exclude each other; use only one",
        ),
    ],
)
def test_refusals_name_the_value(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StructuredOutputsParams(**given)


def test_importing_them_loads_neither_jax_nor_numpy_nor_llguidance():
    program = (
        "import sys; import jfa_models.text.structured; "
        "print([name for name in ('jax', 'numpy', 'llguidance', 'tokenizers', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

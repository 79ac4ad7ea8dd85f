"""--json-schema, --regex and --grammar of `jfa generate`, and forms in the lines of a batch file."""

import json
import re
import sys

import pytest
from golden import GOLDEN
from tiny_model import folder_with_text

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "two"]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_with_text(GOLDEN / "llama3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def jfa(jfa, monkeypatch, tmp_path, folder):
    """Runs `jfa generate` in a folder with forms."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "text.lark").write_text('start: "ab" /[0-9]/+ "é"')
    (tmp_path / "none.json").write_text("no JSON")
    (tmp_path / "latin").write_bytes(b"start: \xe9")
    return lambda *arguments: jfa("generate", *arguments, "--model", folder)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (("--json-schema", "schema.json", "--json"), r'\{\s*"a"\s*:\s*(1|"two")\s*\}'),
        (("--regex", "[a-c]{2}-é"), "[a-c]{2}-é"),
        (("--grammar", "text.lark", "--max-tokens", 4, "--temperature", 1), "ab[0-9]{2}"),
        (("--regex", "[a-c]{2}-é", "--speculative-config", '{"method": "ngram"}'), "[a-c]{2}-é"),
    ],
)
def test_the_text_has_the_form(jfa, options, form):
    status, out, err = jfa("Hi", *options)
    text = json.loads(out)["text"] if "--json" in options else out.removeprefix("Hi").removesuffix("\n")
    assert (status, err) == (0, "") and re.fullmatch(form, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--regex", "a", "--grammar", "text.lark"), "--json-schema, --regex and --grammar exclude each other"),
        (("--json-schema", "none.json"), "json must be a JSON schema: a dictionary, its JSON text, or a class"),
        (("--json-schema", "missing.json"), "'missing.json': No such file or directory"),
        (("--grammar", "latin"), "latin is not a text in UTF-8"),
        (("--regex", "(a"), "the regex cannot be enforced: "),
        (("--regex", ""), "regex must be a non-empty string"),
    ],
)
def test_a_form_that_is_refused(jfa, options, message):
    status, out, err = jfa("Hi", *options)
    assert status != 0 and out == "" and message in err and "Traceback" not in err


def test_the_lines_of_a_batch_file_have_their_own_forms(jfa, tmp_path):
    forms = [None, {"choice": ["yes", "no"]}, {"regex": "(a"}, {"json": SCHEMA}]
    lines = [{"prompt": "Hi"}, *({"prompt": "Hi", "structured_outputs": form} for form in forms)]
    (tmp_path / "in").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    status, out, err = jfa("--batch-file", "in", "--output", "out", "--regex", "[a-c]{2}", "--max-tokens", 60)
    assert (status, out, err) == (0, "", "5 results written to out, of which 1 are errors\n")
    found = {one["line"]: one for one in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert re.fullmatch("[a-c]{2}", found[1]["text"]) and not re.fullmatch("[a-c]{2}", found[2]["text"])
    assert found[3]["text"] in ("yes", "no") and "the regex cannot be enforced" in found[4]["error"]
    assert json.loads(found[5]["text"])["a"] in (1, "two")


def test_a_missing_package_is_one_line(jfa, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    status, out, err = jfa("Hi", "--regex", "a")
    assert (status, out) == (2, "") and err == "jfa: guided decoding needs llguidance: pip install 'jfa[guided]'\n"

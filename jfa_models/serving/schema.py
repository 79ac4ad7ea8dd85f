"""The requests of the API: what their JSON may contain. The fields are OpenAI's, and those that vLLM adds.

A field that is not here is refused by name, and so is one whose value asks for something that this server does not do.
"""

import json
import re
from typing import Any, Literal

import msgspec
import msgspec.inspect

from jfa_models.decoding.params import SamplingParams
from jfa_models.serving.errors import ApiError

Number = float | int
TokenIds = list[int]


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object of a request."""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Body):
    """What all requests that generate have in common.

    `user`, `metadata`, `safety_identifier` and `prompt_cache_key` describe a request to its sender and change nothing.
    """

    model: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int = 0
    timeout: Number | None = None  # seconds; the server's own limit stays


class _Completing(Sampling, kw_only=True):
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False


class CompletionRequest(_Completing, kw_only=True):
    prompt: str | list[str | int | TokenIds]  # a text or token ids, or a list of texts or of token ids
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class FunctionSpec(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(_Completing, kw_only=True):
    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None
    store: bool | None = None
    # vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class ResponsesFunction(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesNamedTool(Body):
    type: Literal["function"]
    name: str


class ResponsesFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesText(Body):
    format: ResponsesFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesReasoning(Body):
    effort: str | None = None
    summary: None = None


class ResponsesStreamOptions(Body):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Sampling, kw_only=True):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: ResponsesText | None = None
    tools: list[ResponsesFunction] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesNamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ResponsesReasoning | None = None
    include: list[str] | None = None
    truncation: Literal["disabled"] | None = None
    store: bool | None = None
    background: Literal[False] | None = None
    stream_options: ResponsesStreamOptions | None = None


class TokenizeRequest(Body):
    """A prompt, or messages that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: TokenIds
    model: str | None = None


class LoadAdapterRequest(Body):
    lora_name: str
    lora_path: str


class UnloadAdapterRequest(Body):
    lora_name: str


# Fields that clients know from elsewhere, and what to do without them.
_ELSEWHERE = {
    "suffix": "text is continued at its end only; leave it out",
    "best_of": "use n, and take the choice with the largest sum of logprobs",
    "use_beam_search": "beams are not served; use jfa_models.LLM",
    "length_penalty": "beams are not served; use jfa_models.LLM",
    "guided_json": "use structured_outputs: {'json': ...} or response_format",
    "guided_regex": "use structured_outputs: {'regex': ...}",
    "guided_choice": "use structured_outputs: {'choice': ...}",
    "guided_grammar": "use structured_outputs: {'grammar': ...}",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this server reads and writes text",
    "prediction": "start the server with --speculative-config: it changes no token",
    "web_search_options": "this server searches nothing; give it tools",
    "chat_template": "the server's template is used; start it with another model folder",
    "prompt_logprobs": "use echo and logprobs of /v1/completions",
    "truncate_prompt_tokens": "cut the prompt, for example with /tokenize",
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use logit_bias",
    "documents": "use chat_template_kwargs",
    "previous_response_id": "this server keeps no responses; send the whole conversation as input",
    "conversation": "this server keeps no conversations; send the whole one as input",
    "top_logprobs": "use /v1/chat/completions",
}
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_AT = re.compile(r" - at `\$\.?(.*)`$")


def decode[T: Body](kind: type[T], body: bytes, *, ignore_unknown: bool = False) -> T:
    """The request that the JSON of a body describes.

    Args:
      ignore_unknown: leave out unknown fields at the top, instead of refusing them.

    Raises:
      ApiError: it is not JSON, or has an unknown field or a value of a wrong type; the message names it.
    """
    try:
        found = msgspec.json.decode(body)
        if ignore_unknown and isinstance(found, dict):
            found = {name: value for name, value in found.items() if name in kind.__struct_fields__}
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        at = _AT.search(text)
        param = at[1] if at else None
        text = _AT.sub("", text)
        if unknown := _UNKNOWN.match(text):
            name = unknown[1]
            param = f"{param}.{name}" if param else name
            known = ", ".join(sorted(kind.__struct_fields__))
            way_out = _ELSEWHERE.get(name, f"the fields of this request are {known}")
            raise ApiError(400, f"there is no field {param!r}: {way_out}", param=param, code="unknown_field") from None
        where = f"{param}: " if param else ""
        if allowed := _allowed(kind, param or ""):
            text += f"; it must be one of {', '.join(allowed)}"
        raise ApiError(400, f"{where}{text[:1].lower()}{text[1:]}", param=param) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def _allowed(kind: type[Body], path: str) -> list[str]:
    """The values of the field at a path that takes only some; empty if it takes others."""
    types: list[Any] = [msgspec.inspect.type_info(kind)]
    for name in re.split(r"[.\[]", path):
        fields = [field for one in types for field in getattr(one, "fields", ()) if field.encode_name == name]
        types = [inner for field in fields for inner in getattr(field.type, "types", (field.type,))]
    return [json.dumps(value) for one in types for value in getattr(one, "values", ())]


_SAME = {  # fields of SamplingParams that requests have under the same name
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n",
    "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "structured_outputs", "logit_bias",
}  # fmt: skip


def sampling_fields(request: Sampling) -> dict[str, Any]:
    """The fields of SamplingParams that a request gives under the same names."""
    fields = {name: value for name in _SAME if (value := getattr(request, name, None)) is not None}
    if bias := fields.get("logit_bias"):
        try:
            fields["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise ApiError(
                400, f"logit_bias: the keys must be token ids, got {list(bias)}", param="logit_bias"
            ) from None
    return fields


def check_field(error: ValueError) -> ApiError:
    """The answer to a value that SamplingParams or the engine refuses; their messages begin with the field's name."""
    text = str(error)
    name = text.partition(" ")[0].rstrip(":")
    return ApiError(400, text, param=name if name in SamplingParams.__dataclass_fields__ else None)

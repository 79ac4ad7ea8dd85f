"""/v1/chat/completions: the next turn of a conversation, with its reasoning and its calls of tools."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import CompletionOutput, Logprob, RequestOutput
from jfa_models.serving.errors import ApiError
from jfa_models.serving.replies import DONE, Reply, event, likeliest, token_text, usage_of
from jfa_models.serving.schema import ChatRequest, FunctionSpec, NamedTool, ResponseFormat, sampling_fields
from jfa_models.text.answers import THINK, THINK_END, AnswerForm, AnswerParser, Piece, for_template
from jfa_models.text.tokenizer import Tokenizer

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal"}
_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "refusal")
_KINDS = dict.fromkeys(_TEXTS, str) | {"tool_calls": list}
_WITHOUT_MEANING = {"audio", "function_call", "annotations"}  # of an answer that is sent back, if they are empty
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_OFF = ("none", "minimal")  # efforts of reasoning for which a model does not think


class ChatReply(Reply):
    """The answer of /v1/chat/completions.

    The calls of tools are the model's own where it may choose; where it must call, its text is JSON by guidance.
    """

    prefix = "chatcmpl"
    request: ChatRequest

    def __init__(
        self, request: ChatRequest, model: str, id: str, language_model: LanguageModel, chat_template: str | None
    ):
        super().__init__(request, model, id)
        tokenizer = language_model.tokenizer
        if request.store:
            raise ApiError(400, "store: this server keeps no conversations", param="store")
        if tokenizer is None:
            raise ApiError(400, "this model has no tokenizer, so it cannot chat: use /v1/completions with token ids")
        template = chat_template or _template_of(tokenizer, with_tools=bool(request.tools))
        self.form = AnswerForm.of(template)
        self._forced = _forced_tools(request)
        tools = [] if request.tool_choice == "none" else request.tools or []
        if tools and not self.form.takes_tools:
            raise ApiError(400, "tools: the model's chat template has no place for tools", param="tools")
        text = prompt_of(request, tokenizer, chat_template, template)
        guided = _structure(request, self._forced)
        self._with_tools = bool(tools) and request.response_format is None
        self._is_thinking = self.form.thinks and text.rstrip().endswith(THINK)
        if self._is_thinking and guided is not None:  # guidance holds from the first token on
            text, self._is_thinking = f"{text.rstrip()}\n{THINK_END}\n\n", False
        self.prompts = [tokenizer.encode(text, add_special_tokens=False)]
        fields = sampling_fields(request)
        if guided is not None:
            fields["structured_outputs"] = guided
        fields["max_tokens"] = _max_tokens(request)
        if request.logprobs:
            fields["logprobs"] = request.top_logprobs or 0
        elif request.top_logprobs is not None:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if any(tokenizer.special_token_id(mark) is not None for mark in self.form.marks):
            fields.setdefault("skip_special_tokens", False)  # they would not be seen
        self.params = language_model.default_params(**fields)
        self._choices: dict[int, _Choice] = {}

    def whole(self, results: Sequence[RequestOutput]) -> dict[str, Any]:
        [result] = results
        choices = [self._whole_choice(one) for one in result.outputs]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage_of(results)}

    def grown(self, place: int, result: RequestOutput) -> Iterator[bytes]:
        for one in result.outputs:
            shown = self.shown(place, one)
            if shown.is_ended or not (one.token_ids or one.finish_reason):
                continue
            if one.index not in self._choices:
                self._choices[one.index] = _Choice(one.index, self.new_parser())
                yield self._chunk(one.index, {"role": "assistant", "content": ""})
            choice = self._choices[one.index]
            pieces = [*choice.parser.push(one.text[shown.num_characters :])]
            if one.finish_reason is not None:
                pieces += choice.parser.finish()
            logprobs = self._logprobs(one, shown.num_tokens)
            shown.num_characters, shown.num_tokens = len(one.text), len(one.token_ids)
            deltas = [delta for piece in self.wanted(pieces, choice) if (delta := self._delta(piece, choice))]
            if not deltas and logprobs:
                deltas = [{}]
            for last, delta in enumerate(deltas, start=1 - len(deltas)):
                yield self._chunk(one.index, delta, logprobs=logprobs if last == 0 else None)
            if one.finish_reason is not None:
                shown.is_ended = True
                yield self._chunk(one.index, {}, ended=one, num_calls=choice.num_calls)

    def end(self, results: Sequence[RequestOutput]) -> Iterator[bytes]:
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(results)})
        yield DONE

    def new_parser(self) -> "AnswerParser | _ForcedCalls":
        """A parser of one answer."""
        if self._forced is not None:
            return _ForcedCalls(self._forced)
        return AnswerParser(self.form, is_thinking=self._is_thinking, with_tools=self._with_tools)

    def wanted(self, pieces: Sequence[Piece], choice: "_Choice") -> Iterator[Piece]:
        """The pieces without the calls after the first one if the request forbids parallel calls."""
        for piece in pieces:
            choice.num_calls += piece.kind == "call"
            is_call = piece.kind in ("call", "arguments")
            if is_call and choice.num_calls > 1 and self.request.parallel_tool_calls is False:
                continue
            yield piece

    def message(self, one: CompletionOutput) -> tuple[dict[str, Any], int]:
        """The message of a finished choice, and its number of calls."""
        choice = _Choice(one.index, self.new_parser())
        pieces = [*choice.parser.push(one.text), *choice.parser.finish()]
        texts: dict[str, str] = {}
        calls: list[dict[str, Any]] = []
        for piece in self.wanted(pieces, choice):
            if piece.kind == "call":
                calls.append({"id": self.call_id(one.index, len(calls)), "type": "function"})
                calls[-1]["function"] = {"name": piece.text, "arguments": ""}
            elif piece.kind == "arguments":
                calls[-1]["function"]["arguments"] += piece.text
            else:
                texts[piece.kind] = texts.get(piece.kind, "") + piece.text
        content = texts.get("content", None if calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if "reasoning" in texts:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        return message, len(calls)

    def call_id(self, index: int, number: int) -> str:
        """The id of a call: the same in a stream and in a whole answer."""
        return f"call_{self.id.rpartition('-')[2]}_{index}_{number}"

    def _whole_choice(self, one: CompletionOutput) -> dict[str, Any]:
        message, num_calls = self.message(one)
        logprobs = self._logprobs(one, 0)
        return {"index": one.index, "message": message, "logprobs": logprobs, **_end_of(one, num_calls)} | (
            {"token_ids": one.token_ids} if self.request.return_token_ids else {}
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        ended: CompletionOutput | None = None,
        num_calls: int = 0,
    ) -> bytes:
        end = {"finish_reason": None} if ended is None else _end_of(ended, num_calls)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, **end}
        if ended is not None and self.request.return_token_ids:
            choice["token_ids"] = ended.token_ids
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _delta(self, piece: Piece, choice: "_Choice") -> dict[str, Any]:
        number = choice.num_calls - 1
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": ""}
            call_id = self.call_id(choice.index, number)
            call = {"index": number, "id": call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        if piece.kind == "arguments":
            return {"tool_calls": [{"index": number, "function": {"arguments": piece.text}}]}
        return {"reasoning_content" if piece.kind == "reasoning" else "content": piece.text}

    def _logprobs(self, one: CompletionOutput, start: int) -> dict[str, Any] | None:
        if one.logprobs is None:
            return None
        entries = zip(one.token_ids[start:], one.logprobs[start:], strict=True)
        return {"content": [self._logprob(token, found) for token, found in entries], "refusal": None}

    def _logprob(self, token_id: int, entries: Mapping[int, Logprob]) -> dict[str, Any]:
        def described(token_id: int, one: Logprob) -> dict[str, Any]:
            text = token_text(token_id, one, as_id=self.request.return_tokens_as_token_ids)
            return {"token": text, "logprob": one.logprob, "bytes": list(text.encode())}

        top = likeliest(entries, self.request.top_logprobs or 0)
        return described(token_id, entries[token_id]) | {"top_logprobs": [described(*entry) for entry in top]}


class _Choice:
    """How far a choice is read."""

    def __init__(self, index: int, parser: "AnswerParser | _ForcedCalls"):
        self.index, self.parser = index, parser
        self.num_calls = 0


class _ForcedCalls:
    """Reads the text of a guided call: the arguments of a function, or a list of objects with names and arguments."""

    def __init__(self, name: str):
        """name: of the function; "": the text names it."""
        self._name = name
        self._calls = None if name else AnswerParser(AnswerForm(call_mark="["), with_tools=True)

    def push(self, text: str) -> Iterator[Piece]:
        if self._calls is not None:
            yield from self._calls.push(text)
            return
        if self._name and text:
            yield Piece("call", self._name)
            self._name = ""
        if text:
            yield Piece("arguments", text)

    def finish(self) -> Iterator[Piece]:
        return iter(()) if self._calls is None else self._calls.finish()


def prompt_of(request: Any, tokenizer: Tokenizer, chat_template: str | None, template: str) -> str:
    """The text of a prompt from the messages, tools and template options of a request.

    Raises:
      ApiError, ValueError: a message has another form, or the template refuses it.
    """
    messages = messages_of(request.messages, has_developer="developer" in template)
    extra = dict(request.chat_template_kwargs or {})
    if reserved := extra.keys() & {"messages", "tools", "chat_template", "tokenize"}:
        raise ApiError(
            400, f"chat_template_kwargs must not have {', '.join(sorted(reserved))}", param=next(iter(reserved))
        )
    if (effort := getattr(request, "reasoning_effort", None)) is not None:
        if "reasoning_effort" in template:
            extra.setdefault("reasoning_effort", effort)
        elif "enable_thinking" in template:
            extra.setdefault("enable_thinking", effort not in _OFF)
        elif effort not in _OFF:
            raise ApiError(400, "reasoning_effort: the model's chat template knows no effort", param="reasoning_effort")
    tools = None
    if request.tools and getattr(request, "tool_choice", None) != "none":
        tools = [{"type": "function", "function": _described(tool.function)} for tool in request.tools]
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=chat_template,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        **extra,
    )


def _described(function: FunctionSpec) -> dict[str, Any]:
    described: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    return described | {"parameters": _parameters(function)}


def _parameters(function: FunctionSpec) -> dict[str, Any]:
    return {"type": "object", "properties": {}} if function.parameters is None else function.parameters


def _template_of(tokenizer: Tokenizer, *, with_tools: bool) -> str:
    templates = tokenizer.chat_templates
    return (templates.get("tool_use") if with_tools else None) or templates.get("default") or ""


def messages_of(messages: Sequence[Mapping[str, Any]], *, has_developer: bool) -> list[dict[str, Any]]:
    """Messages in the form that templates take."""
    return [_message(place, message, has_developer) for place, message in enumerate(messages)]


def _message(place: int, message: Mapping[str, Any], has_developer: bool) -> dict[str, Any]:
    where = f"messages[{place}]"
    found = {name: value for name, value in message.items() if value is not None}
    empty = {name for name in found.keys() & _WITHOUT_MEANING if not found[name]}
    found = {name: value for name, value in found.items() if name not in empty}
    if unknown := sorted(found.keys() - _FIELDS):
        raise ApiError(400, f"{where} has no field {unknown[0]!r}; it has {', '.join(sorted(_FIELDS))}", param=where)
    for name, kind in _KINDS.items():
        if not isinstance(found.get(name, kind()), kind):
            called = "a text" if kind is str else "a list"
            raise ApiError(400, f"{where}.{name} must be {called}, got {found[name]!r}", param=f"{where}.{name}")
    role = found.get("role")
    if role not in _ROLES:
        raise ApiError(400, f"{where}: role must be one of {', '.join(_ROLES)}, got {role!r}", param=f"{where}.role")
    if role == "developer" and not has_developer:
        found["role"] = "system"
    content = found.get("content")
    if content is not None and not isinstance(content, str):
        found["content"] = _parts(f"{where}.content", content)
    refusal = found.pop("refusal", None)
    if content is None and refusal is not None:
        found["content"] = refusal
    if "content" not in found and not found.keys() & {"tool_calls", "reasoning_content", "reasoning"}:
        raise ApiError(400, f"{where} has no content", param=f"{where}.content")
    found.setdefault("content", "")
    try:
        return for_template(found)
    except ValueError as error:
        raise ApiError(400, f"{where}: {error}", param=f"{where}.tool_calls") from None


def _parts(where: str, content: Any) -> list[dict[str, str]]:
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be a text or a list of parts, got {content!r}", param=where)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(_TEXT_PARTS.get(kind, "")) if isinstance(kind, str) else None
        if not isinstance(text, str):
            raise ApiError(
                400,
                f'{where}: a part must be {{"type": "text", "text": ...}}; this server reads text only',
                param=where,
            )
        parts.append({"type": "text", "text": text})
    return parts


def _max_tokens(request: ChatRequest) -> int | None:
    given = [request.max_tokens, request.max_completion_tokens]
    if None not in given and given[0] != given[1]:
        raise ApiError(400, "max_tokens and max_completion_tokens mean the same: give one", param="max_tokens")
    return given[1] if given[0] is None else given[0]


def _forced_tools(request: ChatRequest) -> str | None:
    """The name of the function that must be called; "" for any; None: the model may choose."""
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return None
    names = [tool.function.name for tool in request.tools or ()]
    if not names:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    if not isinstance(choice, NamedTool):
        return ""
    if choice.function.name not in names:
        raise ApiError(
            400,
            f"tool_choice names {choice.function.name!r}, and the tools are {', '.join(names)}",
            param="tool_choice",
        )
    return choice.function.name


def _structure(request: ChatRequest, forced: str | None) -> dict[str, Any] | None:
    """The fields of StructuredOutputsParams that a request asks for; None: any text."""
    form = request.response_format
    wanted = {
        "structured_outputs": request.structured_outputs,
        "response_format": None if form is None else _of_format(form),
        "tool_choice": None if forced is None else {"json": _schema_of_calls(request, forced)},
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    if len(given) > 1:
        raise ApiError(
            400, f"{' and '.join(given)} ask for different forms of one text: give one", param=next(iter(given))
        )
    return next(iter(given.values()), None)


def _of_format(form: ResponseFormat) -> dict[str, Any] | None:
    if form.type != "json_schema":
        if form.json_schema is not None:
            raise ApiError(400, f"response_format of type {form.type} takes no json_schema", param="response_format")
        return {"json_object": True} if form.type == "json_object" else None
    if form.json_schema is None or form.json_schema.schema is None:
        raise ApiError(400, "response_format needs json_schema.schema", param="response_format.json_schema")
    return {"json": form.json_schema.schema}


def _schema_of_calls(request: ChatRequest, forced: str) -> dict[str, Any]:
    functions = [tool.function for tool in request.tools or ()]
    if forced:
        return _parameters(next(function for function in functions if function.name == forced))
    calls = []
    for place, function in enumerate(functions):
        arguments = _moved(_parameters(function), f"#/items/anyOf/{place}/properties/arguments/")
        properties = {"name": {"const": function.name}, "arguments": arguments}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    most = {} if request.parallel_tool_calls is not False else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references hold where it stands in another one."""
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, root) for name, value in schema.items()}
    if isinstance(target := moved.get("$ref"), str) and target.startswith("#"):
        moved["$ref"] = (root + target[1:].lstrip("/")).rstrip("/")
    return moved


def _end_of(one: CompletionOutput, num_calls: int) -> dict[str, Any]:
    reason: str | None = one.finish_reason
    if reason == "stop" and num_calls:
        reason = "tool_calls"
    return {"finish_reason": reason, "stop_reason": one.stop_reason}

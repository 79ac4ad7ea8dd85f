"""/v1/responses, in its part about text: the same answer as that of a chat, as a list of items.

Nothing is kept between requests: a conversation is sent as a whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import CompletionOutput, RequestOutput
from jfa_models.serving.chat import ChatReply
from jfa_models.serving.errors import ApiError
from jfa_models.serving.replies import Reply, event, usage_of
from jfa_models.serving.schema import (
    ChatRequest,
    FunctionSpec,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ResponsesNamedTool,
    ResponsesRequest,
    Sampling,
    Tool,
)
from jfa_models.text.answers import Piece


class ResponsesReply(Reply):
    """The answer of /v1/responses."""

    prefix = "resp"
    request: ResponsesRequest

    def __init__(
        self, request: ResponsesRequest, model: str, id: str, language_model: LanguageModel, chat_template: str | None
    ):
        super().__init__(request, model, id)
        self.id = f"{self.prefix}_{id}"
        if request.store:
            raise ApiError(400, "store: this server keeps no responses", param="store")
        if request.include:
            raise ApiError(400, f"include: there is no more to include, got {request.include}", param="include")
        self._chat = ChatReply(_as_chat(request), model, id, language_model, chat_template)
        self.prompts, self.params = self._chat.prompts, self._chat.params
        self._items = _Items(id, self._chat)
        self._number = -1

    def whole(self, results: Sequence[RequestOutput]) -> dict[str, Any]:
        [one] = results[0].outputs
        items = _Items(self.id.partition("_")[2], self._chat)
        list(items.push(one.text))
        list(items.finish(_status(one)))
        return self._response(_status(one), items.found, results)

    def opening(self) -> Iterator[bytes]:
        for name in ("response.created", "response.in_progress"):
            yield self._event({"type": name, "response": self._response("in_progress", [], ())})

    def grown(self, place: int, result: RequestOutput) -> Iterator[bytes]:
        [one] = result.outputs
        shown = self.shown(place, one)
        events = [*self._items.push(one.text[shown.num_characters :])]
        shown.num_characters = len(one.text)
        if one.finish_reason is not None and not shown.is_ended:
            shown.is_ended = True
            events += self._items.finish(_status(one))
        for found in events:
            yield self._event(found)

    def end(self, results: Sequence[RequestOutput]) -> Iterator[bytes]:
        status = _status(results[0].outputs[0])
        name = "response.completed" if status == "completed" else "response.incomplete"
        yield self._event({"type": name, "response": self._response(status, self._items.found, results)})

    def failed(self, error: ApiError) -> Iterator[bytes]:
        response = self._response("failed", self._items.found, ())
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        yield self._event({"type": "response.failed", "response": response})

    def _event(self, data: dict[str, Any]) -> bytes:
        self._number += 1
        return event({**data, "sequence_number": self._number}, data["type"])

    def _response(
        self, status: str, output: Sequence[Mapping[str, Any]], results: Sequence[RequestOutput]
    ) -> dict[str, Any]:
        request = self.request
        usage = None
        if results:
            counts = usage_of(results)
            usage = {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            }
        form = None if request.text is None else request.text.format
        effort = None if request.reasoning is None else request.reasoning.effort
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "background": False,
            "temperature": self.params.temperature,
            "text": {"format": {"type": "text"} if form is None else form},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": request.user,
            "metadata": request.metadata or {},
        }


class _Items:
    """The items of an answer while it grows, and the events that tell of them.

    Attributes:
      found: the items so far, complete or not.
    """

    def __init__(self, id: str, chat: ChatReply):
        self.found: list[dict[str, Any]] = []
        self._id = id
        self._chat = chat
        self._parser = chat.new_parser()
        self._num_calls = 0

    def push(self, text: str) -> Iterator[dict[str, Any]]:
        """The events of more text."""
        for piece in self._parser.push(text):
            yield from self._take(piece)

    def finish(self, status: str) -> Iterator[dict[str, Any]]:
        """The events at the end of the text."""
        for piece in self._parser.finish():
            yield from self._take(piece)
        if not self.found:
            yield from self._take(Piece("content", ""))
        yield from self._close(status)

    def _take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.kind == "call":
            self._num_calls += 1
        if piece.kind in ("call", "arguments"):
            if self._num_calls > 1 and self._chat.request.parallel_tool_calls is False:
                return
            if piece.kind == "call":
                call = {"call_id": self._chat.call_id(0, self._num_calls - 1), "name": piece.text, "arguments": ""}
                yield from self._open("function_call", "fc", call)
                return
            self.found[-1]["arguments"] += piece.text
            yield {"type": "response.function_call_arguments.delta", **self._where(), "delta": piece.text}
            return
        if piece.kind == "reasoning":
            if not self._is_in("reasoning"):
                yield from self._open("reasoning", "rs", {"summary": [], "content": []})
                self.found[-1]["content"].append({"type": "reasoning_text", "text": ""})
            self.found[-1]["content"][0]["text"] += piece.text
            yield {"type": "response.reasoning_text.delta", **self._where(part=True), "delta": piece.text}
            return
        if not self._is_in("message"):
            yield from self._open("message", "msg", {"role": "assistant", "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.found[-1]["content"].append(part)
            yield {"type": "response.content_part.added", **self._where(part=True), "part": dict(part)}
        self.found[-1]["content"][0]["text"] += piece.text
        if piece.text:
            yield {
                "type": "response.output_text.delta",
                **self._where(part=True),
                "delta": piece.text,
                "logprobs": [],
            }

    def _is_in(self, kind: str) -> bool:
        return bool(self.found) and self.found[-1]["type"] == kind

    def _where(self, *, part: bool = False) -> dict[str, Any]:
        place = {"item_id": self.found[-1]["id"], "output_index": len(self.found) - 1}
        return place | ({"content_index": 0} if part else {})

    def _open(self, kind: str, prefix: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self.found:
            yield from self._close("completed")
        item = {"id": f"{prefix}_{self._id}_{len(self.found)}", "type": kind, "status": "in_progress", **fields}
        self.found.append(item)
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.found) - 1,
            "item": {name: list(value) if isinstance(value, list) else value for name, value in item.items()},
        }

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        item = self.found[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield {
                "type": "response.function_call_arguments.done",
                **self._where(),
                "name": item["name"],
                "arguments": item["arguments"],
            }
        else:
            [part] = item["content"]
            name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            logprobs = {} if name == "reasoning_text" else {"logprobs": []}
            yield {"type": f"response.{name}.done", **self._where(part=True), "text": part["text"], **logprobs}
            if name == "output_text":
                yield {"type": "response.content_part.done", **self._where(part=True), "part": part}
        yield {"type": "response.output_item.done", "output_index": len(self.found) - 1, "item": item}


def _status(one: CompletionOutput) -> str:
    return "incomplete" if one.finish_reason == "length" else "completed"


def _as_chat(request: ResponsesRequest) -> ChatRequest:
    """The chat that has the same prompt and the same form of answer."""
    shared = {name: getattr(request, name) for name in Sampling.__struct_fields__}
    choice: Any = request.tool_choice
    if isinstance(choice, ResponsesNamedTool):
        choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
    tools = [
        Tool(
            type="function",
            function=FunctionSpec(name=one.name, description=one.description, parameters=one.parameters),
        )
        for one in request.tools or ()
    ]
    form = None if request.text is None else request.text.format
    return ChatRequest(
        **shared,
        messages=_messages(request),
        max_completion_tokens=request.max_output_tokens,
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        response_format=None
        if form is None
        else ResponseFormat(
            type=form.type, json_schema=JsonSchema(schema=form.schema) if form.type == "json_schema" else None
        ),
    )


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    given = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(given):
        where = f"input[{place}]"
        kind = item.get("type", "message")
        last: dict[str, Any] | None = messages[-1] if messages else None
        if last is not None and last.get("role") != "assistant":
            last = None
        if kind == "message":
            message = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
            thought = last if last is not None and not {"content", "tool_calls"} & last.keys() else None
            if thought is not None and message.get("role") == "assistant":
                thought.update(message)
            else:
                messages.append(message)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if last is None:
                last = {"role": "assistant"}
                messages.append(last)
            last.setdefault("tool_calls", []).append(
                {"id": item.get("call_id"), "type": "function", "function": function}
            )
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "reasoning":
            texts = [part.get("text") for part in item.get("content") or () if isinstance(part, Mapping)]
            if texts:
                messages.append({"role": "assistant", "reasoning_content": "".join(map(str, texts))})
        else:
            raise ApiError(
                400,
                f"{where}: type must be message, function_call, function_call_output or reasoning, got {kind!r}",
                param=where,
            )
    if request.instructions is not None:
        first = messages[0] if messages and messages[0].get("role") in ("system", "developer") else None
        if first is not None and isinstance(first.get("content"), str):  # most templates take one of them
            first["content"] = f"{request.instructions}\n\n{first['content']}"
        else:
            messages.insert(0, {"role": "system", "content": request.instructions})
    return messages

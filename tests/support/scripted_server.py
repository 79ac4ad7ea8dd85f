"""A server with OpenAI's protocol whose answers a test writes."""

import contextlib
import json

from running import running_app
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route


def event(data):
    """A server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


def part(text, finish_reason=None, **fields):
    """An event of a completion."""
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], **fields})


def usage(input_tokens, output_tokens):
    """The usage field."""
    return {"prompt_tokens": input_tokens, "completion_tokens": output_tokens}


class Scripted:
    """What the server says.

    Attributes:
      url: its address.
      key: what it asks for; None: nothing.
      ids: the tokens that /tokenize answers with; None: there is no such path.
      answer: of a request's JSON the status, and JSON or the events of a stream.
      asked: the JSON of all requests.
      headers: of the answers that are no streams.
    """

    def __init__(self):
        self.url = ""
        self.reset()

    def reset(self):
        """As after the start: complete answers."""
        self.key, self.ids, self.headers, self.asked = None, [5, 6, 7], {}, []
        self.answer = complete

    async def _models(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "send a valid key"}}, 401)
        return JSONResponse({"data": [{"id": "first"}, {"id": "second"}]})

    async def _tokenize(self, request):
        return JSONResponse({}, 404) if self.ids is None else JSONResponse({"tokens": self.ids})

    async def _generate(self, request):
        body = await request.json()
        self.asked.append(body)
        status, said = self.answer(body)
        if status != 200:
            return JSONResponse(said, status, self.headers)
        return StreamingResponse(iter(said), media_type="text/event-stream")

    def app(self):
        """The ASGI application."""
        generate = [
            Route(path, self._generate, methods=["POST"]) for path in ("/v1/completions", "/v1/chat/completions")
        ]
        tokenize = Route("/tokenize", self._tokenize, methods=["POST"])
        return Starlette(routes=[Route("/v1/models", self._models), tokenize, *generate])


def complete(body):
    """An answer of the length that is asked for."""
    count = body["max_tokens"]
    texts = [part(" a") for _ in range(count - 1)]
    end = event({"choices": [], "usage": usage(len(body["prompt"]), count)})
    return 200, [*texts, part(" b", "length"), end, event("[DONE]")]


@contextlib.contextmanager
def scripted_server():
    """A Scripted that is served at its url until the block ends."""
    scripted = Scripted()
    with running_app(scripted.app()) as scripted.url:
        yield scripted

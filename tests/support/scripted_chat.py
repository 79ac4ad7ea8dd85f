"""A server of the chat page whose answers a test writes, piece by piece."""

import asyncio
import json
import queue
import threading
from contextlib import contextmanager

from running import running_app
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from jfa_models.serving.app import PAGE, PAGE_HEADERS

PATIENCE = 20  # seconds that a test waits for what must come


class Reply:
    """One request for an answer, and what a test sends back."""

    def __init__(self, body: dict):
        self.body = body
        self.gone = threading.Event()  # the page has hung up
        self._loop = asyncio.get_running_loop()
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()

    def raw(self, data: bytes) -> None:
        """Sends bytes, in a chunk of their own."""
        self._loop.call_soon_threadsafe(self._out.put_nowait, data)

    def event(self, data: dict | str) -> None:
        self.raw(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())

    def write(self, content: str, name: str = "content") -> None:
        """Sends a piece of the answer, or of its reasoning."""
        self.event({"choices": [{"index": 0, "delta": {name: content}, "finish_reason": None}]})

    def close(self) -> None:
        """Ends the response, with nothing said about the answer."""
        self._loop.call_soon_threadsafe(self._out.put_nowait, None)

    def finish(self, content: str = "", tokens: int = 3, reason: str = "stop") -> None:
        """Sends the last piece, why the answer ended and how long it is."""
        self.write(content)
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
        self.event({"choices": [], "usage": usage})
        self.event("[DONE]")
        self.close()

    async def __call__(self, scope, receive, send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        hung_up = asyncio.ensure_future(receive())
        while True:
            data = asyncio.ensure_future(self._out.get())
            await asyncio.wait({data, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if hung_up.done():
                data.cancel()
                self.gone.set()
                return
            body = data.result()
            await send({"type": "http.response.body", "body": body or b"", "more_body": body is not None})
            if body is None:
                hung_up.cancel()
                return


class Chat:
    """What the server says: the models it has, the key it asks for, and what it refuses the next requests with."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        """As after the start."""
        self.models: list[dict] = [{"id": "smollm2", "parent": None, "max_model_len": 8192}]
        self.key: str | None = None
        self.refusals: list[tuple[int, str, dict[str, str]]] = []  # status, message, headers
        self._asked: queue.Queue[Reply] = queue.Queue()

    def asked(self) -> Reply:
        """The next request for an answer, to be replied to."""
        return self._asked.get(timeout=PATIENCE)

    def quiet(self) -> bool:
        """Whether every request was taken with `asked`."""
        return self._asked.empty()

    def _refusal(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "The API key is missing or wrong."}}, 401)
        return None

    async def _models(self, request):
        return self._refusal(request) or JSONResponse({"object": "list", "data": self.models})

    async def _complete(self, request):
        if refusal := self._refusal(request):
            return refusal
        if self.refusals:
            status, message, headers = self.refusals.pop(0)
            return JSONResponse({"error": {"message": message}}, status, headers)
        reply = Reply(await request.json())
        self._asked.put(reply)
        return reply

    def app(self):
        async def index(request):
            return FileResponse(PAGE / "index.html")

        app = Starlette(
            routes=[
                Route("/", index),
                Mount("/page", StaticFiles(directory=PAGE)),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ]
        )

        async def guarded(scope, receive, send):
            async def send_guarded(message):
                if message["type"] == "http.response.start":
                    headers = [(name.encode(), value.encode()) for name, value in PAGE_HEADERS.items()]
                    message = message | {"headers": [*message["headers"], *headers]}
                await send(message)

            await app(scope, receive, send_guarded)

        return guarded


@contextmanager
def scripted_chat():
    """A Chat that is served at its url until the block ends."""
    chat = Chat()
    with running_app(chat.app()) as url:
        chat.url = f"{url}/"
        yield chat

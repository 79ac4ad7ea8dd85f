"""A client of servers with OpenAI's protocol, whose answers are streams of server-sent events.

The time is taken in the call that brings the bytes, before they are looked at. Of HTTP/1.1 only what such an answer
needs is read here, since a library would take longer for a token than all the rest.
"""

import asyncio
import contextlib
import http.client
import json
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from .latencies import Answer

TIMEOUT = 600.0  # seconds without a byte, after which an answer has failed
LONGEST_WAIT = 60.0  # seconds before a request is sent again, whatever Retry-After says

FAULTS = (OSError, http.client.HTTPException, ValueError)  # of a server, or of what it sends


class HttpError(ValueError):
    """An answer that is an error."""

    def __init__(self, status: int, body: bytes):
        super().__init__(f"HTTP {status}: {_message(body)}")
        self.status = status


class Client:
    """Requests to one server. base_url: without /v1."""

    def __init__(self, base_url: str, headers: Mapping[str, str], *, clock: Callable[[], float] = time.perf_counter):
        """
        Raises:
          ValueError: base_url is not a URL of a server.
        """
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not the URL of a server, such as http://127.0.0.1:8000")
        self.base_url, self.clock = base_url.rstrip("/"), clock
        self._host, self._path, self._netloc = parts.hostname, parts.path.rstrip("/"), parts.netloc
        self._is_secure = parts.scheme == "https"
        self._port = parts.port or (443 if self._is_secure else 80)
        self._headers = {"content-type": "application/json", **headers}

    def json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a path answers with; body: to post.

        Raises:
          HttpError: the status is not 200.
          ValueError: there is no such server, or its answer is not JSON.
        """
        try:
            with contextlib.closing(self._connect()) as connection:
                data = None if body is None else json.dumps(body).encode()
                connection.request("GET" if data is None else "POST", self._path + path, data, self._headers)
                response = connection.getresponse()
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"no server answers at {self.base_url}: {error or type(error).__name__}") from None
        if response.status != 200:
            raise HttpError(response.status, content)
        try:
            return json.loads(content)
        except ValueError:
            raise ValueError(f"{self.base_url}{path} does not answer with JSON: {content[:60]!r}") from None

    async def stream(self, path: str, body: bytes, *, retries: bool = False) -> Answer:
        """Sends a request and reads its answer. retries: send it again after status 429, when the server says."""
        answer = Answer()
        try:
            while (wait := await self._try(path, body, answer)) is not None and retries:
                answer.num_retries += 1
                await asyncio.sleep(wait)
            if wait is not None:
                answer.is_refused, answer.error = True, "HTTP 429"
        except FAULTS as error:
            answer.error = str(error) or type(error).__name__
        return answer

    async def _try(self, path: str, body: bytes, answer: Answer) -> float | None:
        """Sends a request and reads its answer; after status 429 returns the seconds to wait."""
        lines = [f"POST {self._path}{path} HTTP/1.1", f"host: {self._netloc}", "connection: close"]
        lines += [f"content-length: {len(body)}", *(f"{name}: {value}" for name, value in self._headers.items())]
        request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        transport, exchange = await asyncio.get_running_loop().create_connection(
            lambda: _Exchange(request, answer, self.clock), self._host, self._port, ssl=self._is_secure or None
        )
        try:
            return await asyncio.wait_for(exchange.result, TIMEOUT)
        finally:
            transport.abort()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=TIMEOUT)


class _Exchange(asyncio.Protocol):
    """A request and its answer, on a connection of its own that the server closes.

    Attributes:
      result: when the answer has ended: None, or after status 429 the seconds to wait.
    """

    def __init__(self, request: bytes, answer: Answer, clock: Callable[[], float]):
        self.result: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._request, self._answer, self._clock = request, answer, clock
        self._reply = Reply()
        self._stream = Stream(answer)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._answer.num_retries:
            self._answer.sent = self._clock()
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        try:
            body = self._reply.take(data)
            if self._reply.status == 200 and not self.result.done() and self._stream.take(body, now):
                self._end()
        except FAULTS as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def _end(self, error: Exception | None = None) -> None:
        if self.result.done():
            return
        wait, reply = None, self._reply
        try:
            if error is not None:
                raise error
            if reply.status == 429:
                wait = min(reply.retry_after, LONGEST_WAIT)
            elif reply.status != 200:
                raise HttpError(reply.status, reply.body) if reply.status else ValueError("the server hung up")
            else:
                self._stream.check()
        except FAULTS as failure:
            self.result.set_exception(failure)
        else:
            self.result.set_result(wait)


class Reply:
    """Reads the status and the body of an HTTP/1.1 response from the pieces in which it arrives.

    Attributes:
      status: 0 before its head has arrived.
      retry_after: seconds. body: what has arrived, unless the status is 200.
    """

    def __init__(self) -> None:
        self.status, self.retry_after, self.body = 0, 1.0, b""
        self._is_chunked = False
        self._rest = b""

    def take(self, piece: bytes) -> bytes:
        """Adds a piece; returns the part of the body that it completes.

        Raises:
          ValueError: this is not HTTP.
        """
        self._rest += piece
        if not self.status:
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return b""
            first, *lines = head.decode("latin-1").split("\r\n")
            if not re.match(r"HTTP/1\.\d \d{3}", first):
                raise ValueError(f"the answer is not HTTP/1.1: {first[:60]!r}")
            fields = {name.lower(): value.strip().lower() for name, _, value in (line.partition(":") for line in lines)}
            self._is_chunked = "chunked" in fields.get("transfer-encoding", "")
            given = fields.get("retry-after", "")
            self.retry_after = float(given) if given.isdecimal() else self.retry_after
            self.status, self._rest = int(first[9:12]), rest
        body = self._chunks() if self._is_chunked else self._rest
        self._rest = self._rest if self._is_chunked else b""
        self.body += b"" if self.status == 200 else body
        return body

    def _chunks(self) -> bytes:
        """The data of the chunks that are complete."""
        found = []
        while (at := self._rest.find(b"\r\n")) >= 0:
            end = at + 2 + int(self._rest[:at].partition(b";")[0], 16)
            if len(self._rest) < end + 2:
                break
            found.append(self._rest[at + 2 : end])
            self._rest = self._rest[end + 2 :]
        return b"".join(found)


class Stream:
    """Reads the events of an answer from the pieces in which they arrive."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._rest = b""
        self._data: list[bytes] = []
        self._is_finished = False

    def take(self, piece: bytes, now: float) -> bool:
        """Adds a piece that has arrived now; returns whether the stream has ended.

        Raises:
          ValueError: the server reports an error, or sends something else than JSON.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                if data.strip() == b"[DONE]":
                    return True
                self._event(data, now)
        return False

    def check(self) -> None:
        """
        Raises:
          ValueError: the answer is not complete.
        """
        if not self._is_finished:
            raise ValueError("the stream ended without finish_reason")
        if not self._answer.times:
            raise ValueError("the stream has no token")

    def _event(self, data: bytes, now: float) -> None:
        try:
            event = dict(json.loads(data))
        except (ValueError, TypeError):
            raise ValueError(f"the stream has an event that is no JSON object: {data[:60]!r}") from None
        if event.get("error"):
            raise ValueError(f"error in the stream: {_message(data)}")
        answer = self._answer
        if usage := event.get("usage"):
            answer.input_tokens, answer.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        for choice in (event.get("choices") or ())[:1]:
            answer.end = now
            if _has_token(choice):
                answer.times.append(now)
            self._is_finished |= choice.get("finish_reason") is not None


def _has_token(choice: Mapping[str, Any]) -> bool:
    """Whether a choice brings a token: every one of a completion, since a token may be without text; in a chat those
    with anything else than a role."""
    delta = choice.get("delta")
    return delta is None or any(value for name, value in delta.items() if name != "role")


def _message(body: bytes) -> str:
    """What an error says, in one line."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:200]


async def load(
    send: Callable[[int], Awaitable[Answer]],
    arrivals: Sequence[float],
    *,
    max_concurrency: int | None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Answer], float]:
    """Awaits send(i) from arrivals[i] on, in seconds from now; returns the answers, and the seconds until the last.

    max_concurrency: the most calls at a time; others wait, and are not yet sent.
    """
    room = asyncio.Semaphore(max_concurrency or len(arrivals))

    async def one(index: int) -> Answer:
        async with room:
            return await send(index)

    start, tasks = clock(), []
    for index, at in enumerate(arrivals):
        if (wait := start + at - clock()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(index)))
    answers = await asyncio.gather(*tasks)
    return answers, clock() - start

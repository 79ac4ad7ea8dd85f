"""The HTTP application: routes, the limits that hold before a request reaches the engine, and how answers are sent."""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.metadata
import logging
import re
import time
import traceback
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jfa_models.decoding.language_model import LanguageModel
from jfa_models.serving import schema
from jfa_models.serving.chat import ChatReply, prompt_of
from jfa_models.serving.completions import CompletionReply
from jfa_models.serving.errors import ApiError
from jfa_models.serving.metrics import CONTENT_TYPE, Metrics
from jfa_models.serving.openapi import description
from jfa_models.serving.replies import Reply
from jfa_models.serving.responses import ResponsesReply
from jfa_models.serving.runner import Runner, Ticket

log = logging.getLogger("jfa.serving")
PAGE = Path(__file__).parent / "page"
# what anyone may read: probes of a balancer, and the page, which asks for the key
_OPEN = re.compile(r"/|/health|/ready|/page/[\w.]+|/favicon\.ico")
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows.

    Attributes:
      names: by which requests may name the model; the first one is shown.
      keys: one of them must be given as a bearer token; none: anyone may ask.
      hosts: the host names by which the server may be called; none: any.
      origins: of pages in browsers that may read answers; "*" for all.
      adapter_root: adapters are loaded by request from folders under it; None: never.
      max_body: bytes. body_timeout: seconds for a body to arrive.
      stall_timeout: seconds after which a connection that reads nothing is closed.
      max_sequences: of one request: its prompts times n.
      max_stops: stop strings of one request. max_grammar: characters of a grammar or schema.
      ignore_unknown: leave out unknown fields.
      log_prompts: write prompts and answers to the log.
      chat_template: instead of the model's.
    """

    names: Sequence[str]
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    adapter_root: Path | None = None
    max_body: int = 16 * 2**20
    body_timeout: float = 30.0
    stall_timeout: float = 60.0
    max_sequences: int = 256
    max_stops: int = 16
    max_grammar: int = 64 * 2**10
    ignore_unknown: bool = False
    log_prompts: bool = False
    chat_template: str | None = None


class Server:
    """The endpoints of one engine."""

    def __init__(self, runner: Runner, settings: Settings, metrics: Metrics):
        """
        Raises:
          ValueError: an adapter has the name of the model.
        """
        self.runner, self.settings, self.metrics = runner, settings, metrics
        self.model = runner.engine.model
        if taken := [name for name in settings.names if name in self.model.adapters.names]:
            raise ValueError(f"{taken[0]!r} is the name of the model and of an adapter: give one of them another name")
        self.created = int(time.time())
        self.cut: Callable[[Scope], None] = lambda scope: None  # closes a connection at once

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self._page),
            Route("/page/{file}", self._page),
            Route("/favicon.ico", self._no_icon),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.openapi),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self._generating(schema.CompletionRequest, CompletionReply), methods=["POST"]),
            Route("/v1/chat/completions", self._generating(schema.ChatRequest, self._chat), methods=["POST"]),
            Route("/v1/responses", self._generating(schema.ResponsesRequest, self._responses), methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
        ]
        middleware = [Middleware(_Front, settings=self.settings)]
        if self.settings.origins:
            cors = Middleware(
                CORSMiddleware,
                allow_origins=list(self.settings.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-request-id"],
            )
            middleware.insert(0, cors)
        return Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={HTTPException: _http_error, ApiError: _api_error},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.runner.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.runner.stop)

    # Generating.

    def _chat(self, body: schema.ChatRequest, name: str, id: str, model: LanguageModel) -> ChatReply:
        return ChatReply(body, name, id, model, self.settings.chat_template)

    def _responses(self, body: schema.ResponsesRequest, name: str, id: str, model: LanguageModel) -> ResponsesReply:
        return ResponsesReply(body, name, id, model, self.settings.chat_template)

    def _generating(self, kind: type[schema.Sampling], reply_of: Callable[..., Reply]) -> Callable:
        async def endpoint(request: Request) -> "_Answer":
            body = await self._body(request, kind)
            adapter = self._adapter(body.model)
            self._check(body)
            id = uuid.uuid4().hex
            name = body.model or self.settings.names[0]
            reply = await self.runner.prepare(lambda: reply_of(body, name, id, self.model))
            if (count := len(reply.prompts) * reply.params.n) > self.settings.max_sequences:
                raise ApiError(
                    400, f"{count} sequences are more than {self.settings.max_sequences}, the limit of a request"
                )
            if body.timeout is not None and body.timeout <= 0:
                raise ApiError(400, f"timeout must be more than 0 seconds, got {body.timeout}", param="timeout")
            submitted = self.runner.submit(
                id, reply.prompts, reply.params, priority=body.priority, adapter=adapter, timeout=body.timeout
            )
            return _Answer(self, reply, submitted, request.state.record)

        return endpoint

    def _check(self, body: Any) -> None:
        stops = getattr(body, "stop", None)
        if isinstance(stops, list) and len(stops) > self.settings.max_stops:
            raise ApiError(400, f"stop has {len(stops)} strings, more than {self.settings.max_stops}", param="stop")
        for name in ("structured_outputs", "response_format", "tools", "text"):
            given = getattr(body, name, None)
            if given is not None and (size := len(msgspec.json.encode(given))) > self.settings.max_grammar:
                raise ApiError(
                    400, f"{name} has {size} bytes, more than {self.settings.max_grammar}", param=name, code="too_large"
                )

    def _adapter(self, name: str | None) -> str | None:
        """The adapter that a request names as its model; None: the model itself."""
        if name is None or name in self.settings.names:
            return None
        if name in self.model.adapters.names:
            return name
        known = ", ".join((*self.settings.names, *self.model.adapters.names))
        raise ApiError(404, f"there is no model {name!r}; there is {known}", param="model", code="model_not_found")

    async def _body[T: schema.Body](self, request: Request, kind: type[T]) -> T:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send JSON, with the header content-type: application/json")
        body = bytearray()

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > self.settings.max_body:
                    raise ApiError(413, f"the body has more than {self.settings.max_body} bytes", code="too_large")

        try:
            await asyncio.wait_for(read(), self.settings.body_timeout)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.settings.body_timeout:g} s") from None
        if self.settings.log_prompts:
            request.state.record["body"] = body.decode(errors="replace")
        return schema.decode(kind, bytes(body), ignore_unknown=self.settings.ignore_unknown)

    # What is not generated.

    async def models(self, request: Request) -> Response:
        """The model and its adapters."""
        names = [*self.settings.names, *self.model.adapters.names]
        return _json({"object": "list", "data": [self._described(name) for name in names]})

    async def one_model(self, request: Request) -> Response:
        """One of the models."""
        name = request.path_params["name"]
        self._adapter(name)
        return _json(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        root = self.settings.names[0]
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "jfa",
            "root": root if name in self.settings.names else name,
            "parent": None if name in self.settings.names else root,
            "max_model_len": self.runner.engine.max_model_len,
        }

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text, or of messages."""
        body = await self._body(request, schema.TokenizeRequest)
        self._adapter(body.model)
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise ApiError(400, "this model has no tokenizer")
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")

        def encode() -> list[int]:
            adds = body.add_special_tokens
            if body.prompt is not None:
                return tokenizer.encode(body.prompt, add_special_tokens=adds is not False)
            template = self.settings.chat_template or tokenizer.chat_templates.get("default", "")
            text = prompt_of(body, tokenizer, self.settings.chat_template, template)
            return tokenizer.encode(text, add_special_tokens=bool(adds))

        ids = await self.runner.prepare(encode)
        texts = [tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        longest = self.runner.engine.max_model_len
        return _json({"tokens": ids, "count": len(ids), "max_model_len": longest, "token_strs": texts})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await self._body(request, schema.DetokenizeRequest)
        self._adapter(body.model)
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise ApiError(400, "this model has no tokenizer")
        size = self.model.config.vocab_size
        if wrong := [token for token in body.tokens if not 0 <= token < size]:
            raise ApiError(400, f"token ids must be 0 to {size - 1}, got {wrong[0]}", param="tokens")
        text = await self.runner.prepare(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return _json({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """The special tokens and the chat template, under the names of tokenizer_config.json."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise ApiError(404, "this model has no tokenizer")
        template = self.settings.chat_template or tokenizer.chat_templates.get("default")
        return _json({**tokenizer.special_tokens, "chat_template": template})

    async def load_adapter(self, request: Request) -> Response:
        """Loads an adapter from a folder under the adapter root."""
        body = await self._body(request, schema.LoadAdapterRequest)
        root = self.settings.adapter_root
        if root is None:
            raise ApiError(
                403, "this server loads no adapters by request: start it with --adapter-root", code="forbidden"
            )
        if body.lora_name in self.settings.names:
            raise ApiError(400, f"{body.lora_name!r} is the name of the model itself", param="lora_name")
        path = (root / body.lora_path).resolve()
        if not path.is_relative_to(root.resolve()) or not path.is_dir():
            raise ApiError(404, f"there is no folder {body.lora_path!r} under the adapter root", param="lora_path")
        try:
            await asyncio.to_thread(self.model.load_adapter, body.lora_name, path)
        except ValueError as error:
            raise ApiError(400, str(error).replace(str(path), body.lora_path), param="lora_path") from None
        return _json({"loaded": body.lora_name})

    async def unload_adapter(self, request: Request) -> Response:
        """Unloads an adapter; requests that use it go on."""
        body = await self._body(request, schema.UnloadAdapterRequest)
        if self.settings.adapter_root is None:
            raise ApiError(
                403, "this server unloads no adapters by request: start it with --adapter-root", code="forbidden"
            )
        try:
            await asyncio.to_thread(self.model.unload_adapter, body.lora_name)
        except ValueError as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
        return _json({"unloaded": body.lora_name})

    async def health(self, request: Request) -> Response:
        """Whether the engine runs."""
        runner = self.runner
        state = {"status": "ok", "resets": runner.num_resets, "last_failure": runner.last_failure}
        if runner.problem is not None:
            return _json(state | {"status": "failed", "problem": runner.problem}, 503)
        return _json(state)

    async def ready(self, request: Request) -> Response:
        """Whether a request would run now."""
        if self.runner.is_ready:
            return _json({"status": "ready"})
        why = "shutting down" if self.runner.is_draining else self.runner.problem or "compiling"
        return _json({"status": why}, 503)

    async def version(self, request: Request) -> Response:
        """The version of jfa."""
        return _json({"version": importlib.metadata.version("jfa")})

    async def show_metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(await asyncio.to_thread(self.metrics.text), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """What this server takes."""
        return _json(description())

    async def _page(self, request: Request) -> Response:
        path = PAGE / request.path_params.get("file", "index.html")
        if path.parent != PAGE or not path.is_file():
            raise HTTPException(404)
        return FileResponse(path, headers=PAGE_HEADERS)

    async def _no_icon(self, request: Request) -> Response:
        return Response(status_code=204)


class _Answer(Response):
    """Sends what a request becomes. When its client goes away, the engine stops within a step."""

    def __init__(self, server: Server, reply: Reply, submitted: Awaitable[Ticket], record: dict[str, Any]):
        self._server, self._reply, self._submitted, self._record = server, reply, submitted, record
        self.background = None
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.ensure_future(self._run(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self._record["client"] = "gone"
                return
            try:
                await answer
            except TimeoutError:
                self._record["client"] = "stalled"
                self._server.cut(scope)
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _run(self, send: Send) -> None:
        try:
            ticket = await self._submitted
        except ApiError as error:
            await self._send_json(send, error.body, error)
            return
        try:
            await (self._stream if self._reply.request.stream else self._whole)(ticket, send)
        except ApiError as error:
            self._record["error"] = error.message
            if not self._begun:
                await self._send_json(send, error.body, error)
                return
            for data in self._reply.failed(error):
                await self._part(send, data)
            await self._part(send, b"", more=False)
        finally:
            self._record |= {"tokens": [_counts(one) for one in ticket.latest]}
            if self._server.settings.log_prompts:
                self._record["answers"] = [[o.text for o in one.outputs] for one in ticket.latest if one is not None]
            self._server.runner.cancel(ticket)

    async def _whole(self, ticket: Ticket, send: Send) -> None:
        results = await ticket.results()
        await self._send_json(send, self._reply.whole(results))

    async def _stream(self, ticket: Ticket, send: Send) -> None:
        async for changes in ticket.changes():
            parts = [] if self._begun else [*self._reply.opening()]
            for place, result in changes:
                parts += self._reply.grown(place, result)
            if ticket.is_done and ticket.error is None:
                parts += self._reply.end([one for one in ticket.latest if one is not None])
            if parts:
                await self._part(send, b"".join(parts))
        await self._part(send, b"", more=False)

    async def _part(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            headers["x-accel-buffering"] = "no"  # nginx would collect the parts
            await send(_start(200, headers))
        await asyncio.wait_for(
            send({"type": "http.response.body", "body": data, "more_body": more}),
            self._server.settings.stall_timeout,
        )

    async def _send_json(self, send: Send, data: Any, error: ApiError | None = None) -> None:
        response = _json(data) if error is None else _error(error)
        self._begun = True
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body})


class _Front:
    """Around all routes: who may ask, and a line in the log for each request."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        id = given if re.fullmatch(r"[\w.:-]{1,128}", given) else uuid.uuid4().hex
        record: dict[str, Any] = {"id": id, "method": scope["method"], "path": urllib.parse.quote(scope["path"])}
        scope.setdefault("state", {})["record"] = record

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", id.encode())]}
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self._app(scope, receive, send_marked)
        except ApiError as error:
            await _error(error)(scope, receive, send_marked)
        except (ClientDisconnect, ConnectionError):
            record["client"] = "gone"
        except Exception as error:
            log.error("%s: %s", id, error, extra={"traceback": traceback.format_exc()})
            record["error"] = type(error).__name__
            if status:
                raise  # too late for an answer: the connection is cut
            failed = ApiError(500, f"the server failed; its log has the request {id}", kind="server_error")
            await _error(failed)(scope, receive, send_marked)
        finally:
            record |= {"status": status, "seconds": round(time.perf_counter() - start, 3)}
            log.info("request", extra={"record": record})

    def _check(self, path: str, headers: dict[str, str]) -> None:
        if self._settings.hosts:
            host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
            if host not in self._settings.hosts:
                raise ApiError(421, f"this server is not called {host!r}: start it with --allowed-host {host}")
        if not self._settings.keys or _OPEN.fullmatch(path):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        # all are compared, in a time that does not depend on what they have in common
        is_right = [hmac.compare_digest(given, known.encode()) for known in self._settings.keys]
        if kind.lower() != "bearer" or not any(is_right):
            raise ApiError(
                401,
                "send a valid key as Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
            )


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _counts(result: Any) -> dict[str, Any] | None:
    if result is None:
        return None
    generated = sum(len(one.token_ids) for one in result.outputs)
    return {"prompt": len(result.prompt_token_ids), "generated": generated}


def _json(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")


def _start(status: int, headers: dict[str, str]) -> Message:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _error(error: ApiError) -> Response:
    response = _json(error.body, error.status)
    if error.retry_after is not None:
        response.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error(ApiError(404, f"there is no {request.url.path}; /openapi.json lists what there is"))
    response = _error(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
    response.headers.update(error.headers or {})
    return response

"""The engine on a thread of its own, and the event loop's view of the requests in it.

Results are cumulative, so only the newest one of a request is kept: a client that reads slowly gets fewer and longer
pieces, and neither memory nor other requests depend on it.
"""

import asyncio
import concurrent.futures
import contextlib
import ctypes
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.prompts import Prompt
from jfa_models.engine import Engine
from jfa_models.serving.errors import ApiError, unavailable
from jfa_models.serving.schema import check_field

log = logging.getLogger("jfa.serving")
_LONGEST_STEP = 3.0  # seconds to wait for at the end
_LONGEST_WAIT = 60  # seconds to advise: OpenAI's clients do not retry after more than 120


class Ticket:
    """The prompts of one HTTP request, and their newest results. Used on the event loop only.

    Attributes:
      latest: the newest result of each prompt; None before its first token.
      error: why it failed; nothing follows.
    """

    def __init__(self, id: str, num_prompts: int, num_sequences: int):
        self.id = id
        self.num_sequences = num_sequences
        self.latest: list[RequestOutput | None] = [None] * num_prompts
        self.error: ApiError | None = None
        self.is_cancelled = False
        self.arrival = time.monotonic()
        self._grown: dict[int, None] = {}
        self._wake = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether nothing follows."""
        return self.error is not None or all(one is not None and one.finished for one in self.latest)

    @property
    def has_begun(self) -> bool:
        """Whether it has a first token."""
        return any(one is not None for one in self.latest)

    def grow(self, place: int, output: RequestOutput) -> None:
        """Takes the newest result of a prompt."""
        self.latest[place] = output
        self._grown[place] = None
        if (failed := next((one for one in output.outputs if one.finish_reason == "error"), None)) is not None:
            self.fail(ApiError(500, output.error or f"choice {failed.index} failed", kind="server_error"))
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        """Ends it with an error, unless it has ended."""
        if not self.is_done:
            self.error = error
            self._wake.set()

    async def changes(self) -> AsyncIterator[list[tuple[int, RequestOutput]]]:
        """The results that have grown since the last ones, until all are finished.

        Raises:
          ApiError: it failed.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self.error is not None:
                raise self.error
            grown, self._grown = self._grown, {}
            is_done = self.is_done
            yield [(place, output) for place in sorted(grown) if (output := self.latest[place]) is not None]
            if is_done:
                return

    async def results(self) -> list[RequestOutput]:
        """The results of all prompts when they have finished."""
        async for _ in self.changes():
            pass
        return [one for one in self.latest if one is not None]


class Runner:
    """Runs an engine on a thread, takes requests from an event loop, and brings results back to it.

    Attributes:
      problem: why the engine cannot run; None: it can.
      num_resets: how often it was reset after a failed step; last_failure: the cause of the last one.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_num_seqs: int,
        max_waiting: int,
        timeout: float,
        warm_up: Sequence[SamplingParams] = (),
        prepare_timeout: float = 10.0,
        on_end: Callable[[Ticket], None] = lambda ticket: None,
        on_failure: Callable[[str], None] | None = None,
    ):
        """
        Args:
          max_num_seqs: of the engine.
          max_waiting: sequences that may wait behind those; more are refused.
          timeout: seconds after which a request is ended.
          warm_up: parameters for which the engine is warmed up before it takes requests.
          prepare_timeout: seconds for a template, a prompt's tokens and a grammar.
          on_end: called on the event loop when a request has ended in any way.
          on_failure: called with the cause if a step failed; None: the engine is reset, and all requests end.
        """
        self.engine = engine
        self.max_num_seqs, self.max_waiting, self.timeout = max_num_seqs, max_waiting, timeout
        self.prepare_timeout = prepare_timeout
        self.problem: str | None = None
        self.num_resets = 0
        self.last_failure: str | None = None
        self.is_draining = False
        self._warm_up = warm_up
        self._on_end, self._on_failure = on_end, on_failure
        self._tickets: dict[str, Ticket] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._ready = asyncio.Event()
        self._seconds = 1.0  # of a request, a moving mean
        self._grown: dict[str, RequestOutput] = {}  # within a step
        self._aborts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._work = threading.Event()
        self._stopped = False
        self._threads = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="jfa-prepare")
        self._thread = threading.Thread(target=self._run, name="jfa-engine", daemon=True)

    # On the event loop.

    def start(self) -> None:
        """Starts the thread, which first compiles what the requests will need."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that runs; a step that takes long is not waited for."""
        self._stopped = True
        self._work.set()
        self._thread.join(_LONGEST_STEP)
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; it may still do after stop, for example while it compiles."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether requests run at once."""
        return self._ready.is_set() and not self.is_draining and self.problem is None

    async def wait_until_ready(self) -> None:
        """Returns when the engine is warm."""
        await self._ready.wait()

    @property
    def num_sequences(self) -> int:
        """Sequences that run or wait."""
        return sum(ticket.num_sequences for ticket in self._tickets.values())

    async def prepare[T](self, function: Callable[[], T]) -> T:
        """Calls a function that may take long on another thread, and stops it after prepare_timeout.

        Raises:
          ApiError: it took too long or raised ValueError.
        """

        def limited() -> T:
            with _time_limit(self.prepare_timeout):
                return function()

        try:
            # the second limit is for what does not run in Python, which no exception reaches
            return await asyncio.wait_for(self._loop.run_in_executor(self._threads, limited), self.prepare_timeout + 1)
        except TimeoutError:
            raise ApiError(
                400, f"the prompt or its grammar took more than {self.prepare_timeout:g} s to prepare; simplify it"
            ) from None
        except ValueError as error:
            raise check_field(error) from None

    async def submit(
        self,
        id: str,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
        timeout: float | None = None,
    ) -> Ticket:
        """Gives prompts to the engine.

        Raises:
          ApiError: the queue is full, the server compiles, ends or has failed, or the engine refuses a prompt.
        """
        self._check_room()
        ticket = Ticket(id, len(prompts), len(prompts) * params.n)
        self._tickets[id] = ticket
        self._idle.clear()
        seconds = self.timeout if timeout is None else min(timeout, self.timeout)
        self._timers[id] = self._loop.call_later(seconds, self._expire, ticket, seconds)
        try:
            await self.prepare(lambda: self._add(ticket, prompts, params, priority, adapter))
        except BaseException as error:  # cancelled, too
            self.cancel(ticket)
            if isinstance(error, RuntimeError):  # a step has just failed
                raise ticket.error or unavailable(f"the engine cannot take requests: {error}") from None
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request within a step, if it runs; nothing follows."""
        if self._tickets.pop(ticket.id, None) is None:
            return
        ticket.is_cancelled = True
        self._timers.pop(ticket.id).cancel()
        is_done = ticket.is_done and ticket.error is None
        if not is_done:
            for place in range(len(ticket.latest)):
                self._aborts.put(_engine_id(ticket, place))
            self._work.set()
        if not self._tickets:
            self._idle.set()
        self._seconds += 0.1 * (time.monotonic() - ticket.arrival - self._seconds)
        self._on_end(ticket)

    async def drain(self, grace: float) -> None:
        """Refuses new requests and those that wait, and lets the others finish for `grace` seconds."""
        self.is_draining = True
        room = self.max_num_seqs
        for ticket in sorted(self._tickets.values(), key=lambda one: (not one.has_begun, one.arrival)):
            if not ticket.has_begun and room <= 0:
                ticket.fail(unavailable("the server is shutting down"))
            room -= ticket.num_sequences
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)
        for ticket in list(self._tickets.values()):
            ticket.fail(unavailable(f"the server shut down before the answer was complete, after {grace:g} s of grace"))

    def _check_room(self) -> None:
        if self.is_draining:
            raise unavailable("the server is shutting down")
        if not self._ready.is_set():
            raise unavailable("the server compiles; /ready tells when it is done")
        if self.problem is not None:
            raise unavailable(self.problem)
        waiting = self.num_sequences - self.max_num_seqs
        if waiting >= self.max_waiting:
            rounds = (waiting + self.max_num_seqs) / self.max_num_seqs
            raise ApiError(
                429,
                f"{self.max_num_seqs} sequences run and {waiting} wait, which is the limit; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=min(_LONGEST_WAIT, max(1, math.ceil(self._seconds * rounds / 2))),
            )

    def _expire(self, ticket: Ticket, seconds: float) -> None:
        ticket.fail(ApiError(504, f"the request took more than {seconds:g} s", kind="server_error", code="timeout"))

    def _deliver(self, grown: Mapping[str, RequestOutput]) -> None:
        for engine_id, output in grown.items():
            id, _, place = engine_id.rpartition(":")
            if (ticket := self._tickets.get(id)) is not None:
                ticket.grow(int(place), output)

    def _fail(self, tickets: Sequence[Ticket], error: ApiError) -> None:
        for ticket in tickets:
            ticket.fail(error)

    # On other threads.

    def _add(
        self, ticket: Ticket, prompts: Sequence[Prompt], params: SamplingParams, priority: int, adapter: str | None
    ) -> None:
        for place, prompt in enumerate(prompts):
            self.engine.add_request(
                prompt,
                params,
                request_id=_engine_id(ticket, place),
                priority=priority,
                adapter=adapter,
                on_output=self._collect,
            )
        if ticket.is_cancelled or ticket.error is not None:  # in the meantime
            for place in range(len(prompts)):
                self._aborts.put(_engine_id(ticket, place))
        self._work.set()

    def _collect(self, output: RequestOutput) -> None:
        assert output.request_id is not None
        self._grown[output.request_id] = output

    def _run(self) -> None:
        try:
            if self._warm_up:
                self.engine.warm_up(self._warm_up)
        except Exception as error:
            self._recover(error)
        self._loop.call_soon_threadsafe(self._ready.set)
        while not self._stopped:
            while not self._aborts.empty():
                self.engine.abort(self._aborts.get())
            if not self.engine.has_unfinished:
                self._work.wait()
                self._work.clear()
                continue
            try:
                for output in self.engine.step():
                    self._collect(output)
            except Exception as error:  # out of memory, a broken device, a fault of ours
                self._recover(error)
            if self._grown:
                grown, self._grown = self._grown, {}
                self._loop.call_soon_threadsafe(self._deliver, grown)

    def _recover(self, error: Exception) -> None:
        """Ends all requests and resets the engine, until that succeeds."""
        cause = f"{type(error).__name__}: {error}"
        log.error("a step failed, all requests end: %s", cause, extra={"traceback": traceback.format_exc()})
        if self._on_failure is not None:
            self._on_failure(cause)
        failed = ApiError(500, f"a step of the engine failed: {cause}", kind="server_error", code="step_failed")
        while not self._stopped:
            self._grown = {}
            self._loop.call_soon_threadsafe(self._fail, list(self._tickets.values()), failed)
            try:
                self.engine.reset()
            except Exception as again:
                self.problem = f"the engine failed and cannot be reset: {type(again).__name__}: {again}"
                log.error("%s", self.problem)
                time.sleep(1.0)
            else:
                self.problem, self.last_failure = None, cause
                self.num_resets += 1
                return


def _engine_id(ticket: Ticket, place: int) -> str:
    return f"{ticket.id}:{place}"


class _TooLong(BaseException):  # not an Exception: a template's errors are caught
    pass


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends Python code of this thread after some time, with TimeoutError."""
    thread, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()
    is_over = False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TooLong))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                is_over = True
            timer.cancel()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # if it is not raised yet
    except _TooLong:
        raise TimeoutError from None

"""Several engines that share the requests, each on its own devices: data parallelism."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.prompts import Prompt
from jfa_models.engine.engine import Engine, EngineMetrics, Params
from jfa_models.engine.request import OnOutput


class Replicas:
    """Engines that are called as one. A request runs where the fewest are unfinished; its tokens do not depend on it.

    Steps of all engines are launched one after another, and their devices compute at the same time.

    Attributes:
      model: that of the first engine.
    """

    def __init__(self, model: LanguageModel, **options: Any):
        """One engine for each of model.replicas(); options: see Engine, num_pages is of each one."""
        self.model = model
        self._engines = [Engine(one, **options) for one in model.replicas()]
        self._numbers = itertools.count()
        self._places: dict[str, Engine] = {}  # of unfinished requests
        self._ended: list[RequestOutput] = []

    def add_request(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        number: int | None = None,
        on_output: OnOutput | None = None,
        adapter: str | None = None,
    ) -> str:
        """Queues a prompt and returns the request's id. Arguments and errors: see Engine.add_request."""
        count = next(self._numbers)
        if request_id is not None and request_id in self._places:
            raise ValueError(f"request id {request_id!r} is in use; wait for that request or choose another id")
        name = f"request-{count}" if request_id is None else request_id
        while name in self._places:
            name += "+"
        number = count if number is None else number
        held = list(self._places.values())
        engine = min(self._engines, key=held.count)
        options: dict[str, Any] = dict(priority=priority, number=number, on_output=on_output, adapter=adapter)
        self._places[name] = engine
        try:
            return engine.add_request(prompt, params, request_id=name, **options)
        except BaseException:
            del self._places[name]
            raise

    def abort(self, request_id: str) -> None:
        """Ends a request in any state with finish_reason "abort"; a finished one is unchanged."""
        if (engine := self._places.get(request_id)) is not None:
            engine.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request is unfinished, so that step has something to do."""
        return any(engine.has_unfinished for engine in self._engines)

    def step(self) -> list[RequestOutput]:
        """A step of each engine that has something to do; returns the requests that finished since the last call."""
        for engine in self._engines:
            if engine.has_unfinished:
                self._ended += engine.step()  # kept, should the step of another engine fail
        ended, self._ended = self._ended, []
        for result in ended:
            self._places.pop(result.request_id or "", None)
        return ended

    def run(self) -> Iterator[RequestOutput]:
        """Steps until all requests have finished; yields each one when it finishes."""
        while self.has_unfinished or self._ended:
            yield from self.step()

    def reset(self) -> None:
        """Drops all requests and empties the caches. Call this after an interrupted step."""
        self._places.clear()
        self._ended.clear()
        for engine in self._engines:
            engine.reset()

    def warm_up(self, params: Sequence[Params] = ()) -> None:
        """Compiles all steps that any mixture of requests with these params needs, on the devices of each engine."""
        for engine in self._engines:
            engine.warm_up(*([params] if params else ()))

    def metrics(self) -> list[EngineMetrics]:
        """The current metrics of each engine."""
        return [engine.metrics() for engine in self._engines]


def engine_of(model: LanguageModel, **options: Any) -> Engine | Replicas:
    """An Engine, or Replicas if the model's mesh has an axis "data". options: see Engine."""
    return Replicas(model, **options) if model.partition.others else Engine(model, **options)

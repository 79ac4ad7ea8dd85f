"""What the first of several processes tells the others, so that the engines of all run the same schedule.

Only the first takes requests. Before each step it tells which requests are new and which end: one line of JSON, a few
bytes for each token of a new prompt. All else follows from that in every process, so the steps need nothing more.
"""

import dataclasses
import json
import secrets
import socket
from collections.abc import Sequence
from typing import Any

from jfa_models import processes
from jfa_models.decoding.params import BeamSearchParams, SamplingParams
from jfa_models.engine.engine import Abort, Engine
from jfa_models.engine.request import Request
from jfa_models.text.structured import StructuredOutputsParams

PATIENCE = 60.0  # seconds that processes wait for each other at the start


class Leader:
    """The engine of the first process, which the others follow.

    Attributes:
      num_bytes: sent to each of them so far.
    """

    def __init__(self, engine: Engine, host: str):
        """host: the name or address of this machine that the others reach. All processes must call this or follow."""
        self.engine, self.num_bytes = engine, 0
        self._others = others(host)
        engine.on_received = lambda received: self._tell("step", [_described(one) for one in received])

    def warm_up(self, params: Sequence[SamplingParams]) -> None:
        """Engine.warm_up in all processes."""
        self._tell("warm_up", [_fields(one) for one in params])
        self.engine.warm_up(params)

    def stop(self) -> None:
        """Ends the others."""
        self._tell("stop", None)
        for other in self._others:
            other.close()

    def _tell(self, what: str, value: Any) -> None:
        line = json.dumps([what, value]).encode() + b"\n"
        self.num_bytes += len(line)
        for other in self._others:
            try:
                other.sendall(line)
            except OSError as error:
                raise RuntimeError(f"another process has ended ({error}): start all again") from error


def follow(engine: Engine, host: str) -> None:
    """Runs the steps of another process's Leader, whose host this is, until it stops.

    Raises:
      RuntimeError: the first process ended without a word.
    """
    with first(host) as connection:
        for line in connection.makefile("rb"):
            what, value = json.loads(line)
            if what == "stop":
                return
            if what == "warm_up":
                engine.warm_up([_params(fields) for fields in value])
                continue
            for one in value:
                if "abort" in one:
                    engine.abort(one["abort"])
                else:
                    engine.add_request(one["prompt"], _params(one["params"]), **one["options"])
            engine.step()
    raise RuntimeError("the first process has ended: start all again")


def others(host: str) -> list[socket.socket]:
    """In the first process: its connections with the others, which call `first` meanwhile.

    host: the name or address of this machine that the others reach.
    """
    token = secrets.token_hex(16)
    with socket.create_server((host, 0)) as listening:
        processes.of_first(lambda: [listening.getsockname()[1], token])
        listening.settimeout(PATIENCE)
        return [_accepted(listening, token) for _ in range(processes.count() - 1)]


def first(host: str) -> socket.socket:
    """In another process: its connection with the first, whose host this is."""
    port, token = processes.of_first(list)
    found = socket.create_connection((host, port), timeout=PATIENCE)
    found.sendall(token.encode())
    found.settimeout(None)
    return found


def _accepted(listening: socket.socket, token: str) -> socket.socket:
    """The next connection of one of our processes."""
    while True:
        try:
            found, _ = listening.accept()
        except TimeoutError:
            raise RuntimeError(f"another process has not connected within {PATIENCE:g} s: start all again") from None
        found.settimeout(PATIENCE)
        if secrets.compare_digest(found.recv(len(token), socket.MSG_WAITALL), token.encode()):
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found.settimeout(None)  # between two lines there may be any time
            return found
        found.close()


def _described(one: Request | Abort) -> dict[str, Any]:
    if isinstance(one, Abort):
        return {"abort": one.request.id}
    params = one.completions[0].params if one.beams is None else one.beams.params
    adapter = None if one.adapter is None else one.adapter.name
    options = dict(request_id=one.id, priority=one.priority, adapter=adapter, count=one.number)
    return {"prompt": one.prompt_ids, "params": _fields(params), "options": options}


def _fields(params: SamplingParams | BeamSearchParams) -> dict[str, Any]:
    return {"is_beams": isinstance(params, BeamSearchParams)} | dataclasses.asdict(params)


def _params(fields: dict[str, Any]) -> SamplingParams | BeamSearchParams:
    if fields.pop("is_beams"):
        return BeamSearchParams(**fields)
    if (form := fields["structured_outputs"]) is not None:
        fields["structured_outputs"] = StructuredOutputsParams(**form)
    return SamplingParams(**fields)

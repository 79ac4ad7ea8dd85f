"""The records of a folder, unit by unit, in a file that survives an interruption at any point.

Each line of records.jsonl is a JSON object. A line with an `event` says what happened; its benchmark is "card":

  call         a call of the command began; holds the card, versions and commit
  started      a unit began
  interrupted  Ctrl-C ended it; it will be repeated
  done         the records before it, of the same unit, are complete

Only the records of units that are done count. A unit that was started ATTEMPTS times without an end is not tried again:
a kernel may end its process, as a memory fault on an AMD GPU does.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records.record import Record, field

NAME = "records.jsonl"
ATTEMPTS = 2

# What all calls into a folder have in common: field of a call to its name in a message.
COMMON = {
    "device.name": "card",
    "device.arch": "architecture",
    "versions.jax": "jax",
    "git_commit": "git commit",
    "size": "size",
}


class Ledger:
    """The units that are done in a folder, and their records.

    Attributes:
      records: of all units that are done, in the order of the file.
      calls: the calls of the command, the present one last.
      done: unit to its `done` event, with stage, status, reason and seconds.
    """

    def __init__(self, folder: Path, call: Mapping[str, Any]):
        """Opens the file of a folder, which is created if needed, and adds a call.

        Raises:
          ValueError: the file has other records than those of calls with the same COMMON fields.
          OSError: the folder cannot be written.
        """
        self._path = folder / NAME
        self.records: list[Record] = []
        self.calls: list[Record] = []
        self.done: dict[str, Record] = {}
        self._open: collections.Counter[str] = collections.Counter()
        folder.mkdir(parents=True, exist_ok=True)
        known = self._path.read_bytes() if self._path.exists() else b""
        kept = self._load(known)
        if self.calls and (differing := _differing(self.calls[0], call)):
            raise ValueError(f"{folder} holds records of {differing}; choose another folder with --output")
        if kept < len(known):  # a process was ended while it wrote
            with self._path.open("r+b") as file:
                file.truncate(kept)
        self.calls.append({"benchmark": "card", "event": "call", **call})
        self._append([self.calls[-1]])

    def _load(self, text: bytes) -> int:
        """Reads the file's lines; returns the number of bytes up to the end of the last event."""
        pending: list[Record] = []
        place = kept = 0
        lines = text.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            place += len(line)
            try:
                one = json.loads(line)
            except ValueError:
                one = None
            if not isinstance(one, dict) or not line.endswith(b"\n"):
                if number == len(lines) and self.calls:
                    break
                raise ValueError(f"{self._path} was not written by jfa-bench card; choose another folder with --output")
            if number == 1 and one.get("event") != "call":
                raise ValueError(f"{self._path} was not written by jfa-bench card; choose another folder with --output")
            pending.append(one)
            if "event" in one:
                self._take(one, pending[:-1])
                pending, kept = [], place
        return kept

    def _take(self, event: Record, records: Sequence[Record]) -> None:
        unit = event.get("unit", "")
        match event["event"]:
            case "call":
                self.calls.append(event)
            case "started":
                self._open[unit] += 1
            case "interrupted":
                self._open[unit] -= 1
            case "done":
                self.done[unit] = event
                self.records += records

    def gave_up(self, unit: str) -> bool:
        """Whether a unit ended its process too often."""
        return self._open[unit] >= ATTEMPTS

    def longest(self, stage: str) -> float:
        """Seconds of the longest unit of a stage so far; of all stages, if the stage has none."""
        own = [one["seconds"] for one in self.done.values() if one["stage"] == stage]
        return max(own or [one["seconds"] for one in self.done.values()], default=0.0)

    def start(self, unit: str) -> None:
        """Notes that a unit begins."""
        self._note({"event": "started", "unit": unit})

    def interrupt(self, unit: str) -> None:
        """Notes that the user ended a unit, which is therefore not the unit's fault."""
        self._note({"event": "interrupted", "unit": unit})

    def finish(self, unit: str, records: Sequence[Record], **about: Any) -> None:
        """Adds a unit that is done; about: stage, status, reason and seconds."""
        self._note({"event": "done", "unit": unit, **about}, records)

    def _note(self, event: Record, records: Sequence[Record] = ()) -> None:
        event = {"benchmark": "card", **event}
        self._append([*records, event])
        self._take(event, records)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(one) + "\n" for one in lines).encode())


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a call has not in common with an earlier one: "jax 0.11.2, not of 0.12.0"; empty if nothing."""
    return ", ".join(
        f"{name} {field(before, path)}, not of {field(now, path)}"
        for path, name in COMMON.items()
        if field(before, path) != field(now, path)
    )

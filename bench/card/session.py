"""One call of `jfa-bench card`: runs the units that are left until the time is over, and keeps the page up to date.

Nothing is timed before every case of the oracle holds. A unit is not started if less time is left than the longest of
its stage took. The records, the tuning tables and the page are written after each unit.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jfa.device import probe

from ..measure import machine, outcome, timing
from . import correctness, page, plan, tuning
from .ledger import ATTEMPTS, Ledger

PAGE, TABLES = "card.md", "tuning_tables"


def run(
    folder: Path,
    *,
    minutes: float,
    size: plan.Size,
    say: Callable[[str], None],
    clock: timing.Clock = time.monotonic,
) -> int:
    """Works for some minutes on what is left in a folder; returns the exit status: 1 if a result is wrong, 130 after
    Ctrl-C.

    say: shows a line to the user.

    Raises:
      ValueError: the folder holds records of another card, jax, commit or size.
      OSError: the folder cannot be written.
    """
    end = clock() + 60 * minutes
    device = probe()
    ledger = Ledger(folder, machine.circumstances() | {"size": size.name})
    units, left_out = plan.units(size, device)
    command = f"jfa-bench card --minutes {minutes:g} --output {shlex.quote(str(folder))}{' --quick' * size.quick}"

    def write() -> None:
        tuning.write(folder / TABLES, device.arch, ledger.records)
        text = page.text(ledger, units, left_out, arch=device.arch, command=command)
        (folder / PAGE).write_text(text)

    status, why = 0, "everything is done"
    for unit in units:
        bad = correctness.wrong(ledger)
        if bad and unit.stage != plan.CORRECTNESS:
            why = f"nothing is timed, since results are wrong: {len(bad)}, the first: {bad[0]}"
            break
        if unit.key in ledger.done:
            continue
        left, needed = end - clock(), ledger.longest(unit.stage)
        if left <= needed:
            why = f"the time is over: {max(0, left):.0f} s are left, and the next unit may take {needed:.0f} s"
            break
        try:
            say(_ran(unit, ledger, clock))
            write()
            if reason := _silence():
                status, why = 1, f"the device stopped answering in {unit.key}: {reason}; call the command again"
                break
        except KeyboardInterrupt:
            if unit.key not in ledger.done:
                ledger.interrupt(unit.key)
            status, why = 130, f"interrupted in {unit.key}"
            break
    write()
    say(f"{why}\n{sum(one.key in ledger.done for one in units)} of {len(units)} units are done; see {folder / PAGE}")
    return status or int(bool(correctness.wrong(ledger)))


def _ran(unit: plan.Unit, ledger: Ledger, clock: timing.Clock) -> str:
    """Runs a unit and adds it to the ledger; returns a line about it."""
    start = clock()
    status, reason, records = "ok", None, []
    if ledger.gave_up(unit.key):
        status, reason = "crashed", f"the process ended {ATTEMPTS} times while this ran"
    else:
        ledger.start(unit.key)
        try:
            for one in unit.run(ledger.records):
                records.append(one)
        except outcome.REFUSALS as refusal:
            refused = outcome.of(refusal)
            status, reason = refused["status"], refused["reason"]
    seconds = round(clock() - start, 1)
    ledger.finish(unit.key, records, stage=unit.stage, status=status, reason=reason, seconds=seconds)
    return f"{unit.key}, {seconds:.0f} s" + (f": {status}: {reason}" if reason else "")


def _silence() -> str | None:
    """Why the device computes nothing anymore, as after a memory fault; None if it does."""
    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except outcome.REFUSALS as error:
        return outcome.of(error)["reason"]
    return None

"""The connections over which groups of processes send their results. Here both processes are threads of one."""

import queue
import threading

import pytest

from jfa_models import processes
from jfa_models.engine.shares import Shares


@pytest.fixture
def both(monkeypatch):
    """The Shares of the first process and of another, and the errors that they have told of."""
    told, other, errors = queue.Queue(), threading.local(), queue.Queue()
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "is_first", lambda: not hasattr(other, "is_here"))

    def of_first(value):
        if processes.is_first():
            told.put(found := value())
            return found
        return told.get(timeout=60)

    monkeypatch.setattr(processes, "of_first", of_first)
    made = queue.Queue()

    def run():
        other.is_here = True
        made.put(Shares("127.0.0.1", lambda error: errors.put(("second", str(error)))))

    thread = threading.Thread(target=run)
    thread.start()
    first = Shares("127.0.0.1", lambda error: errors.put(("first", str(error))))
    thread.join(60)
    second = made.get(timeout=60)
    yield first, second, errors
    for one in (*first._sockets, *second._sockets):
        one.close()


def test_all_results_come_to_the_first_process(both):
    first, second, errors = both
    assert all(one.gettimeout() is None for one in (*first._sockets, *second._sockets))  # lines may be far apart
    assert [*first.arrived()] == [] == [*second.arrived()]
    for line in (2, 4):
        second.send({"line": line, "text": "é\n"})
    first.send({"line": 1})
    ends = threading.Thread(target=lambda: list(second.rest()))
    ends.start()
    assert [*first.arrived(), *first.rest()] == [{"line": line, "text": "é\n"} for line in (2, 4)]
    ends.join(60)
    assert not ends.is_alive() and errors.empty()


@pytest.mark.parametrize(("victim", "who"), [(0, "the first process"), (1, "another process")])
def test_the_end_of_a_process_is_noticed(both, victim, who):
    first, second, errors = both
    second.send({"line": 2})
    (first, second)[victim]._sockets[0].shutdown(2)
    seen = dict(errors.get(timeout=60) for _ in range(2))
    assert seen[("second", "first")[victim]].startswith(f"{who} has ended") and "start all again" in seen["first"]
    with pytest.raises(RuntimeError, match=rf"{who} has ended.*: start all again"):
        list((second, first)[victim].rest())


def test_half_a_line_is_no_result(both):
    first, second, errors = both
    second._sockets[0].sendall(b'["result", {"line"')
    second._sockets[0].shutdown(2)
    assert "start all again" in errors.get(timeout=60)[1]
    with pytest.raises(RuntimeError, match="another process has ended: start all again"):
        list(first.rest())

"""`jfa-bench memory`: the memory that pages save, from the allocator's state on simulated requests. No model runs.

Prompt and completion lengths are log-normal with the means of two data sets of the PagedAttention paper
(arXiv:2309.06180, section 6.2, figure 11). In each step every request gets its next token; finished requests are
replaced by new ones. Parallel samples are forks of a prompt. Beams fork and end at every step: the most likely
continuations of all beams, whose scores differ by SPREAD, are the next beams.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator

import jfa

from . import machine

DATA_SETS = {"ShareGPT": (161.31, 337.99), "Alpaca": (19.31, 58.45)}  # mean tokens of prompts and completions
SIGMA = 0.8  # standard deviation of the logarithm of a length
SPREAD = 1.0  # standard deviation, in natural units, of the scores of one beam's continuations
RUNNING = 64  # number of concurrent requests


# (kind of sampling, number of samples or beams)
WAYS = (("one", 1), *itertools.product(("parallel", "beams"), (2, 4, 6)))


def measure(*, data_sets: tuple[str, ...], page_sizes: tuple[int, ...], steps: int, seed: int = 0) -> Iterator[dict]:
    """A record for each data set, page size and kind of sampling.

    wasted_share: fraction of the slots in held pages that have no token. saved_share: of the pages that would be held
    without sharing, the fraction that sharing saves. reserved_share: held slots / slots of a cache that reserves 2048
    tokens for every sequence. All are means over the steps after the first fifth.
    """
    shared = machine.circumstances() | {"benchmark": "memory"}
    for data, page_size, (sampling, width) in itertools.product(data_sets, page_sizes, WAYS):
        pool = _Pool(data, page_size, sampling, width, seed)
        for _ in range(steps // 5):
            pool.step()
        seen = [pool.step() for _ in range(steps - steps // 5)]
        wasted, saved, reserved = (sum(column) / len(seen) for column in zip(*seen, strict=True))
        case = {"data": data, "page_size": page_size, "sampling": sampling, "width": width, "steps": steps}
        figures = {"wasted_share": wasted, "saved_share": saved, "reserved_share": reserved}
        yield shared | {"case": case, "implementation": "PageAllocator", "status": "ok", "reason": None} | figures


@dataclasses.dataclass
class _Request:
    names: list[tuple[int, int]]  # its sequences
    scores: list[float]
    left: int  # tokens still to generate


class _Pool:
    """Running requests, and an allocator with enough pages for all of them."""

    def __init__(self, data: str, page_size: int, sampling: str, width: int, seed: int):
        self._prompt, self._answer = DATA_SETS[data]
        self._sampling, self._width = sampling, width
        self._random = random.Random(seed)
        self._pages = jfa.PageAllocator(RUNNING * width * 8192 // page_size, page_size)
        self._number = itertools.count()
        self._requests = [self._new(begun=True) for _ in range(RUNNING)]

    def step(self) -> tuple[float, float, float]:
        """Adds one token to every sequence; returns the shares that measure averages."""
        for i, request in enumerate(self._requests):
            if request.left == 0:
                for name in request.names:
                    self._pages.free(name)
                request = self._requests[i] = self._new()
            if self._sampling == "beams":
                self._choose(request)
            for name in request.names:
                assert self._pages.append(name) is not None
            request.left -= 1
        names = [name for request in self._requests for name in request.names]
        slots = self._pages.num_held * self._pages.page_size
        alone = sum(-(-self._pages.num_tokens(name) // self._pages.page_size) for name in names)
        return self._pages.wasted_slots / slots, 1 - self._pages.num_held / alone, slots / (2048 * len(names))

    def _length(self, mean: float) -> int:
        drawn = self._random.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)
        return max(1, min(2048, round(drawn)))

    def _new(self, *, begun: bool = False) -> _Request:
        """Adds a request. begun: it has generated a part of its tokens, so that initial requests differ in age."""
        request, answer = next(self._number), self._length(self._answer)
        names = [(request, i) for i in range(self._width)]
        assert self._pages.add(names[0], self._length(self._prompt)) is not None
        for name in names[1:]:
            self._pages.fork(names[0], name)
        left = self._random.randint(1, answer) if begun else answer
        return _Request(names, [0.0] * self._width, left)

    def _choose(self, request: _Request) -> None:
        """Makes the most likely continuations of all beams the next beams: some parents fork, others end."""
        gauss = self._random.gauss
        drawn = [
            (score + gauss(0.0, SPREAD), parent)
            for parent, score in enumerate(request.scores)
            for _ in range(2 * self._width)
        ]
        chosen = sorted(drawn, reverse=True)[: self._width]
        parents = [parent for _, parent in chosen]
        free = [name for i, name in enumerate(request.names) if i not in parents]
        for name in free:
            self._pages.free(name)
        names, kept = [], set()
        for parent in parents:
            if parent not in kept:
                kept.add(parent)
                names.append(request.names[parent])
                continue
            child = free.pop()
            self._pages.fork(request.names[parent], child)
            names.append(child)
        best = chosen[0][0]
        request.names, request.scores = names, [score - best for score, _ in chosen]

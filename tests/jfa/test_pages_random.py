"""PageAllocator under random operations: after each, its state is compared with a brute-force model of the pool."""

import dataclasses
import random
from collections import Counter

import pytest
from allocators import assert_refused, snapshot
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from runs import run

from jfa.pages import Copy, PageAllocator
from jfa.types import NULL_PAGE


@dataclasses.dataclass
class Row:
    """A sequence as the model sees it. kv: what each token's slot must hold."""

    salt: bytes
    pages: list[int]
    tokens: list[int]
    kv: list[int]
    committed: int  # tokens in pages that were committed
    gone: int = 0  # pages at its start that slide released

    def copy(self):
        return Row(self.salt, self.pages.copy(), self.tokens.copy(), self.kv.copy(), self.committed, self.gone)


class Device:
    """A pool of pages with contents, and the allocator, whose results are recomputed by brute force.

    The content of a slot represents a key and a value: a number that depends on the salt and on every token so far.
    Copies and writes are deferred until settle, as an engine defers them until its step, so that the owners of pages
    change in between.
    """

    def __init__(self, num_pages, page_size, watermark):
        self.allocator = PageAllocator(num_pages, page_size, watermark=watermark)
        self.size = page_size
        self.slots = {page: [-1] * page_size for page in range(num_pages)}
        self.rows: dict[str, Row] = {}
        self.registered: dict[int, int] = {}  # kv of a page's last slot: page
        self.idle: list[int] = []  # registered pages that no row owns, in the order of eviction
        self.numbers: dict[tuple, int] = {}  # (kv before, token): kv
        self.copies: list[Copy] = []
        self.writes: list[tuple[str, int]] = []  # row, position
        self.named = 0
        self.counts = Counter()  # of operations and of their outcomes

    # The state, recomputed at each call.

    def owned(self):
        return {page for row in self.rows.values() for page in row.pages[row.gone :]}

    def owners(self, page):
        return [name for name, row in self.rows.items() if page in row.pages[row.gone :]]

    def free(self):
        return self.slots.keys() - {NULL_PAGE} - self.owned()

    def kv(self, salt, tokens):
        numbers = [self.numbers.setdefault((salt,), len(self.numbers))]
        for token in tokens:
            numbers.append(self.numbers.setdefault((numbers[-1], token), len(self.numbers)))
        return numbers[1:]

    def num_pages_for(self, num_tokens):
        return (num_tokens + self.size - 1) // self.size

    # How an operation changes the model.

    def ask(self, fits, call):
        """The allocator's result. It must be None, and nothing may change, if and only if there are too few pages."""
        if fits:
            answer = call()
            assert answer is not None, f"None with {len(self.free())} free pages"
            return answer
        self.counts["refused"] += 1
        assert_refused(self.allocator, call)
        return None

    def take(self, page):
        """Checks that the allocator was right to allocate this page."""
        empty = self.free() - set(self.idle)
        if empty:
            assert page in empty, f"page {page} was allocated, but {empty} are empty"
        else:
            assert page == self.idle.pop(0), f"page {page} was evicted in the wrong order"
            self.forget(page)

    def forget(self, page):
        self.counts["evicted"] += 1
        self.registered = {kv: other for kv, other in self.registered.items() if other != page}

    def release(self, row, keep):
        while len(row.pages) > keep:
            page = row.pages.pop()
            if page in self.registered.values() and not self.owners(page):
                self.idle.append(page)

    def write(self, name, tokens, kv):
        row = self.rows[name]
        self.writes += [(name, position) for position in range(len(row.tokens), len(row.tokens) + len(tokens))]
        row.tokens += tokens
        row.kv += kv

    def settle(self):
        """Runs a step: copies in their order, then writes, each to a page with one owner that is not registered."""
        for source, destination in self.copies:
            self.slots[destination] = self.slots[source].copy()
        for name, position in self.writes:
            page = self.rows[name].pages[position // self.size]
            assert page != NULL_PAGE and self.owners(page) == [name], f"page {page} is of {self.owners(page)}"
            assert page not in self.registered.values(), f"page {page} is written while it is registered"
            self.slots[page][position % self.size] = self.rows[name].kv[position]
        self.copies, self.writes = [], []
        self.verify()

    # The operations.

    def add(self, tokens, num_tokens, *, salt=b"", reuse=True, window=None):
        """Starts a row with tokens, truncated or padded with zeros to num_tokens."""
        self.counts["add"] += 1
        self.named += 1
        name = f"row{self.named}"
        content = (tokens + [0] * num_tokens)[:num_tokens]
        kv = self.kv(salt, content)
        hits, gone = [], 0
        for end in range(self.size, min(num_tokens, len(tokens) - 1) + 1, self.size) if reuse else ():
            seen = range(0 if window is None else max(0, end - window + 1), end)
            first = seen.start // self.size
            ends = [kv[(index + 1) * self.size - 1] for index in range(first, end // self.size)]
            if all(number in self.registered for number in ends):
                hits, gone = [NULL_PAGE] * first + [self.registered[number] for number in ends], first
        pages = self.num_pages_for(num_tokens) - len(hits) + sum(page in self.idle for page in hits)
        prompt = tokens if reuse else None
        reused = self.ask(
            len(self.free()) - pages >= self.allocator.watermark,
            lambda: self.allocator.add(name, num_tokens, tokens=prompt, salt=salt, window=window),
        )
        if reused is not None:
            assert reused == len(hits) * self.size
            self.counts["hit"] += reused
            self.counts["queried"] += len(tokens) if reuse else 0
            self.idle = [page for page in self.idle if page not in hits]
            self.counts["windowed"] += gone > 0
            row = self.rows[name] = Row(salt, hits, content[:reused], kv[:reused], reused, gone)
            for page in self.allocator.pages(name, len(hits)):
                self.take(page)
                row.pages.append(page)
            self.write(name, content[reused:], kv[reused:])

    def append(self, name, tokens):
        self.counts["append"] += 1
        row = self.rows[name]
        missing = self.num_pages_for(len(row.tokens) + len(tokens)) - len(row.pages)
        tail = row.pages[-1] if tokens and len(row.tokens) % self.size else NULL_PAGE
        shared, known = len(self.owners(tail)) > 1, tail in self.registered.values()
        to_spare = len(self.free()) - missing
        copies = self.ask(to_spare >= shared, lambda: self.allocator.append(name, len(tokens)))
        if copies is None:
            return False
        pages = self.allocator.pages(name)
        if shared or (known and to_spare):
            assert copies == [(tail, pages[len(row.pages) - 1])]
            self.counts["copied"] += 1
            self.copies += copies
            self.take(copies[0].destination)
            self.release(row, len(row.pages) - 1)
            row.pages.append(copies[0].destination)
        else:
            assert copies == []
            if known:
                self.counts["given up"] += 1
                self.forget(tail)
        for page in pages[len(row.pages) :]:
            self.take(page)
            row.pages.append(page)
        kv = self.kv(row.salt, row.tokens + tokens)
        self.write(name, tokens, kv[len(row.tokens) :])
        return True

    def fork(self, name):
        self.settle()
        self.counts["fork"] += 1
        self.named += 1
        child = f"row{self.named}"
        self.allocator.fork(name, child)
        self.rows[child] = self.rows[name].copy()

    def truncate(self, name, num_tokens):
        self.settle()
        self.counts["truncate"] += 1
        row = self.rows[name]
        self.allocator.truncate(name, num_tokens)
        self.release(row, self.num_pages_for(num_tokens))
        del row.tokens[num_tokens:], row.kv[num_tokens:]
        row.committed = min(row.committed, num_tokens // self.size * self.size)

    def slide(self, name, first_token):
        self.settle()
        self.counts["slide"] += 1
        row = self.rows[name]
        self.allocator.slide(name, first_token)
        gone = max(row.gone, first_token // self.size)
        for index in reversed(range(row.gone, gone)):
            page, row.pages[index] = row.pages[index], NULL_PAGE
            if page in self.registered.values() and not any(page in other.pages for other in self.rows.values()):
                self.idle.append(page)
        row.gone = gone

    def commit(self, name, num_tokens):
        self.settle()
        self.counts["commit"] += 1
        row = self.rows[name]
        self.allocator.commit(name, row.tokens[:num_tokens])
        for end in range(row.committed + self.size, num_tokens + 1, self.size):
            if end // self.size > row.gone:
                self.registered.setdefault(row.kv[end - 1], row.pages[end // self.size - 1])
            row.committed = end

    def drop(self, name):
        """Frees a row, so that its tokens of this step are not written, as for a preempted sequence."""
        self.counts["free"] += 1
        self.allocator.free(name)
        self.writes = [write for write in self.writes if write[0] != name]
        self.release(self.rows[name], 0)
        del self.rows[name]

    def verify(self):
        """Checks that the allocator agrees with the model, and that every row reads its own tokens from its pages."""
        allocator, owned = self.allocator, self.owned()
        allocator.check()
        assert allocator.sequences == tuple(self.rows)
        assert allocator.num_free == len(self.free())
        assert allocator.num_held == len(owned)
        assert allocator.num_evictable == len(self.idle)
        rows = self.rows.values()
        places = [(row, at) for row in rows for at in range(row.gone * self.size, len(row.kv))]
        used = {(row.pages[at // self.size], at % self.size) for row, at in places}
        assert allocator.wasted_slots == len(owned) * self.size - len(used)
        assert allocator.evictions == self.counts["evicted"]
        assert (allocator.hit_tokens, allocator.queried_tokens) == (self.counts["hit"], self.counts["queried"])
        for name, row in self.rows.items():
            assert allocator.pages(name) == tuple(row.pages)
            assert allocator.num_tokens(name) == len(row.tokens)
            if not self.writes and not self.copies:
                read = [slot for page in row.pages for slot in self.slots[page]]
                kept = slice(row.gone * self.size, len(row.kv))
                assert read[kept] == row.kv[kept], f"{name} reads other tokens through its pages {row.pages}"


OPERATIONS = ("add", "append", "fork", "truncate", "slide", "commit", "free")
LETTERS = st.lists(st.integers(0, 1), max_size=3)
PROMPTS = st.builds(lambda n, letters: [0] * n + letters, st.integers(0, 6), LETTERS)  # with many common prefixes
SALTS = st.sampled_from([b"", b"", b"adapter"])
WINDOWS = st.sampled_from([None, None, 1, 2, 5])
INDEX = st.integers(0, 99)
has_rows = precondition(lambda self: self.device.rows)


class PageMachine(RuleBasedStateMachine):
    """Calls in any order, with arguments that hypothesis can shrink."""

    @initialize(num_pages=st.integers(4, 16), page_size=st.sampled_from([2, 3, 1]), watermark=st.integers(0, 1))
    def start(self, num_pages, page_size, watermark):
        self.device = Device(num_pages, page_size, watermark)
        self.add([0] * 5, 0, b"", True, None)

    def name(self, index):
        return list(self.device.rows)[index % len(self.device.rows)]

    @rule(
        tokens=PROMPTS,
        more=st.integers(-2, 2),
        salt=SALTS,
        reuse=st.sampled_from([True, True, False]),
        window=WINDOWS,
    )
    def add(self, tokens, more, salt, reuse, window):
        self.device.add(tokens, max(0, len(tokens) + more), salt=salt, reuse=reuse, window=window)

    @has_rows
    @rule(index=INDEX, tokens=LETTERS)
    def append(self, index, tokens):
        self.device.append(self.name(index), tokens)

    @has_rows
    @rule(index=INDEX, tokens=LETTERS, window=WINDOWS)
    def add_same_again(self, index, tokens, window):
        """Adds a prompt that starts like a row whose tokens are all committed."""
        self.commit(index, 0)
        row = self.device.rows[self.name(index)]
        self.add(row.tokens + tokens, 0, row.salt, True, window)

    @has_rows
    @rule(index=INDEX, first=LETTERS, second=LETTERS)
    def fork_and_append_to_both(self, index, first, second):
        self.device.fork(self.name(index))
        self.append(index, first)
        self.append(-1, second)

    @has_rows
    @rule(index=INDEX)
    def fork(self, index):
        self.device.fork(self.name(index))

    @has_rows
    @rule(index=INDEX, forgotten=st.integers(0, 5))
    def truncate(self, index, forgotten):
        name = self.name(index)
        row = self.device.rows[name]
        self.device.truncate(name, max(row.gone * self.device.size, len(row.tokens) - forgotten))

    @has_rows
    @rule(index=INDEX, kept=st.integers(0, 5))
    def slide(self, index, kept):
        name = self.name(index)
        self.device.slide(name, max(0, len(self.device.rows[name].tokens) - kept))

    @has_rows
    @rule(index=INDEX, unwritten=st.integers(0, 3))
    def commit(self, index, unwritten):
        row = self.device.rows[self.name(index)]
        self.device.commit(self.name(index), max(row.committed, len(row.tokens) - unwritten))

    @has_rows
    @rule(index=INDEX)
    def free(self, index):
        self.device.drop(self.name(index))

    @rule(share=st.integers(0, 3))
    def evict(self, share):
        """Frees the oldest rows, and reuses all free pages for other contents."""
        device = self.device
        for name in list(device.rows)[: len(device.rows) * share // 3]:
            device.drop(name)
        num_pages = max(0, len(device.free()) - device.allocator.watermark)
        before = set(device.rows)
        device.add([], num_pages * device.size, reuse=False)
        for name in device.rows.keys() - before:
            device.drop(name)

    @rule()
    def settle(self):
        self.device.settle()

    @invariant()
    def verify(self):
        if hasattr(self, "device"):
            self.device.verify()


PageMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestAnyOrderOfCalls = PageMachine.TestCase


def drive(device, rng, steps):
    """A workload of many steps like an engine's: grow, fork, roll back, end, and preempt when pages run out."""
    trunk = [rng.randrange(2) for _ in range(6 * device.size)]  # prompts share prefixes of it
    for _ in range(steps):
        name = rng.choice(list(device.rows)) if device.rows else None
        size = len(device.rows[name].tokens) if name else 0
        match rng.random():
            case p if p < 0.18 or name is None:
                tokens = trunk[: rng.randrange(len(trunk))] + [rng.randrange(2) for _ in range(rng.randrange(6))]
                num_tokens = max(0, len(tokens) + rng.choice((-2, 0, 0, 0, 2)))
                salt, window = rng.choice((b"", b"", b"adapter")), rng.choice((None, None, 1, 4, 9))
                device.add(tokens, num_tokens, salt=salt, reuse=rng.random() < 0.8, window=window)
            case p if p < 0.5:
                tokens = [rng.randrange(2) for _ in range(rng.choice((0, 1, 1, 1, 2, 5)))]
                if not device.append(name, tokens):
                    device.drop(list(device.rows)[-1])  # the newest, as schedulers preempt
            case p if p < 0.6 and len(device.rows) < 8:
                device.fork(name)
            case p if p < 0.7:
                device.truncate(name, rng.randint(max(size // 2, device.rows[name].gone * device.size), size))
            case p if p < 0.76:
                device.slide(name, rng.randint(0, size))
            case p if p < 0.9:
                device.commit(name, rng.choice((size, rng.randint(device.rows[name].committed, size))))
            case _:
                device.drop(name)
        if rng.random() < 0.6:
            device.settle()
        else:
            device.verify()
    device.settle()


@pytest.mark.parametrize("count", [run(10_000, quick=True), run(100_000, quick=False, soak=True)])
def test_a_seeded_workload_of_many_operations(count):
    rng = random.Random(20230612)
    total = Counter()
    while total["done"] < count:
        num_pages = rng.choice((2, 5, 9, 16, 30, 60))
        device = Device(num_pages, rng.randint(1, 4), rng.randint(0, min(2, num_pages - 2)))
        drive(device, rng, 1000)
        total += device.counts
        total["done"] += sum(device.counts[name] for name in OPERATIONS) - device.counts["refused"]
    # every operation and outcome occurred
    assert min(total[name] for name in OPERATIONS) > count / 20, total
    assert min(total[name] for name in ("refused", "evicted", "hit")) > count / 20, total
    assert min(total["copied"], total["windowed"]) > count / 200 and total["given up"] > count / 5_000, total


def test_the_same_calls_give_the_same_pages():
    def run():
        device = Device(12, 2, 1)
        drive(device, random.Random(1), 2000)
        return snapshot(device.allocator)

    assert run() == run()

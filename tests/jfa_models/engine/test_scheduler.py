"""The scheduler and its snapshots without a model: a few lines of Python replace the device."""

import random

import pytest

from jfa.pages import PageAllocator
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.sampling import seed_sequence
from jfa_models.engine.pools import Pool, Pools
from jfa_models.engine.request import Continuation, Request
from jfa_models.engine.scheduler import Scheduler
from jfa_models.engine.snapshots import Snapshots

PARAMS = SamplingParams()
SEED = seed_sequence(PARAMS, 0, 0)


class Machine:
    """Runs a scheduler as the engine does: results are known one step later.

    num_snapshots: the model has layers with states. The state in a slot is the number of tokens that it has seen, and
    those of them that were known.
    """

    def __init__(
        self,
        *,
        num_pages=64,
        page_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        window=None,
        num_snapshots=0,
        has_attention=True,
        **options,
    ):
        self.allocator = PageAllocator(num_pages, page_size if has_attention else 1000)
        self.snapshots, self.states = None, {}
        if num_snapshots:
            self.snapshots = Snapshots(range(max_num_seqs, max_num_seqs + num_snapshots), page_size)
        self.scheduler = Scheduler(
            Pools([Pool(self.allocator, window)], snapshots=self.snapshots, has_attention=has_attention),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            **options,
        )
        self.requests = 0
        self.live: list[Continuation] = []
        self.on_its_way = []
        self.ended = []

    def add(self, prompt, max_tokens, *, priority=0, n=1):
        """Adds a prompt with n continuations, each of which ends after max_tokens."""
        number, self.requests = self.requests, self.requests + 1
        request = Request(
            id=str(number), number=number, prompt=None, prompt_ids=tuple(prompt), priority=priority, arrival=0.0
        )
        ones = [
            Continuation(request, i, prompt, limit=len(prompt) + max_tokens, params=PARAMS, seed=SEED) for i in range(n)
        ]
        ones[0].followers = ones[1:]
        self.live += ones
        self.scheduler.add(ones[0])
        return ones[0]

    def step(self):
        """Schedules, checks and runs a step, then reads the tokens that the previous step sampled."""
        chunks = self.scheduler.schedule()
        self.allocator.check()
        self.check(chunks)
        if self.snapshots is not None:
            self.snapshots.check()
            self.run_states(chunks)
        before, self.on_its_way = (
            self.on_its_way,
            [one for chunk in chunks if chunk.samples for one in (chunk.of, *chunk.followers)],
        )
        for one in before:
            if one.finished:
                continue
            one.tokens.append(1000 + len(one.tokens))
            if len(one.tokens) >= one.limit:
                self.scheduler.finish(one)
                self.ended.append(one)
        return chunks

    def check(self, chunks):
        scheduler, rows = self.scheduler, [one for chunk in chunks for one in (chunk.of, *chunk.followers)]
        assert sum(chunk.num_tokens for chunk in chunks) <= scheduler.max_num_batched_tokens
        assert len({one.slot for one in rows}) == len(rows) <= scheduler.max_num_seqs
        assert all(one.slot is not None for one in rows)
        assert len({chunk.of for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.num_tokens >= 1
            assert self.allocator.num_tokens(chunk.of) >= chunk.start + chunk.num_tokens == chunk.of.num_computed
            # a token whose id is not known yet is the only one of its chunk
            assert chunk.start + chunk.num_tokens <= len(chunk.of.tokens) or chunk.num_tokens == 1
        written = {}  # (page, slot) to the continuation that writes it in this step: no two write the same
        for chunk in chunks:
            pages = self.allocator.pages(chunk.of)
            for place in range(chunk.start, chunk.start + chunk.num_tokens):
                key = pages[place // self.allocator.page_size], place % self.allocator.page_size
                assert key not in written, f"{chunk.of} and {written[key]} write the same place"
                written[key] = chunk.of

    def run_states(self, chunks):
        """Computes the states of a step's rows as the launcher does."""
        self.states |= {slot: self.states.get(source) for slot, source in self.scheduler.forked.items()}
        self.scheduler.forked.clear()
        for chunk in chunks:
            one, end = chunk.of, chunk.start + chunk.num_tokens
            count, known = self.states[one.slot] if chunk.start else (0, ())
            assert count == chunk.start and known == tuple(one.tokens[: len(known)])
            for each in (one, *chunk.followers):
                self.states[each.slot] = end, tuple(one.tokens[:end])
        self.states |= {snapshot: self.states[own] for snapshot, own in self.scheduler.saved.items()}
        self.scheduler.saved.clear()

    def run(self, steps=10_000):
        for _ in range(steps):
            if all(one.finished for one in self.live):
                return
            self.step()
        raise AssertionError(f"continuations never finish: {[one for one in self.live if not one.finished]}")


def summary(chunks):
    return [(chunk.of.request.number, chunk.start, chunk.num_tokens) for chunk in chunks]


def test_prompts_fill_the_budget_in_the_order_of_arrival_and_decoding_goes_first():
    machine = Machine(max_num_batched_tokens=10)
    machine.add(range(8), 5)
    machine.add(range(100, 107), 5)
    assert summary(machine.step()) == [(0, 0, 8), (1, 0, 2)]
    assert summary(machine.step()) == [(0, 8, 1), (1, 2, 5)]
    machine.add(range(200, 220), 5)
    assert summary(machine.step()) == [(0, 9, 1), (1, 7, 1), (2, 0, 8)]
    assert summary(machine.step()) == [(0, 10, 1), (1, 8, 1), (2, 8, 8)]


def test_a_slot_is_reused_within_two_steps_of_its_owner_s_last_token():
    machine = Machine(max_num_seqs=1)
    machine.add([1, 2], 2)
    machine.add([3], 1)
    assert [summary(machine.step()) for _ in range(4)] == [[(0, 0, 2)], [(0, 2, 1)], [], [(1, 0, 1)]]


def test_smaller_priorities_go_first_whenever_they_arrive():
    machine = Machine(max_num_seqs=1)
    machine.add([1], 2)
    machine.step()
    machine.add([2], 1)
    machine.add([3], 1, priority=-1)
    machine.run()
    assert [one.request.number for one in machine.ended] == [0, 2, 1]


def test_no_prompt_overtakes_one_that_waits_for_pages():
    machine = Machine(num_pages=9, max_num_seqs=8, max_num_batched_tokens=32)
    machine.add(range(16), 4)
    machine.add(range(100, 124), 4)  # it needs six pages, and four are free
    machine.add([7], 4)
    order = [chunk.of.request.number for _ in range(30) for chunk in machine.step() if chunk.start == 0]
    assert order == [0, 1, 2]


def test_the_newest_is_preempted_and_recomputed():
    machine = Machine(num_pages=7, max_num_seqs=4)
    first, second = machine.add(range(8), 12), machine.add(range(100, 108), 12)
    machine.run()
    assert machine.scheduler.num_preemptions > 0
    assert machine.ended == [first, second]
    assert second.tokens == [*range(100, 108), *range(1008, 1020)]


def test_what_is_in_a_step_is_not_preempted_for_a_prompt_in_it():
    """With a window a prompt gets pages step by step, and an urgent one may join others that decode."""
    machine = Machine(window=4, page_size=2, num_pages=8, max_num_batched_tokens=8)
    machine.add(range(6), 20, priority=1)
    for _ in range(3):
        machine.step()
    urgent = machine.add(range(100, 130), 3)
    for _ in range(60):
        machine.step()
    assert urgent in machine.ended and len(machine.ended) == 2


def test_a_preempted_continuation_finds_its_full_pages_again():
    machine = Machine(num_pages=9, max_num_seqs=4)
    machine.add(range(8), 12)
    machine.add(range(100, 108), 12)
    hits = machine.allocator.hit_tokens
    machine.run()
    assert machine.scheduler.num_preemptions > 0 and machine.allocator.hit_tokens > hits


@pytest.mark.parametrize("num_pages", [15, 16, 40])
def test_nothing_is_preempted_for_drafts(num_pages):
    """Otherwise a prompt might take the slot, in a step that verifies drafts."""
    machine = Machine(num_pages=num_pages, max_num_seqs=2)
    first, second = machine.add(range(4), 60), machine.add(range(100, 108), 20)
    machine.step()
    first.tokens.append(1004)
    second.tokens.append(1008)
    machine.add([7, 8], 4, priority=-1)  # there is no slot for it
    assert machine.scheduler.next_tokens == [first, second]
    chunks = machine.scheduler.schedule({first: [5] * 40})
    assert summary(chunks) == [(0, 4, 1), (1, 8, 1)] and machine.scheduler.num_preemptions == 0
    assert [len(chunk.drafts) for chunk in chunks] == [40 if num_pages == 40 else 0, 0]


def test_drafts_within_the_page_of_the_next_token_need_no_free_page():
    """A model without attention has one page for each sequence: all are taken once its slots are."""
    machine = Machine(num_pages=3, max_num_seqs=2, has_attention=False)
    rows = [machine.add(range(4), 60), machine.add(range(100, 108), 20)]
    machine.step()
    for one in rows:
        one.tokens.append(1000)
    assert machine.allocator.num_free == 0 and machine.scheduler.next_tokens == rows
    assert [len(chunk.drafts) for chunk in machine.scheduler.schedule({rows[0]: [5] * 6, rows[1]: [5] * 3})] == [6, 3]


def test_a_step_that_preempts_verifies_no_drafts():
    """They were planned for a step of more rows, which may have room for more tokens."""
    machine = Machine(num_pages=16, max_num_seqs=5, max_num_batched_tokens=64)
    rows = [machine.add(range(10 * i, 10 * i + n), 20) for i, n in enumerate((4, 2, 2, 2, 44))]
    machine.step()
    for one in rows:
        one.tokens.append(1000)
    assert machine.scheduler.next_tokens == rows
    chunks = machine.scheduler.schedule({rows[1]: [5] * 5})
    assert [chunk.of for chunk in chunks] == rows[:4] and machine.scheduler.num_preemptions == 1
    assert not any(chunk.drafts for chunk in chunks)


def test_no_prompt_joins_a_step_that_verifies_drafts():
    machine = Machine(num_pages=40, max_num_seqs=2)
    first = machine.add(range(4), 60)
    machine.step()
    first.tokens.append(1004)
    second = machine.add(range(100, 108), 20)
    chunks = machine.scheduler.schedule({first: [5, 6]})
    assert summary(chunks) == [(0, 4, 1)] and second.slot is None
    machine.scheduler.keep(first, 2)
    first.tokens += [5, 6, 7]
    assert machine.scheduler.next_tokens == []  # the prompt goes first
    assert summary(machine.scheduler.schedule()) == [(0, 7, 1), (1, 0, 8)]


def test_equal_prompts_share_their_full_pages_even_in_the_step_that_computes_them():
    machine = Machine(max_num_batched_tokens=32)
    machine.add(range(10), 2)
    machine.add(range(10), 2)
    assert summary(machine.step()) == [(0, 0, 10), (1, 8, 2)]
    assert machine.allocator.num_held == 4
    machine.run()


def test_without_a_prefix_cache_every_prompt_is_computed():
    machine = Machine(max_num_batched_tokens=32, enable_prefix_caching=False)
    machine.add(range(10), 2)
    machine.add(range(10), 2)
    assert summary(machine.step()) == [(0, 0, 10), (1, 0, 10)]


def test_samples_of_a_prompt_share_it_and_copy_what_they_write():
    machine = Machine()
    machine.add(range(10), 4, n=3)
    [chunk] = machine.step()
    assert len(chunk.followers) == 2 and machine.allocator.num_held == 3
    chunks = machine.step()
    assert summary(chunks) == [(0, 10, 1)] * 3
    assert [len(chunk.copies) for chunk in chunks] == [1, 1, 0]  # the last owner writes into the page itself
    assert machine.allocator.num_held == 5
    machine.run()


def test_samples_without_a_slot_wait_and_find_the_prompt():
    machine = Machine(max_num_seqs=2)
    machine.add(range(10), 4, n=5)
    [chunk] = machine.step()
    assert len(chunk.followers) == 1
    machine.run()
    assert len(machine.ended) == 5 and machine.allocator.hit_tokens == 3 * 8


def hits_of(machine, prompts):
    """For each prompt, run one after another: how many of its tokens another one has computed."""
    found = []
    for prompt in prompts:
        before = machine.scheduler.pools.hit_tokens
        machine.add(prompt, 3)
        machine.run()
        found.append(machine.scheduler.pools.hit_tokens - before)
    return found


SYSTEM = [*range(500, 518)]
QUESTIONS = {  # prompts, and how many tokens of each are taken over, with pages of four tokens
    "questions": ([[*SYSTEM, *range(n, n + 7)] for n in (0, 20, 40, 60)], [0, 0, 16, 16]),
    "chat": ([[*range(10)], [*range(21)], [*range(33)], [*range(34)]], [0, 8, 20, 32]),
    "one_page": ([[*range(4)]] * 2, [0, 0]),  # its last token is computed, and with it the page
    "whole_pages": ([[*range(8)]] * 3, [0, 4, 4]),
    "a_token_more": ([[*range(9)]] * 2, [0, 8]),
    "prefix_of_another": ([[*range(17)], [*range(9)], [*range(9)], [*range(13)]], [0, 0, 8, 8]),
    "document": ([[*range(150), *range(n, n + 20)] for n in (200, 300, 400)], [0, 128, 148]),
}


@pytest.mark.parametrize("has_attention", [True, False])
@pytest.mark.parametrize("case", QUESTIONS)
def test_prompts_go_on_from_snapshots_of_states(case, has_attention):
    prompts, want = QUESTIONS[case]
    options = dict(max_num_batched_tokens=64, has_attention=has_attention)
    assert hits_of(Machine(num_snapshots=20, **options), prompts) == want
    for size in (1, 2, 3):  # fewer snapshots: fewer hits, and the states are right all the same
        few = Machine(num_snapshots=size, **options)
        assert all(hit <= most for hit, most in zip(hits_of(few, prompts), want, strict=True))
        assert len(few.snapshots._slot_of) <= size
    single = Machine(num_snapshots=20, num_pages=200, page_size=1, **options)
    assert all(hit >= least for hit, least in zip(hits_of(single, prompts), want, strict=True))


def test_prompts_that_arrive_together_wait_for_the_snapshot_that_they_share():
    machine = Machine(num_snapshots=8, max_num_batched_tokens=64)
    for n in (0, 20, 40, 40):
        machine.add([*SYSTEM, *range(n, n + 7)], 3)
    assert summary(machine.step()) == [(0, 0, 24), (1, 0, 16)]  # the first has what may be asked again, the second, too
    assert summary(machine.step()) == [(0, 24, 1), (1, 16, 8), (2, 16, 8)]
    assert summary(machine.step())[-1] == (3, 24, 1)
    machine.run()


def test_the_least_recently_used_snapshot_is_dropped_and_guesses_first():
    machine = Machine(num_snapshots=2, has_attention=False)
    a, b, c = ([n, *range(8)] for n in (100, 200, 300))
    assert hits_of(machine, [a, b, a, c, a, b]) == [0, 0, 8, 0, 8, 0]
    long = [*range(400, 460)]  # each of its steps takes a snapshot, in the slot of the last one
    assert hits_of(machine, [a, long, a]) == [8, 0, 8]


def test_a_dropped_page_drops_its_snapshot():
    machine = Machine(num_pages=9, num_snapshots=8)
    assert hits_of(machine, [range(9), range(9)]) == [0, 8]
    assert len(machine.snapshots._slot_of) == 1
    machine.add(range(100, 126), 5)
    machine.run()
    assert [len(machine.snapshots._slot_of), len(machine.snapshots._free)] == [2, 6]  # of the second prompt only
    assert hits_of(machine, [range(9)]) == [0]


def test_steps_of_a_long_prompt_end_at_page_borders():
    machine = Machine(num_snapshots=8, max_num_batched_tokens=15)
    machine.add(range(40), 2)
    assert [summary(machine.step()) for _ in range(4)] == [[(0, 0, 12)], [(0, 12, 12)], [(0, 24, 12)], [(0, 36, 4)]]
    machine.run()
    small = Machine(num_snapshots=8, max_num_batched_tokens=5, page_size=8)  # a step that reaches no border goes on
    small.add(range(20), 2)
    assert [summary(small.step()) for _ in range(4)] == [[(0, 0, 5)], [(0, 5, 3)], [(0, 8, 5)], [(0, 13, 3)]]


def test_beginnings_of_prompts_are_remembered_longest(monkeypatch):
    monkeypatch.setattr("jfa_models.engine.snapshots.SEEN_PAGES", 6)
    machine = Machine(num_snapshots=8, max_num_batched_tokens=64)
    prompts = [[*SYSTEM, *range(7)], [*range(100, 109)], [*SYSTEM, *range(20, 27)], [*SYSTEM, *range(40, 47)]]
    assert hits_of(machine, prompts) == [0, 0, 0, 16]  # of the first prompt, four pages are remembered


def test_a_sequence_that_grew_has_more_digests():
    snapshots, tokens = Snapshots(range(1), 2), [1, 2, 3]
    assert len(snapshots.digests(tokens, b"")) == 2
    tokens += [4, 5]
    assert len(snapshots.digests(tokens, b"")) == 3


def test_a_step_may_take_more_snapshots_than_there_are():
    machine = Machine(num_snapshots=1, max_num_batched_tokens=64)
    for n in (0, 100, 200):
        machine.add(range(n, n + 9), 2)
    assert len(machine.step()) == 3
    machine.run()
    assert hits_of(machine, [range(9), range(200, 209)]) == [0, 0]
    assert hits_of(machine, [range(200, 209)]) == [8]


@pytest.mark.parametrize("kind", ["pages", "no_cache", "states_and_pages", "states"])
@pytest.mark.parametrize("seed", range(6))
def test_every_continuation_finishes_and_releases_its_pages(seed, kind):
    """Random arrivals, priorities, samples and aborts in a pool of a few pages; every step is checked."""
    rng = random.Random(seed)
    machine = Machine(
        num_pages=rng.randint(9, 20),
        page_size=rng.choice([1, 3, 4]),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(6, 20),
        enable_prefix_caching=kind != "no_cache",
        num_snapshots=rng.choice([1, 2, 8]) if "states" in kind else 0,
        has_attention=kind != "states",
    )
    page_size = machine.snapshots.page_size if kind == "states" else machine.allocator.page_size
    room = (machine.allocator.num_pages - 1) * page_size
    for _ in range(150):
        if rng.random() < 0.4:
            length = rng.randint(1, room // 2)
            prompt = [rng.randrange(2) for _ in range(length)]  # many share a prefix
            machine.add(prompt, rng.randint(1, room - length), priority=rng.choice([0, 0, 1]), n=rng.choice([1, 1, 3]))
        if rng.random() < 0.1 and (living := [one for one in machine.live if not one.finished]):
            for one in ((victim := rng.choice(living)).request,):
                for other in machine.live:
                    if other.request is one:
                        machine.scheduler.finish(other)
            assert victim.finished
        machine.step()
    machine.run()
    assert not machine.allocator.sequences and machine.scheduler.num_running == machine.scheduler.num_waiting == 0
    assert machine.snapshots is None or not machine.snapshots._plans
    assert all(len(one.tokens) <= one.limit for one in machine.live)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_num_seqs=0), "max_num_seqs must be at least 1, got 0"),
        (
            dict(max_num_seqs=8, max_num_batched_tokens=7),
            "max_num_batched_tokens must be at least max_num_seqs, one token per decoding sequence, got 7 and 8",
        ),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Machine(**options)

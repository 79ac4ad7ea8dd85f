"""PageAllocator: a page is written by one sequence alone, and what is reused is what was written."""

from collections.abc import Callable

import pytest
from allocators import assert_refused

from jfa.pages import Copy, PageAllocator, prefix_digests
from jfa.types import NULL_PAGE


def with_committed(num_pages, page_size, tokens, *, salt=b""):
    """An allocator that sequence 'old' has used and left: its full pages are evictable."""
    allocator = PageAllocator(num_pages, page_size)
    allocator.add("old", len(tokens), salt=salt)
    allocator.commit("old", tokens)
    allocator.free("old")
    return allocator


def test_pages_are_taken_on_demand_and_the_null_page_never():
    allocator = PageAllocator(4, 2)
    assert allocator.add("a", 0) == 0 and allocator.pages("a") == ()
    seen = []
    for num_tokens in range(1, 7):
        assert allocator.append("a") == []
        assert allocator.num_tokens("a") == num_tokens
        seen.append(allocator.pages("a"))
    assert seen == [(1,), (1,), (1, 2), (1, 2), (1, 2, 3), (1, 2, 3)]
    assert allocator.pages("a", 1) == (2, 3)
    assert_refused(allocator, lambda: allocator.append("a"))
    assert allocator.num_held == 3 and allocator.num_free == 0
    allocator.free("a")
    assert allocator.num_held == 0 and allocator.num_free == 3 and allocator.num_evictable == 0
    assert allocator.sequences == ()


def test_append_of_many_tokens_takes_all_pages_or_none():
    allocator = PageAllocator(4, 2)
    allocator.add("a", 1)
    assert_refused(allocator, lambda: allocator.append("a", 6))
    assert allocator.append("a", 5) == [] and len(allocator.pages("a")) == 3
    assert allocator.append("a", 0) == []


def test_add_leaves_the_watermark_and_append_may_use_it():
    allocator = PageAllocator(5, 2, watermark=1)
    assert_refused(allocator, lambda: allocator.add("a", 7))
    assert allocator.add("a", 6) == 0 and allocator.num_free == 1
    assert_refused(allocator, lambda: allocator.add("b", 1))
    assert allocator.append("a") == [] and allocator.num_free == 0


def test_an_evictable_page_that_is_taken_up_again_leaves_the_watermark_too():
    allocator = with_committed(4, 2, [1, 2, 3, 4])
    allocator.watermark = 1
    assert_refused(allocator, lambda: allocator.add("a", 5, tokens=[1, 2, 3, 4, 5]))
    assert allocator.add("a", 4, tokens=[1, 2, 3, 4, 5]) == 4


def test_truncate_gives_back_what_only_the_forgotten_tokens_need():
    allocator = PageAllocator(6, 2)
    allocator.add("a", 9)
    for num_tokens, pages in [(9, 5), (8, 4), (7, 4), (1, 1), (0, 0)]:
        allocator.truncate("a", num_tokens)
        assert allocator.num_held == len(allocator.pages("a")) == pages
    assert allocator.append("a") == []


def test_num_shared_counts_what_each_of_its_own_would_take_besides():
    allocator = PageAllocator(num_pages=16, page_size=4)
    allocator.add("a", 10)
    assert allocator.num_shared == 0
    allocator.fork("a", "b")
    allocator.fork("a", "c")
    assert allocator.num_shared == 6
    allocator.append("b", 1)  # a copy of the last page
    assert allocator.num_shared == 5
    allocator.free("a")
    assert allocator.num_shared == 2


def test_wasted_slots_counts_a_shared_page_once():
    allocator = PageAllocator(9, 4)
    assert allocator.wasted_slots == 0
    allocator.add("a", 8)
    assert allocator.wasted_slots == 0
    allocator.fork("a", "b")
    allocator.truncate("b", 5)
    assert allocator.wasted_slots == 0  # 'a' fills the page that 'b' ends in
    allocator.truncate("a", 6)
    assert allocator.wasted_slots == 2  # the fuller of the two
    allocator.append("b")
    assert allocator.wasted_slots == 2 + 2 and allocator.num_held == 3


def test_a_fork_costs_no_page_and_the_first_to_append_gets_a_copy():
    allocator = PageAllocator(6, 2)
    allocator.add("a", 3)
    allocator.fork("a", "b")
    assert allocator.pages("b") == allocator.pages("a") == (1, 2) and allocator.num_held == 2
    assert allocator.append("b") == [Copy(source=2, destination=3)]
    assert allocator.append("a") == []  # the only owner by now: in place
    assert allocator.pages("a") == (1, 2) and allocator.pages("b") == (1, 3)


def test_a_fork_with_a_full_last_page_needs_no_copy():
    allocator = PageAllocator(6, 2)
    allocator.add("a", 4)
    allocator.fork("a", "b")
    assert allocator.append("a") == allocator.append("b") == []
    assert allocator.pages("a") == (1, 2, 3) and allocator.pages("b") == (1, 2, 4)


def test_every_fork_but_the_last_gets_a_copy():
    allocator = PageAllocator(9, 4)
    allocator.add(0, 2)
    for child in (1, 2, 3):
        allocator.fork(0, child)
    assert [allocator.append(name) for name in range(4)] == [[(1, 2)], [(1, 3)], [(1, 4)], []]


def test_a_copy_that_finds_no_page_changes_nothing():
    allocator = PageAllocator(2, 4)
    allocator.add("a", 2)
    allocator.fork("a", "b")
    assert_refused(allocator, lambda: allocator.append("b"))
    assert allocator.append("b", 0) == []  # nothing is written, so nothing need be copied
    allocator.free("a")
    assert allocator.append("b") == []


def test_freeing_one_owner_leaves_the_page_to_the_other():
    allocator = PageAllocator(3, 2)
    allocator.add("a", 3)
    allocator.fork("a", "b")
    allocator.free("a")
    assert allocator.pages("b") == (1, 2) and allocator.num_free == 0


def test_the_longest_committed_prefix_of_full_pages_is_reused():
    allocator = with_committed(9, 2, [1, 2, 3, 4, 5])
    assert allocator.num_evictable == 2 and allocator.num_free == 8
    assert allocator.add("a", 6, tokens=[1, 2, 3, 4, 5, 6]) == 4  # the page of 5 was never full
    assert allocator.pages("a")[:2] == (1, 2)
    assert allocator.add("b", 6, tokens=[1, 2, 9, 4, 5, 6]) == 2
    assert allocator.pages("b")[0] == 1 and allocator.num_held == 5
    assert allocator.add("c", 6, tokens=[9, 2, 3, 4, 5, 6]) == 0  # [3, 4] is known, but behind another token
    assert (allocator.hit_tokens, allocator.queried_tokens) == (6, 18)


def test_a_prefix_ends_where_it_first_differs():
    allocator = with_committed(9, 2, [1, 2, 5, 6])
    assert allocator.add("a", 7, tokens=[1, 2, 3, 4, 5, 6, 7]) == 2


def test_tokens_are_not_looked_for_unless_they_are_given():
    allocator = with_committed(9, 2, [1, 2])
    assert allocator.add("a", 3) == 0 and allocator.queried_tokens == 0


@pytest.mark.parametrize(("num_tokens", "prompt", "reused"), [(4, 4, 2), (4, 5, 4), (5, 5, 4), (3, 5, 2), (0, 5, 0)])
def test_the_last_token_is_computed_again(num_tokens, prompt, reused):
    allocator = with_committed(9, 2, [1, 2, 3, 4])
    assert allocator.add("a", num_tokens, tokens=[1, 2, 3, 4, 5][:prompt]) == reused


def test_an_empty_prompt_reuses_nothing():
    assert with_committed(9, 1, [1, 2]).add("a", 2, tokens=[]) == 0


def test_what_runs_is_reused_as_well_as_what_has_ended():
    allocator = PageAllocator(9, 2)
    allocator.add("a", 4)
    allocator.commit("a", [1, 2, 3, 4])
    assert allocator.add("b", 4, tokens=[1, 2, 3, 4]) == 2
    assert allocator.pages("a")[0] == allocator.pages("b")[0] and allocator.num_held == 3


def test_append_behind_a_reused_prefix_copies_nothing():
    allocator = with_committed(9, 2, [1, 2, 3, 4])
    allocator.add("a", 4, tokens=[1, 2, 3, 4, 5])
    assert allocator.append("a") == []


def test_prefixes_of_different_salts_differ():
    allocator = with_committed(9, 2, [1, 2], salt=b"adapter")
    assert allocator.add("a", 3, tokens=[1, 2, 3]) == 0
    assert allocator.add("b", 3, tokens=[1, 2, 3], salt=b"adapter") == 2


def test_room_that_is_not_committed_is_not_reused():
    allocator = PageAllocator(9, 2)
    allocator.add("a", 6)
    allocator.commit("a", [1, 2, 3])
    assert allocator.add("b", 6, tokens=[1, 2, 3, 4, 5, 6]) == 2
    allocator.commit("a", [1, 2, 3, 4])
    assert allocator.add("c", 6, tokens=[1, 2, 3, 4, 5, 6]) == 4


def test_of_equal_pages_the_first_stays_registered():
    allocator = PageAllocator(9, 2)
    for name in "ab":
        allocator.add(name, 2)
        allocator.commit(name, [1, 2])
    allocator.free("b")
    assert allocator.num_evictable == 0  # page 2 was free at once
    assert allocator.add("c", 3, tokens=[1, 2, 3]) == 2 and allocator.pages("c")[0] == 1


def test_a_registered_page_that_truncate_left_in_part_is_copied_before_it_is_written():
    allocator = PageAllocator(9, 4)
    allocator.add("a", 4)
    allocator.commit("a", [1, 2, 3, 4])
    allocator.truncate("a", 3)
    assert allocator.append("a") == [(1, 2)] and allocator.num_evictable == 1
    assert allocator.add("b", 5, tokens=[1, 2, 3, 4, 5]) == 4  # what was known is known


def test_with_no_page_to_spare_the_content_is_given_up_instead():
    allocator = PageAllocator(2, 4)
    allocator.add("a", 4)
    allocator.commit("a", [1, 2, 3, 4])
    allocator.truncate("a", 3)
    assert allocator.append("a") == [] and allocator.pages("a") == (1,) and allocator.evictions == 1
    allocator.free("a")
    assert allocator.add("b", 4, tokens=[1, 2, 3, 4, 5]) == 0


def test_the_least_recently_used_content_goes_first_and_a_tail_before_its_head():
    allocator = PageAllocator(6, 1)
    for name, tokens in {"a": [1, 2], "b": [3, 4]}.items():  # pages 1, 2 and 3, 4
        allocator.add(name, 2)
        allocator.commit(name, tokens)
    allocator.free("b")
    allocator.free("a")
    assert allocator.num_evictable == 4 and allocator.num_free == 5
    taken = []
    allocator.add("c", 0)
    for _ in range(5):
        allocator.append("c")
        taken.append(allocator.pages("c")[-1])
    assert taken == [5, 4, 3, 2, 1]  # the free one, then b's tail and head, then a's
    assert allocator.evictions == 4


def test_who_is_told_of_evictions_knows_the_prefix_by_its_digest():
    tokens, evicted = list(range(9)), []
    allocator = with_committed(6, 2, tokens, salt=b"x")
    allocator.on_evicted = evicted.append
    digests = list(prefix_digests(tokens, 2, b"x"))
    assert len(set(digests)) == 5  # of 0, 2, 4, 6 and 8 tokens
    allocator.add("new", 7)
    assert evicted == digests[:1:-1]  # one page was free, three were not: the longest prefix goes first
    assert list(prefix_digests(tokens, 2)) != digests and list(prefix_digests([1], 2, b"x")) == digests[:1]


def test_a_prefix_that_was_used_again_is_evicted_last():
    allocator = PageAllocator(4, 1)
    for name in (1, 2):
        allocator.add(name, 1)
        allocator.commit(name, [name])
    allocator.free(1)
    allocator.free(2)
    assert allocator.add("a", 1, tokens=[1, 9]) == 1
    allocator.free("a")
    allocator.add("b", 2)  # the free page, then one of the two
    assert allocator.add("c", 1, tokens=[1, 9]) == 1


def test_a_prefix_that_add_reuses_is_not_evicted_for_its_own_sequence():
    allocator = PageAllocator(3, 1)
    for name in (1, 2):
        allocator.add(name, 1)
        allocator.commit(name, [name])
    allocator.free(1)  # the next to be evicted
    allocator.free(2)
    assert_refused(allocator, lambda: allocator.add("a", 3, tokens=[1, 9, 9]))
    assert allocator.add("a", 2, tokens=[1, 9]) == 1
    assert allocator.pages("a") == (1, 2) and allocator.evictions == 1


def test_what_follows_a_truncate_is_committed_as_it_is():
    allocator = PageAllocator(9, 2)
    allocator.add("a", 4)
    allocator.commit("a", [1, 2, 3, 4])
    allocator.truncate("a", 2)
    allocator.append("a", 2)
    allocator.commit("a", [1, 2, 5, 6])
    assert allocator.add("b", 5, tokens=[1, 2, 5, 6, 9]) == 4 and allocator.pages("b")[:2] == allocator.pages("a")
    assert allocator.add("c", 5, tokens=[1, 2, 3, 4, 9]) == 4  # still there, but evictable until now


def test_pages_of_the_first_tokens_stay():
    allocator = PageAllocator(9, 2)
    tokens = list(range(10))
    allocator.add("a", 10)
    allocator.commit("a", tokens)
    pages = allocator.pages("a")
    for first_token in (1, 3, 6, 9):
        allocator.slide("a", first_token, num_sinks=3)
        allocator.check()
    assert allocator.gone("a") == slice(2, 4)
    assert allocator.pages("a") == (*pages[:2], NULL_PAGE, NULL_PAGE, pages[4]) and allocator.num_held == 3
    allocator.fork("a", "b")
    assert allocator.num_held == 3 and allocator.num_shared == 3
    # a prefix needs the pages of the window, and of the first tokens
    assert allocator.add("c", 12, tokens=[*tokens, 10, 11], window=2, num_sinks=3) == 10
    assert allocator.pages("c")[:5] == allocator.pages("a") and allocator.gone("c") == slice(2, 4)
    allocator.check()
    for name in "abc":
        allocator.free(name)
    allocator.check()
    assert allocator.num_held == 0
    allocator.add("d", 8 * 2)  # takes the others' pages, and the first one at last
    allocator.free("d")
    assert allocator.known_tokens([*tokens, 10], 11, window=2, num_sinks=3) == 0


def test_what_slid_out_of_a_window_is_given_back_once():
    allocator = PageAllocator(9, 2)
    allocator.add("a", 7)
    pages = allocator.pages("a")
    allocator.fork("a", "b")
    allocator.slide("a", 5)
    assert allocator.pages("a") == (NULL_PAGE, NULL_PAGE, *pages[2:]) and allocator.num_held == 4
    allocator.slide("b", 3)
    assert allocator.pages("b") == (NULL_PAGE, *pages[1:]) and allocator.num_held == 3
    allocator.slide("a", 0)  # what is gone stays gone
    assert (allocator.gone("a"), allocator.gone("b"), allocator.num_tokens("a")) == (slice(0, 2), slice(0, 1), 7)
    allocator.free("a")
    allocator.free("b")
    allocator.check()
    assert allocator.num_held == 0


def busy():
    """Sequences 'a' of 5 tokens, 4 of them in committed pages, and its fork 'b', in pages of 2."""
    allocator = PageAllocator(9, 2)
    allocator.add("a", 5)
    allocator.commit("a", [1, 2, 3, 4])
    allocator.fork("a", "b")
    return allocator


def commit_other_tokens_than_the_fork():
    allocator = PageAllocator(9, 2)
    allocator.add("a", 2)
    allocator.fork("a", "b")
    allocator.commit("a", [1, 2])
    allocator.commit("b", [1, 3])


def truncate_what_slid():
    allocator = busy()
    allocator.slide("a", 5)
    allocator.truncate("a", 3)


UNKNOWN = "there is no sequence 'x'; start it with add or fork"
THERE = "sequence 'b' already exists; free it first or choose another id"
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "one_page": (lambda: PageAllocator(1, 2), "num_pages must be >= 2, since page 0 is never allocated, got 1"),
    "page_size_0": (
        lambda: PageAllocator(2, 0),
        "page_size is the number of tokens per page and must be >= 1, got 0",
    ),
    "watermark_below_0": (lambda: PageAllocator(9, 2, watermark=-1), "watermark must be >= 0 .* got -1"),
    "watermark_of_all": (
        lambda: PageAllocator(9, 2, watermark=8),
        "leave at least one page to allocate, so at most 7 of 9 pages, got 8",
    ),
    "add_known": (lambda: busy().add("b", 1), THERE),
    "add_negative": (lambda: busy().add("c", -1), "to add sequence 'c', num_tokens must be >= 0, got -1"),
    "append_unknown": (lambda: busy().append("x"), UNKNOWN),
    "append_negative": (
        lambda: busy().append("a", -2),
        "to append to sequence 'a', num_tokens must be >= 0, got -2; use truncate to drop tokens",
    ),
    "fork_unknown": (lambda: busy().fork("x", "c"), UNKNOWN),
    "fork_known": (lambda: busy().fork("a", "b"), THERE),
    "truncate_unknown": (lambda: busy().truncate("x", 0), UNKNOWN),
    "truncate_negative": (lambda: busy().truncate("a", -1), "0 to 5 tokens of sequence 'a', got -1"),
    "truncate_to_more": (lambda: busy().truncate("a", 6), "must keep 0 to 5 tokens of sequence 'a', got 6; use append"),
    "slide_unknown": (lambda: busy().slide("x", 0), UNKNOWN),
    "slide_too_far": (lambda: busy().slide("a", 6), "first_token must be from 0 to its length, 5, got 6"),
    "truncate_what_slid": (
        truncate_what_slid,
        "cannot truncate to 3 tokens: slide released the pages of sequence 'a' up to token 4; free it and add",
    ),
    "commit_unknown": (lambda: busy().commit("x", []), UNKNOWN),
    "commit_too_many": (
        lambda: busy().commit("a", [1, 2, 3, 4, 5, 6]),
        "from the first one on: at least the 4 already committed and at most 5, got 6; see append and truncate",
    ),
    "commit_only_the_new": (lambda: busy().commit("a", [5]), "pass its tokens from the first one on: .* got 1"),
    "commit_other_tokens": (
        commit_other_tokens_than_the_fork,
        "tokens of sequence 'b' from 0 on differ from those that another owner of page 1 committed; fork before",
    ),
    "free_unknown": (lambda: busy().free("x"), UNKNOWN),
    "pages_unknown": (lambda: busy().pages("x"), UNKNOWN),
    "num_tokens_unknown": (lambda: busy().num_tokens("x"), UNKNOWN),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_caller_is_named(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()


def corrupt(allocator, name):
    """Makes the books wrong in one way. 'a' and 'b' own pages 1, 2, 3; 1 and 2 are registered; 4 is evictable."""
    match name:
        case "count":
            allocator._counts[3] += 1
        case "free_and_held":
            allocator._free.append(3)
        case "lost":
            allocator._free.remove(8)
        case "twice_free":
            allocator._free.append(8)
        case "null_page":
            allocator._free.append(NULL_PAGE)
        case "evictable_unknown":
            allocator._evictable[allocator._free.pop(0)] = None
        case "free_registered":
            allocator._free.append(allocator._evictable.popitem()[0])
        case "not_found":
            del allocator._page_of[allocator._digest_of[4]]
        case "found_elsewhere":
            allocator._page_of[b"other"] = 3
        case "too_few_pages":
            allocator._sequences["a"].num_tokens = 7
        case "page_twice":
            allocator._sequences["a"].pages[2] = 1
            allocator._counts[1] += 1
            allocator._counts[3] -= 1
        case "commits_too_much":
            allocator._sequences["a"].chain.append(b"")
        case "other_tokens":
            allocator._sequences["a"].chain[1] = b"other"


CORRUPTIONS = {
    "count": "page 3 has 2 owners and a count of 3",
    "free_and_held": "page 3 is not in exactly one state: 2 owners, 1 times free, evictable is False",
    "lost": "page 8 is not in exactly one state: 0 owners, 0 times free, evictable is False",
    "twice_free": "page 8 is not in exactly one state: 0 owners, 2 times free",
    "null_page": "page 0 is not in exactly one state: 0 owners, 1 times free",
    "evictable_unknown": "page 8 is evictable, but not registered",
    "free_registered": "page 4 is free, but registered",
    "not_found": "page 4 is registered, but not found",
    "found_elsewhere": "page 3 is found by the digest of another page",
    "too_few_pages": "sequence 'a' of 7 tokens has 3 pages of 2",
    "page_twice": r"sequence 'a' has a page twice: \[1, 2, 1\]",
    "commits_too_much": "sequence 'a' has committed more than its 2 full pages",
    "other_tokens": "page 1 of sequence 'a' has other tokens",
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_names_what_is_wrong(name):
    allocator = busy()
    allocator.add("old", 2)
    allocator.commit("old", [7, 8])
    allocator.free("old")
    allocator.check()
    corrupt(allocator, name)
    with pytest.raises(AssertionError, match=CORRUPTIONS[name]):
        allocator.check()

"""Prompt lookup, and how many drafted tokens a step verifies. Times are given, not measured."""

import random

import pytest

from jfa_models.engine.drafts import Acceptance, Lookup
from jfa_models.engine.pace import LOOK_EVERY, PLAIN_EVERY, Pace


def lookup(text, *, shortest=1, longest=3, length=4):
    one = Lookup(shortest, longest, length, Acceptance())
    one.follow([ord(x) for x in text])
    return one


def drafted(one):
    return "".join(map(chr, one.draft().tokens))


@pytest.mark.parametrize(
    ("text", "options", "draft"),
    [
        ("abcdefab", {}, "cdef"),  # the two last tokens stood at the beginning
        ("xabc1 yabc2 zabc", {}, "2 za"),  # where they stood last
        ("xabc1 yabc2 xabc", {"longest": 4}, "1 ya"),  # more of them matter more than later
        ("abcab", {"shortest": 3}, ""),  # too few of them stood before
        ("abc", {}, ""),
        ("", {}, ""),
        ("a", {}, ""),
        ("ababab", {"length": 7}, "abababa"),  # a period goes on beyond the end of the text
        ("aa", {"length": 3}, "aaa"),
    ],
)
def test_lookup(text, options, draft):
    assert drafted(lookup(text, **options)) == draft


def test_lookup_of_a_growing_text_is_that_of_the_whole():
    rng = random.Random(0)
    text = "".join(rng.choices("abc", k=300))
    grown = lookup("")
    for end in range(1, len(text)):
        grown.follow([ord(x) for x in text[:end]])
        if end % 7 == 0 and not grown._draft:
            assert drafted(grown) == drafted(lookup(text[:end]))


def test_the_draft_against_a_plain_search():
    """The same as trying each size and each earlier place, the latest first."""
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("ab c", k=rng.randrange(30)))
        want = ""
        for size in (3, 2, 1):
            ends = [i for i in range(size, len(text)) if text[i - size : i] == text[len(text) - size :]]
            if len(text) > size and ends:
                start = ends[-1]
                period = len(text) - start
                want = "".join(text[start + i % period] for i in range(4))
                break
        assert drafted(lookup(text)) == want, text


def test_acceptance_learns_also_from_drafts_that_were_not_verified():
    one = lookup("abcdabcd" * 3)
    before = one.draft().odds[0]
    for end in range(1, 9):
        one.draft()
        one.follow([ord(x) for x in "abcdabcd" * 3 + "abcdabcd"[:end]])
    assert one._acceptance.odds((3, 1)) > before
    wrong = lookup("abcdabcd" * 3)
    for end in range(1, 9):
        wrong.draft()
        wrong.follow([ord(x) for x in "abcdabcd" * 3 + "badcabdc"[:end]])
    wrong.draft()
    assert wrong._acceptance.odds((3, 0)) < before


def test_a_request_starts_with_the_acceptance_of_all():
    every = Acceptance()
    one = Acceptance(every)
    for _ in range(50):
        one.add(2, 0, missed=True)
    assert Acceptance(every).odds(2) == every.odds(2) < 0.2
    assert Acceptance(every).odds(3) == 0.5


def timed(pace, seconds):
    for shape, value in seconds.items():
        for _ in range(2):  # the first one may have compiled
            pace.time(*shape, value)
    return pace


def powers(odds, n):
    """The gains of a chain of tokens with these odds."""
    return [odds ** (i + 1) for i in range(n)]


SHAPES = [(1, 1), (1, 2), (1, 4), (1, 8)]
CHEAP = {(1, 1): 1.0, (1, 2): 1.0, (1, 4): 1.1, (1, 8): 1.2}
DEAR = {(1, 1): 1.0, (1, 2): 1.9, (1, 4): 3.5, (1, 8): 6.5}


def test_cheap_tokens_are_all_verified_and_dear_ones_if_they_are_right():
    assert timed(Pace(adaptive=True), CHEAP).lengths([powers(0.6, 10)], SHAPES) == [7]
    assert timed(Pace(adaptive=True), DEAR).lengths([powers(0.6, 10)], SHAPES) == [0]
    assert timed(Pace(adaptive=True), DEAR).lengths([powers(0.99, 10)], SHAPES) == [7]
    assert Pace(adaptive=False).lengths([powers(0.1, 10)], SHAPES) == [10]


def test_the_likelier_drafts_get_the_room():
    shapes = [(2, 2), (2, 4), (2, 8)]
    pace = timed(Pace(adaptive=True), {(2, 2): 1.0, (2, 4): 1.1, (2, 8): 9.0})
    assert pace.lengths([powers(0.3, 5), powers(0.9, 5)], shapes) == [0, 2]
    pace = timed(Pace(adaptive=True), {(2, 2): 1.0, (2, 4): 1.1, (2, 8): 1.2})
    assert pace.lengths([powers(0.3, 5), powers(0.9, 5)], shapes) == [1, 5]
    assert pace.lengths([[], powers(0.9, 2)], shapes) == [0, 2]
    assert pace.lengths([[], []], shapes) == [0, 0]


def test_nothing_is_drafted_until_a_plain_step_was_timed():
    pace = Pace(adaptive=True)
    assert pace.lengths([powers(0.9, 5)], SHAPES) == [0]
    pace.time(1, 1, 1.0)
    assert pace.lengths([powers(0.9, 5)], SHAPES) == [0]
    pace.time(1, 1, 1.0)
    assert pace.lengths([powers(0.9, 5)], SHAPES) == [5]  # untimed sizes are taken to be cheap


def test_a_plain_step_is_timed_again_now_and_then():
    pace = timed(Pace(adaptive=True), CHEAP)
    lengths = [pace.lengths([powers(0.9, 5)], SHAPES)[0] for _ in range(2 * PLAIN_EVERY + 2)]
    assert lengths.count(0) == 2


def test_looks_become_rare_while_drafts_do_not_pay():
    pace = timed(Pace(adaptive=True), DEAR)
    looks = 0
    for _ in range(20 * LOOK_EVERY):
        if pace.looks():
            looks += 1
            assert pace.lengths([powers(0.1, 5)], SHAPES) == [0]
    assert looks == LOOK_EVERY + 19
    timed(pace, CHEAP)
    pace.time(1, 8, 1.2)
    while not pace.looks():
        pass
    assert pace.lengths([powers(0.99, 7)], SHAPES) == [7]
    assert all(pace.looks() for _ in range(LOOK_EVERY))


def test_one_slow_step_does_not_count_for_long():
    pace = timed(Pace(adaptive=True), CHEAP)
    pace.time(1, 8, 1000.0)
    for _ in range(10):
        pace.time(1, 8, 1.2)
    assert pace.lengths([powers(0.9, 10)], SHAPES) == [7]


def test_what_drafts_may_lose_is_bounded():
    """Odds that are always wrong: at most the stake and a few per cent are lost, and drafts are tried now and then."""
    pace, lost, drafted, steps = timed(Pace(adaptive=True), CHEAP | {(1, 8): 2.5}), 0.0, 0, 2000
    for _ in range(steps):
        if pace.looks() and any(pace.lengths([powers(0.95, 7)], SHAPES)):
            pace.time(1, 8, 2.5, plain=(1, 1), won=0.0)
            lost, drafted = lost + 1.5, drafted + 1
        else:
            pace.time(1, 1, 1.0)
    assert drafted > 20 and lost < 5 + 0.05 * steps


def test_drafts_that_win_go_on():
    pace, drafted = timed(Pace(adaptive=True), CHEAP | {(1, 8): 2.5}), 0
    for _ in range(200):
        if pace.looks() and any(pace.lengths([powers(0.95, 7)], SHAPES)):
            pace.time(1, 8, 2.5, plain=(1, 1), won=3.0)
            drafted += 1
        else:
            pace.time(1, 1, 1.0)
    assert drafted > 190

"""Lookahead decoding, with a function in place of the model: the text is that without it, in fewer steps."""

import random

import pytest

from jfa_models.engine.lookahead import MOST_KNOWN, Window

VOCAB = 50


def decoded(following, *, prompt, steps, length, width=4, size=3, permitted=lambda guess: guess, plain_every=None):
    """The text after so many steps of lookahead decoding. following: the next token of a text.

    plain_every: so many steps between two that verify no drafts.
    """
    window, text = Window(width, size, 0), list(prompt)
    for step in range(steps):
        window.follow(text)
        if plain_every is not None and step % plain_every == plain_every - 1:
            text.append(following(text))
            continue
        tree = window.draft(length, permitted)
        assert len(tree) <= length
        assert len({*zip(tree.parents, tree.tokens, strict=True)}) == len(tree)  # no token is there twice
        sampled = [following([*text, *tree.text(node)]) for node in range(-1, len(tree))]
        node, num_right = -1, -1
        while node is not None:
            num_right += 1
            token = sampled[node + 1]
            text.append(token)
            node = tree.child(node, token)
        window.judge(num_right, sampled)
    return text[len(prompt) :]


def plain(following, prompt, length):
    text = list(prompt)
    while len(text) < len(prompt) + length:
        text.append(following(text))
    return text[len(prompt) :]


def by_last(text):
    """A text that depends on its last token, so that guesses are right whatever stands before them."""
    return (text[-1] * 7 + 3) % VOCAB


def by_all(text):
    """A text in which no guess helps."""
    return random.Random(str(text)).randrange(VOCAB)


def by_place(text):
    return len(text) * 13 % VOCAB


@pytest.mark.parametrize("following", [by_last, by_all, by_place])
@pytest.mark.parametrize(("width", "size", "length"), [(4, 3, 20), (1, 2, 2), (5, 4, 16), (3, 5, 40)])
def test_the_text_is_that_without_lookahead(following, width, size, length):
    found = decoded(following, prompt=[1, 2, 3], steps=40, length=length, width=width, size=size)
    assert found == plain(following, [1, 2, 3], len(found))


def test_guesses_that_do_not_depend_on_the_text_before_become_drafts():
    found = decoded(by_last, prompt=[1], steps=30, length=31, width=5, size=4)
    assert len(found) > 2 * 30


def test_a_window_guesses_what_comes_at_its_places():
    """Tokens by their place alone: a window that were one place off would always guess wrong."""
    found = decoded(by_place, prompt=[1, 2], steps=10, length=31, width=5, size=4)
    assert len(found) > 2 * 10


def test_a_window_keeps_its_places_over_steps_without_drafts():
    found = decoded(by_place, prompt=[1, 2], steps=30, length=31, width=5, size=4, plain_every=3)
    assert found == plain(by_place, [1, 2], len(found)) and len(found) > 50


def test_a_step_without_room_for_the_window_drops_its_last_places():
    assert len(decoded(by_last, prompt=[1], steps=30, length=9, width=5, size=4)) > 30


def test_drafts_are_cut_where_they_are_not_permitted():
    lengths = []

    def permitted(guess):
        lengths.append(len(guess))
        return guess[:1]

    window = Window(2, 4, 0)
    window.follow([1, 2, 3, 4, 1])
    assert window.draft(20, permitted).tokens[0] == 2 and lengths == [3]
    window = Window(2, 4, 0)
    window.follow([1, 2, 3, 4, 1])
    assert window.draft(20, lambda guess: guess).tokens[:3] == [2, 3, 4]


def test_the_latest_ngrams_are_known():
    window = Window(1, 2, 0)
    window.follow([x for token in range(MOST_KNOWN + 10) for x in (0, token + 1)] + [0])
    assert list(window._known[0]) == [(token + 1,) for token in range(10, MOST_KNOWN + 10)]
    assert window.draft(4, lambda guess: guess).tokens[:3] == [MOST_KNOWN + 10, MOST_KNOWN + 9, MOST_KNOWN + 8]

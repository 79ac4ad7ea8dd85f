"""Lookahead decoding: the model itself guesses tokens that lie ahead, and proves guesses that fit the text. No jax.

A window of W places ahead of the text has a guess from each of the last N - 1 steps, as in Jacobi iteration: a step
computes all of them, each behind the earlier one of its own place, and gives the next. What a place went through is an
n-gram. Those that begin with the text's last token are drafts of the same step. Both are parts of one tree: the oldest
guesses follow the text one after another, and each is followed by the later ones of its place.

Source: arXiv:2402.02057.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.speculation import SpeculativeConfig
from jfa_models.engine.drafts import FADING
from jfa_models.engine.request import Continuation
from jfa_models.engine.speculator import permitted

MOST_KNOWN = 32  # n-grams with the same first token
FIRST_GAIN = 1.0  # accepted tokens of a draft, before any was verified


class LookaheadProposer:
    """Drafts n-grams that the model guessed before, and has it guess more."""

    def __init__(self, config: SpeculativeConfig):
        self._config = config
        self._windows: WeakKeyDictionary[Continuation, Window] = WeakKeyDictionary()
        self._gain = FIRST_GAIN  # accepted tokens of a draft

    def gains(self, one: Continuation) -> Sequence[float]:
        """An equal share for each token: a window pays in later steps."""
        if one not in self._windows:
            self._windows[one] = Window(self._config.window_size, self._config.ngram_size, one.order[-1])
        self._windows[one].follow(one.tokens)
        # drafts that did not pay are tried again one day
        self._gain = FADING * self._gain + (1 - FADING) * FIRST_GAIN
        return [min(1.0, self._gain / self._config.length)] * self._config.length

    def draft(self, lengths: Mapping[Continuation, int]) -> Mapping[Continuation, DraftTree]:
        return {
            one: self._windows[one].draft(length, lambda guess, one=one: permitted(one, guess).tokens)
            for one, length in lengths.items()
        }

    def judge(self, one: Continuation, draft: DraftTree, path: Sequence[int], sampled: Sequence[int]) -> None:
        self._gain = FADING * self._gain + (1 - FADING) * len(path)
        self._windows[one].judge(len(path), sampled)

    def warm_up(self, params: Sequence[SamplingParams]) -> None:
        """Nothing: it runs on the host."""


class Window:
    """The guesses ahead of one text that grows, and the n-grams that came of earlier ones and of the text."""

    def __init__(self, width: int, ngram_size: int, seed: int):
        self._width, self._size = width, ngram_size
        self._random = random.Random(seed)  # the first guesses: tokens of the text
        self._tokens: list[int] = []
        self._places: list[list[int]] = []  # for each place ahead, its last N - 1 guesses
        self._start = 0  # where in the text the first place is
        self._computed: list[list[int]] = []  # for each place, where these are in the last draft
        self._known: dict[int, dict[tuple[int, ...], None]] = {}  # what followed a token, the latest last

    def follow(self, tokens: Sequence[int]) -> None:
        """Takes the text, which has grown since the last call."""
        new = tokens[len(self._tokens) :]
        self._tokens += new
        for end in range(max(self._size, len(self._tokens) - len(new) + 1), len(self._tokens) + 1):
            self._learn(self._tokens[end - self._size : end])

    def draft(self, length: int, permitted: Callable[[Sequence[int]], Sequence[int]]) -> DraftTree:
        """The n-grams that begin with the last token, and behind them the window.

        permitted: cuts a draft at the first token that must not follow the text.
        """
        # a short draft has room for a part of the window alone
        room = max(length - self._width * (self._size - 1), length // 2)
        tree = DraftTree()
        for guess in reversed(self._known.get(self._tokens[-1], ())):
            if len(tree) + len(guess) > room:
                break
            tree.add(permitted(guess))
        del self._places[: len(self._tokens) - self._start]  # steps without drafts have passed these
        self._start = len(self._tokens)
        while len(self._places) < self._width:
            self._places.append(self._random.choices(self._tokens, k=self._size - 1))
        self._computed, oldest = [], -1
        for guesses in self._places:
            node, nodes = oldest, []
            for token in guesses:
                if (child := tree.child(node, token)) is None:
                    child = tree.append(token, node)
                node = child
                nodes.append(node)
            oldest = nodes[0]
            self._computed.append(nodes)
        return tree.first(length)

    def judge(self, num_right: int, sampled: Sequence[int]) -> None:
        """Takes the model's token after the text and those after each drafted one, of which num_right were right."""
        places = []
        for guesses, nodes in zip(self._places, self._computed, strict=True):
            if nodes[-1] + 1 >= len(sampled):
                break  # there was no room for it in the step
            ngram = [*guesses, sampled[nodes[-1] + 1]]
            self._learn(ngram)
            places.append(ngram[1:])
        # each place has moved on by one token, and the text by one more for each right one
        self._places = places[num_right:]
        self._start += 1 + num_right

    def _learn(self, ngram: Sequence[int]) -> None:
        first, *rest = ngram
        known = self._known.setdefault(first, {})
        known.pop(tuple(rest), None)
        known[tuple(rest)] = None
        if len(known) > MOST_KNOWN:
            del known[next(iter(known))]

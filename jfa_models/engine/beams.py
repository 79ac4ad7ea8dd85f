"""Beam search on the host: which candidates survive, and when the search ends. Plain Python, float64 sums."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from jfa_models.decoding.params import BeamSearchParams


class Beam(NamedTuple):
    """Tokens generated after the prompt, and the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    total: float = 0.0


class Hypothesis(NamedTuple):
    """A finished continuation. score: total / length ** length_penalty."""

    score: float
    beam: Beam
    ended: bool  # by an end token; False: by max_tokens


class BeamSearch:
    """The beam search of one request. When all live beams have reported successors, `choose` selects the next beams.

    Source: the search of transformers' `generate(num_beams=...)`: of the 2 * width best candidates, an end token among
    the first width becomes a hypothesis, and the first width candidates without an end token stay live.

    Attributes:
      live: the current beams, best first.
      hypotheses: finished continuations, best first, at most beam_width.
      done: whether the search is finished: no better result is possible.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Sequence[int]):
        self.params = params
        self.live = [Beam()]
        self.hypotheses: list[Hypothesis] = []
        self.done = False
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._reports: dict[int, list[tuple[int, float]]] = {}

    def report(self, place: int, successors: Sequence[tuple[int, float]]) -> bool:
        """Records the likeliest successors of live[place], with log-probabilities; True if all beams have reported."""
        self._reports[place] = list(successors)
        return len(self._reports) == len(self.live)

    def choose(self) -> list[tuple[int, int]]:
        """The next live beams, as (index of the parent among the current ones, token); empty if the search is done."""
        width = self.params.beam_width
        candidates = [
            (self.live[place].total + logprob, place, token)
            for place, successors in self._reports.items()
            for token, logprob in successors
            if logprob > float("-inf")
        ]
        candidates.sort(key=lambda one: (-one[0], one[1], one[2]))
        chosen: list[tuple[int, int]] = []
        beams: list[Beam] = []
        for rank, (total, place, token) in enumerate(candidates[: 2 * width]):
            beam = Beam((*self.live[place].tokens, token), total)
            if token in self._eos:
                if rank < width:
                    self._end(beam, ended=True)
            elif len(beams) < width:
                chosen.append((place, token))
                beams.append(beam)
        self._reports.clear()
        length = len(beams[0].tokens) if beams else 0
        if beams and self._is_settled(length, beams[0].total):
            beams = []
        elif length >= self.params.max_tokens:
            for beam in beams:
                self._end(beam, ended=False)
            beams = []
        self.live = beams
        self.done = not beams
        return chosen if beams else []

    def _end(self, beam: Beam, *, ended: bool) -> None:
        score = beam.total / len(beam.tokens) ** self.params.length_penalty
        bisect.insort(self.hypotheses, Hypothesis(score, beam, ended), key=lambda one: -one.score)
        del self.hypotheses[self.params.beam_width :]

    def _is_settled(self, length: int, best: float) -> bool:
        if len(self.hypotheses) < self.params.beam_width:
            return False
        if self.params.early_stopping:
            return True
        return self.hypotheses[-1].score >= best / length**self.params.length_penalty

"""Beam search without a model: random log-probabilities, compared with an exhaustive search."""

import itertools
import math
import random

import pytest

from jfa_models.decoding.params import BeamSearchParams
from jfa_models.engine.beams import BeamSearch

EOS = 0


def language(seed, vocab_size):
    """Log-probabilities of the next token, given the tokens before it."""
    known = {}

    def next_logprobs(tokens):
        if tokens not in known:
            rng = random.Random(f"{seed} {tokens}")
            scores = [rng.gauss(0, 1.5) for _ in range(vocab_size)]
            total = math.log(sum(map(math.exp, scores)))
            known[tokens] = [score - total for score in scores]
        return known[tokens]

    return next_logprobs


def search(params, next_logprobs):
    beams = BeamSearch(params, [EOS])
    rounds = 0
    while not beams.done:
        rounds += 1
        assert len(beams.live) <= params.beam_width
        for place, beam in enumerate(beams.live):
            successors = sorted(enumerate(next_logprobs(beam.tokens)), key=lambda one: -one[1])
            complete = beams.report(place, successors[: 2 * params.beam_width])
        assert complete
        chosen = beams.choose()
        assert len(chosen) == len(beams.live)
    return beams, rounds


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_beam_wide_enough_to_keep_everything_finds_the_best_of_all(seed, penalty):
    vocab_size, length = 3, 3
    next_logprobs = language(seed, vocab_size)
    params = BeamSearchParams(beam_width=10, max_tokens=length, length_penalty=penalty)
    beams, _ = search(params, next_logprobs)
    scored = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(vocab_size), repeat=size):
            if EOS in tokens[:-1] or (tokens[-1] != EOS and size < length):
                continue
            total = sum(next_logprobs(tokens[:i])[token] for i, token in enumerate(tokens))
            scored.append((total / size**penalty, tokens))
    scored.sort(reverse=True)
    # fewer than ten beams are live at a time, so with ten none is dropped before it ends
    assert [found.beam.tokens for found in beams.hypotheses][:3] == [tokens for _, tokens in scored][:3]
    assert beams.hypotheses[0].score == pytest.approx(scored[0][0])


def step_by_step(params, next_logprobs):
    """The same rules on lists of sequences, with all candidates instead of the likeliest."""
    live, ended = [((), 0.0)], []
    for length in range(1, params.max_tokens + 1):
        candidates = [
            (total + logprob, (*tokens, token))
            for tokens, total in live
            for token, logprob in enumerate(next_logprobs(tokens))
        ]
        candidates.sort(reverse=True)
        ended += [
            (total / length**params.length_penalty, tokens)
            for total, tokens in candidates[: params.beam_width]
            if tokens[-1] == EOS and not params.ignore_eos
        ]
        ended = sorted(ended, reverse=True)[: params.beam_width]
        live = [(tokens, total) for total, tokens in candidates if tokens[-1] != EOS or params.ignore_eos]
        live = live[: params.beam_width]
        enough = len(ended) == params.beam_width
        if enough and (params.early_stopping or ended[-1][0] >= live[0][1] / length**params.length_penalty):
            return ended
    ended += [(total / params.max_tokens**params.length_penalty, tokens) for tokens, total in live]
    return sorted(ended, reverse=True)[: params.beam_width]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_agrees_with_a_search_over_all_candidates(width, early_stopping, ignore_eos):
    for seed, penalty in itertools.product(range(6), (0.5, 1.0, -1.0)):
        next_logprobs = language(seed, 7)
        params = BeamSearchParams(
            beam_width=width,
            max_tokens=8,
            length_penalty=penalty,
            early_stopping=early_stopping,
            ignore_eos=ignore_eos,
        )
        beams, _ = search(params, next_logprobs)
        assert [found.beam.tokens for found in beams.hypotheses] == [
            tokens for _, tokens in step_by_step(params, next_logprobs)
        ]


def test_early_stopping_ends_the_search_earlier():
    next_logprobs = language(3, 4)
    _, early = search(
        BeamSearchParams(beam_width=2, max_tokens=30, early_stopping=True, length_penalty=3), next_logprobs
    )
    _, late = search(BeamSearchParams(beam_width=2, max_tokens=30, length_penalty=3), next_logprobs)
    assert early < late


REFUSED = {
    "beam_width": (dict(beam_width=11), "beam_width must be an integer from 1 to 10, got 11; there are 20 candidates"),
    "max_tokens": (dict(max_tokens=0), "max_tokens must be an integer from 1 to 2147483647, got 0; it limits the"),
    "length_penalty": (dict(length_penalty=11), r"length_penalty must be a number in \[-10, 10\], got 11; use 0"),
    "early_stopping": (dict(early_stopping="never"), "early_stopping must be True or False, got 'never'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**fields)

"""Layers with a sliding window: ring buffers and pages are reused, and logits are those of a full forward pass."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import sharp_decoder, tiny_config

from jfa_models import LanguageModel, SamplingParams, Session
from jfa_models.decoding.options import CacheOptions

CONFIG = tiny_config(num_layers=3, context_length=256)
WINDOWS = (6, None, 6)
CACHES = {
    "ring": CacheOptions(),
    "pages": CacheOptions(kind="paged", page_size=4),
    "int8": CacheOptions(kind="paged", page_size=4, kv_dtype="int8"),
}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)


@functools.cache
def model(cache="ring"):
    decoder = sharp_decoder(dataclasses.replace(CONFIG, windows=WINDOWS))
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    return LanguageModel(decoder=decoder, params=params, cache_options=CACHES[cache])


@pytest.fixture
def small(monkeypatch):
    """Ring buffers and pages that a text of 100 tokens wraps around many times."""
    monkeypatch.setattr("jfa_models.decoding.caches.SLACK", 3)
    monkeypatch.setattr("jfa_models.decoding.caches.PREFILL_CHUNK", 16)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


@pytest.mark.parametrize("cache", CACHES)
def test_rows_of_different_lengths_wrap_around(small, cache):
    prompts = [prompt(100), prompt(7, 1), prompt(41, 2)]
    results = model(cache).generate(prompts, GREEDY)
    for tokens, result in zip(prompts, results, strict=True):
        written = result.outputs[0].token_ids
        logits = np.asarray(model().logits([tokens + list(written)]))[0, len(tokens) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        got = np.array([entry[token].logprob for token, entry in zip(written, result.outputs[0].logprobs, strict=True)])
        np.testing.assert_allclose(got, logprobs[range(len(written)), written], atol=0.3 if cache == "int8" else 1e-4)


def test_a_window_keeps_only_the_tokens_it_needs(small):
    cache = model().new_cache(batch=2, capacity=256)
    assert [k.shape[1] for k in cache.k] == [9, 256, 9]
    cache = model("pages").new_cache(batch=2, capacity=256)
    assert [k.shape[0] for k in cache.k] == [1 + 2 * 8, 1 + 2 * 64, 1 + 2 * 8]


@pytest.mark.parametrize("cache", ["ring", "pages"])
@pytest.mark.parametrize("kept", [0, 5, 58, 60, 66])
def test_a_session_reuses_as_much_as_its_windows_allow(small, cache, kept):
    """After another prompt with the same first tokens, the answer is that of a new session."""
    first, second = prompt(60), prompt(60)[:kept] + prompt(12, 5)
    session = Session()
    answer = list(model(cache).stream(first, GREEDY, session=session))[-1].outputs[0].token_ids
    if kept > 60:
        second = first + list(answer)[: kept - 60] + prompt(12, 5)
    [*_, got] = model(cache).stream(second, GREEDY, session=session)
    [want] = model(cache).generate([second], GREEDY)
    assert got.outputs[0].token_ids == want.outputs[0].token_ids


def test_a_session_that_grows_keeps_its_windows(small):
    session, tokens = Session(), prompt(200)
    for length in (20, 120, 240):  # the cache grows from 64 slots... to 512
        text = (tokens + tokens)[:length]
        [*_, got] = model().stream(text, GREEDY, session=session)
        [want] = model().generate([text], GREEDY)
        assert got.outputs[0].token_ids == want.outputs[0].token_ids

"""Prefill that computes a part of the scores: exact where it computes all, close where it keeps what matters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from golden import GOLDEN
from tiny_model import byte_tokenizer, sharp_decoder, tiny_config

import jfa
from jfa_models import LLM, cli
from jfa_models.decoding import caches
from jfa_models.decoding.language_model import LanguageModel, Session
from jfa_models.decoding.options import CacheOptions
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained
from jfa_models.model import sparse_attention
from jfa_models.model.sparse_config import SparseConfig

PATTERNS = ("vertical-slash", "top-k", "window")
PROMPTS = ["The first prompt is longer than four tiles of sixteen tokens and a bit.", "Another, shorter."]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sparse_attention, "BLOCK", 16)
    monkeypatch.setattr(sparse_attention, "LAST_QUERIES", 8)
    monkeypatch.setattr(caches, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(caches, "SMALLEST_CAPACITY", 64)


@functools.lru_cache
def decoder_of(windows):
    return sharp_decoder(dataclasses.replace(tiny_config(num_layers=2, context_length=128), windows=windows))


def model(sparse=None, *, windows=(), **options):
    decoder = decoder_of(windows)
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    given = dict(cache_options=CacheOptions(**options), tokenizer=byte_tokenizer())
    return LanguageModel(decoder=decoder, params=params, sparse_prefill=sparse and SparseConfig.of(sparse), **given)


def tokens(results):
    return [result.outputs[0].token_ids for result in results]


def arrays(t=150, hq=4, hkv=2, d=8):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, t, h, d)) for key, h in zip(keys, (hq, hkv, hkv), strict=True))
    return q, k, v, jnp.array([t, 83])


@pytest.mark.parametrize(
    "options", [{}, {"windows": (5, None)}, {"kind": "paged", "page_size": 4}], ids=["slots", "window", "pages"]
)
def test_a_fraction_of_1_gives_the_exact_tokens(options):
    want = model(**options).generate(PROMPTS, GREEDY)
    assert tokens(model("vertical-slash:1", **options).generate(PROMPTS, GREEDY)) == tokens(want)


def test_a_fraction_of_1_gives_the_exact_tokens_of_a_model_with_states():
    plain, sparse = (
        from_pretrained(GOLDEN / "granitemoehybrid", dtype="float32", sparse_prefill=given)
        for given in (None, "top-k:1")
    )
    prompts = [list(range(3, 40)), [5, 6, 7]]
    assert tokens(sparse.generate(prompts, GREEDY)) == tokens(plain.generate(prompts, GREEDY))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_large_fraction_is_close_to_the_exact_result(pattern):
    q, k, v, lengths = arrays()
    valid = (jnp.arange(150) < lengths[:, None])[..., None, None]
    exact = jfa.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)

    @functools.partial(jax.jit, static_argnums=0)
    def error(sparse):
        out = sparse_attention.sparse_attention(q, k, v, sparse, query_seq_lengths=lengths, scale=None)
        return jnp.linalg.norm(jnp.where(valid, out - exact, 0)) / jnp.linalg.norm(jnp.where(valid, exact, 0))

    small, large = (float(error(SparseConfig(pattern=pattern, fraction=each))) for each in (0.2, 0.95))
    assert large < 0.35 and large < 0.6 * small


def test_vertical_slash_finds_the_lines_that_matter():
    """A key that all queries look at, and one at a distance: the window of the same size misses both."""
    q, k, v, _ = arrays(d=32)
    codes = 1.2 * jax.random.rademacher(jax.random.key(3), (150, 24), jnp.float32)
    q = (0.1 * q).at[..., 0].add(6.0).at[..., 8:].add(jnp.roll(codes, 110, axis=0)[:, None])
    k = (0.1 * k).at[:, 40, :, 0].add(6.0).at[..., 8:].add(codes[:, None])
    exact = jfa.dot_product_attention(q, k, v, is_causal=True)
    errors = {}
    for pattern in ("vertical-slash", "window"):
        sparse = SparseConfig(pattern=pattern, fraction=0.8)
        attend = functools.partial(sparse_attention.sparse_attention, config=sparse, query_seq_lengths=None, scale=None)
        errors[pattern] = float(jnp.abs(jax.jit(attend)(q, k, v) - exact)[:, 115:].mean())
    assert errors["vertical-slash"] < 0.2 * errors["window"]


def test_the_weights_of_lines_are_those_of_the_last_queries():
    q, k, _, lengths = arrays()
    found = sparse_attention._weights_of_lines(q, k, lengths, 0.3)
    n = -(-150 // 16)
    for row, length in enumerate(lengths.tolist()):
        scores = 0.3 * np.einsum("ihd,jhd->hij", q[row], np.repeat(k[row], 2, axis=1))
        vertical, distance = np.zeros((4, 16 * n)), np.zeros((4, 16 * n))
        for i in range(length - 8, length):
            weights = np.exp(scores[:, i, : i + 1])
            weights /= weights.sum(1, keepdims=True)
            vertical[:, : i + 1] += weights
            distance[:, : i + 1] += weights[:, ::-1]
        share = np.arange(16) / 16
        own, following = (distance.reshape(4, n, 16) * each for each in (1 - share, share))
        slash = own.max(-1)
        slash[:, 1:] = np.maximum(slash[:, 1:], following.max(-1)[:, :-1])
        np.testing.assert_allclose(found[0][row], vertical.reshape(4, n, 16).max(-1), atol=1e-5)
        np.testing.assert_allclose(found[1][row], slash, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7])
def test_vertical_slash_computes_at_most_the_fraction(fraction):
    q, k, _, lengths = arrays()
    grid = sparse_attention._vertical_slash(q, k, lengths, fraction, 0.3)
    for row, length in enumerate(lengths.tolist()):
        tiles = -(-length // 16)
        own = np.asarray(grid)[row, :, :tiles, :tiles]
        assert own[:, np.arange(tiles), np.arange(tiles)].all()  # each query sees itself
        assert own.sum((1, 2)).max() <= max(tiles, fraction * tiles * (tiles + 1) / 2)


def test_a_long_prompt_is_one_chunk_and_what_follows_it_is_dense(monkeypatch):
    sparse, plain = model("vertical-slash:0.5"), model()
    shapes = []
    whole = sparse.steps.prefill_sparse

    def counted(params, cache, hidden, tokens, *rest, **more):
        shapes.append(tokens.shape)
        return whole(params, cache, hidden, tokens, *rest, **more)

    monkeypatch.setattr(sparse.steps, "prefill_sparse", counted)
    session = Session()
    *_, first = sparse.stream(PROMPTS[0], GREEDY, session=session)
    # 71 bytes: 80 tokens, a multiple of an eighth of 128
    assert shapes == [(1, 80)] and len(first.prompt_token_ids) == 71
    *_, _ = sparse.stream([*first.prompt_token_ids, *first.outputs[0].token_ids, 40, 41], GREEDY, session=session)
    assert len(shapes) == 1
    # a step of decoding is the same program on the same cache
    state = sparse.start(PROMPTS[0], GREEDY)
    again = jax.tree.map(jnp.copy, state)
    one, other = sparse.steps.decode(sparse.params, state)[1], plain.steps.decode(plain.params, again)[1]
    assert np.array_equal(one.sampled.token, other.sampled.token)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a-shape:0.1", "pattern of sparse attention must be one of vertical-slash, top-k, window, got 'a-shape'"),
        ("top-k:0", "fraction of sparse attention must be above 0 and at most 1, got 0; 0.1 computes"),
        ("top-k:1.5", "must be above 0 and at most 1, got 1.5"),
        ("window", "must be PATTERN:FRACTION, such as top-k:0.25, got 'window'"),
        ("window:few", "must be PATTERN:FRACTION, such as top-k:0.25, got 'window:few'"),
        ("window:nan", "must be PATTERN:FRACTION"),
    ],
)
def test_invalid_patterns_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained("smollm2", sparse_prefill=text)


def test_models_that_it_does_not_change_are_refused():
    with pytest.raises(ValueError, match=r"this mamba2 model has only layers with a state.*; leave it out"):
        from_pretrained(GOLDEN / "mamba2", sparse_prefill="window:0.5")
    with pytest.raises(ValueError, match=r"sparse_prefill=top-k:0.5: this llama model has only layers with a window"):
        model("top-k:0.5", windows=(5, 9))


def test_what_cannot_honor_it_refuses_it():
    with pytest.raises(ValueError, match=r"has no pages for whole prompts.*use cache='contiguous'"):
        model("top-k:0.5", windows=(5, None), kind="paged")
    with pytest.raises(ValueError, match="an engine prefills prompts in parts"):
        LLM(model("top-k:0.5"))
    mesh = jax.make_mesh((2,), ("context",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="but the mesh divides them over context; use a mesh without 'context'"):
        LanguageModel.random(tiny_config(num_layers=1, context_length=64), sparse_prefill="top-k:0.5", mesh=mesh)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "--speculative-config", '{"method": "ngram"}'], "cannot be combined with --speculative-config"),
        (["--batch-file", __file__, "--output", "out"], "cannot be combined with --batch-file, whose engine"),
    ],
)
def test_the_command_refuses_what_uses_an_engine(arguments, message):
    done = CliRunner().invoke(cli.commands, ["generate", "--sparse-prefill", "top-k:0.5", *arguments])
    assert done.exit_code == 2 and message in done.stderr

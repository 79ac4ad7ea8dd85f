"""Attention to the first and the last tokens of texts of any length (StreamingLLM), against the paper's description."""

import dataclasses
import functools
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from engines import assert_clean
from flax import nnx
from golden import GOLDEN
from runs import run
from tiny_model import byte_tokenizer, counted_compilations, folder_with_text, sharp_decoder, tiny_config

from jfa_models import (
    BeamSearchParams,
    Engine,
    LanguageModel,
    SamplingParams,
    Session,
    cli,
    from_pretrained,
    training,
)
from jfa_models.decoding import caches
from jfa_models.decoding.options import CacheOptions
from jfa_models.model.attention import Attention
from jfa_models.model.config import StreamingConfig
from jfa_models.model.decoder import Decoder

WINDOW, SINKS = 8, 3
CONTEXT = 256
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPT = [int(x) for x in np.random.default_rng(0).integers(3, 250, 45)]


def config(num_layers=2, **changes):
    changes = dict(streaming=StreamingConfig(window=WINDOW, num_sinks=SINKS)) | changes
    return dataclasses.replace(tiny_config(num_layers=num_layers, context_length=CONTEXT), **changes)


@functools.cache
def language_model(cache="paged", kv_dtype=None, page_size=4, context_length=CONTEXT, windows=()):
    decoder = sharp_decoder(config(context_length=context_length, windows=windows))
    options = CacheOptions(kind=cache, kv_dtype=kv_dtype, page_size=page_size)
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    return LanguageModel(decoder=decoder, params=params, cache_options=options, tokenizer=byte_tokenizer())


def rotated(x, positions, frequencies):
    angle = np.asarray(positions)[:, None, None] * frequencies
    first, second = np.split(x, 2, axis=-1)
    turned = first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
    return np.concatenate(turned, -1)


def as_in_the_paper(layer, x, own):
    """Each query over a cache of the first and the last tokens, whose positions are their places in that cache."""
    projected = (np.asarray(project(x), np.float64)[0] for project in (layer.q, layer.k, layer.v))
    q, k, v = (part.reshape(x.shape[1], -1, own.head_dim) for part in projected)
    frequencies = np.asarray(own.rope.inverse_frequencies(own.head_dim, own.context_length))
    group, rows = q.shape[1] // k.shape[1], []
    for p in range(x.shape[1]):
        kept = [i for i in range(p + 1) if i < SINKS or i > p - WINDOW]
        keys = rotated(k[kept], range(len(kept)), frequencies).repeat(group, axis=1)
        query = rotated(q[p : p + 1], [len(kept) - 1], frequencies)[0]
        scores = np.einsum("hd,nhd->hn", query, keys) / np.sqrt(own.head_dim)
        cap = own.attention_soft_cap
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        rows.append(np.einsum("hn,nhd->hd", weights, v[kept].repeat(group, axis=1)).reshape(-1))
    return np.asarray(layer.o(jnp.asarray(np.stack(rows)[None], jnp.float32)))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_positions_are_places_in_the_cache(soft_cap, monkeypatch):
    own = config(num_layers=1, attention_soft_cap=soft_cap)
    decoder = Decoder(own, dtype=jnp.float32, rngs=nnx.Rngs(1))
    got = {}
    call = Attention.__call__

    def keeping(self, x, *args):
        out, cache = call(self, x, *args)
        got.update(x=x.value, out=out - args[-1], layer=self)  # the last one is the residual
        return out, cache

    monkeypatch.setattr(Attention, "__call__", keeping)
    decoder(jnp.asarray([PROMPT], jnp.int32))
    want = as_in_the_paper(got["layer"], got["x"], own)
    np.testing.assert_allclose(got["out"], want, rtol=0, atol=1e-5 * np.abs(want).max())


def greedy_by_logits(model, count):
    """By forward passes without a cache."""
    ids = list(PROMPT)
    for _ in range(count):
        padded = np.zeros((1, len(PROMPT) + count), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(np.asarray(model.logits(padded))[0, len(ids) - 1].argmax()))
    return tuple(ids[len(PROMPT) :])


def tokens(results):
    return [one.token_ids for result in results for one in result.outputs]


@pytest.mark.parametrize(("cache", "page_size"), [("contiguous", 4), ("paged", 1), ("paged", 4)])
def test_a_cache_gives_the_tokens_of_whole_texts(cache, page_size, monkeypatch):
    monkeypatch.setattr(caches, "PREFILL_CHUNK", 16)
    model = language_model(cache, page_size=page_size)
    want = greedy_by_logits(model, 24)
    assert tokens(model.generate([PROMPT, PROMPT[:5], PROMPT], GREEDY))[::2] == [want, want]
    *_, last = model.stream(PROMPT, GREEDY)
    assert last.outputs[0].token_ids == want


def test_layers_with_a_window_of_their_own_keep_it():
    plain = dataclasses.replace(config(windows=(6, None)), streaming=None)
    assert plain.patterns == (6, None) and config(windows=(6, None)).patterns == (6, WINDOW)
    assert [config(windows=(6, None)).is_streaming(layer) for layer in (0, 1)] == [False, True]
    assert config(windows=(6, None)).cache_elements(100) == 2 * 2 * 8 * (6 + WINDOW + SINKS)
    contiguous, paged = (language_model(cache, windows=(6, None)) for cache in ("contiguous", "paged"))
    want = tokens(contiguous.generate([PROMPT], GREEDY))
    assert want == tokens(paged.generate([PROMPT], GREEDY)) == [greedy_by_logits(paged, 24)]


@pytest.mark.parametrize(
    ("kv_dtype", "speculation", "tie"),
    [
        run(None, None, 1e-3, quick=True),
        run(None, {"method": "ngram", "adaptive": False}, 1e-3, quick=False, soak=True),
        run(None, {"method": "self", "num_layers": 1, "adaptive": False}, 1e-3, quick=False, soak=True),
        run(None, {"method": "lookahead", "adaptive": False}, 1e-3, quick=False, soak=True),
        run("int8", None, 0.05, quick=False, soak=True),
        run("int4", None, 0.5, quick=False, soak=True),
    ],
)
def test_an_engine_gives_the_tokens_of_generate(kv_dtype, speculation, tie):
    """With shared prefixes, preemption, and pages that hold fewer tokens than the texts have."""
    model, rng = language_model(kv_dtype=kv_dtype), random.Random(0)
    shared = [PROMPT[: rng.randint(1, 45)] for _ in range(12)]
    prompts = [ids + rng.choices(range(3, 250), k=rng.randint(1, 4)) for ids in shared]
    params = [dataclasses.replace(GREEDY, max_tokens=rng.randint(4, 40), logprobs=20) for _ in prompts]
    want = model.generate(prompts, params)
    sizes = dict(max_num_seqs=4, page_size=4, num_pages=16, max_num_batched_tokens=16)
    engine = Engine(model, kv_dtype=kv_dtype, speculative_config=speculation, **sizes)
    engine.warm_up(params)
    with counted_compilations() as compilations:
        for _ in range(2):
            for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                engine.add_request(prompt, one, number=number, request_id=str(number))
            for result in engine.run():
                assert_same(result.outputs[0], want[int(result.request_id)].outputs[0], tie)
    assert not compilations
    metrics = engine.metrics()
    assert metrics.preemptions > 0 and metrics.prefix_hits > 0
    assert_clean(engine)


def assert_same(got, want, tie):
    """The same tokens, up to a tie that rounding may decide."""
    for place, (one, other) in enumerate(zip(got.token_ids, want.token_ids, strict=True)):
        if one != other:
            likely = want.logprobs[place]
            assert one in likely and likely[other].logprob - likely[one].logprob < tie
            return


def test_a_text_is_longer_than_its_pages():
    """Ten pages have the first 3 tokens, a window of 8, and a step of 16; 40 tokens, of a text of 145."""
    model = language_model()
    engine = Engine(model, max_num_seqs=1, page_size=4, num_pages=11, max_num_batched_tokens=16)
    long = dataclasses.replace(GREEDY, max_tokens=100)
    engine.add_request(PROMPT, long)
    most, results = 0.0, []
    while engine.has_unfinished:
        results = engine.step()
        most = max(most, engine.metrics().cache_use)
    want = tokens(model.generate([PROMPT], long))
    assert tokens(results) == want and most < 1
    session, ids = Session(), list(PROMPT)
    for _ in range(2):
        *_, last = model.stream(ids, dataclasses.replace(GREEDY, max_tokens=50), session=session)
        ids += last.outputs[0].token_ids
    assert tuple(ids[len(PROMPT) :]) == want[0]


@pytest.mark.exhaustive
def test_beams_and_samples():
    model = language_model()
    engine = Engine(model, max_num_seqs=8, page_size=4, num_pages=64, max_num_batched_tokens=16)
    sampled = SamplingParams(temperature=1, seed=3, n=3, max_tokens=30, ignore_eos=True)
    engine.add_request(PROMPT, sampled)
    [found] = engine.run()
    want = [model.generate([PROMPT], dataclasses.replace(sampled, n=1))]
    assert tokens([found])[0] == tokens(want[0])[0] and len(set(tokens([found]))) == 3
    engine.add_request(PROMPT, BeamSearchParams(beam_width=3, max_tokens=30, ignore_eos=True))
    [beams] = engine.run()
    assert len(set(tokens([beams]))) == 3
    assert_clean(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_sinks=4), "attention_sinks=4 has no effect without attention_window"),
        (
            dict(attention_window=0),
            "attention_window must be at least 1, attention_sinks at least 0, and both together",
        ),
        (dict(attention_window=250, attention_sinks=7), "at most 256, the model's context, got 250 and 7"),
        (dict(context_length=257), "must be 1 to 256, the model's own, got 257"),
        (dict(attention_window=8, context_length=0), "got 0"),
        (dict(attention_window=8, sparse_prefill="window:0.5"), "has only layers with a window"),
        (dict(attention_window=8, tensor_parallel=2), "attention_window is not offered for a model that is divided"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_pretrained(GOLDEN / "llama3_tiny", dtype="float32", **options)


def test_models_without_layers_that_see_all_are_refused():
    with pytest.raises(ValueError, match=r"attention_window=8: no layer of this mamba2 model sees the whole context"):
        from_pretrained(GOLDEN / "mamba2", attention_window=8)
    # layers with a longer window of their own still need the context that they were trained with
    model = from_pretrained(GOLDEN / "gemma3", dtype="float32", attention_window=8, context_length=1000)
    assert model.config.context_length == 1000


def test_it_is_neither_saved_nor_trained(tmp_path):
    model = from_pretrained(GOLDEN / "llama3_tiny", dtype="float32", attention_window=8, context_length=1000)
    with pytest.raises(ValueError, match="attention_window is not part of a checkpoint: load the model without it"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="that was loaded with attention_window cannot be trained"):
        training.Trainable(model, training.new_adapter(model, rank=2))


def test_commands_know_it(tmp_path):
    folder = folder_with_text(GOLDEN / "llama3_tiny", tmp_path / "model")
    given = ["--model", str(folder), "--attention-window", "8", "--attention-sinks", "2", "--max-model-len", "300"]
    done = CliRunner().invoke(cli.commands, ["generate", *given, "--max-tokens", "280", "--json", "aa"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["token_ids"]
    done = CliRunner().invoke(cli.commands, ["generate", "--model", str(folder), "--attention-sinks", "2", "a"])
    assert "attention_sinks=2 has no effect without attention_window" in str(done.exception)

"""Layers with a state: however a text is cut, padded, packed or continued, it is the same text."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from golden import GOLDEN
from runs import run
from safetensors.numpy import load_file

import jfa
from jfa_models import Engine, LanguageModel, SamplingParams, from_pretrained
from jfa_models.checkpoints.peft import read_adapter, save_adapter
from jfa_models.decoding.language_model import Session
from jfa_models.decoding.steps import Batch as EngineBatch
from jfa_models.training import Batch, Trainable, make_optimizer, make_train_step, new_adapter, new_state

NAMES = ("mamba2", "granitemoehybrid", "qwen3_next")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
CLOSE = 2e-4  # of the spread of the logits: sums are in other orders


@functools.cache
def loaded(name, cache="contiguous"):
    return from_pretrained(GOLDEN / name, dtype="float32", cache=cache)


def tokens_of(name):
    return np.load(GOLDEN / f"{name}.npz")["input_ids"]


def scored(model, tokens, chunks, width):
    """The logits [2, t, vocab] of two rows, whose chunks are padded to a width, and the cache."""
    cache = model.new_cache(batch=2, capacity=64)
    logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    done = np.zeros(2, int)
    for lengths in chunks:
        padded = np.full((2, width), 7, np.int32)
        for row, length in enumerate(lengths):
            padded[row, :length] = tokens[row, done[row] : done[row] + length]
        before = jax.device_get(cache.states)
        cache, found = model.steps.score(model.params, cache, padded, np.array(lengths, np.int32))
        for row, length in enumerate(lengths):
            logits[row, done[row] : done[row] + length] = found[row, :length]
            if length == 0:
                after = jax.device_get(cache.states)
                for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
                    assert np.array_equal(old[row], new[row])
        done += lengths
    assert (done == tokens.shape[1]).all() and cache.kv_len.tolist() == done.tolist()
    return logits, cache.states


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_any_size_end_in_the_same_states(name):
    model, tokens = loaded(name), tokens_of(name)
    want, states = scored(model, tokens, [(24, 24)], 24)
    cuts = {
        "chunks": ([(1, 5), (0, 2), (13, 0), (10, 4), (0, 13)], 13),
        "one by one": ([(1, 0), (0, 1)] + [(1, 1)] * 23, 1),
    }
    for cut, (chunks, width) in cuts.items():
        got, after = scored(model, tokens, chunks, width)
        assert np.abs(got - want).max() < CLOSE * want.std(), cut
        for x, y in zip(jax.tree.leaves(states), jax.tree.leaves(after), strict=True):
            np.testing.assert_allclose(x, y, atol=CLOSE * np.abs(x).max(), err_msg=cut)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        run("mamba2", "contiguous", quick=True),
        run("granitemoehybrid", "paged", quick=True),
        run("granitemoehybrid", "contiguous", quick=False),
        run("qwen3_next", "contiguous", quick=False),
    ],
)
def test_a_batch_of_prompts_in_chunks_gives_each_its_own_tokens(name, cache, monkeypatch):
    monkeypatch.setattr("jfa_models.decoding.caches.PREFILL_CHUNK", 16)
    model, rows = loaded(name, cache), tokens_of(name).tolist()
    prompts = [rows[0], rows[1][:3], rows[1], rows[0][:17], rows[0]]
    got = [result.outputs[0].token_ids for result in model.generate(prompts, GREEDY, max_batch=4)]
    monkeypatch.undo()
    for prompt, tokens in zip(prompts, got, strict=True):
        *_, alone = model.stream(prompt, GREEDY)
        assert alone.outputs[0].token_ids == tokens


@pytest.mark.parametrize("name", NAMES)
def test_packed_texts_know_nothing_of_each_other(name):
    model, (text, other) = loaded(name), tokens_of(name)
    graphdef, state = nnx.split(model.decoder)
    decoder = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), model.params))
    packed = np.concatenate([text[:9], other[:2], text[9:20], other])[None]
    segments = np.repeat([3, 4, 1, 2], [9, 2, 11, 24])[None]
    hidden, _ = jax.jit(lambda tokens, segments: decoder(tokens, segments=segments))(packed, segments)
    got = np.asarray(decoder.unembed(hidden))[0]
    start = 0
    for part in (text[:9], other[:2], text[9:20], other):
        want = np.asarray(model.logits(np.pad(part, (0, 24 - len(part)))[None], lengths=[len(part)]))[0, : len(part)]
        assert np.abs(got[start : start + len(part)] - want).max() < CLOSE * want.std()
        start += len(part)


def test_a_session_computes_a_prompt_again_unless_it_goes_on(monkeypatch):
    model, computed = loaded("granitemoehybrid"), []
    prefill = model.steps.prefill

    def spy(params, cache, hidden, tokens, lengths, *adapter, **adapters):
        computed.append(int(lengths[0]))
        return prefill(params, cache, hidden, tokens, lengths, *adapter, **adapters)

    monkeypatch.setattr(model.steps, "prefill", spy)
    session = Session()

    def turn(prompt, stop_after=None):
        computed.clear()
        stream = model.stream(prompt, GREEDY, session=session)
        if stop_after is not None:
            answer = [next(stream) for _ in range(stop_after)][-1].outputs[0].token_ids
            stream.close()
            return [*prompt, *answer], sum(computed)
        *_, last = stream
        new = sum(computed)
        [want] = model.generate([prompt], GREEDY)
        assert last.outputs[0].token_ids == want.outputs[0].token_ids
        return [*prompt, *last.outputs[0].token_ids], new

    held, new = turn([5, 6, 7])
    assert new == 3
    held, new = turn([*held, 8, 9])
    assert new == 3  # the last token of an answer is not in the states
    assert turn(held[:-2])[1] == len(held) - 2  # the states cannot go back
    assert turn([5, 6, 90, 7])[1] == 4
    held, _ = turn([5, 6, 7, 8], stop_after=3)
    assert turn([*held, 10, 11])[1] == 2  # a step that ran ahead has added the last token


def test_another_adapter_starts_the_states_of_a_session_over():
    model = from_pretrained(GOLDEN / "mamba2", dtype="float32")
    adapter = new_adapter(model, rank=2)
    noisy = {
        module: {
            kind: np.random.default_rng(0).standard_normal(x.shape).astype(np.float32) for kind, x in kinds.items()
        }
        for module, kinds in adapter.tensors.items()
    }
    model.load_adapter("noisy", dataclasses.replace(adapter, tensors=noisy))
    session, prompts = Session(), ([5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10])
    for prompt, name in zip(prompts, (None, "noisy", None), strict=True):
        *_, last = model.stream(prompt, GREEDY, session=session, adapter=name)
        assert [last] == model.generate([prompt], GREEDY, adapter=name)


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_generate_and_quantized_ones_stay_close(name):
    config = loaded(name).config
    model = LanguageModel.random(config, dtype="bfloat16")
    assert model.config.num_params == sum(x.size for x in model.params)
    [result] = model.generate([[1, 2, 3]], GREEDY)
    assert len(result.outputs[0].token_ids) == 8
    exact, tokens = loaded(name), tokens_of(name)
    rounded = from_pretrained(GOLDEN / name, dtype="float32", quantization="int8")
    kinds = {name.rpartition(".")[2]: type(x) for name, x in zip(rounded.names, rounded.params, strict=True)}
    assert kinds["weight"] is jfa.QuantizedArray and kinds["kernel"] is not jfa.QuantizedArray
    want = np.asarray(exact.logits(tokens))
    assert np.abs(np.asarray(rounded.logits(tokens)) - want).mean() < 0.15 * want.std()


@pytest.mark.parametrize(("with_adapter", "remat"), [(True, "all"), (False, "none")])
def test_training_steps_lower_the_loss_of_a_hybrid(with_adapter, remat):
    model = loaded("granitemoehybrid").with_layers(2)
    trainable = Trainable(model, new_adapter(model, rank=4) if with_adapter else None, remat=remat)
    optimizer = make_optimizer(learning_rate=3e-2, num_steps=12)
    state = new_state(trainable.start(model), optimizer)
    tokens = np.random.default_rng(0).integers(3, 96, (1, 2, 24)).astype(np.int32)
    segments = np.repeat([[[1, 2, 0]]], 8, axis=2).repeat(2, axis=1).astype(np.int32)
    is_target = np.tile(np.arange(24) % 8 > 0, (1, 2, 1)) & (segments > 0)
    step = make_train_step(trainable, optimizer)
    losses = []
    for _ in range(12):
        state, metrics = step(trainable.base, state, Batch(tokens, segments, is_target))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0] and np.isfinite(losses).all()


def test_an_adapter_of_mamba_has_the_names_of_its_checkpoint(tmp_path):
    model = loaded("mamba2")
    adapter = new_adapter(model, rank=2)
    save_adapter(tmp_path, adapter, prefix="backbone.")
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.backbone.layers.1.mixer.in_proj.lora_A.weight" in names
    again = read_adapter(tmp_path, model.config, model.shapes)
    assert again.tensors.keys() == adapter.tensors.keys()


@pytest.mark.parametrize("name", NAMES)
def test_accepted_tokens_enter_the_states_and_refused_ones_leave_no_trace(name):
    """A step that verifies drafts of none, some or all right tokens, beside a row without drafts and one of padding."""
    model, tokens = loaded(name), tokens_of(name)[:, :20]
    engine = Engine(model, max_num_seqs=5, page_size=32, num_pages=9, max_model_len=32, num_state_snapshots=2)
    steps, slots = model.steps, [4, 2, 0, 3]
    tables = np.array([[1], [2], [3], [4], [0]], np.int32)

    def with_rows(cache, kv_len):
        return dataclasses.replace(cache, page_tables=(tables,), kv_len=np.array(kv_len, np.int32))

    def batch_of(parts, last):
        start = np.cumsum([0, *map(len, parts), 0], dtype=np.int32)
        padded = np.full(32, 7, np.int32)
        padded[: start[-1]] = np.concatenate(parts)
        slot = np.array([*slots, engine._launcher.cache.states.num_rows], np.int32)
        return EngineBatch(tokens=padded, query_start=start, slot=slot, last=np.zeros(5, np.int32) if last else None)

    texts = [*tokens, *tokens[::-1]]
    known, right, drafted = [5, 9, 0, 7], [1, 3, 4, 1], [4, 4, 4, 1]  # right: with the token before the drafts
    cache = with_rows(engine._launcher.cache, [0] * 5)
    first = batch_of([text[:n] for text, n in zip(texts, known, strict=True)], last=True)
    cache, *_ = steps.advance(model.params, cache, np.zeros(5, np.int32), first)
    before, unused = jax.device_get(cache.states), [1, 5, 6]
    parts = [text[n : n + count] for text, n, count in zip(texts, known, drafted, strict=True)]
    sampled = np.full(32, -1, np.int32)
    for start, count, part in zip(np.cumsum([0, *drafted]), right, parts, strict=False):
        sampled[start : start + count - 1] = part[1:count]
    batch = batch_of(parts, last=False)
    cache = with_rows(cache, [*known, 0])
    cache, _, _, pending = steps.advance(model.params, cache, np.zeros(5, np.int32), batch)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(cache.states)), strict=True):
        assert np.array_equal(old, new)
    after = steps.enter(model.params, with_rows(cache, [*known, 0]), pending, batch, sampled).states
    alone = model.new_cache(batch=4, capacity=64)
    lengths = np.array(known) + right
    padded = np.stack([text[:16] for text in texts]).astype(np.int32)
    alone, _ = steps.score(model.params, alone, padded, lengths.astype(np.int32))
    for want, old, got in zip(*map(jax.tree.leaves, (alone.states, before, after)), strict=True):
        assert np.array_equal(got[np.array(unused)], old[np.array(unused)])
        for row, slot in enumerate(slots):
            assert np.abs(got[slot] - want[row]).max() < CLOSE * np.abs(want[row]).max()


# What is refused


def test_pages_of_a_model_without_attention_cannot_be_quantized():
    message = "kv_dtype='int8': a mamba2 model has no keys and values, .*; leave it out"
    with pytest.raises(ValueError, match=message):
        Engine(loaded("mamba2"), kv_dtype="int8")
    with pytest.raises(ValueError, match=message):
        from_pretrained(GOLDEN / "mamba2", dtype="float32", cache="paged", kv_dtype="int8").generate([[5]], GREEDY)

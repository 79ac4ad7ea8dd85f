"""A decoder in which some layers compute a part of the scores: against the reference, and never from later tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_model import counted_compilations, tiny_config

import jfa
from jfa_models import LLM, LanguageModel, SamplingParams, from_pretrained
from jfa_models.checkpoints.hf_config import config_from_hf, config_to_hf
from jfa_models.decoding.options import CacheOptions
from jfa_models.engine import Engine
from jfa_models.model import sparse_attention
from jfa_models.model.config import Mamba2Config, StreamingConfig
from jfa_models.model.decoder import Decoder
from jfa_models.model.sparse_config import SparseConfig
from jfa_models.training.step import Batch, Trainable, loss_fn, make_train_step, new_state

CAUSAL = ("top-k", "window")
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
CONFIG = tiny_config(num_layers=2, context_length=256)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sparse_attention, "BLOCK", 16)
    monkeypatch.setattr(sparse_attention, "LAST_QUERIES", 8)


def config_of(*entries):
    """Of layer 1, or of both layers."""
    return dataclasses.replace(CONFIG, sparse_attention=(None, *entries)[-2:])


def model(*entries, **options):
    return LanguageModel.random(config_of(*entries) if entries else CONFIG, **options)


def ids(b, t, seed=0):
    return np.random.default_rng(seed).integers(3, 200, (b, t)).astype(np.int32)


def arrays(t=85):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (2, t, h, 8)) for key, h in zip(keys, (4, 2, 2, 4), strict=True)]


def test_a_fraction_of_1_is_the_dense_layer_bit_for_bit():
    tokens = ids(2, 70)
    np.testing.assert_array_equal(model("top-k:1").logits(tokens, [70, 33]), model().logits(tokens, [70, 33]))


@pytest.mark.parametrize(
    ("pattern", "is_packed"), [("top-k", False), ("top-k", True), ("window", True), ("vertical-slash", False)]
)
def test_a_layer_is_the_reference_with_its_mask_and_so_are_its_gradients(pattern, is_packed):
    q, k, v, d_out = arrays()
    config, lengths = SparseConfig(pattern=pattern, fraction=0.4), jnp.array([85, 50])
    mask = sparse_attention.mask_of(config, q, k, lengths, scale=0.3).to_array()
    assert not mask[:, :, 80:, :80].all()
    options = dict(scale=0.3, query_seq_lengths=lengths)
    if is_packed:
        segments = jnp.repeat(jnp.array([[1, 2, 3, 3, 3], [1, 1, 1, 2, 0]]), 17, axis=1)
        options |= dict(query_segment_ids=segments, key_value_segment_ids=segments)

    def loss(attend, *arrays):
        out = attend(*arrays)
        return (out * d_out).sum(), out

    dense = functools.partial(jfa.dot_product_attention, mask=mask, is_causal=True, implementation="reference")
    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, functools.partial(attend, **options)), (0, 1, 2), True))(
            q, k, v
        )
        for attend in (functools.partial(sparse_attention.sparse_attention, config=config), dense)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


@pytest.mark.parametrize("pattern", CAUSAL)
def test_no_token_depends_on_later_ones_or_on_padding(pattern):
    """Also not the choice of tiles: a later token of the same tile, more tokens, and padding change nothing."""
    one = model(f"{pattern}:0.3")
    tokens = ids(1, 90)
    want = one.logits(tokens)
    for at in (89, 70, 53):
        changed = tokens.copy()
        changed[:, at:] = ids(1, 90 - at, seed=1)
        np.testing.assert_array_equal(one.logits(changed)[:, :at], want[:, :at])
    np.testing.assert_allclose(one.logits(tokens[:, :70]), want[:, :70], atol=1e-5)
    padded = np.pad(tokens, ((0, 0), (0, 100)), constant_values=7)
    np.testing.assert_allclose(one.logits(padded, [90])[:, :90], want, atol=1e-5)
    assert np.abs(want - model().logits(tokens)).max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"kind": "paged", "page_size": 4}], ids=["slots", "pages"])
def test_a_prompt_is_sparse_and_what_follows_is_dense(options):
    """The first token is that of the pass without a cache; the next ones see all that the cache has."""
    sparse, plain = (model(*entries, cache_options=CacheOptions(**options)) for entries in (["top-k:0.3"], []))
    prompt = ids(1, 90)
    state = sparse.start(prompt[0].tolist(), GREEDY)
    assert int(state.token[0]) == int(sparse.logits(prompt)[0, -1].argmax())
    again = jax.tree.map(jnp.copy, state)
    one, other = sparse.steps.decode(sparse.params, state)[0], plain.steps.decode(plain.params, again)[0]
    np.testing.assert_array_equal(one.token, other.token)
    for x, y in zip(jax.tree.leaves(one.cache), jax.tree.leaves(other.cache), strict=True):
        np.testing.assert_array_equal(x, y)


def test_prefill_and_decoding_are_the_plain_pass_where_masks_agree():
    """In texts of two tiles all tiles are computed."""
    one, prompt = model("top-k:0.1"), ids(1, 20)[0].tolist()
    found = one.generate([prompt], GREEDY)[0].outputs[0].token_ids
    logits = one.logits([prompt + list(found)])[0]
    assert tuple(logits[19:-1].argmax(-1).tolist()) == tuple(found)


def test_gradients_of_a_decoder_are_those_of_the_reference():
    found = []
    for implementation in (None, "reference"):
        options = dict(dtype=jnp.float32, rngs=nnx.Rngs(0), attention_implementation=implementation)
        graphdef, params = nnx.split(Decoder(config_of("top-k:0.3"), **options))

        @jax.jit
        def gradient(params, tokens, graphdef=graphdef):
            def loss(params):
                decoder = nnx.merge(graphdef, params)
                return jnp.square(decoder.unembed(decoder(tokens, lengths=jnp.array([60, 41]))[0])[:, :41]).mean()

            return jax.grad(loss)(params)

        found.append(nnx.to_pure_dict(gradient(params, ids(2, 60))))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max())
    of_layer = found[0]["layers"][1]["attention"]
    assert all(np.abs(of_layer[name]["weight"]).max() > 0 for name in ("q", "k", "v"))


def test_packed_rows_are_trained_and_nothing_is_compiled_again():
    one = model("window:0.3")
    trainable = Trainable(one, None, remat="attention")
    tensors = trainable.start(one)
    tokens, segments = ids(2, 70), np.repeat([[1, 2, 0], [1, 1, 2]], [40, 20, 10], axis=1).astype(np.int32)
    targets = (segments > 0).astype(np.int32)
    targets[:, 0] = targets[:, 40] = targets[1, 60] = 0
    loss = jax.jit(functools.partial(loss_fn, trainable, trainable.base))
    whole = loss(tensors, tokens, segments, targets)
    changed = np.where(segments == 1, tokens, ids(2, 70, seed=3))
    first = np.where(segments == 1, targets, 0)
    assert loss(tensors, tokens, segments, first) == loss(tensors, changed, segments, first) < whole
    step = make_train_step(trainable, optax.adam(1e-2))
    batch, state = Batch(tokens[None], segments[None], targets[None]), new_state(tensors, optax.adam(1e-2))
    state, before = step(trainable.base, state, batch)
    with counted_compilations() as compiled:
        _, after = step(trainable.base, state, batch)
    assert float(after["loss"]) < float(before["loss"]) and not compiled


def test_a_second_prompt_compiles_nothing():
    one = model("top-k:0.3")
    one.generate([ids(1, 90)[0].tolist()], GREEDY)
    with counted_compilations() as compiled:
        one.generate([ids(1, 90, seed=1)[0].tolist()], GREEDY)
    assert not compiled


def test_a_mesh_computes_what_one_device_does():
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    one, divided = model("top-k:0.3"), model("top-k:0.3", mesh=mesh)
    np.testing.assert_allclose(divided.logits(ids(2, 60), [60, 41]), one.logits(ids(2, 60), [60, 41]), atol=1e-5)


def test_a_saved_model_has_its_sparse_layers(tmp_path):
    one = model("window:0.1", "top-k:0.25")
    one.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype="float32")
    assert again.config == one.config and str(again.config.sparse_attention[1]) == "top-k:0.25"
    np.testing.assert_array_equal(again.logits(ids(1, 70)), one.logits(ids(1, 70)))
    assert "sparse_attention" not in config_to_hf(CONFIG)


def test_entries_are_read_from_text():
    config = config_of("top-k:0.25", SparseConfig(pattern="window", fraction=1))
    assert config.sparse_attention == (SparseConfig(pattern="top-k", fraction=0.25), SparseConfig.of("window:1"))
    assert config.sparse_layers == (0,)
    assert config.with_layers(1).sparse_attention == (SparseConfig.of("top-k:0.25"),)
    assert hash(config) == hash(config_of("top-k:0.25", "window:1"))


STATES = dict(mixers=("attention", "mamba2"), mamba2=Mamba2Config(num_heads=2, head_dim=8, state_size=8))
REFUSED = {
    "number": (dict(sparse_attention=("top-k:0.5",)), r"one entry per layer, 2, got \('top-k:0.5',\)"),
    "one": (dict(sparse_attention=5), "one entry per layer, 2, got 5"),
    "text": (dict(sparse_attention="top-k:0.5"), "one entry per layer, 2, got 'top-k:0.5'"),
    "form": (dict(sparse_attention=(None, "top-k")), "must be PATTERN:FRACTION, such as top-k:0.25, got 'top-k'"),
    "states": (STATES, "sparse_attention=top-k:0.5: layer 1 is a layer of mamba2, which has no scores; make its entry"),
    "window": (dict(windows=(None, 9)), "layer 1 sees only the last 9 tokens; make its entry None"),
    "streaming": (dict(streaming=StreamingConfig(window=9)), "the last 9 tokens; leave attention_window out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_have_no_such_scores_are_refused(name):
    changed, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config_of("top-k:0.5"), **changed)


def test_what_cannot_honor_it_refuses_it():
    one, of_layer = model("vertical-slash:0.5"), "sparse_attention=vertical-slash:0.5 of layer 1"
    with pytest.raises(ValueError, match=f"{of_layer} chooses by the last queries of a text.*: use top-k or window"):
        one.logits(ids(1, 60))
    for refusing in (LLM, Engine):
        with pytest.raises(ValueError, match=f"{of_layer}: an engine prefills prompts in parts"):
            refusing(one)
    draft = dict(method="draft_model", model=one, num_speculative_tokens=1)
    with pytest.raises(ValueError, match=f"{of_layer}: an engine prefills prompts in parts"):
        Engine(model(), speculative_config=draft)
    with pytest.raises(
        ValueError, match=r"sparse_prefill=window:0.5: this model has sparse_attention=top-k:0.2 of its"
    ):
        model("top-k:0.2", sparse_prefill="window:0.5")
    mesh = jax.make_mesh((2,), ("context",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"of layer 1: .* but the mesh divides them over context; use a mesh without"):
        model("top-k:0.2", mesh=mesh)
    windows = dataclasses.replace(config_of("top-k:0.2"), windows=(9, None))
    with pytest.raises(ValueError, match=r"sparse_attention=top-k:0.2 of layer 1: a paged cache has no pages"):
        LanguageModel.random(windows, cache_options=CacheOptions(kind="paged"))


def test_a_config_json_of_another_form_is_refused():
    written = config_to_hf(config_of("top-k:0.5")) | {"sparse_attention": {"1": "top-k:0.5"}}
    with pytest.raises(ValueError, match=r"config.json: sparse_attention must be a list with null or PATTERN"):
        config_from_hf(written)

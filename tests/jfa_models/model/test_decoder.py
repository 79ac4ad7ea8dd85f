"""The decoder compared with transformers, and with a cache compared with its own full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import GOLDEN

import jfa
from jfa_bench.truth.numerics import assert_within, limit
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained
from jfa_models.model.attention import paged_cache
from jfa_models.model.config import DecoderConfig
from jfa_models.model.decoder import Decoder
from jfa_models.model.layers import Linear, together
from jfa_models.model.lora import Applied
from jfa_models.model.rope import RopeConfig

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10_000.0),
)

ROUNDINGS = 64  # of two layers, whose sums are in another order


def seeded_decoder(dtype=jnp.float32, config=CONFIG):
    """Weights large enough for attention to prefer some tokens to others; the same numbers in every dtype."""
    decoder = Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(decoder, jax.tree.map(lambda x: (8 * x if x.ndim == 2 else x).astype(dtype), nnx.state(decoder)))
    return decoder


def forward(decoder):
    @jax.jit
    def logits(tokens, lengths=None, cache=None):
        hidden, cache = decoder(tokens, lengths=lengths, cache=cache)
        return decoder.unembed(hidden), cache

    return logits


def empty_cache(*, batch, capacity, dtype=jnp.float32):
    shape = dict(num_layers=CONFIG.num_layers, num_kv_heads=CONFIG.num_kv_heads, head_dim=CONFIG.head_dim)
    return jfa.KVCache.create(batch=batch, capacity=capacity, dtype=dtype, **shape)


def poisoned(cache):
    """NaN in every slot at or past kv_len."""
    held = jnp.arange(cache.capacity) < cache.kv_len[:, None]
    k, v = (tuple(jnp.where(held[..., None, None], x, jnp.nan) for x in arrays) for arrays in (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v)


def assert_same_logits(got, want, dtype=jnp.float32):
    assert_within(got, want, ROUNDINGS * float(jnp.finfo(dtype).eps) * float(jnp.abs(want).max()))


@pytest.fixture(scope="module")
def llama3():
    return from_pretrained(GOLDEN / "llama3", dtype="float32"), np.load(GOLDEN / "llama3.npz")


@pytest.fixture(scope="module")
def logits():
    return forward(seeded_decoder())


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 24), 0, CONFIG.vocab_size)


def test_llama3_logits_agree_with_transformers(llama3):
    model, golden = llama3
    assert_within(model.logits(golden["input_ids"]), golden["logits"], 1e-4)


def test_llama3_greedy_tokens_agree_with_transformers(llama3):
    model, golden = llama3
    results = model.generate(golden["input_ids"], SamplingParams(temperature=0, max_tokens=16))
    assert [result.outputs[0].token_ids for result in results] == [tuple(row) for row in golden["greedy"].tolist()]


def test_llama3_padded_on_the_right_agrees_with_transformers_padded_on_the_left(llama3):
    model, golden = llama3
    real = golden["padded_mask"].astype(bool)
    lengths = real.sum(axis=1)
    assert lengths.min() < lengths.max()
    tokens = np.zeros_like(golden["padded_input_ids"])
    for row, (ids, here) in enumerate(zip(golden["padded_input_ids"], real, strict=True)):
        tokens[row, : lengths[row]] = ids[here]
    got = model.logits(tokens, lengths)
    for row, here in enumerate(real):
        assert_within(got[row, : lengths[row]], golden["padded_logits"][row][here], 1e-4)


def test_prefill_in_chunks_and_decoding_equal_the_full_forward(logits, tokens):
    want, _ = logits(tokens)
    cache, parts = empty_cache(batch=3, capacity=32), []
    for start, stop in ((0, 16), (16, 21), (21, 22), (22, 23), (23, 24)):
        part, cache = logits(tokens[:, start:stop], None, poisoned(cache))
        parts.append(part)
    assert_same_logits(jnp.concatenate(parts, axis=1), want)
    assert cache.kv_len.tolist() == [24, 24, 24]


def test_rows_of_different_lengths_each_continue_at_their_end(logits, tokens):
    want, _ = logits(tokens)
    lengths = jnp.array([16, 3, 9])
    _, cache = logits(tokens[:, :16], lengths, poisoned(empty_cache(batch=3, capacity=32)))
    following = tokens[jnp.arange(3), lengths][:, None]
    got, cache = logits(following, None, poisoned(cache))
    assert_same_logits(got[:, 0], want[jnp.arange(3), lengths])
    assert cache.kv_len.tolist() == [17, 4, 10]


def test_a_row_that_adds_no_token_keeps_its_cache(logits, tokens):
    _, before = logits(tokens[:, :16], None, empty_cache(batch=3, capacity=32))
    _, after = logits(tokens[:, 16:17], jnp.array([1, 0, 1]), before)
    assert after.kv_len.tolist() == [17, 16, 17]
    for old, new in zip((*before.k, *before.v), (*after.k, *after.v), strict=True):
        assert jnp.array_equal(old[1, :16], new[1, :16])


def test_a_row_does_not_depend_on_other_rows_nor_on_its_padding(logits, tokens):
    lengths = jnp.array([24, 7, 12])
    want, _ = logits(tokens, lengths)
    others = (tokens + 1) % CONFIG.vocab_size
    mixed = others.at[1, :7].set(tokens[1, :7])  # the same seven tokens; all others differ
    got, _ = logits(mixed, lengths)
    assert_same_logits(got[1, :7], want[1, :7])
    alone, _ = logits(tokens[1:2, :7])
    assert_same_logits(alone[0], want[1, :7])


def test_bfloat16_stays_near_float32(logits, tokens):
    want, _ = logits(tokens)
    cache = empty_cache(batch=3, capacity=32, dtype=jnp.bfloat16)
    got, cache = forward(seeded_decoder(jnp.bfloat16))(tokens, None, cache)
    assert got.dtype == jnp.float32 and cache.k[0].dtype == jnp.bfloat16
    error, scale = jnp.abs(got - want), jnp.abs(want).max()
    assert float(error.mean()) < 4 * float(jnp.finfo(jnp.bfloat16).eps) * float(scale)
    assert float(error.max()) > 0, "was it computed in bfloat16?"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_config_counts_parameters_and_cache_elements(tied, biased):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, qkv_bias=biased, out_bias=biased, mlp_bias=biased)
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))))
    assert config.num_params == sum(leaf.size for leaf in leaves)
    cache = empty_cache(batch=3, capacity=32)
    assert cache.num_bytes == 3 * 32 * 4 * config.cache_elements_per_token


# Trees of new tokens

PARENTS = (-1, 0, 0, 1, 1, 2, 3, 6, 5)
WINDOWED = dict(windows=(3, None), local_rope=RopeConfig(theta=100.0))  # as in Gemma 3; the tree is deeper


def path_to(token):
    return ([] if PARENTS[token] < 0 else path_to(PARENTS[token])) + [token]


def tree_step(config, kv_dtype):
    """A decoder, a cache after a prompt in each of three rows, and a step with a tree, a prompt chunk and one token."""
    decoder = seeded_decoder(config=config)
    size, columns = 4, 8
    cache = paged_cache(
        config,
        num_pages=[1 + 3 * columns] * len(config.patterns),
        page_size=size,
        batch=3,
        pages_per_seq=columns,
        dtype=jnp.float32,
        kv_dtype=kv_dtype,
    )
    table = 1 + jax.random.permutation(jax.random.key(0), 3 * columns).reshape(3, columns)
    cache = dataclasses.replace(cache, page_tables=tuple(jnp.array(table) for _ in config.patterns))
    tokens = jax.random.randint(jax.random.key(1), (3, 30), 0, config.vocab_size)
    before = jnp.array([7, 5, 10])
    _, cache = decoder(tokens[:, :10], lengths=before, cache=cache)
    new = (len(PARENTS), 12, 1)
    start = jnp.cumsum(jnp.array([0, *new]))
    step = jnp.concatenate(
        [tokens[row, before[row] : before[row] + n] for row, n in enumerate(new)] + [jnp.zeros(2, int)]
    )
    mask = np.zeros((len(step), 16), bool)
    for token in range(len(PARENTS)):
        mask[token, path_to(token)] = True
    return decoder, cache, tokens, before, step, start, mask


@pytest.mark.parametrize(
    ("changed", "kv_dtype"),
    [
        pytest.param({}, None, id="full"),
        pytest.param(WINDOWED, "int8", id="windows-int8"),
        pytest.param({}, "int8", id="full-int8", marks=(pytest.mark.exhaustive, pytest.mark.soak)),
        pytest.param(WINDOWED, None, id="windows", marks=(pytest.mark.exhaustive, pytest.mark.soak)),
    ],
)
def test_every_node_of_a_tree_has_the_logits_of_its_path(changed, kv_dtype):
    config = dataclasses.replace(CONFIG, **changed)
    decoder, cache, tokens, before, step, start, mask = tree_step(config, kv_dtype)
    run = jax.jit(lambda tokens, cache, **rows: decoder(tokens, cache=cache, **rows))
    hidden, after = run(step[None], cache, query_start=start, tree_mask=mask)
    got = decoder.unembed(hidden[0])
    assert after.kv_len.tolist() == (before + jnp.diff(start)).tolist()
    for node in range(len(PARENTS)):
        path = jnp.zeros((3, 6), int).at[0, : len(path_to(node))].set(step[jnp.array(path_to(node))])
        want, _ = run(path, cache, lengths=jnp.array([len(path_to(node)), 0, 0]))
        assert_same_logits(got[node], decoder.unembed(want[0, len(path_to(node)) - 1]))
    others = jnp.zeros((3, 12), int).at[1].set(tokens[1, 5:17]).at[2, 0].set(tokens[2, 10])
    want, _ = run(others, cache, lengths=jnp.array([0, 12, 1]))
    assert_same_logits(got[start[1] : start[2]], decoder.unembed(want[1]))
    assert_same_logits(got[start[2]], decoder.unembed(want[2, 0]))

    # the accepted path stays, and the next step is that of a cache which got only this path
    kept = path_to(7)
    compacted = after.truncate(before).compact(jnp.array([kept] * 3), jnp.array([len(kept), 0, 0]))
    compacted = compacted.advance(jnp.array([len(kept), 12, 1]))
    plain = others.at[0, : len(kept)].set(step[jnp.array(kept)])
    _, plain = run(plain, cache, lengths=jnp.array([len(kept), 12, 1]))
    assert compacted.kv_len.tolist() == plain.kv_len.tolist()
    following = jnp.array([[3], [4], [5]])
    (got, _), (want, _) = run(following, compacted), run(following, plain)
    assert_same_logits(decoder.unembed(got), decoder.unembed(want))


def test_gradients_through_the_tpu_kernels_are_those_of_the_reference():
    """Packed rows, as in training, in the interpreter; a row of lanes holds several heads."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 40)))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [20, 15, 5], axis=1).astype(np.int32))
    found = []
    for implementation in ("tpu", "reference"):
        _, params = nnx.split(seeded_decoder())
        decoder = Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0), attention_implementation=implementation)
        graphdef = nnx.graphdef(decoder)

        @jax.jit
        def gradient(params, graphdef=graphdef):
            def loss(params):
                decoder = nnx.merge(graphdef, params)
                return jnp.square(decoder.unembed(decoder(tokens, segments=segments)[0])).mean()

            return jax.grad(loss)(params)

        found.append(nnx.to_pure_dict(gradient(params)))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        assert_within(x, np.asarray(y), ROUNDINGS * float(jnp.finfo(jnp.float32).eps) * max(1.0, np.abs(y).max()))
    of_layer = found[0]["layers"][1]["attention"]
    assert all(np.abs(of_layer[name]["weight"]).max() > 0 for name in ("q", "k", "v"))


def caches(config, kind):
    if kind in ("slots", "ring"):
        shape = dict(num_layers=2, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=jnp.float32)
        windows = [config.window(layer) for layer in range(2)] if kind == "ring" else ()
        return jfa.KVCache.create(batch=2, capacity=32, windows=windows, **shape)
    pages: dict = dict(page_size=4, batch=2, pages_per_seq=8, dtype=jnp.float32)
    cache = paged_cache(config, num_pages=[17], kv_dtype=None if kind == "pages" else kind, **pages)
    return dataclasses.replace(cache, page_tables=(1 + jnp.arange(16, dtype=jnp.int32).reshape(2, 8),))


@pytest.mark.parametrize("kind", ["slots", "ring", "pages", "int8"])
def test_the_kernel_that_rotates_and_writes_changes_no_logits(kind):
    """In the interpreter. A prompt, which may be short; then two tokens, then one, by its own program or by XLA's."""
    config = dataclasses.replace(CONFIG, head_dim=16, windows=(8, 8) if kind == "ring" else ())
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    found, kernels = [], []
    for implementation in ("triton", "xla"):
        params = nnx.state(seeded_decoder(config=config))
        decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0), attention_implementation=implementation)
        nnx.update(decoder, params)
        step, cache, logits = forward(decoder), caches(config, kind), []
        for first, end, lengths in ((0, 6, [6, 4]), (6, 8, [2, 1]), (8, 9, None)):
            new = jnp.asarray(tokens[:, first:end])
            of_rows = None if lengths is None else jnp.asarray(lengths)
            kernels.append("rotate_and_write" in str(jax.make_jaxpr(step)(new, of_rows, cache)))
            out, cache = step(new, of_rows, cache)
            cache = cache.advance(end - first if of_rows is None else of_rows)
            logits += [out[0], out[1] if lengths is None else out[1, : lengths[1]]]
        found.append(logits)
    assert kernels == [kind != "ring", kind != "ring", True, False, False, False]
    for got, want in zip(*found, strict=True):
        assert_same_logits(got, want)


@pytest.mark.parametrize("kind", ["pages", "int8", "int4"])
def test_spare_heads_of_pages_change_no_logits(kind):
    """As on a TPU, where heads are rounded up to whole tiles."""
    config, found = CONFIG, []
    decoder = seeded_decoder(config=config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    for spare in (0, 1):
        heads = config.num_kv_heads + spare
        cache = caches(dataclasses.replace(config, num_kv_heads=heads, num_q_heads=heads), kind)
        assert cache.num_heads(config.head_dim) == heads
        step, logits = forward(decoder), []
        for first, end in ((0, 6), (6, 7)):
            out, cache = step(jnp.asarray(tokens[:, first:end]), None, cache)
            cache = cache.advance(end - first)
            logits.append(out)
        start = jnp.array([0, 2, 4])
        ragged = jax.jit(lambda x, cache, start: decoder(x, cache=cache, query_start=start)[0])
        logits.append(decoder.unembed(ragged(jnp.asarray(tokens[:, 7:].reshape(1, -1)), cache, start)))
        found.append(logits)
    for got, want in zip(*found, strict=True):
        assert_same_logits(got, want)


def kernels_in(jaxpr):
    """The name of each Pallas call of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"]
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from kernels_in(inner)


FAMILIES = {  # changes of CONFIG, and how many products of a layer are one kernel with what is around them
    "llama": ({}, 4),
    "biases": (dict(qkv_bias=True, mlp_bias=True, out_bias=True), 4),
    "post_norms": (dict(norm="rms_plus_one", post_norms=True, hidden_act="gelu_tanh"), 2),
    "multiplier": (dict(residual_multiplier=0.25), 2),
    "parallel": (dict(norm="layer", parallel_block=True, gated_mlp=False, hidden_act="gelu_tanh", mlp_bias=True), 4),
    "gate_and_norms_of_heads": (dict(qk_norm=True, attention_gate=True), 4),
    "another_activation": (dict(hidden_act="gelu"), 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_products_in_one_kernel_change_no_logits(family):
    """In the interpreter, beside XLA's products: both in bfloat16, against float32."""
    change, in_kernels = FAMILIES[family]
    config = dataclasses.replace(CONFIG, head_dim=16, **change)
    rows = (2, 5) if family == "llama" else (2, 9)  # up to 16 are normalized by the kernel
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, rows), jnp.int32)
    params = nnx.state(seeded_decoder(config=config, dtype=jnp.bfloat16))
    found = {}
    for implementation, dtype in (("triton", jnp.bfloat16), ("xla", jnp.bfloat16), ("reference", jnp.float32)):
        decoder = Decoder(config, dtype=dtype, rngs=nnx.Rngs(0), attention_implementation=implementation)
        nnx.update(decoder, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params))
        launched = list(kernels_in(jax.make_jaxpr(forward(decoder))(tokens))).count("matmul_few_rows")
        assert launched == (2 * in_kernels if implementation == "triton" else 0)
        found[implementation] = forward(decoder)(tokens)[0]
    want, plain = (np.asarray(found[name], np.float64) for name in ("reference", "xla"))
    assert_within(found["triton"], want, limit(want, plain, jnp.bfloat16))


def test_a_product_that_an_adapter_changes_or_devices_share_is_no_part_of_a_kernel():
    options = dict(bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), implementation="triton")
    x, change = jnp.ones((2, 64), jnp.bfloat16), Applied(change=None, gates=jnp.ones((2, 1)), dropout=None)
    plain, shared, later = (
        Linear(64, 32, **options, **more) for more in ({}, {"sum_over": ("tensor",)}, {"sums_later": True})
    )
    assert together(x, (plain, plain), (None, None)).shape == (2, 64)
    assert together(x, (plain, plain), (None, change)) is None
    assert together(x, (shared,), (None,)) is None and together(x, (later,), (None,)) is None

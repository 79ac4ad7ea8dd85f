"""jit, vmap, checkpoint and shard_map of the op, and its backends on random shapes and options."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import run_on_eight_devices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import run

import jfa
from jfa_bench.truth import cases
from jfa_bench.truth.cases import Case, truth, truth_of
from jfa_bench.truth.numerics import assert_within, limit

TILES = {
    "xla": jfa.BlockConfig(block_q=16, block_kv=16, widen=True),
    "triton": jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1),
}


@pytest.mark.parametrize("backend", TILES)
def test_vmap_of_the_gradient(backend):
    random = np.random.default_rng(1)
    q = jnp.asarray(random.standard_normal((2, 1, 20, 2, 16)), jnp.float32)
    lengths = jnp.array([[20], [7]], jnp.int32)

    def gradient(q, lengths):
        def loss(q):
            options = dict(implementation=backend, config=TILES[backend], key_value_seq_lengths=lengths)
            return jnp.square(jfa.dot_product_attention(q, q, q, is_causal=True, **options)).sum()

        return jax.grad(loss)(q)

    one_by_one = jnp.stack([gradient(*one) for one in zip(q, lengths, strict=True)])
    np.testing.assert_allclose(jax.vmap(gradient)(q, lengths), one_by_one, atol=1e-5)


@pytest.mark.parametrize("names", [(), ("jfa_out", "jfa_lse")])
def test_checkpoint_gives_the_same_gradient(names):
    q, k, v = truth("gqa", "float32").arrays

    def loss(q, k, v):
        return jnp.square(jfa.dot_product_attention(q, k, v, is_causal=True, config=TILES["xla"])).sum()

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    want = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    for x, y in zip(jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))(q, k, v), want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax 0.11 leaves the unused forward pass to XLA")
def test_saving_the_checkpoint_names_avoids_a_second_forward_pass():
    q, k, v = truth("gqa", "float32").arrays

    def loss(q, k, v):
        options = dict(implementation="triton", config=TILES["triton"])
        return jnp.square(jfa.dot_product_attention(q, k, v, **options)).sum()

    def kernels(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(q, k, v)).count("pallas_call[")

    assert kernels() == kernels("jfa_out", "jfa_lse") + 1


def test_forward_mode_works_on_the_reference():
    q, k, v = truth("gqa", "float32").arrays

    def attend(q):
        return jfa.dot_product_attention(q, k, v, implementation="reference")

    step = jnp.ones_like(q)
    _, slope = jax.jvp(attend, (q,), (step,))
    difference = (attend(q + 1e-2 * step) - attend(q - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(slope, difference, atol=1e-3)


def test_repeated_gradients_are_bit_identical():
    known = truth("gqa", "bfloat16")

    def gradient():
        def loss(q):
            options = dict(implementation="triton", config=TILES["triton"], is_causal=True)
            return jfa.dot_product_attention(q, *known.arrays[1:], **options).astype(jnp.float32).sum()

        return jax.grad(loss)(known.arrays[0])

    np.testing.assert_array_equal(gradient(), gradient())


def test_dropout_keeps_the_expected_fraction():
    q = jnp.zeros((2, 256, 2, 16))
    v = jnp.ones_like(q)
    options = dict(dropout_rate=0.3, dropout_key=jax.random.key(1), config=jfa.BlockConfig(block_q=64, block_kv=64))
    out = jfa.dot_product_attention(q, q, v, **options)
    # 262,144 weights: the mean of the kept ones, divided by 0.7, is 1 to within four standard deviations
    assert abs(float(out.mean()) - 1) < 4 * (0.3 / 0.7 / 262_144) ** 0.5
    assert float(out[..., 0].std()) > 0.01  # and not the same for all


@pytest.mark.exhaustive
def test_shard_map_over_batch_and_heads():
    """Uses eight CPU devices in a separate process, because their number is fixed when JAX starts."""
    program = """
        import functools
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, PartitionSpec as P
        import jfa

        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "heads"))
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (4, 20, 4, 16))
        k, v = (jax.random.normal(key, (4, 20, 2, 16)) for key in keys[1:])

        sinks, bias = jnp.arange(4.0), jax.random.normal(keys[0], (1, 1, 20, 20))

        def loss(q, k, v, sinks, bias, implementation="xla"):
            options = dict(is_causal=True, sinks=sinks, bias=bias, implementation=implementation)
            return jnp.square(jfa.dot_product_attention(q, k, v, **options)).sum((1, 3))

        def sharded(loss):
            spec = P("data", None, "heads", None)
            specs = (spec, spec, spec, P("heads"), P())  # the bias is the same everywhere
            return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P("data", "heads"))

        def gradients(f):
            return jax.jit(jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2, 3, 4)))

        arrays = q, k, v, sinks, bias
        for got, want in zip(gradients(sharded(loss))(*arrays), gradients(loss)(*arrays)):
            np.testing.assert_allclose(got, want, atol=1e-4)

        pages = jax.random.normal(keys[1], (9, 4, 2, 16))
        rows = jnp.arange(1, 9).reshape(4, 2), jnp.array([8, 3, 0, 5])

        def decode(q, pages, table, kv_len):
            return jfa.paged_decode_attention(q, pages, pages, table, kv_len)

        heads = P(None, None, "heads", None)
        parts = (P("data", "heads", None), heads, P("data"), P("data"))  # each device has all pages of its heads
        split = jax.shard_map(decode, mesh=mesh, in_specs=parts, out_specs=P("data", "heads", None))
        np.testing.assert_allclose(split(q[:, 0], pages, *rows), decode(q[:, 0], pages, *rows), atol=1e-5)

        def ragged(q, pages, table, kv_len, start):
            return jfa.ragged_paged_attention(q, pages, pages, table, kv_len, start, implementation="xla")

        start = jnp.array([0, 1, 3, 3, 4])
        by_head = (P(None, "heads", None), heads, P(), P(), P())
        split = jax.shard_map(ragged, mesh=mesh, in_specs=by_head, out_specs=P(None, "heads", None))
        np.testing.assert_allclose(split(q[:, 0], pages, *rows, start), ragged(q[:, 0], pages, *rows, start), atol=1e-5)

        # heads sharded by the compiler: no device receives the pages of heads on other devices
        place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
        large = place(jnp.ones((500, 16, 2, 64)), *heads)
        table = jnp.arange(1, 81).reshape(4, 20)
        for op, more in ((decode, ()), (ragged, (start,))):
            wide = place(jnp.ones((4, 4, 64)), None, "heads", None)
            compiled = jax.jit(op).lower(wide, large, table, jnp.full(4, 300), *more).compile()
            assert compiled.memory_analysis().temp_size_in_bytes < large.nbytes / 4, op

        # interpreted kernels do not run under shard_map's check, so they are only lowered
        from jax.sharding import AbstractDevice, AbstractMesh, AxisType
        device = AbstractDevice(device_kind="gfx942", num_cores=None, platform="rocm")
        kernel = functools.partial(loss, implementation="triton")
        auto = (AxisType.Auto, AxisType.Auto)
        mesh = AbstractMesh((4, 2), ("data", "heads"), axis_types=auto, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            lowered = gradients(sharded(kernel)).trace(*arrays).lower(lowering_platforms=("rocm",)).as_text()
            split = jax.shard_map(decode, mesh=mesh, in_specs=parts, out_specs=P("data", "heads", None))
            paged = jax.jit(split).trace(q[:, 0], pages, *rows).lower(lowering_platforms=("rocm",)).as_text()
        assert lowered.count("@__gpu$xla.gpu.triton") == 4 and paged.count("@__gpu$xla.gpu.triton") == 1
    """
    run_on_eight_devices(program)


EXPLICIT = """
    import dataclasses
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec as P
    import jfa, jfa.flax

    mesh = jax.make_mesh((4, 2), ("rows", "heads"))  # axes are explicit by default
    keys = jax.random.split(jax.random.key(0), 6)
    q = jax.random.normal(keys[0], (4, 16, 4, 16))
    k, v = (jax.random.normal(key, (4, 16, 2, 16)) for key in keys[1:3])
    segments = jnp.sort(jax.random.randint(keys[3], (4, 16), 0, 3), axis=1)
    arrays = q, k, v, jnp.arange(4.0), jax.random.normal(keys[4], (1, 4, 16, 16)), jnp.array([16, 9, 3, 0]), segments

    def place(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    def same(got, want):
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(jax.device_get(one), other, atol=1e-4)

    def attend(q, k, v, sinks, bias, lengths, segments):
        options = dict(query_segment_ids=segments, key_value_segment_ids=segments, key_value_seq_lengths=lengths)
        options |= dict(is_causal=True, sinks=sinks, bias=bias, implementation=BACKEND)
        return jfa.dot_product_attention(q, k, v, **options)

    gradients = jax.grad(lambda *x: jnp.square(attend(*x)).sum(), argnums=range(5))
    want = attend(*arrays), gradients(*arrays)
    head = None, None, "heads"
    placements = (
        [("rows", *head[1:]), ("rows", *head[1:]), ("rows", *head[1:]), ("heads",), (None, "heads"), (), ("rows",)],
        [(None, "rows"), (None, "rows"), (None, "rows"), (), (), (), (None, "rows")],  # of the sequence
        [("rows",), ("rows",), ("rows",), (), (), ("rows",), ("rows",)],
        [("rows",), (), (), (), (), (), ()],
        [(None, None, None, "heads"), (), (), (), (), (), ()],
    )
    # shardings are handled before an implementation is chosen: one of them meets all, interpreted kernels two
    for parts in placements if BACKEND == "xla" else placements[:2]:
        placed = [place(x, *part) for x, part in zip(arrays, parts)]
        out = jax.jit(attend)(*placed)
        same(out, want[0])
        assert out.sharding.spec == P(*[*parts[0], None, None, None][:3], None)
        with jax.set_mesh(mesh):
            same(attend(*placed), want[0])
            same(jax.jit(gradients)(*placed), want[1])

    pages = jax.random.normal(keys[1], (9, 4, 2, 16))
    table, kv_len = jnp.arange(1, 9).reshape(4, 2), jnp.array([8, 3, 0, 5])
    placed = [place(q[:, 0], "rows", "heads"), place(pages, *head), place(table, "rows"), place(kv_len, "rows")]

    def decode(q, pages, table, kv_len):
        return jfa.paged_decode_attention(q, pages, pages, table, kv_len, implementation=BACKEND)

    def ragged(q, pages, table, kv_len):
        start = jnp.array([0, 1, 3, 3, 4])
        return jfa.ragged_paged_attention(q, pages, pages, table, kv_len, start, implementation=BACKEND)

    for op in (decode, ragged):
        same(jax.jit(op)(*placed), op(q[:, 0], pages, table, kv_len))
"""

# what takes no implementation
EXPLICIT_CACHES = """
    rings = dict(num_layers=1, batch=4, capacity=12, num_kv_heads=2, head_dim=16, dtype="float32")
    paged = dict(num_layers=1, num_pages=17, page_size=4, batch=4, pages_per_seq=4, num_kv_heads=2, head_dim=16)

    def filled(place_rows, place_pages):
        new = place_rows(k[:, :5])
        ring = jax.tree.map(place_rows, jfa.KVCache.create(**rings, windows=(6,), slack=1))
        ring = ring.write(0, new, new, place_rows(kv_len)).advance(place_rows(kv_len))
        pool = jfa.PagedKVCache.create(**paged, dtype="float32", kv_dtype="int8")
        pool = jax.tree.map(lambda x: place_pages(x) if x.ndim > 2 else x, pool)
        tables = (place_rows(jnp.arange(1, 17).reshape(4, 4)),)
        pool = dataclasses.replace(pool, page_tables=tables, kv_len=place_rows(pool.kv_len))
        pool = pool.write(0, new, new).advance(5).copy_pages(jnp.array([1]), jnp.array([16]))
        pool = pool.write_ragged(0, place_rows(k[:, 0]), v[:, 0], jnp.array([0, 2, 2, 3, 4]))
        return ring, ring.followed_by(0, new, new), ring.slots_seen(0, 6), ring.truncate(kv_len - 1), pool

    plain = filled(lambda x: x, lambda x: x)
    with jax.set_mesh(mesh):
        split = filled(lambda x: place(x, "rows"), lambda x: place(x, None, None, "heads"))
    assert [x.sharding.spec[0] for x in (*split[0].k, split[4].kv_len)] == ["rows"] * 2
    same(split, plain)

    with jax.set_mesh(mesh):
        x = place(jax.random.normal(keys[5], (4, 12, 32)), "rows")
        options = dict(num_heads=4, in_features=32, decode=False)
        ours, theirs = (
            nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0), attention_fn=function)(x)
            for function in (jfa.flax.attention_fn, nnx.dot_product_attention)
        )
        same(ours, theirs)
"""


@pytest.mark.parametrize("backend", TILES)
def test_a_mesh_with_explicit_axes_on_one_device(backend):
    mesh = jax.make_mesh((1,), ("rows",))  # axes are explicit by default
    q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 4, 16)), jnp.float32)
    pages, table, kv_len = q.reshape(8, 4, 4, 16), jnp.array([[1, 2], [3, 4]]), jnp.array([7, 2])

    def attend(q):
        return jfa.dot_product_attention(q, q[:, :, :2], q[:, :, :2], is_causal=True, implementation=backend)

    def decode(q):
        return jfa.paged_decode_attention(q[:, 0], pages, pages, table, kv_len, implementation=backend)

    for function in (attend, jax.grad(lambda q: attend(q).sum()), decode):
        with jax.set_mesh(mesh):
            got = jax.jit(function)(jax.device_put(q, jax.NamedSharding(mesh, jax.P("rows"))))
        np.testing.assert_allclose(got, jax.jit(function)(q), atol=1e-6)


@pytest.mark.parametrize("backend", [run(name, quick=False, soak=True) for name in TILES])
def test_a_mesh_with_explicit_axes_on_eight_devices(backend):
    program = EXPLICIT + EXPLICIT_CACHES if backend == "xla" else EXPLICIT
    run_on_eight_devices(f"BACKEND = {backend!r}\n" + textwrap.dedent(program))


@st.composite
def drawn_cases(draw) -> Case:
    """A case of any shape and options that make sense together."""
    hkv, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    b, tq, tk = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 50))
    options: dict = dict(is_causal=draw(st.booleans()))
    if draw(st.booleans()):
        options["local_window_size"] = (draw(st.integers(0, 30)), draw(st.integers(0, 30)))
    if draw(st.booleans()):
        options["query_offset"] = [draw(st.integers(-5, 50)) for _ in range(b)]
    if draw(st.booleans()):
        options["key_value_seq_lengths"] = [draw(st.integers(0, tk)) for _ in range(b)]
    if draw(st.booleans()):
        options["query_seq_lengths"] = [draw(st.integers(0, tq)) for _ in range(b)]
    if draw(st.booleans()):
        options["logits_soft_cap"] = draw(st.floats(0.5, 20))
    scores = (b, hkv * group, tq, tk)

    def broadcast():
        return tuple(draw(st.sampled_from([1, size])) for size in scores)

    return Case(
        shape=(b, tq, tk, hkv * group, hkv, draw(st.sampled_from([8, 16, 40]))),
        value_head_dim=draw(st.sampled_from([None, 8, 24])),
        options=options,
        bias=broadcast() if draw(st.booleans()) else None,
        mask=broadcast() if draw(st.booleans()) else None,
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        segments=draw(st.sampled_from([0, 0, 3])),
        dropout_rate=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=drawn_cases())
def test_random_shapes_and_options_agree_with_the_oracle(dtype, case):
    known = truth_of(case, dtype, seed=1)
    arrays = dict(zip(("query", "key", "value"), known.arrays, strict=True))
    arrays |= {name: known.options[name] for name in cases.GRADIENTS if name in known.options}
    options = {name: x for name, x in known.options.items() if name not in arrays}

    def loss(arrays):
        out, lse = jfa.dot_product_attention(
            **arrays, implementation="xla", config=TILES["xla"], return_residual=True, **options
        )
        through_lse = jnp.where(jnp.isfinite(lse), lse * known.d_lse, 0.0)
        total = (out.astype(jnp.float32) * known.d_out.astype(jnp.float32)).sum() + through_lse.sum()
        return total, (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))
    for name, (want, plain) in known.gradients.items():
        assert_within(gradients[name], want, limit(want, plain, jnp.dtype(dtype), products=3))

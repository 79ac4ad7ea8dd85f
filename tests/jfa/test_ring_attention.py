"""Attention over a sequence split over devices: against the oracle, its compiled programs, its work, bad input."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import run_on_eight_devices
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from runs import run

import jfa
from jfa.backends import xla
from jfa.sharding import ring_attention, unzigzag, zigzag

PRELUDE = """
    import itertools, re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh, PartitionSpec as P
    import jfa
    from jfa.sharding import ring_attention, unzigzag, zigzag

    def mesh_of(n):
        return Mesh(np.array(jax.devices()[:n]), ("context",))

    def collectives(program):
        names = "all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute"
        found = {name: len(re.findall(rf" {name}(?:-start)?\\(", program.as_text())) for name in names}
        return {name: count for name, count in found.items() if count}
"""

ORACLE = """
    from jfa_bench.truth import cases
    from jfa_bench.truth.cases import Case, truth_of
    from jfa_bench.truth.numerics import assert_within, limit

    causal = dict(is_causal=True)
    CASES = {
        "causal": Case(shape=(2, 64, 64, 4, 2, 16), sinks=True, options=causal),
        "window": Case(shape=(1, 64, 64, 2, 1, 16), options=dict(causal, local_window_size=9, logits_soft_cap=2.0)),
        "both_windows": Case(shape=(1, 64, 64, 2, 2, 16), options=dict(local_window_size=(20, 3)), sinks=True),
        "right_window": Case(shape=(1, 64, 64, 2, 2, 16), options=dict(local_window_size=(None, 3))),
        "segments": Case(shape=(2, 64, 64, 4, 2, 16), options=causal, segments=4),
        "segments_both_ways": Case(shape=(2, 64, 64, 2, 2, 16), segments=6, sinks=True),
        "more_keys": Case(shape=(1, 32, 64, 2, 1, 16), value_head_dim=24),
        "more_queries": Case(shape=(1, 64, 32, 2, 1, 16), options=dict(causal, local_window_size=(11, 0))),
    }

    def compare(name, n, order, dtype):
        known = truth_of(CASES[name], dtype, seed=list(CASES).index(name))
        arrays = dict(zip(("query", "key", "value"), known.arrays, strict=True))
        options = dict(known.options)
        if "sinks" in options:
            arrays["sinks"] = options.pop("sinks")

        def there(x):
            return zigzag(x, n) if order == "zigzag" else jnp.asarray(x)

        def back(x):
            return unzigzag(x, n) if order == "zigzag" else x

        options = {name: there(x) if name.endswith("ids") else x for name, x in options.items()}
        weights = [there(known.d_out.astype("float32")), there(known.d_lse)]

        def loss(arrays):
            out, lse = ring_attention(**arrays, **options, order=order, mesh=mesh_of(n), return_residual=True)
            total = (out.astype(jnp.float32) * weights[0]).sum()
            return total + jnp.where(jnp.isfinite(lse), lse * weights[1], 0.0).sum(), (out, lse)

        placed = {name: x if name == "sinks" else there(x) for name, x in arrays.items()}
        gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(placed)
        assert_within(back(out), known.out, limit(known.out, known.plain_out, out.dtype))
        assert_within(back(lse), known.lse, limit(known.lse, known.plain_lse, lse.dtype))
        for name, (want, plain) in known.gradients.items():
            got = gradients[name] if name == "sinks" else back(gradients[name])
            assert got.dtype == arrays[name].dtype
            assert_within(got, want, limit(want, plain, jnp.dtype(dtype), products=3))
"""

CHOSEN = [
    ("causal", 8, "zigzag", "bfloat16"),
    ("window", 4, "zigzag", "float16"),
    ("window", 8, "contiguous", "float32"),
    ("both_windows", 4, "contiguous", "bfloat16"),
    ("segments", 8, "zigzag", "float32"),
    ("more_keys", 2, "zigzag", "float32"),
]


def on_eight_devices(*parts: str) -> None:
    run_on_eight_devices("\n".join(map(textwrap.dedent, (PRELUDE, *parts))))


def test_results_and_gradients_agree_with_the_oracle():
    on_eight_devices(ORACLE, f"for one in {CHOSEN}:\n    compare(*one)")


@pytest.mark.parametrize("n", [run(n, quick=False, soak=True) for n in (2, 4, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_case_in_both_orders_agrees_with_the_oracle(n, dtype):
    everything = f"""
        for name, order in itertools.product(CASES, ("contiguous", "zigzag")):
            compare(name, {n}, order, {dtype!r})
    """
    on_eight_devices(ORACLE, everything)


def test_only_keys_and_their_gradients_travel_and_memory_is_constant():
    on_eight_devices("""
        def program(n, **options):
            shape, mesh = (1, 512 * n, 2, 32), mesh_of(n)
            x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, P(None, "context")))

            def loss(q, k, v):
                return ring_attention(q, k, v, is_causal=True, mesh=mesh, **options).astype(jnp.float32).sum()

            return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()

        of_4, of_8 = (program(n, order="zigzag") for n in (4, 8))
        # keys with values in the loop of each pass; their gradients in that of the backward pass, after it, and home
        assert collectives(of_8) == {"collective-permute": 2 + 3}, collectives(of_8)
        assert of_4.memory_analysis().temp_size_in_bytes == of_8.memory_analysis().temp_size_in_bytes
    """)


def test_a_device_runs_nothing_for_hidden_parts(changing_kernels):
    changing_kernels.setattr(xla, "FLASH", xla.FLASH)  # the program replaces it
    on_eight_devices("""
        import dataclasses
        from jfa.backends import xla

        seen = np.zeros(8, int)
        unchanged = xla.FLASH

        def counted(run):
            def wrapper(*args):
                jax.debug.callback(lambda device: np.add.at(seen, int(device), 1), jax.lax.axis_index("context"))
                return run(*args)
            return wrapper

        xla.FLASH = dataclasses.replace(
            unchanged, run=counted(unchanged.run), run_backward=counted(unchanged.run_backward)
        )
        q = jnp.ones((1, 64, 1, 8))

        def runs(backward=False, **options):
            def attend(q):
                return ring_attention(q, q, q, mesh=mesh_of(8), **options)

            def gradient(q):
                return jax.vjp(attend, q)[1](q)

            seen[:] = 0
            jax.block_until_ready(jax.jit(gradient if backward else attend)(q))
            jax.effects_barrier()
            return seen.tolist()

        segments = jnp.repeat(jnp.arange(4), 16)[None]
        ids = dict(query_segment_ids=segments, key_value_segment_ids=segments)
        assert runs(is_causal=True) == [1, 2, 3, 4, 5, 6, 7, 8]
        # pairs of half as many queries and as many keys: 17 of 32 on every device
        assert runs(is_causal=True, order="zigzag") == [17] * 8
        assert runs(is_causal=True, order="zigzag", backward=True) == [34] * 8
        assert runs(is_causal=True, local_window_size=8) == [1] + [2] * 7
        assert runs(local_window_size=(8, 1)) == [2, *[3] * 6, 2]
        assert runs(**ids, is_causal=True) == [1, 2] * 4

        def turns(**options):
            program = jax.make_jaxpr(lambda q: ring_attention(q, q, q, is_causal=True, mesh=mesh_of(8), **options))(q)
            return re.search(r"length=(\\d+)", str(program))[1]

        # keys before the window do not travel
        assert turns() == turns(local_window_size=60) == "7" and turns(local_window_size=9) == "2"
    """)


def test_inside_shard_map_over_heads_too():
    on_eight_devices("""
        q = jax.random.normal(jax.random.key(0), (2, 64, 4, 16))
        sinks = jnp.arange(4.0)
        mesh, spec = jax.make_mesh((2, 4), ("heads", "context")), P(None, "context", "heads")

        def loss(attend, q, sinks, **options):
            return jnp.square(attend(q, q, q, is_causal=True, sinks=sinks, **options))

        def split(q, sinks):
            body = lambda q, sinks: loss(ring_attention, q, sinks)
            return jax.shard_map(body, mesh=mesh, in_specs=(spec, P("heads")), out_specs=spec)(q, sinks)

        placed = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in ((q, spec), (sinks, P("heads")))]
        got = jax.jit(jax.grad(lambda *x: split(*x).sum(), argnums=(0, 1)))(*placed)
        want = jax.grad(lambda *x: loss(jfa.dot_product_attention, *x).sum(), argnums=(0, 1))(q, sinks)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(jax.device_get(x), y, atol=1e-4)
    """)


@pytest.mark.exhaustive
@pytest.mark.soak
def test_meshes_contexts_and_shard_map():
    on_eight_devices("""
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (2, 64, 4, 16))
        k, v = (jax.random.normal(key, (2, 64, 2, 16)) for key in keys[1:])
        arrays = q, k, v, jnp.arange(4.0)

        def one(q, k, v, sinks):
            return jfa.dot_product_attention(q, k, v, is_causal=True, sinks=sinks)

        def ring(q, k, v, sinks, **options):
            return ring_attention(q, k, v, is_causal=True, sinks=sinks, **options)

        def gradients(f):
            return jax.grad(lambda *x: jnp.square(f(*x)).sum(), argnums=(0, 1, 2, 3))

        want = one(*arrays), gradients(one)(*arrays)

        def same(got, want):
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(jax.device_get(x), y, atol=1e-4)

        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 4), ("heads", "context"), axis_types=(kind,) * 2)
            spec = P(None, "context", "heads")
            place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
            placed = [*(place(x, spec) for x in arrays[:3]), place(arrays[3], P("heads"))]
            with_mesh = lambda *x: ring(*x, mesh=mesh)
            program = jax.jit(with_mesh).lower(*placed).compile()
            assert collectives(program) == {"collective-permute": 1}, collectives(program)
            out = program(*placed)
            same(out, want[0])
            assert out.sharding.is_equivalent_to(placed[0].sharding, 4), out.sharding
            same(jax.jit(gradients(with_mesh))(*placed), want[1])
            same((with_mesh(*arrays), gradients(with_mesh)(*arrays)), want)  # nothing is on the mesh before
            same(ring(*placed), want[0])  # the mesh is that of the arrays
            with jax.set_mesh(mesh):
                same((ring(*arrays), jax.jit(gradients(ring))(*arrays)), want)

            def inside(q, k, v, sinks, spec=spec, mesh=mesh):
                specs = spec, spec, spec, P("heads")
                return jax.shard_map(ring, mesh=mesh, in_specs=specs, out_specs=spec)(q, k, v, sinks)

            same((inside(*placed), jax.jit(gradients(inside))(*placed)), want)

            def over_one_axis(q, k, v, sinks, mesh=mesh):
                spec = P(None, "context")
                options = dict(in_specs=(spec, spec, spec, P()), out_specs=spec, axis_names={"context"})
                return jax.shard_map(ring, mesh=mesh, **options)(q, k, v, sinks)

            same(jax.jit(over_one_axis)(*placed), want[0])

        kernel = lambda *x: ring(*x, implementation="triton", mesh=mesh_of(4))  # interpreted
        same((kernel(*arrays), jax.jit(gradients(kernel))(*arrays)), want)

        # keys that no query sees may be anything
        segments = jnp.where(jnp.arange(64) < 40, 0, 1)[None]
        ids = dict(query_segment_ids=jnp.zeros((1, 64), int), key_value_segment_ids=segments)
        poison = [x[:1].at[:, 40:].set(jnp.nan) for x in (k, v)]
        got = ring_attention(q[:1], *poison, mesh=mesh_of(8), **ids)
        same(got, jfa.dot_product_attention(q[:1], *poison, **ids))
    """)


def test_one_device_is_a_ring_too():
    mesh = jax.make_mesh((1,), ("context",))  # axes are explicit by default
    q = jnp.asarray(np.random.default_rng(0).standard_normal((20, 4, 16)), jnp.float32)

    def loss(attend, **options):
        def sums(q):
            out, lse = attend(q, q[:, :2], q[:, :2], is_causal=True, return_residual=True, **options)
            return jnp.square(out).sum() + lse.sum()

        return jax.value_and_grad(sums)

    got, want = jax.jit(loss(ring_attention, mesh=mesh))(q), jax.jit(loss(jfa.dot_product_attention))(q)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.exhaustive
def test_kernels_are_lowered_for_a_gpu():
    device = AbstractDevice(device_kind="gfx942", num_cores=None, platform="rocm")
    mesh = AbstractMesh((8,), ("context",), axis_types=(AxisType.Auto,), abstract_device=device)
    x = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.bfloat16)

    def loss(q, k, v):
        return ring_attention(q, k, v, is_causal=True, order="zigzag").astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("rocm",))
    # one, and two for the gradients; in the loop and for the last part
    assert lowered.as_text().count("@__gpu$xla.gpu.triton") == 2 * (1 + 2)


def test_zigzag_gives_each_device_an_early_and_a_late_chunk():
    x = jnp.arange(12)
    np.testing.assert_array_equal(zigzag(x, 3, axis=0), [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])
    np.testing.assert_array_equal(unzigzag(zigzag(x, 3, axis=0), 3, axis=0), x)
    y = jnp.arange(48).reshape(2, 8, 3)
    np.testing.assert_array_equal(unzigzag(zigzag(y, 2), 2), y)
    np.testing.assert_array_equal(zigzag(y, 2, axis=-2), zigzag(y, 2))


MESH = AbstractMesh((8,), ("context",))


def ring_of(*, tq=64, tk=64, hq=4, hkv=2, d=16, **options):
    q, k, v = jnp.zeros((1, tq, hq, d)), jnp.zeros((1, tk, hkv, d)), jnp.zeros((1, tk, hkv, d))
    return ring_attention(q, k, v, **{"mesh": MESH, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tq=60), r"query has length 60, but contiguous order cuts it into 8 equal parts; .* is 56 or 64: pad"),
        (dict(tk=72, order="zigzag"), "key has length 72, but zigzag order cuts it into 16 equal parts; .* 64 or 80"),
        (dict(tq=7), "query has length 7, but .* is 8: pad"),
        (dict(tq=0), "query has length 0"),
        (dict(axis_name="tensor"), r"axis_name must be an axis of the mesh, one of \['context'\], got 'tensor'"),
        (dict(mesh=None), "no mesh is known whose axis 'context' the sequence could be split over; pass mesh="),
        (dict(hq=3), "the number of query heads must be a multiple of the number of key heads, got 3 and 2"),
        (dict(order="striped"), "order must be 'contiguous' or 'zigzag', got 'striped'"),
        (dict(sinks=jnp.zeros(3)), "sinks must contain one number per query head"),
        (dict(query_segment_ids=jnp.zeros((1, 64), int)), "key_value_segment_ids is missing"),
        (
            dict(query_segment_ids=jnp.zeros((1, 64), int), key_value_segment_ids=jnp.zeros((1, 8), int)),
            r"key_value_segment_ids must contain one integer per position, shape \(1, 64\), got \(1, 8\)",
        ),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ring_of(**options)


def test_bad_input_inside_of_shard_map_is_refused():
    mesh = jax.make_mesh((1,), ("context",), axis_types=(AxisType.Auto,))
    x, spec = jnp.zeros((1, 7, 2, 16)), jax.P(None, "context")

    def inside(**options):
        attend = jax.shard_map(lambda x: ring_attention(x, x, x, **options), mesh=mesh, in_specs=spec, out_specs=spec)
        return attend(x)

    with pytest.raises(ValueError, match="length 7, but zigzag order cuts this device's part of it into 2 equal parts"):
        inside(order="zigzag")
    with pytest.raises(ValueError, match="inside a shard_map over 'context' arrays are already split; call without"):
        inside(mesh=mesh)


def test_the_reference_is_refused():
    with pytest.raises(jfa.UnsupportedError, match="implementation='reference': it has no backward pass of its own"):
        ring_of(implementation="reference")


def test_zigzag_of_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"x has length 10, but zigzag order cuts it into 4 equal parts; .* 8 or 12"):
        zigzag(jnp.zeros((1, 10)), 2)

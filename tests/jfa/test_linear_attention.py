"""Linear attention and its convolution: a float64 recurrence in NumPy is the oracle of every form and backend."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from runs import run

import jfa
from jfa.kernels.triton.linear_bwd import linear_attention_bwd
from jfa.types import LinearOperands, LinearSpec
from jfa_bench.proof.proofs import linear_backward_check
from jfa_bench.truth.linear_cases import CASES, SEGMENTS, LinearCase, arrays_of, gradients, recurrence, truth, truth_of
from jfa_bench.truth.numerics import assert_within, limit

BACKENDS = {
    "reference": None,
    "xla": jfa.LinearConfig(chunk_size=16),
    "one_chunk": None,
    "triton": jfa.LinearKernelConfig(chunk_size=16, block_v=16, num_warps=4, num_stages=1),
}


def attend(known, backend, **more):
    implementation, config = ("xla", None) if backend == "one_chunk" else (backend, BACKENDS[backend])
    options = dict(implementation=implementation, config=config) | known.options | more
    static = {name: options.pop(name) for name in ("implementation", "config", "scale") if name in options}
    return jax.jit(functools.partial(getattr(jfa, known.op), **static))(*known.arrays, **options)


def assert_agrees(out, state, known, **options):
    """options: of the limit."""
    assert_within(out, known.out, limit(known.out, known.plain_out, known.arrays[0].dtype, **options))
    assert_within(state, known.state, limit(known.state, known.plain_state, np.float32, **options))


RUNS = [
    (name, dtype, backend)
    for i, name in enumerate(CASES)
    for dtype in ("float32", ("bfloat16", "float16")[i % 2])
    for backend in BACKENDS
    if not (backend == "reference" and dtype != "float32")
    and not (backend == "triton" and (dtype == "float16" or CASES[name].op is None))
]


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle(name, dtype, backend):
    known = truth(name, dtype)
    out, state = attend(known, backend)
    assert out.dtype == jnp.dtype(dtype) and state.dtype == jnp.float32
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    rounded = out.dtype if backend == "triton" else state.dtype  # of what is added to the state
    assert_within(state, known.state, limit(known.state, known.plain_state, rounded))


@pytest.mark.parametrize("name", ["mamba", "delta_and_columns", "mixed_decays"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_other_chunks_give_the_same_result(name, size):
    known = truth(name, "float32")
    assert_agrees(*attend(known, "xla", config=jfa.LinearConfig(chunk_size=size)), known)


@pytest.mark.parametrize("name", ["mamba", "columns_and_groups", "delta_and_groups", "delta_and_columns"])
def test_a_text_in_parts_gives_what_it_gives_in_one_go(name):
    known = truth(name, "float32")
    beta = known.options.get("beta")
    state, start, outs = known.options["initial_state"], 0, []
    scale = known.options.get("scale")
    for size in (9, 1, 20, 1, 100):
        part = slice(start, start + size)
        tokens = [x[:, part] for x in known.arrays]
        own = {} if beta is None else {"beta": beta[:, part]}
        if size == 1:
            own = {name: x[:, 0] for name, x in own.items()}
            out, state = jfa.linear_attention_step(*(x[:, 0] for x in tokens), state, **own, scale=scale)
            out = out[:, None]
        else:
            out, state = jfa.linear_attention(*tokens, **own, initial_state=state, scale=scale)
        outs.append(out)
        start += size
    assert_agrees(np.concatenate(outs, axis=1), state, known, products=2)


def test_decays_that_overflow_a_quotient_of_products():
    # within one chunk the product of all decays is e^-3000: its inverse is infinite in every dtype
    case = LinearCase(b=1, t=60, by_columns=True, dk=16, decays=(1.7, 1.7), state=False)
    arrays, _ = arrays_of(case, "bfloat16")
    arrays = (*arrays[:3], np.where(np.arange(60)[:, None, None] % 3, arrays[3], -1e-3))  # some tokens keep the state
    want, plain = recurrence(arrays), recurrence(arrays, dtype=np.float32)
    out, state = jfa.linear_attention(*arrays)
    assert_within(out, want[0], limit(want[0], plain[0], out.dtype))
    assert_within(state, want[1], limit(want[1], plain[1], state.dtype))


@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_the_state_after_a_hundred_thousand_tokens(delta):
    # one head; decays from 1 - 1e-7 to e^-100; float32 sums of 100,000 products keep four digits or more
    t, d = 100_000, 4
    rng = np.random.default_rng(0)
    k = rng.standard_normal((t, d)).astype(np.float32)
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    v = rng.standard_normal((t, d)).astype(np.float32)
    log_decay = -(10 ** rng.uniform(-7, -3, t)).astype(np.float32)
    log_decay[rng.random(t) < 1e-4] = -100.0
    beta = rng.random(t).astype(np.float32) if delta else None
    want = np.zeros((d, d))
    for i in range(t):
        want *= np.exp(np.float64(log_decay[i]))
        new = v[i].astype(float)
        if beta is not None:
            new = beta[i] * (new - want.T @ k[i])
        want += np.outer(k[i], new)
    shaped = [x.reshape(1, t, 1, d) for x in (k, k, v)]
    more = {} if beta is None else {"beta": beta.reshape(1, t, 1)}
    _, state = jax.jit(jfa.linear_attention)(*shaped, log_decay.reshape(1, t, 1), **more)
    assert_within(state[0, 0], want, 1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", ["mamba", "columns_and_groups", "delta_and_columns", "segments_columns_and_lengths"])
@pytest.mark.parametrize("size", [5, 64])
def test_gradients_agree_with_differences_of_the_oracle(name, size):
    known = truth(name, "float32")
    arrays, options = known.arrays, known.options
    rng = np.random.default_rng(1)
    names = ("initial_state", "beta") if "beta" in options else ("initial_state",)
    others = {key: x for key, x in options.items() if key not in names}
    given = (*arrays, *(options[key] for key in names))
    weights = [rng.standard_normal(x.shape) for x in recurrence(arrays, **options)]

    def loss(run, *given):
        found = run(given[:4], **dict(zip(names, given[4:], strict=True)), **others)
        return sum((x * w).sum() for x, w in zip(found, weights, strict=True))

    def in_chunks(arrays, **more):
        return jfa.linear_attention(*arrays, config=jfa.LinearConfig(chunk_size=size), **more)

    grads = jax.jit(jax.grad(functools.partial(loss, in_chunks), argnums=tuple(range(len(given)))))(*given)
    for i, grad in enumerate(grads):
        direction = rng.standard_normal(given[i].shape) * np.abs(given[i])

        def moved(step, i=i, direction=direction):
            return loss(recurrence, *given[:i], given[i] + step * direction, *given[i + 1 :])

        want = (moved(1e-5) - moved(-1e-5)) / 2e-5
        size_of = np.linalg.norm(np.asarray(grad) * direction)
        assert abs(float((np.asarray(grad, float) * direction).sum()) - want) <= 1e-5 * max(size_of, 1.0)


def test_memory_of_the_gradient_is_linear_in_the_length():
    def temporary(t):
        arrays, _ = arrays_of(LinearCase(b=1, t=t, dk=16, dv=16))
        gradient = jax.jit(jax.grad(lambda *x: jfa.linear_attention(*x)[0].sum()))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)


COUNTS = [1, 0, 30, 1, 5, 20]
START = np.concatenate([[0], np.cumsum(COUNTS)])
SLOT = np.array([3, 9, 0, 7, 2, 5])
IS_NEW = np.array([False, False, True, True, False, False])


@pytest.mark.parametrize("backend", ["reference", "xla", "triton"])
def test_padding_after_the_last_row_is_zero_and_other_states_are_unchanged(backend):
    known = truth("rows_delta", "float32")
    out, after = attend(known, backend)
    assert not np.asarray(out[sum(CASES["rows_delta"].rows) :]).any()
    used = known.options["slot"][np.array(CASES["rows_delta"].rows) > 0]
    others = np.setdiff1d(np.arange(len(after)), used)
    np.testing.assert_array_equal(after[others], known.options["states"][others])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(37, 20), (28, 36), (26, 33), (37, 0), (1, 2)])
def test_the_convolution_agrees_with_its_definition(dtype, lengths):
    rng = np.random.default_rng(0)
    x, weight, bias, state = (
        rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in ((2, 37, 3), (3, 4), (3,), (2, 3, 3))
    )
    segments = SEGMENTS.copy()
    segments[0, 22] = 7  # the same number on both sides, within the convolution's width
    out, after = jfa.causal_conv(
        x, weight, bias, initial_state=state, segment_ids=segments, seq_lengths=jnp.asarray(lengths)
    )
    want = np.zeros(x.shape)
    for row in range(2):
        for i in range(lengths[row]):
            want[row, i] = bias
            for back in range(4):
                j = i - back
                if (segments[row, max(j, 0) : i] == segments[row, i]).all():
                    before = x[row, j] if j >= 0 else state[row, j]
                    want[row, i] += before.astype(float) * weight[:, 3 - back].astype(float)
    assert_within(out, want, limit(want, want, out.dtype))
    held = np.concatenate([state, x], axis=1)
    for row, n in enumerate(lengths):
        changes = np.flatnonzero(np.diff(segments[row, :n])) + 1
        kept = np.arange(n, n + 3) >= 3 + (changes[-1] if len(changes) else -3)  # of the last document
        np.testing.assert_array_equal(after[row], np.where(kept[:, None], held[row, n : n + 3], 0))


def test_the_ragged_convolution_gives_what_each_row_gives_alone():
    rng = np.random.default_rng(0)
    x, weight, bias, states = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((70, 3), (3, 4), (3,), (9, 3, 3))
    )
    x[START[-1] :] = np.nan
    states[7] = np.nan
    out, after = jfa.ragged_causal_conv(x, weight, states, SLOT, START, bias, is_new=IS_NEW)
    for row, (start, end) in enumerate(itertools.pairwise(START)):
        if start < end:
            state = np.zeros_like(states[:1]) if IS_NEW[row] else states[SLOT[row]][None]
            want, held = jfa.causal_conv(x[None, start:end], weight, bias, initial_state=state)
            np.testing.assert_allclose(out[start:end], want[0], rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(after[SLOT[row]], held[0])
    assert not np.asarray(out[START[-1] :]).any()
    np.testing.assert_array_equal(after[np.array([1, 4, 6, 8])], states[[1, 4, 6, 8]])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_is_never_read(implementation):
    known = truth("lengths", "float32")
    arrays, options = known.arrays, known.options
    poisoned = [np.array(x) for x in arrays]
    beta = np.array(options["beta"])
    for x in (*poisoned, beta):
        for row, n in enumerate(options["seq_lengths"]):
            x[row, n:] = np.nan
    want = jfa.linear_attention(*arrays, **options, implementation=implementation)
    found = jfa.linear_attention(*poisoned, **(options | dict(beta=beta)), implementation=implementation)
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [dict(b=0), dict(t=0), dict(h=0, hk=1)], ids=str)
def test_empty_input(shape):
    arrays, more = arrays_of(LinearCase(**shape))
    out, state = jfa.linear_attention(*arrays, **more)
    assert out.shape == arrays[2].shape
    np.testing.assert_array_equal(state, more["initial_state"])


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((1,), ("rows",))
    known = truth("delta", "float32")
    placed = [jax.device_put(x, jax.NamedSharding(mesh, jax.P("rows"))) for x in known.arrays]
    with jax.set_mesh(mesh):
        found = jax.jit(jfa.linear_attention)(*placed, **known.options)
    assert_agrees(*found, known)


ZEROS = {
    "query": np.zeros((2, 5, 2, 8), np.float32),
    "key": np.zeros((2, 5, 2, 8), np.float32),
    "value": np.zeros((2, 5, 4, 6), np.float32),
    "log_decay": np.zeros((2, 5, 4), np.float32),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(query=np.zeros((5, 2, 8), np.float32)), r"query must be \[batch, length, heads, head_dim\], got shape"),
        (dict(value=np.zeros((2, 5, 4, 6), int)), "value must be float16, bfloat16 or float32, got int"),
        (dict(key=np.zeros((2, 5, 2, 8), np.float16)), "must share one dtype, got float32, float16 and float32; cast"),
        (dict(query=np.zeros((2, 4, 2, 8), np.float32)), "query and key must have the same shape, got"),
        (dict(value=np.zeros((2, 4, 4, 6), np.float32)), "key and value must have the same batch, length, got"),
        (dict(value=np.zeros((2, 5, 4, 0), np.float32)), "head_dim must be at least 1, got 8 for key, 0 for value"),
        (dict(value=np.zeros((2, 5, 3, 6), np.float32)), "value heads must be a multiple of .* key heads, got 3 and 2"),
        (dict(log_decay=np.zeros((2, 5, 2), np.float32)), r"log_decay must have the shape .*\(2, 5, 4, 8\), got"),
        (dict(log_decay=np.zeros((2, 5, 4), int)), "log_decay must be float16, bfloat16 or float32, got int"),
        (
            dict(log_decay=np.full((2, 5, 4), 0.5, np.float32)),
            "log_decay must be at most 0, .* number is 0.5; pass log",
        ),
        (dict(beta=np.zeros((2, 5, 2), np.float32)), r"beta must have the shape \(2, 5, 4\), got \(2, 5, 2\)"),
        (dict(initial_state=np.zeros((2, 4, 6, 8), np.float32)), r"initial_state must be float32\[2, 4, 8, 6\], got"),
        (dict(initial_state=np.zeros((2, 4, 8, 6), np.float16)), r"initial_state must be float32.*, got float16\["),
        (dict(seq_lengths=np.zeros(3, int)), "seq_lengths must contain one integer per batch row"),
        (dict(segment_ids=np.zeros((2, 4), int)), "segment_ids must contain one integer per position"),
        (dict(scale=float("nan")), "scale must be a finite number, got nan"),
        (dict(config=jfa.BlockConfig(block_q=16, block_kv=16)), "takes a LinearConfig, got a BlockConfig"),
        (dict(implementation="cuda"), "implementation must be None or one of"),
    ],
)
def test_invalid_arguments_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        jfa.linear_attention(**(ZEROS | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            dict(log_decay=np.zeros((2, 5, 4, 8), np.float32), beta=np.zeros((2, 5, 4), np.float32)),
            "the kernels have the delta rule with one decay per head, not with one for each",
        ),
        ({name: ZEROS[name].astype(np.float16) for name in ("query", "key", "value")}, "float16 ends at 65,504"),
        (dict(value=np.zeros((2, 5, 4, 300), np.float32)), "the head_dim of value must be at most 256, got 300"),
    ],
)
def test_what_the_kernel_does_not_support_is_left_to_xla(changed, message):
    with pytest.raises(jfa.UnsupportedError, match=f"{message}.*; leave it None"):
        jfa.linear_attention(**(ZEROS | changed), implementation="triton")


OF_KERNELS = {  # what selects each kernel
    "linear_attention": dict(),
    "gated_linear_attention": dict(by_columns=True),
    "delta_attention": dict(delta=True),
}


@pytest.mark.parametrize("kind", ["gfx942", "gfx1100", "NVIDIA H200"])
@pytest.mark.parametrize("op", OF_KERNELS)
def test_on_a_gpu_a_call_is_one_kernel(kind, op):
    platform = "cuda" if kind.startswith("NVIDIA") else "rocm"
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    arrays, more = arrays_of(LinearCase(dk=64, dv=64, **OF_KERNELS[op]), "bfloat16")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jfa.linear_attention).trace(*arrays, **more)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert f'"{op}"' in text


@pytest.mark.parametrize("kind", ["gfx942", "NVIDIA H200"])
@pytest.mark.parametrize("op", OF_KERNELS)
def test_on_a_gpu_the_gradient_is_three_kernels(kind, op):
    platform = "cuda" if kind.startswith("NVIDIA") else "rocm"
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    arrays, more = arrays_of(LinearCase(dk=64, dv=64, **OF_KERNELS[op]), "bfloat16")
    gradient = jax.jit(jax.grad(lambda query, *rest: jfa.linear_attention(query, *rest, **more)[0].sum()))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = gradient.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert all(f'"{op}_{part}"' in text for part in ("states", "dstates", "dqkv"))
    assert "jfa.linear_attention.xla" not in text


QUICK_GRADIENTS = {
    "columns_and_groups": "bfloat16",
    "delta_and_groups": "float32",
    "lengths": "bfloat16",
    "mamba": "bfloat16",
    "segments": "float32",
}
GRADIENTS = [
    run(name, dtype, quick=QUICK_GRADIENTS.get(name) == dtype)
    for name, case in CASES.items()
    for dtype in ("float32", "bfloat16")
    if case.op is not None and case.rows is None
]


@pytest.mark.parametrize(("name", "dtype"), GRADIENTS)
def test_gradients_through_the_kernels_agree_with_the_oracle(name, dtype):
    fn, args, wanted, limits = linear_backward_check(truth(name, dtype), "triton")
    for got, want, allowed in zip(jax.jit(fn)(*args), wanted, limits, strict=True):
        assert_within(got, want, allowed)


SIZES = {
    "pieces": dict(chunk_size=16, block_v=16, block_d=16),  # several of the keys and of the values
    "one_chunk": dict(chunk_size=64, block_v=32),
    "wide": dict(chunk_size=32, block_v=64, block_d=64),  # wider than keys and values
}


@pytest.mark.parametrize("size", [run(size, quick=size == "pieces") for size in SIZES])
@pytest.mark.parametrize("op", OF_KERNELS)
def test_gradients_by_kernels_do_not_depend_on_tiles(size, op):
    case = LinearCase(b=1, hk=1, dk=40, dv=20, **OF_KERNELS[op], decays=(-3.0, 4.0), options=dict(scale=0.5))
    known = truth_of(case, "float32", seed=0)
    state, beta = known.options["initial_state"], known.options.get("beta")
    config = jfa.LinearKernelConfig(**SIZES[size], num_warps=4, num_stages=1)
    kernels = jax.jit(
        functools.partial(linear_attention_bwd, spec=LinearSpec(scale=0.5), config=config, interpret=True)
    )
    found = kernels(LinearOperands(*known.arrays, state=state, beta=beta), *known.cotangents)
    shown = dict(zip(("query", "key", "value", "log_decay", "initial_state", "beta"), found, strict=True))
    for name, (want, plain) in known.gradients.items():
        assert_within(shown[name], want, limit(want, plain, np.float32, products=3))


def test_a_decay_of_zero_has_no_gradient():
    q, k, v, log_decay = truth("mamba", "float32").arrays
    log_decay = np.where(np.arange(log_decay.shape[1])[:, None] % 3 == 2, -np.inf, log_decay)

    def loss(log_decay):
        return jfa.linear_attention(q, k, v, log_decay, implementation="triton")[0].sum()

    found = np.asarray(jax.jit(jax.grad(loss))(log_decay))
    assert not found[:, 2::3].any() and found[:, 1::3].all() and np.isfinite(found).all()


def test_the_gradient_of_a_decay_of_a_column_near_0_has_its_digits():
    known = truth("columns", "float32")
    q, k, v, log_decay = (x[:1] for x in known.arrays)
    log_decay = log_decay.copy()
    log_decay[:, 8] = -25.0  # in the middle of a chunk; its gradient is 1e-10 of others
    d_out, d_state = (x[:1] for x in known.cotangents)
    wanted = gradients((q, k, v, log_decay), d_out, d_state)["log_decay"][:, 8]

    def loss(log_decay):
        out, state = jfa.linear_attention(q, k, v, log_decay, implementation="triton")
        return (out * d_out).sum() + (state * d_state).sum()

    found = np.asarray(jax.jit(jax.grad(loss))(log_decay))[:, 8]
    assert 0 < np.abs(wanted).max() < 1e-8
    assert_within(found, wanted, 1e-4 * np.abs(wanted).max())


def test_the_gradient_through_the_kernel_does_not_need_promotion_of_ranks():
    known = truth("mamba", "float32")
    q, k, v, log_decay = known.arrays

    def loss(v):
        return attend(dataclasses.replace(known, arrays=(q, k, v, log_decay)), "triton")[0].sum()

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = jax.jit(jax.grad(loss))(v)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_decays_that_are_constants_of_a_traced_function(transform):
    query, key, value, log_decay = (jnp.asarray(x) for x in truth("mamba", "float32").arrays)

    def run(query, log_decay=log_decay):
        return jfa.linear_attention(query, key, value, log_decay)[0]

    np.testing.assert_allclose(transform(run)(query), run(query), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="log_decay must be at most 0"):
        transform(functools.partial(run, log_decay=abs(log_decay)))(query)


def test_chunks_have_at_least_one_token():
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        jfa.LinearConfig(chunk_size=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=np.zeros((5, 3), np.float32)), r"x must be \[batch, length, channels\], got shape \(5, 3\)"),
        (dict(x=np.zeros((2, 5, 3), int)), "x must be float16, bfloat16 or float32, got int"),
        (dict(weight=np.zeros((3, 1), np.float32)), r"weight must be \[channels, width\] = \[3, at least 2\], got"),
        (dict(bias=np.zeros(4, np.float32)), "bias must have one number for each of the 3 channels, got shape"),
        (dict(initial_state=np.zeros((2, 4, 3), np.float32)), r"initial_state must be float32\[2, 3, 3\], got"),
    ],
)
def test_invalid_convolutions_are_refused(changed, message):
    valid = dict(x=np.zeros((2, 5, 3), np.float32), weight=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=message):
        jfa.causal_conv(**(valid | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(states=np.zeros((3, 4, 6, 8), np.float32)), r"states must be float32\[3, 4, 8, 6\], got"),
        (dict(query_start=np.array([0, 5, 5])), "query_start must contain one integer per batch row"),
        (
            dict(query_start=np.array([1, 5])),
            r"query_start must begin with 0, .*, got \[1, 5\]; put the rows",
        ),
        (dict(slot=np.array([1, 2]), query_start=np.array([0, 4, 3])), r"must .* not decrease, .*, got \[0, 4, 3\]"),
        (dict(query_start=np.array([0, 6])), r"end with at most 5, the number of tokens, got \[0, 6\]"),
        (dict(is_new=np.zeros(1, int)), "is_new must be boolean, one for each of the 1 rows, got int"),
    ],
)
def test_invalid_rows_are_refused(changed, message):
    tokens = {name: x[0] for name, x in ZEROS.items()}
    rows = dict(states=np.zeros((3, 4, 8, 6), np.float32), slot=np.array([1]), query_start=np.array([0, 5]))
    with pytest.raises(ValueError, match=message):
        jfa.ragged_linear_attention(**tokens, **(rows | changed))

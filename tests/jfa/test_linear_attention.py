"""Linear attention and its convolution: a float64 recurrence in NumPy is the oracle of every form and backend."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jfa
from jfa_bench.truth.numerics import assert_within, limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options. decays: of log_decay, the exponents of its power of ten."""

    b: int = 2
    t: int = 37
    hk: int = 2
    h: int = 2
    dk: int = 8
    dv: int = 5
    by_columns: bool = False
    delta: bool = False
    state: bool = True
    decays: tuple[float, float] = (-3.0, 1.0)
    options: dict = dataclasses.field(default_factory=dict)


SEGMENTS = np.array([[0] * 5 + [1] * 20 + [2] + [3] * 11, [4] * 30 + [4, 4, 0, 0, 0, 4, 4]])
CASES = {
    "mamba": Case(hk=1, h=4, dk=16, options=dict(scale=1.0)),
    "heads": Case(h=6),
    "columns": Case(by_columns=True),
    "columns_and_groups": Case(by_columns=True, h=4, t=50),
    "delta": Case(delta=True),
    "delta_and_groups": Case(delta=True, h=4, dv=16, t=70),
    "delta_and_columns": Case(delta=True, by_columns=True, h=4),
    "one_token": Case(t=1, delta=True),
    "no_state": Case(state=False),
    "lengths": Case(options=dict(seq_lengths=np.array([0, 21])), delta=True),
    "segments": Case(options=dict(segment_ids=SEGMENTS)),
    "segments_columns_and_lengths": Case(
        by_columns=True, delta=True, options=dict(segment_ids=SEGMENTS, seq_lengths=np.array([37, 31]))
    ),
    "decays_near_1": Case(decays=(-9.0, -6.0), t=90),
    "decays_near_0": Case(decays=(1.5, 4.0), t=90),
    "decays_near_0_by_columns": Case(decays=(1.0, 3.0), by_columns=True, delta=True, t=90),
    "mixed_decays": Case(decays=(-8.0, 4.0), delta=True, t=90),
}
BACKENDS = {
    "reference": None,
    "xla": jfa.LinearConfig(chunk_size=16),
    "one_chunk": None,
    "triton": jfa.LinearKernelConfig(chunk_size=16, block_v=16, num_warps=4, num_stages=1),
}


def arrays_of(case: Case, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    keys = (case.b, case.t, case.hk, case.dk)
    q, k = (rng.standard_normal(keys).astype(dtype) for _ in "qk")
    k = (k / np.linalg.norm(k.astype(np.float32), axis=-1, keepdims=True)).astype(dtype)
    v = rng.standard_normal((case.b, case.t, case.h, case.dv)).astype(dtype)
    log_decay = -(10 ** rng.uniform(*case.decays, (case.b, case.t, case.h, case.dk)).astype(np.float32))
    if not case.by_columns:
        log_decay = log_decay[..., 0]
    more = {}
    if case.delta:
        more["beta"] = rng.random((case.b, case.t, case.h), np.float32)
    if case.state:
        more["initial_state"] = rng.standard_normal((case.b, case.h, case.dk, case.dv)).astype(np.float32)
    return (q, k, v, log_decay), more


def recurrence(arrays, *, beta=None, initial_state=None, scale=None, seq_lengths=None, segment_ids=None, dtype=float):
    """The definition, one token after another."""
    q, k, v, log_decay = (np.asarray(x, dtype) for x in arrays)
    b, t, h, dv = v.shape
    dk = k.shape[3]
    q, k = (np.repeat(x, h // k.shape[2], axis=2) for x in (q, k))
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    states = np.zeros((b, h, dk, dv), dtype) if initial_state is None else np.array(initial_state, dtype)
    out = np.zeros((b, t, h, dv), dtype)
    for row in range(b):
        for i in range(t if seq_lengths is None else seq_lengths[row]):
            if segment_ids is not None and i and segment_ids[row, i] != segment_ids[row, i - 1]:
                states[row] = 0
            for head in range(h):
                state = np.exp(log_decay[row, i, head])[:, None] * states[row, head]
                new = v[row, i, head]
                if beta is not None:
                    new = beta[row, i, head] * (new - state.T @ k[row, i, head])
                states[row, head] = state + np.outer(k[row, i, head], new)
                out[row, i, head] = states[row, head].T @ q[row, i, head] * (dk**-0.5 if scale is None else scale)
    return out, states


@functools.lru_cache(maxsize=64)
def truth(name, dtype):
    case = CASES[name]
    arrays, more = arrays_of(case, jnp.dtype(dtype))
    want = recurrence(arrays, **more, **case.options)
    plain = recurrence(arrays, **more, **case.options, dtype=np.float32)
    return arrays, more | case.options, want, plain


def attend(arrays, options, backend, **more):
    implementation, config = ("xla", None) if backend == "one_chunk" else (backend, BACKENDS[backend])
    options = dict(implementation=implementation, config=config) | options | more
    static = {name: options.pop(name) for name in ("implementation", "config", "scale") if name in options}
    return jax.jit(functools.partial(jfa.linear_attention, **static))(*arrays, **options)


RUNS = [
    (name, dtype, backend)
    for i, name in enumerate(CASES)
    for dtype in ("float32", ("bfloat16", "float16")[i % 2])
    for backend in BACKENDS
    if not (backend == "reference" and dtype != "float32")
    and not (backend == "triton" and (dtype == "float16" or CASES[name].by_columns))
]


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle(name, dtype, backend):
    arrays, options, want, plain = truth(name, dtype)
    out, state = attend(arrays, options, backend)
    assert out.dtype == jnp.dtype(dtype) and state.dtype == jnp.float32
    assert_within(out, want[0], limit(want[0], plain[0], out.dtype))
    rounded = out.dtype if backend == "triton" else state.dtype  # of what is added to the state
    assert_within(state, want[1], limit(want[1], plain[1], rounded))


@pytest.mark.parametrize("name", ["mamba", "delta_and_columns", "mixed_decays"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_other_chunks_give_the_same_result(name, size):
    arrays, options, want, plain = truth(name, "float32")
    out, state = attend(arrays, options, "xla", config=jfa.LinearConfig(chunk_size=size))
    assert_within(out, want[0], limit(want[0], plain[0], out.dtype))
    assert_within(state, want[1], limit(want[1], plain[1], state.dtype))


@pytest.mark.parametrize("name", ["mamba", "columns_and_groups", "delta_and_groups", "delta_and_columns"])
def test_a_text_in_parts_gives_what_it_gives_in_one_go(name):
    arrays, options, want, plain = truth(name, "float32")
    beta = options.get("beta")
    state, start, outs = options["initial_state"], 0, []
    scale = options.get("scale")
    for size in (9, 1, 20, 1, 100):
        part = slice(start, start + size)
        tokens = [x[:, part] for x in arrays]
        own = {} if beta is None else {"beta": beta[:, part]}
        if size == 1:
            own = {name: x[:, 0] for name, x in own.items()}
            out, state = jfa.linear_attention_step(*(x[:, 0] for x in tokens), state, **own, scale=scale)
            out = out[:, None]
        else:
            out, state = jfa.linear_attention(*tokens, **own, initial_state=state, scale=scale)
        outs.append(out)
        start += size
    assert_within(np.concatenate(outs, axis=1), want[0], limit(want[0], plain[0], np.float32, products=2))
    assert_within(state, want[1], limit(want[1], plain[1], np.float32, products=2))


def test_decays_that_overflow_a_quotient_of_products():
    # within one chunk the product of all decays is e^-3000: its inverse is infinite in every dtype
    case = Case(b=1, t=60, by_columns=True, dk=16, decays=(1.7, 1.7), state=False)
    arrays, _ = arrays_of(case, jnp.bfloat16)
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
    arrays, options, _, _ = truth(name, "float32")
    rng = np.random.default_rng(1)
    names = ("initial_state", "beta") if "beta" in options else ("initial_state",)
    others = {key: x for key, x in options.items() if key not in names}
    given = (*arrays, *(options[key] for key in names))
    weights = [rng.standard_normal(x.shape) for x in recurrence(arrays, **options)]

    def loss(run, *given):
        found = run(given[:4], **dict(zip(names, given[4:], strict=True)), **others)
        return sum((x * w).sum() for x, w in zip(found, weights, strict=True))

    def run(arrays, **more):
        return jfa.linear_attention(*arrays, config=jfa.LinearConfig(chunk_size=size), **more)

    grads = jax.jit(jax.grad(functools.partial(loss, run), argnums=tuple(range(len(given)))))(*given)
    for i, grad in enumerate(grads):
        direction = rng.standard_normal(given[i].shape) * np.abs(given[i])

        def moved(step, i=i, direction=direction):
            return loss(recurrence, *given[:i], given[i] + step * direction, *given[i + 1 :])

        want = (moved(1e-5) - moved(-1e-5)) / 2e-5
        size_of = np.linalg.norm(np.asarray(grad) * direction)
        assert abs(float((np.asarray(grad, float) * direction).sum()) - want) <= 1e-5 * max(size_of, 1.0)


def test_memory_of_the_gradient_is_linear_in_the_length():
    def temporary(t):
        arrays, _ = arrays_of(Case(b=1, t=t, dk=16, dv=16))
        gradient = jax.jit(jax.grad(lambda *x: jfa.linear_attention(*x)[0].sum()))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)


COUNTS = [1, 0, 30, 1, 5, 20]
START = np.concatenate([[0], np.cumsum(COUNTS)])
SLOT = np.array([3, 9, 0, 7, 2, 5])
IS_NEW = np.array([False, False, True, True, False, False])


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *itertools.product(
            ["mamba", "columns_and_groups", "delta_and_groups", "delta_and_columns"], ["reference", "xla"]
        ),
        *itertools.product(["mamba", "delta_and_groups"], ["triton"]),
    ],
)
def test_ragged_rows_give_what_each_gives_alone(name, backend):
    case = dataclasses.replace(CASES[name], b=1, t=70)
    arrays, more = arrays_of(case)
    arrays = [np.array(x[0]) for x in arrays]
    beta = more["beta"][0] if case.delta else None
    states = np.random.default_rng(2).standard_normal((9, case.h, case.dk, case.dv)).astype(np.float32)
    states[7] = np.nan  # of a new row
    for x in arrays:
        x[START[-1] :] = np.nan  # padding belongs to no row
    options = dict(is_new=IS_NEW, scale=0.5, implementation=backend)
    out, after = jfa.ragged_linear_attention(*arrays, states, SLOT, START, beta=beta, **options)
    for row, (start, end) in enumerate(itertools.pairwise(START)):
        if start == end:
            continue
        own = {} if beta is None else {"beta": beta[None, start:end]}
        state = np.zeros_like(states[:1]) if IS_NEW[row] else states[SLOT[row]][None]
        want, plain = (
            recurrence([x[None, start:end] for x in arrays], **own, initial_state=state, scale=0.5, dtype=dtype)
            for dtype in (np.float64, np.float32)
        )
        assert_within(out[start:end], want[0][0], limit(want[0], plain[0], np.float32))
        assert_within(after[SLOT[row]], want[1][0], limit(want[1], plain[1], np.float32))
    assert not np.asarray(out[START[-1] :]).any()
    others = [1, 4, 6, 8]
    np.testing.assert_array_equal(after[np.array(others)], states[others])


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
    arrays, options, _, _ = truth("lengths", "float32")
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
    arrays, more = arrays_of(Case(**shape))
    out, state = jfa.linear_attention(*arrays, **more)
    assert out.shape == arrays[2].shape
    np.testing.assert_array_equal(state, more["initial_state"])


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((1,), ("rows",))
    arrays, options, want, plain = truth("delta", "float32")
    placed = [jax.device_put(x, jax.NamedSharding(mesh, jax.P("rows"))) for x in arrays]
    with jax.set_mesh(mesh):
        out, _ = jax.jit(jfa.linear_attention)(*placed, **options)
    assert_within(out, want[0], limit(want[0], plain[0], out.dtype))


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
        (dict(log_decay=np.zeros((2, 5, 4, 8), np.float32)), "the kernel has one decay per head, not one for each"),
        ({name: ZEROS[name].astype(np.float16) for name in ("query", "key", "value")}, "float16 ends at 65,504"),
        (dict(value=np.zeros((2, 5, 4, 300), np.float32)), "the head_dim of value must be at most 256, got 300"),
    ],
)
def test_what_the_kernel_does_not_support_is_left_to_xla(changed, message):
    with pytest.raises(jfa.UnsupportedError, match=f"{message}.*; leave it None"):
        jfa.linear_attention(**(ZEROS | changed), implementation="triton")


@pytest.mark.parametrize("kind", ["gfx942", "gfx1100", "NVIDIA H200"])
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_on_a_gpu_a_call_is_one_kernel(kind, delta):
    platform = "cuda" if kind.startswith("NVIDIA") else "rocm"
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    arrays, more = arrays_of(Case(dk=64, dv=64, delta=delta), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jfa.linear_attention).trace(*arrays, **more)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert "linear_attention" in text


def test_the_gradient_through_the_kernel_is_that_of_its_chunks():
    arrays, options, _, _ = truth("delta_and_groups", "float32")

    def loss(backend, *arrays):
        out, state = attend(arrays, options, backend)
        return (out * jnp.cos(out)).sum() + (state * jnp.sin(state)).sum()

    found, want = (jax.grad(functools.partial(loss, name), argnums=(0, 1, 2, 3))(*arrays) for name in ("triton", "xla"))
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_through_the_kernel_does_not_need_promotion_of_ranks():
    arrays, options, _, _ = truth("mamba", "float32")
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = jax.grad(lambda v: attend([*arrays[:2], v, arrays[3]], options, "triton")[0].sum())(arrays[2])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_decays_that_are_constants_of_a_traced_function(transform):
    query, key, value, log_decay = (jnp.asarray(x) for x in truth("mamba", "float32")[0])

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
            r"query_start must begin with 0, .*, got \[1, 5\]; put the rows one after",
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

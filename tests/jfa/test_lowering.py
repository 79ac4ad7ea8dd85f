"""The Triton kernel, lowered on the CPU for GPUs that are not present."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jfa
from jfa import tuning
from jfa.device import describe, probe

TARGETS = {"gfx942": ("rocm", "gfx942"), "gfx1100": ("rocm", "gfx1100"), "NVIDIA H200": ("cuda", "sm_90")}
ALL_PLATFORMS = {
    **TARGETS,
    **{arch: ("rocm", arch) for arch in ("gfx90a", "gfx950", "gfx1201")},
    "NVIDIA A100": ("cuda", "sm_80"),
}
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (16, 40, 64, 80, 128, 256)
BATCH, Q_LEN, KV_LEN, Q_HEADS, KV_HEADS = 2, 300, 333, 4, 2
LENGTHS = jnp.array([300, 7], jnp.int32)
OPTIONS = {
    "full": dict(),
    "causal": dict(is_causal=True),
    "left_window": dict(is_causal=True, local_window_size=(100, 0)),
    "both_windows": dict(local_window_size=(100, 20)),
    "soft_cap": dict(logits_soft_cap=30.0),
    "query_lengths": dict(query_seq_lengths=LENGTHS),
    "key_lengths": dict(key_value_seq_lengths=LENGTHS),
    "cached_chunk": dict(is_causal=True, query_offset=33),
    "negative_scale": dict(scale=-0.5),
    "sinks": dict(sinks=jnp.ones(Q_HEADS)),
    "alibi": dict(alibi_slopes=jnp.ones(Q_HEADS)),
    "bias": dict(bias=jnp.ones((BATCH, Q_HEADS, 1, KV_LEN), jnp.bfloat16)),
    "mask": dict(mask=jnp.ones((1, 1, Q_LEN, KV_LEN), bool)),
    "dropout": dict(dropout_rate=0.1, dropout_key=jax.random.key(0)),
    "segments": dict(
        query_segment_ids=jnp.zeros((BATCH, Q_LEN), int), key_value_segment_ids=jnp.zeros((BATCH, KV_LEN), int)
    ),
    "everything": dict(
        is_causal=True,
        local_window_size=64,
        logits_soft_cap=30.0,
        query_seq_lengths=LENGTHS,
        key_value_seq_lengths=LENGTHS,
        query_offset=LENGTHS,
    ),
}


@contextlib.contextmanager
def target(kind):
    """A context in which JAX traces and lowers for a named GPU: an abstract device replaces the real one."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=ALL_PLATFORMS[kind][0])
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def lowered(kind, dtype="bfloat16", head_dim=64, q_len=Q_LEN, **options):
    """StableHLO of a call without a requested backend."""
    q = jax.ShapeDtypeStruct((BATCH, q_len, Q_HEADS, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((BATCH, KV_LEN, KV_HEADS, head_dim), dtype)
    with target(kind):
        traced = jax.jit(lambda q, k, v: jfa.dot_product_attention(q, k, v, **options)).trace(q, kv, kv)
        return traced.lower(lowering_platforms=(ALL_PLATFORMS[kind][0],)).as_text()


def assert_one_kernel(text, config, q_len=Q_LEN):
    """Checks that text has one Triton call, with this configuration's grid, warps and stages."""
    assert re.findall(r"custom_call @(\S+?)\(", text) == ["__gpu$xla.gpu.triton"]
    found = {name: int(x) for name, x in re.findall(r"(grid_[xyz]|num_warps|num_stages) = (\d+) : i32", text)}
    assert found == dict(
        grid_x=Q_HEADS,
        grid_y=math.ceil(q_len / config.block_q),
        grid_z=BATCH,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_plain_call_is_one_kernel_with_the_tuned_tiles(kind, dtype, head_dim):
    config = tuning.flash_config(TARGETS[kind][1], dtype=dtype, head_dim=head_dim)
    assert config is not None, "no entry in the tuning table"
    assert_one_kernel(lowered(kind, dtype, head_dim, is_causal=True), config)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", TARGETS)
def test_every_option_lowers(kind, options):
    config = tuning.flash_config(TARGETS[kind][1], dtype="bfloat16", head_dim=80)
    assert_one_kernel(lowered(kind, head_dim=80, **OPTIONS[options]), config)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_residual_needs_no_second_kernel(kind):
    config = tuning.flash_config(TARGETS[kind][1], dtype="bfloat16", head_dim=64)
    assert_one_kernel(lowered(kind, return_residual=True), config)


@pytest.mark.parametrize(("q_len", "rows"), [(1, 16), (16, 16), (17, 32), (200, 128)])
def test_a_tile_is_no_taller_than_the_queries_need(q_len, rows):
    config = jfa.FlashConfig(block_q=128, block_kv=32, num_warps=2, num_stages=1)
    assert_one_kernel(lowered("gfx942", q_len=q_len, config=config), config, q_len=q_len)
    q, k = jnp.ones((1, q_len, 2, 64)), jnp.ones((1, 64, 2, 64))
    attend = functools.partial(jfa.dot_product_attention, implementation="triton", config=config)
    scores = re.findall(r"f32\[(\d+),32\] = dot_general", str(jax.make_jaxpr(attend)(q, k, k)))
    assert set(scores) == {str(rows)}


def test_an_explicit_config_overrides_the_table():
    config = jfa.FlashConfig(block_q=32, block_kv=32, num_warps=2, num_stages=2)
    assert_one_kernel(lowered("gfx942", config=config), config)


def test_calls_that_the_kernel_does_not_support_use_xla():
    assert "triton" not in lowered("gfx942", head_dim=8)


@pytest.mark.parametrize("kind", TARGETS)
def test_lowering_twice_gives_the_same_text(kind):
    assert lowered(kind, **OPTIONS["everything"]) == lowered(kind, **OPTIONS["everything"])


@pytest.mark.parametrize("kind", TARGETS)
def test_probe_sees_the_target(kind):
    with target(kind):
        assert probe() == describe(*TARGETS[kind])


@pytest.mark.parametrize("kind", TARGETS)
def test_block_sparse_attention_lowers_forward_and_backward(kind):
    q, kv = (jax.ShapeDtypeStruct((BATCH, t, h, 80), jnp.bfloat16) for t, h in ((Q_LEN, Q_HEADS), (KV_LEN, KV_HEADS)))
    bias = jax.ShapeDtypeStruct((1, Q_HEADS, Q_LEN, 1), jnp.bfloat16)
    mask = jfa.BlockMask.sliding_window(Q_LEN, KV_LEN, (100, 0), sinks=4)
    options = dict(is_causal=True, logits_soft_cap=30.0, sinks=jnp.ones(Q_HEADS), key_value_seq_lengths=LENGTHS)

    def loss(q, k, v, bias, mask):
        return jfa.block_sparse_attention(q, k, v, mask, bias, **options).astype(jnp.float32).sum()

    with target(kind):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, kv, kv, bias, mask)
        text = traced.lower(lowering_platforms=(ALL_PLATFORMS[kind][0],)).as_text()
    assert len(re.findall(r"custom_call @__gpu\$xla.gpu.triton", text)) == 4  # forward, dq, dk with dv, bias


@pytest.mark.parametrize("kind", ALL_PLATFORMS)
@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_the_gradient_lowers(kind, backend):
    row = jax.ShapeDtypeStruct((1, 300, 4, 64), jnp.bfloat16)

    def loss(q, k, v):
        return jfa.dot_product_attention(q, k, v, is_causal=True, implementation=backend).astype(jnp.float32).sum()

    with target(kind):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(row, row, row)
        text = traced.lower(lowering_platforms=(ALL_PLATFORMS[kind][0],)).as_text()
    if backend == "triton":  # forward, dq, dk with dv
        assert len(re.findall(r"custom_call @__gpu\$xla.gpu.triton", text)) == 3
    else:
        assert "triton" not in text and "stablehlo.while" in text

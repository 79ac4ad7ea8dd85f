"""PagedKVCache compared with plain Python: a write changes only the slots that its row's page table specifies."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa
from jfa import quant
from jfa.device import describe
from jfa.types import NULL_PAGE

PAGE_SIZES = (1, 3, 16)
# row 0 has all its pages, row 1 two, row 2 none: the other entries are NULL_PAGE
TABLE = np.array([[7, 2, 5], [3, 6, 0], [0, 0, 0]], np.int32)
SHAPE = dict(num_layers=2, num_pages=9, page_size=3, batch=3, pages_per_seq=3, num_kv_heads=2, head_dim=4)


def empty(**changed):
    return jfa.PagedKVCache.create(**(SHAPE | dict(dtype=jnp.float32) | changed))


def filled(**changed):
    """A cache with TABLE for every layer, whose pages contain distinct numbers, below 0 if they are floats."""
    cache = empty(**changed)
    number = iter(range(1, 100))
    pages = {
        name: tuple(jax.tree.map(lambda x: garbage(x, next(number)), page) for page in getattr(cache, name))
        for name in "kv"
    }
    return dataclasses.replace(cache, **pages, page_tables=tuple(jnp.asarray(TABLE) for _ in cache.page_tables))


def garbage(x, seed):
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 100, x.shape) if jnp.issubdtype(x.dtype, jnp.integer) else -1 - random.random(x.shape)
    return jnp.asarray(numbers.astype(x.dtype))  # rounded by NumPy: nothing compiles


def tokens(*shape, seed=0):
    """k and v."""
    random = np.random.default_rng(seed)
    return tuple(
        random.standard_normal((*shape, SHAPE["num_kv_heads"], SHAPE["head_dim"])).astype(np.float32) for _ in "kv"
    )


def stored(pages):
    """Leaves of one layer's pages as exact numbers, each [num_pages, page_size, ...]."""
    return [np.array(leaf, np.float64) for leaf in jax.tree.leaves(pages)]


def written(pages, kv_dtype, table, kv_len, rows):
    """The expected pages, in the form of `stored`, after each row's tokens are written at its kv_len; plain Python."""
    page_size = pages[0].shape[1]
    for row, new in enumerate(rows):
        for place, token in enumerate(new):
            column, within = divmod(int(kv_len[row]) + place, page_size)
            if column >= table.shape[1] or table[row, column] == NULL_PAGE:
                continue
            leaves = [token] if kv_dtype is None else jax.tree.leaves(quantize(token, kv_dtype))
            for leaf, x in zip(pages, leaves, strict=True):
                leaf[table[row, column], within] = np.asarray(x, np.float64).reshape(-1)
    return pages


quantize = jax.jit(quant.quantize, static_argnames="kind")


@functools.partial(jax.jit, static_argnames="layer")
def write(cache, layer, k, v, lengths=None):
    return cache.write(layer, k, v, lengths)


@functools.partial(jax.jit, static_argnames="layer")
def write_ragged(cache, layer, k, v, query_start):
    return cache.write_ragged(layer, k, v, query_start)


def assert_pages(cache, layer, want_k, want_v):
    for pages, want in ((cache.k[layer], want_k), (cache.v[layer], want_v)):
        for got, leaf in zip(stored(pages), want, strict=True):
            np.testing.assert_array_equal(got, leaf)


# Writes


@pytest.mark.parametrize(
    ("page_size", "kv_dtype"), [*((size, None) for size in PAGE_SIZES), *((3, kind) for kind in quant.KINDS)]
)
def test_writes_go_only_to_the_slots_in_the_page_table(page_size, kv_dtype):
    cache = filled(page_size=page_size, kv_dtype=kv_dtype)
    others = stored(cache.k[0]) + stored(cache.v[0])
    want = [stored(cache.k[1]), stored(cache.v[1])]
    t = 4
    # padding, a full row, a row without pages; then across a page boundary, past the second page; then past the table
    for step, (kv_len, lengths) in enumerate(
        [((0, 0, 0), (2, 4, 4)), ((2, 4, 4), (4, 3, 1)), ((3 * page_size - 2, 2 * page_size - 1, 0), (4, 4, 4))]
    ):
        cache = dataclasses.replace(cache, kv_len=jnp.asarray(kv_len, jnp.int32))
        k, v = tokens(3, t, seed=step)
        cache = write(cache, 1, k, v, jnp.asarray(lengths))
        for pages, new in zip(want, (np.asarray(cache.rotated(k)), v), strict=True):
            written(pages, kv_dtype, TABLE, kv_len, [row[:n] for row, n in zip(new, lengths, strict=True)])
        assert_pages(cache, 1, *want)
    assert cache.kv_len.tolist() == [3 * page_size - 2, 2 * page_size - 1, 0], "only advance changes it"
    for got, leaf in zip(stored(cache.k[0]) + stored(cache.v[0]), others, strict=True):
        np.testing.assert_array_equal(got, leaf)


@pytest.mark.parametrize(
    ("heads", "head_dim", "kv_dtype", "stored"),
    [
        (3, 64, None, 4),  # 192 columns become 256
        (5, 64, "int8", 6),
        (3, 64, "int4", 4),  # 32 columns a head
        (3, 80, None, 3),  # 8 heads would be more than twice as many
        (1, 64, None, 2),
        (8, 128, "fp8", 8),
    ],
)
def test_on_a_tpu_spare_heads_fill_whole_tiles(monkeypatch, heads, head_dim, kv_dtype, stored):
    monkeypatch.setattr("jfa.cache.paged.probe", lambda: describe("tpu", "v5e"))
    shape = dict(num_kv_heads=heads, head_dim=head_dim, kv_dtype=kv_dtype)
    cache = jax.eval_shape(lambda: empty(**shape))
    assert cache.num_heads(head_dim) == stored
    if kv_dtype is not None:
        assert cache.k[0].scales.shape[2] == stored
    mesh = jax.make_mesh((1,), ("heads",))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "heads"))
    assert empty(sharding=divided, **shape).num_heads(head_dim) == heads


def test_spare_heads_are_written_as_zeros():
    k, v = tokens(3, 2)
    more = SHAPE["num_kv_heads"] + 1
    for kind in (None, "int8"):
        cache = write(filled(kv_dtype=kind), 0, k, v)
        wider = write(filled(kv_dtype=kind, num_kv_heads=more), 0, k, v)
        for name in "kv":
            leaves = stored(getattr(cache, name)[0]), stored(getattr(wider, name)[0])
            for want, got in zip(*leaves, strict=True):
                np.testing.assert_array_equal(got[7, :2, : want.shape[2]], want[7, :2])
                assert not got[7, :2, want.shape[2] :].any()


def test_without_lengths_all_tokens_are_written():
    cache = dataclasses.replace(filled(), kv_len=np.array([1, 2, 0], np.int32))
    k, v = tokens(3, 4)
    jax.tree.map(np.testing.assert_array_equal, write(cache, 0, k, v), write(cache, 0, k, v, jnp.array([4, 4, 4])))


@pytest.mark.parametrize(("page_size", "kv_dtype"), [(1, None), (3, "int8"), (16, None)])
def test_write_ragged_agrees_with_write(page_size, kv_dtype):
    cache = filled(page_size=page_size, kv_dtype=kv_dtype)
    k, v = tokens(3, 4)
    for kv_len, lengths in (
        ((0, 0, 0), (4, 4, 1)),
        ((3 * page_size - 1, page_size, 0), (3, 1, 0)),
        ((1, 2, 3), (0, 0, 0)),
        ((0, 5, 0), (0, 4, 2)),
    ):
        cache = dataclasses.replace(cache, kv_len=jnp.asarray(kv_len, jnp.int32))
        start = np.concatenate([[0], np.cumsum(lengths)])
        padding = 12 - start[-1]
        ragged = [
            np.concatenate([*(row[:n] for row, n in zip(x, lengths, strict=True)), np.full((padding, 2, 4), np.nan)])
            for x in (k, v)
        ]
        got = write_ragged(cache, 1, *ragged, jnp.asarray(start))
        want = write(cache, 1, k, v, jnp.asarray(lengths))
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_null_page_is_never_written(kv_dtype):
    cache = dataclasses.replace(filled(kv_dtype=kv_dtype), page_tables=(np.zeros((3, 3), np.int32),))
    k, v = tokens(3, 4)
    for after in (
        write(cache, 0, k, v, jnp.array([4, 4, 4])),
        write_ragged(cache, 0, k[0], v[0], jnp.array([0, 1, 3, 4])),
    ):
        jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_only_int4_keys_are_rotated_and_rotated_queries_give_the_same_scores():
    q, k = tokens(3, 4)
    for kv_dtype in (None, "int8", "fp8"):
        assert empty(kv_dtype=kv_dtype).rotated(q) is q
    cache = empty(kv_dtype="int4")
    turned_q, turned_k = cache.rotated(q), cache.rotated(k.astype(jnp.bfloat16))
    assert turned_q.dtype == jnp.float32 and turned_k.dtype == jnp.bfloat16
    got, want = (turned_q * cache.rotated(k)).sum(-1), (q * k).sum(-1)
    size = np.abs(q).max() * np.abs(k).max() * q.shape[-1] ** 2
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * float(jnp.finfo(jnp.float32).eps) * size)


def test_floats_are_rounded_to_the_dtype_of_the_pages():
    k, v = tokens(3, 3)
    cache = write(filled(dtype=jnp.bfloat16), 0, k, v, jnp.array([3, 3, 0]))
    assert cache.k[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.k[0][7], jnp.asarray(k[0], jnp.bfloat16).reshape(3, -1))


def test_no_tokens_and_no_rows_write_nothing():
    cache = filled()
    for after in (
        cache.write(0, *tokens(3, 0)),
        cache.write_ragged(0, *tokens(0), jnp.zeros(4, jnp.int32)),
        cache.copy_pages(jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)),
    ):
        jax.tree.map(np.testing.assert_array_equal, after, cache)
    none = empty(batch=0)
    assert not none.write(0, *tokens(0, 2)).k[0].any()


@pytest.mark.parametrize("shape", [dict(batch=0), dict(pages_per_seq=0)], ids=["batch", "pages_per_seq"])
def test_tables_of_no_rows_or_columns_write_nothing(shape):
    cache = empty(**shape)
    start = jnp.minimum(jnp.arange(cache.kv_len.shape[0] + 1), 2)
    assert not cache.write_ragged(0, *tokens(2), start).k[0].any()


# Lengths


def test_advance_and_truncate_change_only_kv_len():
    cache = filled()
    moved = cache.advance(jnp.array([3, 1, 0])).advance(2)
    assert moved.kv_len.tolist() == [5, 3, 2]
    back = moved.truncate(jnp.array([4, 9, 0]))
    assert back.kv_len.tolist() == [4, 3, 0], "truncate never lengthens"
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(back, kv_len=cache.kv_len), cache)


def test_truncated_tokens_are_overwritten():
    k, v = tokens(3, 3)
    cache = write(filled(), 0, k, v, jnp.array([3, 3, 3])).advance(3).truncate(jnp.array([1, 3, 3]))
    cache = write(cache, 0, 2 * k, 2 * v, jnp.array([1, 0, 0]))
    np.testing.assert_array_equal(cache.k[0][7], np.stack([k[0, 0], 2 * k[0, 0], k[0, 2]]).reshape(3, -1))


def test_kv_len_stays_int32_in_double_precision():
    with jax.enable_x64(True):
        cache = filled()
        assert cache.kv_len.dtype == jnp.int32
        assert cache.advance(jnp.array([1, 2, 0])).kv_len.dtype == jnp.int32
        assert cache.truncate(jnp.array([1, 2, 0])).kv_len.dtype == jnp.int32


def test_writes_are_the_same_in_double_precision():
    k, v = tokens(3, 4)
    want = write(filled(), 0, k, v, np.array([1, 4, 2]))
    with jax.enable_x64(True):
        got = write(filled(), 0, k, v, np.array([1, 4, 2]))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got.k[0].dtype == jnp.float32 and got.kv_len.dtype == jnp.int32


# Pages


@pytest.mark.parametrize(
    ("page_size", "kv_dtype"), [(2, None), (3, None), (16, None), *((3, kind) for kind in quant.KINDS)]
)
def test_compact_leaves_the_kept_tokens_as_if_only_they_had_been_written(page_size, kv_dtype):
    tables = TABLE, np.array([[1, 4, 8], [2, 5, 0], [0, 0, 0]], np.int32)
    kv_len = np.array([1, page_size - 1, 0], np.int32)
    before = filled(page_size=page_size, kv_dtype=kv_dtype, table_of=(0, 1))
    before = dataclasses.replace(before, kv_len=jnp.asarray(kv_len), page_tables=tuple(map(jnp.asarray, tables)))
    k, v = tokens(3, 5)
    kept, num_kept = np.array([[0, 2, 4], [1, 0, 0], [0, 1, 3]]), np.array([3, 1, 0])
    path_k, path_v = (np.take_along_axis(x, kept[..., None, None], axis=1) for x in (k, v))
    whole = want = before
    for layer in (0, 1):
        whole = write(whole, layer, k, v, jnp.array([5, 3, 5]))
        want = write(want, layer, path_k, path_v, jnp.asarray(num_kept))
    got = jax.jit(lambda cache: cache.compact(kept, num_kept))(whole)
    assert got.kv_len.tolist() == kv_len.tolist(), "only advance changes it"
    for layer, table in enumerate(tables):
        for name in "kv":
            leaves = (stored(getattr(cache, name)[layer]) for cache in (got, want, whole))
            for found, wanted, old in zip(*leaves, strict=True):
                expected = old.copy()
                for row in (0, 1):  # row 2 has no pages
                    for token in range(kv_len[row] + num_kept[row]):
                        place = table[row, token // page_size], token % page_size
                        expected[place] = wanted[place]
                np.testing.assert_array_equal(found, expected)


def test_compact_keeps_rows_without_kept_tokens():
    cache = filled()
    kept = cache.compact(jnp.array([[2, 3], [1, 2], [0, 1]]), jnp.zeros(3, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, kept, cache)


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_copy_pages_reads_all_before_it_writes_and_ignores_padding(kv_dtype):
    cache = filled(kv_dtype=kv_dtype)
    source, destination = jnp.array([3, 0, 6, 2, 0]), jnp.array([6, 0, 3, 8, 0])  # a swap, a copy, padding between
    copied = jax.jit(lambda cache: cache.copy_pages(source, destination))(cache)
    for before, after in zip(jax.tree.leaves((cache.k, cache.v)), jax.tree.leaves((copied.k, copied.v)), strict=True):
        want = np.array(before)
        want[[6, 3, 8]] = np.array(before)[[3, 6, 2]]
        np.testing.assert_array_equal(after, want)
    assert copied.kv_len.tolist() == [0, 0, 0]


def test_copy_pages_copies_only_in_the_layers_of_its_table():
    cache = filled(table_of=(0, 1))
    one = jnp.array([3]), jnp.array([6])
    for table in (0, 1):
        copied = cache.copy_pages(*one, table=table)
        for layer in (0, 1):
            same = [
                np.array_equal(x, y) for x, y in ((copied.k[layer], cache.k[layer]), (copied.v[layer], cache.v[layer]))
            ]
            assert same == [layer != table] * 2
        np.testing.assert_array_equal(copied.v[table][6], cache.v[table][3])


def test_layers_use_their_table_in_table_of():
    cache = filled(table_of=(1, 0))
    assert len(cache.page_tables) == 2
    other = np.full((3, 3), NULL_PAGE, np.int32)
    other[0] = [1, 4, 8]
    cache = dataclasses.replace(cache, page_tables=(jnp.asarray(TABLE), jnp.asarray(other)))
    k, v = tokens(3, 1)
    for layer, page, table in ((0, 1, other), (1, 7, TABLE)):
        after = write(cache, layer, k, v)
        np.testing.assert_array_equal(after.k[layer][page, 0], k[0, 0].reshape(-1))
        np.testing.assert_array_equal(after.arguments(layer)["page_table"], table)
        np.testing.assert_array_equal(after.k[1 - layer], cache.k[1 - layer])


def test_grow_keeps_pages_tables_and_lengths_and_appends_empty_pages():
    for kv_dtype in (None, "int4"):
        cache = filled(kv_dtype=kv_dtype).advance(2)
        more = cache.grow(12)
        assert more.num_pages == (12,) and more.capacity == cache.capacity and more.kv_len.tolist() == [2, 2, 2]
        np.testing.assert_array_equal(more.page_tables[0], TABLE)
        for before, after in zip(jax.tree.leaves((cache.k, cache.v)), jax.tree.leaves((more.k, more.v)), strict=True):
            np.testing.assert_array_equal(after[:9], before)
            assert not after[9:].any()
    with pytest.raises(ValueError, match="a cache of 9 pages cannot grow to 8"):
        cache.grow(8)


# What it is


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_arguments_are_those_of_the_ops(kv_dtype):
    cache = write(filled(kv_dtype=kv_dtype), 1, *tokens(3, 4)).advance(4)
    arguments = cache.arguments(1)
    assert set(arguments) == {"key_pages", "value_pages", "page_table", "key_scales", "value_scales"}
    assert (arguments["key_scales"] is None) == (kv_dtype is None) == (arguments["value_scales"] is None)
    attend = jax.jit(functools.partial(jfa.paged_decode_attention, implementation="reference"))
    out = attend(np.ones((3, 4, 4), np.float32), kv_len=np.array([4, 4, 0]), **arguments)
    assert out.shape == (3, 4, 4) and out[:2].all() and not out[2].any()


def test_sizes_are_those_of_the_arrays():
    cache = empty(page_size=16, head_dim=64, dtype=jnp.bfloat16)
    assert (cache.page_size, cache.num_pages, cache.capacity) == (16, (9,), 48)
    slots = 2 * 2 * 9 * 16 * 2  # layers, k and v, pages, tokens of a page, heads
    for kv_dtype, bytes_of_a_vector in ((None, 2 * 64), ("int8", 64 + 2), ("fp8", 64 + 2), ("int4", 32 + 2)):
        cache = empty(page_size=16, head_dim=64, dtype=jnp.bfloat16, kv_dtype=kv_dtype)
        assert cache.num_bytes == slots * bytes_of_a_vector
        assert (cache.page_size, cache.num_pages, cache.capacity) == (16, (9,), 48)


def test_empty_tables_contain_no_page_and_arrays_are_not_aliased():
    cache = empty(table_of=(0, 1), kv_dtype="int8")
    assert all((table == NULL_PAGE).all() for table in cache.page_tables) and not cache.kv_len.any()
    leaves = jax.tree.leaves(cache)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(kv_dtype="int3"), "kv_dtype must be one of int8, fp8, int4, or None for unquantized pages, got 'int3'"),
        (dict(kv_dtype="int4", head_dim=5), "int4 stores two numbers per byte, .* even length, got 5"),
        (
            dict(num_pages=1),
            "num_pages must be >= 2, since page 0 is never used, .* got num_pages=1 and page_size=3",
        ),
        (dict(page_size=0), "and page_size >= 1, got num_pages=9 and page_size=0"),
        (dict(table_of=(0, 0, 1)), r"a page table index >= 0 for each of the 2 layers, got \(0, 0, 1\)"),
        (dict(table_of=(0, -1)), r"a page table index >= 0 for each of the 2 layers, got \(0, -1\)"),
    ],
    ids=["kv_dtype", "odd_head_dim", "num_pages", "page_size", "table_of", "negative"],
)
def test_create_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        empty(**changed)


# Memory


def test_a_table_index_out_of_range_is_refused():
    with pytest.raises(ValueError, match="table must be 0 to 0, an index of page_tables, got 5"):
        empty().copy_pages(jnp.array([1]), jnp.array([2]), table=5)


def two_layers(step):
    return lambda cache, *args: functools.reduce(lambda cache, layer: step(cache, layer, *args), (0, 1), cache)


LARGE = dict(num_kv_heads=2, head_dim=64, batch=4, pages_per_seq=8)
STEPS = {
    "write": (two_layers(lambda cache, layer, x: cache.write(layer, x, x)), lambda: (jnp.ones((4, 1, 2, 64)),)),
    "write_ragged": (
        two_layers(lambda cache, layer, x, start: cache.write_ragged(layer, x, x, start)),
        lambda: (jnp.ones((11, 2, 64)), jnp.array([0, 3, 4, 8, 10])),
    ),
    "copy_pages": (
        lambda cache, source, destination: cache.copy_pages(source, destination),
        lambda: (jnp.array([1, 2, 0]), jnp.array([2, 1, 0])),
    ),
}


@pytest.mark.parametrize(
    ("step", "page_size", "kv_dtype"),
    [
        ("write", 1, None),
        ("write", 3, "int8"),
        ("write", 16, None),
        ("write", 16, "int4"),
        ("write", 16, "fp8"),
        ("write_ragged", 1, "int8"),
        ("write_ragged", 3, "int4"),
        ("write_ragged", 16, None),
        ("write_ragged", 16, "fp8"),
        ("copy_pages", 1, None),
        ("copy_pages", 3, "int8"),
        ("copy_pages", 16, "int4"),
        ("copy_pages", 16, "fp8"),
    ],
)
def test_no_step_copies_the_pool(step, page_size, kv_dtype):
    function, arguments = STEPS[step]
    cache = empty(**LARGE, num_pages=4800 // page_size, page_size=page_size, kv_dtype=kv_dtype)
    cache = dataclasses.replace(cache, page_tables=(jnp.arange(1, 33, dtype=jnp.int32).reshape(4, 8),))
    compiled = jax.jit(function, donate_argnums=0).lower(cache, *arguments()).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.num_bytes > 1e6
    if kv_dtype == "fp8":  # XLA on a CPU moves no 8-bit floats: they are copied as bytes, but not widened
        assert not re.search(rf"\bf16\[{4800 // page_size},", compiled.as_text())
    else:
        assert memory.temp_size_in_bytes < cache.num_bytes / 20
    after = compiled(cache, *arguments())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((cache.k, cache.v)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("kv_dtype", [None, *quant.KINDS])
def test_no_read_copies_or_widens_the_pool(kv_dtype):
    rows_of_four_tiles = LARGE | dict(pages_per_seq=32)
    cache = empty(**rows_of_four_tiles, num_pages=2000, page_size=64, kv_dtype=kv_dtype)

    def read(cache, q):
        return jfa.paged_decode_attention(
            cache.rotated(q), kv_len=cache.kv_len, implementation="xla", **cache.arguments(0)
        )

    q = jnp.ones((4, 2, 64))
    assert jax.jit(read).lower(cache, q).compile().memory_analysis().temp_size_in_bytes < cache.num_bytes / 10


def test_caches_of_many_models_are_written_by_vmap():
    caches = [dataclasses.replace(filled(kv_dtype="int8"), kv_len=jnp.array([i, 0, 2])) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    k, v = tokens(2, 3, 4)
    got = jax.jit(jax.vmap(lambda cache, k, v: cache.write(0, k, v)))(stacked, k, v)
    for i, cache in enumerate(caches):
        want = write(cache, 0, k[i], v[i])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), got, want)


def test_each_page_table_has_its_own_number_of_pages():
    shape = dict(num_layers=3, page_size=2, batch=1, pages_per_seq=4, num_kv_heads=1, head_dim=2, dtype=jnp.float32)
    cache = jfa.PagedKVCache.create(num_pages=(5, 9), table_of=(1, 0, 1), **shape)
    assert cache.num_pages == (5, 9) and [k.shape[0] for k in cache.k] == [9, 5, 9]
    assert [k.shape[0] for k in cache.grow((5, 12)).k] == [12, 5, 12]
    with pytest.raises(ValueError, match="a cache of 5, 9 pages cannot grow to 6, 8"):
        cache.grow((6, 8))
    with pytest.raises(ValueError, match=r"num_pages must have one entry for each of the 2 page tables, got \(5,\)"):
        jfa.PagedKVCache.create(num_pages=(5,), table_of=(1, 0, 1), **shape)

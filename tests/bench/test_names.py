"""The names that command lines accept agree with what they refer to."""

import dataclasses

from jfa import backends
from jfa_bench import amdgcn, names
from jfa_bench.measure import memory, peers
from jfa_bench.proof import ops, prove
from jfa_bench.records import plot
from jfa_models.decoding import options


def test_kernels_agree_with_the_table_of_ops():
    assert list(names.KERNELS.items()) == [(op.kernel, (op.name, op.direction)) for op in ops.OPS]
    assert names.TUNED == tuple(op.kernel for op in ops.TUNED)
    assert {op for op, _ in prove.PROOFS} == set(names.OPS)
    dtypes = dict.fromkeys(dtype for op in ops.OPS for dtype in op.dtypes)
    assert tuple(dtypes) == names.DTYPES and set(names.FLASH_DTYPES) < set(dtypes)
    sizes = {(op.head_dims, op.between) for op in ops.OPS}
    assert sizes == {(names.HEAD_DIMS, names.BETWEEN), (names.GROUP_SIZES, ()), (names.GROUP_SIZES[-1:], ())}
    assert max(names.GROUP_SIZES) == ops.LENGTH, "the last one stands for a whole row"


def test_architectures_agree_with_the_emulator():
    assert tuple(amdgcn.TARGETS) == names.EXECUTED_ARCHS and set(names.EXECUTED_ARCHS) < set(names.ARCHS)


def test_implementations_agree_with_those_that_are_measured():
    assert tuple(peers.PEERS) == names.PEERS and set(names.PEERS) <= set(plot.LOOKS)
    assert names.IMPLEMENTATIONS == ("jfa", *backends.NAMES)
    assert tuple(memory.DATA_SETS) == names.DATA_SETS
    assert names.PAGE_KINDS == ("same", *options.KV_DTYPES)


def test_cache_options_agree_with_the_command_line():
    fields = {field.name: field.default for field in dataclasses.fields(options.CacheOptions)}
    assert fields["kind"] in options.CACHES

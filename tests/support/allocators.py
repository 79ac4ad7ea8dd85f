"""Helpers for tests of the page allocator."""

import copy


def snapshot(allocator):
    """The whole state of an allocator."""
    return copy.deepcopy(vars(allocator))


def assert_refused(allocator, call):
    """The call returns None and changes nothing."""
    before = snapshot(allocator)
    assert call() is None
    assert snapshot(allocator) == before

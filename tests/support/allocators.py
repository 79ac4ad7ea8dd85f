"""What tests of the page allocator share."""

import copy


def snapshot(allocator):
    """All that an allocator knows."""
    return copy.deepcopy(vars(allocator))


def assert_refused(allocator, call):
    """The call returns None and changes nothing."""
    before = snapshot(allocator)
    assert call() is None
    assert snapshot(allocator) == before

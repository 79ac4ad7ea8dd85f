"""Helpers for tests of engines."""


def assert_clean(engine):
    """After its last request, nothing holds pages or an adapter."""
    list(engine.run())
    for pool in engine._scheduler.pools.pools:
        pool.allocator.check()
        assert not pool.allocator.sequences
    if (snapshots := engine._scheduler.pools.snapshots) is not None:
        snapshots.check()
        assert not snapshots._plans
    assert engine.metrics().running == engine.metrics().waiting == 0
    held = [one for one in engine.model.adapters._slots if one is not None]
    assert not any(one.users or one.is_unloaded for one in held)

"""Helpers for tests of engines."""

import pytest

TIE = 1e-3


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


def assert_same(got, want):
    """The same tokens, texts and log-probabilities, up to a tie that rounding may decide; want has these."""
    for one, other in zip(got.outputs, want.outputs, strict=True):
        pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
        same = next((i for i, (x, y) in pairs if x != y), None)
        for token, mine, theirs in zip(one.token_ids[:same], one.logprobs or (), other.logprobs, strict=False):
            assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-3)
        if same is None:
            was_cut = one.finish_reason == "abort"
            assert was_cut or (one.finish_reason, one.token_ids) == (other.finish_reason, other.token_ids)
            continue
        likely = other.logprobs[same]
        assert one.token_ids[same] in likely, (same, one.token_ids, other.token_ids)
        chosen = [likely[tokens[same]].logprob for tokens in (one.token_ids, other.token_ids)]
        assert abs(chosen[0] - chosen[1]) < TIE, (same, one.token_ids, other.token_ids)

"""The one number that outputs compute."""

import pytest

from jfa_models.outputs import CompletionOutput, RequestOutput


def request(*token_ids, decode_ms):
    outputs = tuple(CompletionOutput(index=i, text="", token_ids=ids) for i, ids in enumerate(token_ids))
    return RequestOutput(prompt=None, prompt_token_ids=(1,), outputs=outputs, prefill_ms=9.0, decode_ms=decode_ms)


def test_tokens_per_s_leaves_the_first_token_to_the_prefill():
    assert request((5, 6, 7, 8, 9), decode_ms=20.0).tokens_per_s == pytest.approx(200)
    assert request((5, 6), (7, 8, 9), (), decode_ms=10.0).tokens_per_s == pytest.approx(300)


@pytest.mark.parametrize("decode_ms", [None, 0.0, 5.0])
def test_tokens_per_s_is_none_where_nothing_was_decoded_or_timed(decode_ms):
    assert request((5,), decode_ms=decode_ms).tokens_per_s is None
    assert request((5, 6), decode_ms=None).tokens_per_s is None

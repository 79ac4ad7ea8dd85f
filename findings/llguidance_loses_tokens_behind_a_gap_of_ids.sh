#!/usr/bin/env bash
# llguidance: a token whose id is not below the number of tokens has no text, and no mask ever allows it.
#
# Expected: ids of a tokenizer.json may have gaps (GPT-4o's 200,000 tokens have ids up to 200,018; the tokenizers package
# encodes and decodes them), so a grammar that matches a token's text allows its id, wherever it lies.
# Seen with llguidance 1.9.1 and tokenizers 0.22.1 on 2026-11-28: the table of texts has as many entries as there are
# tokens, so ids behind them are lost without an error or a warning of llguidance. tokenize_str still gives such an id,
# decode_str shows it as "<[9]>", and a mask for [abc] lacks it. The output:
#   ids without a gap: c is 2, decode_str 'c', tokenize_str [0, 1, 2], mask of [abc] [0, 1, 2]
#   ids with a gap: c is 9, decode_str '<[9]>', tokenize_str [0, 1, 9], mask of [abc] [0, 1]
# jfa: fills the gaps with special tokens, which no mask allows, before llguidance sees the tokenizer.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "llguidance==1.9.1" --with "tokenizers==0.22.1" \
    --with "numpy==2.3.5" python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
from importlib.metadata import version

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|endoftext|>"
print(f"llguidance {version('llguidance')}, tokenizers {version('tokenizers')}")
found = {}
for what, ids in (("without", {"a": 0, "b": 1, "c": 2, END: 3}), ("with", {"a": 0, "b": 1, END: 2, "c": 9})):
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    c = ids["c"]
    assert tokenizer.encode("abc").ids == [0, 1, c] and tokenizer.decode([c]) == "c"
    ours = LLTokenizer(tokenizer.to_str(), n_vocab=16, eos_token=ids[END])
    matcher = LLMatcher(ours, LLMatcher.grammar_from_regex("[abc]"))
    mask = np.zeros(1, np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    assert not matcher.is_error()
    allowed = [i for i in range(16) if mask[0] >> i & 1]
    texts = ours.decode_str([c]), ours.tokenize_str("abc")
    print(f"ids {what} a gap: c is {c}, decode_str {texts[0]!r}, tokenize_str {texts[1]}, mask of [abc] {allowed}")
    found[what] = *texts, allowed
assert found["without"] == ("c", [0, 1, 2], [0, 1, 2]), "changed: ids without a gap"
assert found["with"] == ("<[9]>", [0, 1, 9], [0, 1]), "changed: ids with a gap"
PYTHON

#!/usr/bin/env bash
# llguidance: whether rollback counts a consumed end token depends on whether the document could have gone on.
#
# Expected: rollback(n) undoes the last n tokens that consume_token accepted, so after a document and an end token,
# rollback(1) undoes the end token.
# Seen with llguidance 1.9.1 and tokenizers 0.22.1 on 2026-11-28: that is so where the document could have gone on (an
# integer, stop reason EndOfSentence). Where it could not (a boolean, stop reason NoExtension), the end token is accepted
# and not recorded: rollback(1) undoes the document's last token, without an error. The output:
#   integer 12 and an end token (EndOfSentence); after rollback(1) it may end: True
#   boolean true and an end token (NoExtension); after rollback(1) it may end: False
# jfa: never gives an end token to a matcher, so a rollback over drafts counts what it consumed.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "llguidance==1.9.1" --with "tokenizers==0.22.1" \
    python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|endoftext|>"
ids = {text: i for i, text in enumerate([*"truefals0123456789-", END])}
tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
ours = LLTokenizer(tokenizer.to_str(), eos_token=ids[END])
print(f"llguidance {version('llguidance')}")
found = {}
for kind, text in (("integer", "12"), ("boolean", "true")):
    matcher = LLMatcher(ours, LLMatcher.grammar_from_json_schema(json.dumps({"type": kind})))
    tokens = [ids[letter] for letter in text]
    assert matcher.consume_tokens(tokens) and matcher.is_accepting()
    assert matcher.consume_token(ids[END]) and matcher.is_stopped()
    reason = matcher.stop_reason()
    assert matcher.rollback(1) and not matcher.is_error()
    print(f"{kind} {text} and an end token ({reason}); after rollback(1) it may end: {matcher.is_accepting()}")
    found[kind] = reason, matcher.is_accepting()
assert found["integer"] == ("EndOfSentence", True), "changed: a document that could have gone on"
assert found["boolean"] == ("NoExtension", False), "changed: a document that could not"
PYTHON

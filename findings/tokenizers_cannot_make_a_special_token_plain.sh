#!/usr/bin/env bash
# tokenizers: adding a token again can make it special, but not plain; transformers' tokenizer_config.json neither.
#
# Expected: add_tokens([AddedToken(text, special=...)]) of a token that is there sets its options, in both directions, as
# "special" in added_tokens_decoder of tokenizer_config.json suggests; or returns 0 for a token that it leaves alone.
# Seen with tokenizers 0.23.3 on 2026-11-28: add_tokens returns 1 in both cases; special=True takes effect, and with
# special=False decode(skip_special_tokens=True) still leaves the token out.
# jfa: follows the library, so a token that tokenizer.json calls special stays special; docs/models.md names both files.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "tokenizers==0.23.3" python - <<'PYTHON'
from importlib.metadata import version

from tokenizers import AddedToken, Tokenizer, models


def shown_after(first, then):
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.add_tokens([AddedToken("<mark>", special=first, normalized=False)])
    count = tokenizer.add_tokens([AddedToken("<mark>", special=then, normalized=False)])
    return count, tokenizer.decode([tokenizer.token_to_id("<mark>")], skip_special_tokens=True)


on, off = shown_after(False, True), shown_after(True, False)
print(f"tokenizers {version('tokenizers')}: plain, then special: {on}; special, then plain: {off}")
assert on == (1, ""), "changed: a token no longer becomes special"
assert off == (1, ""), "changed: a special token becomes plain"
PYTHON

"""The vocabulary in the metadata of a GGUF file, as a tokenizer of the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from jfa_models.text.ends import ends_among, is_unmistakable
from jfa_models.text.pre_tokenizers import PreTokenizer, pre_tokenizer_of

# Kinds of token in a GGUF vocabulary. Source: the GGUF specification, key tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

_NEVER_STRIP = ("<unk>", "<s>", "<|endoftext|>")

_SPACE = "\u2581"  # how SentencePiece writes a space


def core_of(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer without begin- and end-of-text tokens, and whether a text gets the former by default.

    Raises:
      ValueError: the metadata has no vocabulary, or its kind is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"GGUF metadata: tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    needed = ("tokens", "merges" if kind == "gpt2" else "scores")
    if missing := [key for key in needed if f"tokenizer.ggml.{key}" not in metadata]:
        raise ValueError(
            f"GGUF metadata lacks {', '.join(f'tokenizer.ggml.{key}' for key in missing)}; "
            "convert the model again, with its vocabulary"
        )
    if kind == "gpt2":
        dialect = pre_tokenizer_of(metadata)
        core, add_bos = _byte_level(metadata, dialect), dialect.add_bos
    else:
        core, add_bos = _sentence_piece(metadata), True
    strip = _strips_after_special_tokens(metadata)
    core.add_tokens(
        [
            AddedToken(
                token, normalized=False, special=kind != _USER_DEFINED, rstrip=strip and token not in _NEVER_STRIP
            )
            for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds_of(metadata), strict=True)
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
        ]
    )
    return core, add_bos


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The end-of-text, -turn and -message tokens: those that the file names, and added tokens with the text of one."""
    names = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    named = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in names]
    pairs = zip(metadata.get("tokenizer.ggml.tokens", ()), kinds_of(metadata), strict=True)
    control = {token: i for i, (token, kind) in enumerate(pairs) if kind == _CONTROL}
    return tuple(dict.fromkeys([i for i in named if i is not None] + [control[end] for end in ends_among(control)]))


def kinds_of(metadata: Mapping[str, Any]) -> list[int]:
    """The kind of each token. As in llama.cpp, ends are control tokens whatever the file says (but for `</s>`).

    Raises:
      ValueError: the file has kinds for some tokens only.
    """
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        named = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
        kinds = [_CONTROL if i in named else _NORMAL for i in range(len(tokens))]
    if len(kinds) < len(tokens):
        raise ValueError(
            f"GGUF metadata: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens; "
            "convert the model again, with its vocabulary"
        )
    return [_CONTROL if is_unmistakable(token) else kind for token, kind in zip(tokens, kinds, strict=False)]


def _strips_after_special_tokens(metadata: Mapping[str, Any]) -> bool:
    """Whether white space after a special token is dropped, as in Phi-3, whose files do not say so.

    Source: llama.cpp, src/llama-vocab.cpp, which goes by the name alone; newer converters write "Phi 3 Mini".
    """
    name = str(metadata.get("general.name", "")).lower()
    of_phi3 = metadata.get("general.architecture") == "phi3" and metadata["tokenizer.ggml.model"] == "llama"
    return of_phi3 or "phi-3" in name or "phi3" in name


def _byte_level(metadata: Mapping[str, Any], dialect: PreTokenizer) -> tokenizers.Tokenizer:
    """GPT-2's scheme: text becomes bytes, bytes become printable characters, characters are merged."""
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        core = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=dialect.whole_words))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"GGUF metadata: tokenizer.ggml.merges do not fit its tokens ({error}); convert the model again"
        ) from None
    if (normalizer := dialect.normalizer()) is not None:
        core.normalizer = normalizer
    core.pre_tokenizer = dialect.pre_tokenizer()
    core.decoder = decoders.ByteLevel()
    return core


def _sentence_piece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Llama 2's scheme: characters are merged, the highest score first; text without a token becomes bytes."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = kinds_of(metadata)
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unknown = tokens[unknown_id if 0 <= unknown_id < len(tokens) else 0]
    if len(metadata["tokenizer.ggml.scores"]) < len(tokens):
        raise ValueError(
            f"GGUF metadata: tokenizer.ggml.scores has {len(metadata['tokenizer.ggml.scores'])} entries for "
            f"{len(tokens)} tokens; convert the model again, with its vocabulary"
        )
    core = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            _merges_from_scores(tokens, types, metadata["tokenizer.ggml.scores"][: len(tokens)]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    texts: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        texts.append(decoders.Strip(content=" ", left=1))
    core.normalizer = normalizers.Sequence(spaces)
    core.decoder = decoders.Sequence(texts)
    return core


def _merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to merge two tokens into a third, the one with the highest score first."""
    outside = (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    mergeable = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind not in outside}
    best_first = sorted(mergeable, key=lambda token: -mergeable[token])
    return [
        (whole[:cut], whole[cut:])
        for whole in best_first
        for cut in range(1, len(whole))
        if whole[:cut] in mergeable and whole[cut:] in mergeable
    ]

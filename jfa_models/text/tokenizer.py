"""Text to token ids and back: from a tokenizer.json, or from the vocabulary inside a GGUF file.

The merging itself is done by the `tokenizers` library. This module adds the rest: conversion of GGUF vocabularies, the
rules for adding begin- and end-of-text tokens, streaming, and chat templates.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import tokenizers
from tokenizers import processors

from jfa_models.text import chat
from jfa_models.text.files import read_json, write_json
from jfa_models.text.gguf_vocabulary import core_of, end_token_ids

# Names in chat templates -> names in tokenizer.ggml.*_token_id.
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_HALF_A_CHARACTER = "\ufffd"  # what the bytes of an incomplete character decode to


@final
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to token ids and back."""

    core: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]  # "bos_token": "<s>" and so on: the names that chat templates use
    chat_template: str | None

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they exist, tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja.

        `add_bos_token` of tokenizer_config.json, if set, decides on the begin-of-text token; otherwise tokenizer.json.

        Raises:
          ValueError: there is no tokenizer.json, a file is damaged, or a flag asks for a token that is not defined.
        """
        core = _read_core(path / "tokenizer.json")
        config = _read_if_there(path / "tokenizer_config.json")
        named = {**_read_if_there(path / "special_tokens_map.json"), **config}
        special_tokens = {
            name: text["content"] if isinstance(text, dict) else text
            for name, text in named.items()
            if name.endswith("_token") and isinstance(text, str | dict)
        }
        bos, eos = (_id_or_none(core, special_tokens.get(name)) for name in ("bos_token", "eos_token"))
        if (add_bos := config.get("add_bos_token")) is not None:
            core.post_processor = _surround(bos, eos, add_bos, bool(config.get("add_eos_token")))
        template = config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (template_file := path / "chat_template.jinja").exists():
            template = template_file.read_text(encoding="utf-8")
        return cls(
            core=core,
            bos_token_id=bos,
            eos_token_ids=() if eos is None else (eos,),
            special_tokens=special_tokens,
            chat_template=template,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Builds the tokenizer that the metadata of a GGUF file describes.

        Raises:
          ValueError: the metadata has no vocabulary, or its kind is not supported.
        """
        core, add_bos = core_of(metadata)
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
        ids = {name: i for name, i in ids.items() if i is not None and i < len(tokens)}
        bos, eos = ids.get("bos_token"), ids.get("eos_token")
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", add_bos)
        core.post_processor = _surround(bos, eos, add_bos, metadata.get("tokenizer.ggml.add_eos_token", False))
        return cls(
            core=core,
            bos_token_id=bos,
            eos_token_ids=end_token_ids(metadata),
            special_tokens={name: tokens[i] for name, i in ids.items()},
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def save(self, folder: Path) -> None:
        """Writes the files that from_folder and Hugging Face read."""
        self.core.save(str(folder / "tokenizer.json"))
        # no add_bos_token: tokenizer.json already adds the begin-of-text token
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", config)

    @property
    def vocab_size(self) -> int:
        """Number of tokens with a text; a model's vocabulary may be slightly larger."""
        return self.core.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in it are recognized.

        `add_special_tokens` adds the begin- and end-of-text tokens that the model was trained with; set it to False for
        the output of a chat template, which writes them itself.

        Raises:
          ValueError: the text is not valid Unicode, for example because of bytes from a terminal.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode at character {error.start}, {text[error.start]!r}; give it in UTF-8"
            ) from None
        return self.core.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.core.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token as it appears within a text, special tokens included.

        Raises:
          ValueError: the vocabulary has no such token.
        """
        if self.core.id_to_token(token_id) is None:
            raise ValueError(f"token id must be in the vocabulary of {self.vocab_size} tokens, got {token_id}")
        # SentencePiece decoders drop the space before the first token, so the second of two is used.
        once, twice = (self.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :]

    def stream(self) -> "StreamingDetokenizer":
        """A streaming detokenizer for one answer."""
        return StreamingDetokenizer(self)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """Formats a conversation as the model was trained to read it; encode it without adding special tokens.

        `extra` is passed to the template by name (`tools`, `enable_thinking`, ...).

        Raises:
          ValueError: the model has no chat template, or its template refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template; prompt it with plain text, "
                "or put a chat_template.jinja next to its tokenizer.json"
            )
        given = {"tools": None, "documents": None, **self.special_tokens, **extra}
        return chat.render(self.chat_template, messages=messages, add_generation_prompt=add_generation_prompt, **given)


@final
class StreamingDetokenizer:
    """Turns one answer's tokens into text as they arrive.

    The concatenated pieces are the text of all tokens. A piece is returned once no later token can change it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Two runs of tokens: those returned last, which are decoded again because the text of a token depends on
        # whether it comes first, and those that are still withheld.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; often the token's own, "" in the middle of a character."""
        self._pending.append(token_id)
        piece = self._pending_text()
        if not piece or piece.endswith(_HALF_A_CHARACTER):
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def flush(self) -> str:
        """The withheld text, at the end of the answer; an incomplete character becomes U+FFFD."""
        piece = self._pending_text()
        self._context, self._pending = [], []
        return piece

    def _pending_text(self) -> str:
        context = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(context) :]


def _read_core(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise ValueError(
            f"{path.parent} has no tokenizer.json; save the tokenizer in that form (save_pretrained of a fast "
            "tokenizer writes it); tokenizer.model files are not supported"
        )
    read_json(path)  # for its error message: for a damaged file, the library raises a bare Exception without details
    core = tokenizers.Tokenizer.from_file(str(path))
    core.no_truncation()
    core.no_padding()
    return core


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _id_or_none(core: tokenizers.Tokenizer, text: str | None) -> int | None:
    return None if text is None else core.token_to_id(text)


def _surround(bos: int | None, eos: int | None, add_bos: bool, add_eos: bool) -> processors.TemplateProcessing:
    """What `add_special_tokens` adds around a text."""
    wanted = {"bos": (bos, add_bos), "eos": (eos, add_eos)}
    for name, (token_id, add) in wanted.items():
        if add and token_id is None:
            raise ValueError(
                f"add_{name}_token is set, but the tokenizer defines no {name}_token; define it or unset the flag"
            )
    single = ["bos"] * add_bos + ["$A"] + ["eos"] * add_eos
    known = [(name, token_id) for name, (token_id, add) in wanted.items() if add and token_id is not None]
    return processors.TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=known)

"""Text to token ids and back: from a tokenizer.json, or from the vocabulary inside a GGUF file.

The merging itself is done by the `tokenizers` library. This module adds the rest: conversion of GGUF vocabularies, the
rules for adding begin- and end-of-text tokens, streaming, and chat templates.
"""

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import tokenizers
from tokenizers import processors

from jfa_models.text import chat
from jfa_models.text.ends import ENDS, ends_among
from jfa_models.text.files import read_json, write_json
from jfa_models.text.gguf_vocabulary import core_of, end_token_ids

# Names in chat templates -> names in tokenizer.ggml.*_token_id.
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Arguments of transformers' apply_chat_template about token ids, which this one does not return.
_OF_TRANSFORMERS = {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"} | {
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
}
_HALF_A_CHARACTER = "\ufffd"  # what the bytes of an incomplete character decode to


@final
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to token ids and back."""

    core: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]  # "bos_token": "<s>" and so on: the names that chat templates use
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by name: "default", "tool_use"

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they exist, tokenizer_config.json, special_tokens_map.json,
        added_tokens.json, chat_template.jinja and additional_chat_templates/.

        tokenizer.json alone decides what is added around a text, as in transformers since version 5: `add_bos_token` of
        tokenizer_config.json is ignored.

        Raises:
          ValueError: there is no tokenizer.json, a file is damaged, or a token is named that is not in the vocabulary.

        Warns:
          UserWarning: an added token has another id than its file says.
        """
        core = _read_core(path / "tokenizer.json")
        config = _read_if_there(path / "tokenizer_config.json")
        named = {**_read_if_there(path / "special_tokens_map.json"), **config}
        legacy = _read_if_there(path / "added_tokens.json")
        try:
            special_tokens = {
                name: text["content"] if isinstance(text, dict) else text
                for name, text in named.items()
                if name.endswith("_token") and isinstance(text, str | dict) and text
            }
            _add_tokens(core, config, legacy, special_tokens.values())
            _add_special_tokens(core, special_tokens.values(), _listed_special_tokens(named))
            templates = _read_templates(path, config)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: tokenizer_config.json or added_tokens.json does not have the form that transformers writes "
                f"({type(error).__name__}: {error}); download it again"
            ) from error
        bos, eos = (_id_of(core, special_tokens, name) for name in ("bos_token", "eos_token"))
        # the template of a chat model may end turns with a token that no file names
        written = [end for end in ENDS if any(end in text for text in templates.values())]
        ends = [core.token_to_id(end) for end in ends_among(written)]
        return cls(
            core=core,
            bos_token_id=bos,
            eos_token_ids=tuple(dict.fromkeys(i for i in (eos, *ends) if i is not None)),
            special_tokens=special_tokens,
            chat_templates=templates,
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
        ids = {name: i for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
        bos, eos = ids.get("bos_token"), ids.get("eos_token")
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", add_bos)
        core.post_processor = _surround(bos, eos, add_bos, metadata.get("tokenizer.ggml.add_eos_token", False))
        return cls(
            core=core,
            bos_token_id=bos,
            eos_token_ids=end_token_ids(metadata),
            special_tokens={name: tokens[i] for name, i in ids.items()},
            chat_templates={
                key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": template
                for key, template in metadata.items()
                if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
            },
        )

    def save(self, folder: Path) -> None:
        """Writes the files that from_folder and Hugging Face read."""
        self.core.save(str(folder / "tokenizer.json"))
        # no add_bos_token: tokenizer.json already adds the begin-of-text token
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_templates.keys() == {"default"}:
            config["chat_template"] = self.chat_templates["default"]
        elif self.chat_templates:
            config["chat_template"] = [
                {"name": name, "template": template} for name, template in self.chat_templates.items()
            ]
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

    def stream(self, *, skip_special_tokens: bool = True) -> "StreamingDetokenizer":
        """A streaming detokenizer for one answer."""
        return StreamingDetokenizer(self, skip_special_tokens=skip_special_tokens)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token with exactly this text, which decode omits; None if there is none."""
        token_id = self.core.token_to_id(text)
        added = self.core.get_added_tokens_decoder()
        return token_id if token_id in added and added[token_id].special else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        **extra: Any,
    ) -> str:
        """Formats a conversation as the model was trained to read it; encode it without adding special tokens.

        Args:
          messages: {"role": ..., "content": ...}, oldest first; the content is a text, a list of text parts, or None.
          tools: functions that the model may call, as JSON schemas; with them, a template named "tool_use" is used if
            the model has one.
          chat_template: a template, or the name of one of the model's.
          add_generation_prompt: end with the opening of the model's turn; None: unless continue_final_message.
          continue_final_message: end within the last message, so that the model continues it; the name of a field, such
            as "reasoning_content", to continue that.
          tokenize: must be False: the result is a text.
          extra: passed to the template by name (`enable_thinking`, ...).

        Raises:
          ValueError: the model has no chat template, its template is faulty or refuses these messages, or two arguments
            exclude each other.
        """
        if refused := sorted(extra.keys() & _OF_TRANSFORMERS) or (["tokenize"] if tokenize else []):
            raise ValueError(
                f"apply_chat_template has no {', '.join(refused)}: its result is a text; pass it to "
                "encode(text, add_special_tokens=False)"
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt opens a new turn and continue_final_message continues the last one: use only one"
            )
        if not isinstance(chat_template, str | None):
            raise ValueError(f"chat_template must be a template or the name of one, got {chat_template!r}")
        if chat_template is None and not self.chat_templates:
            raise ValueError(
                "this model has no chat template; prompt it with plain text, "
                "or put a chat_template.jinja next to its tokenizer.json"
            )
        if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(one, Mapping) for one in tools)):
            raise ValueError(f"tools must be a list of dictionaries, the JSON schemas of functions, got {tools!r}")
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        templates = {**self.chat_templates, None: self.chat_templates.get(name)}
        template = templates.get(chat_template, chat_template)
        if template is None:
            raise ValueError(
                f"this model has chat templates for {', '.join(sorted(self.chat_templates))} only, and no default one; "
                "put a chat_template.jinja next to its tokenizer.json"
            )
        given = {"documents": None, **self.special_tokens, **extra}
        opens = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        given |= {"tools": tools, "add_generation_prompt": opens}
        return chat.render(template, messages, given, continue_final_message=continue_final_message)


@final
class StreamingDetokenizer:
    """Turns one answer's tokens into text as they arrive.

    The concatenated pieces are the text of all tokens. A piece is returned once no later token can change it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
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
        context = self._tokenizer.decode(self._context, skip_special_tokens=self._skip)
        text = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=self._skip)
        return text[len(context) :]


def _read_core(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
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
    return read_json(path) if path.is_file() else {}


def _add_tokens(
    core: tokenizers.Tokenizer, config: Mapping[str, Any], legacy: Mapping[str, int], special: Collection[str]
) -> None:
    """Adds the tokens that tokenizer_config.json, or else added_tokens.json, has in addition to tokenizer.json."""
    entries: Any = (config.get("added_tokens_decoder") or {}).items()
    if not entries:
        entries = [(token_id, {"content": text, "special": text in special}) for text, token_id in legacy.items()]
    if wrong := [token_id for token_id, _ in entries if not str(token_id).isdecimal()]:
        raise TypeError(f"an added token has the id {wrong[0]!r}")
    for token_id, entry in sorted((int(token_id), entry) for token_id, entry in entries):
        if not (text := entry["content"]):
            warnings.warn(f"the added token with the id {token_id} has no text and is ignored", stacklevel=4)
            continue
        core.add_tokens([_added_token(entry)])  # of one that is there, it only changes the options
        if (found := core.token_to_id(text)) != token_id:
            warnings.warn(
                f"the added token {text!r} has the id {token_id} in its file, but {found} is the next free one in "
                "tokenizer.json, and is used, as in transformers",
                stacklevel=4,
            )


def _added_token(entry: Mapping[str, Any]) -> tokenizers.AddedToken:
    options = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(entry["content"], **{name: bool(entry.get(name, False)) for name in options})


def _add_special_tokens(
    core: tokenizers.Tokenizer, named: Collection[str], listed: Sequence[tokenizers.AddedToken]
) -> None:
    """Makes tokens special, unless they are added tokens with options of their own; adds the listed ones."""
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    core.add_special_tokens([text for text in named if text not in known and core.token_to_id(text) is not None])
    core.add_special_tokens([token for token in listed if token.content not in known])


def _listed_special_tokens(named: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    """The tokens of additional_special_tokens and extra_special_tokens: lists, or texts by name."""
    found = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        given = named.get(key) or []
        if isinstance(given, str):
            raise TypeError(f"{key} is {given!r}")
        for entry in given.values() if isinstance(given, dict) else given:
            found.append(_added_token({**({"content": entry} if isinstance(entry, str) else entry), "special": True}))
    return found


def _read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name: its .jinja files, or else those of tokenizer_config.json."""
    files = {file.stem: file for file in sorted(path.glob("additional_chat_templates/*.jinja")) if file.is_file()}
    if (default := path / "chat_template.jinja").is_file():
        files.setdefault("default", default)
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    if not isinstance(template, str | None):
        raise TypeError(f"chat_template is {template!r}")
    return {} if template is None else {"default": template}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8; download it again") from None


def _id_of(core: tokenizers.Tokenizer, special_tokens: Mapping[str, str], name: str) -> int | None:
    text = special_tokens.get(name)
    if text is None:
        return None
    if (found := core.token_to_id(text)) is None:
        raise ValueError(
            f"tokenizer_config.json names the {name} {text!r}, which is not in the vocabulary of tokenizer.json; "
            "use the files that belong together"
        )
    return found


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

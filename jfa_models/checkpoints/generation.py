"""The sampling parameters that a model's authors recommend."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jfa_models.text.gguf_vocabulary import end_token_ids
from jfa_models.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The sampling parameters that a model's authors recommend. None: not specified."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_hf(cls, generation: Mapping[str, Any], config: Mapping[str, Any]) -> "GenerationDefaults":
        """Reads generation_config.json (empty if it does not exist) and the eos tokens of config.json.

        Raises:
          ValueError: eos_token_id is neither a token id nor a list of them.
        """
        eos_token_ids: list[int] = []
        for file, source in (("generation_config.json", generation), ("config.json", config)):
            eos = source.get("eos_token_id")
            ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
            if not all(type(token_id) is int and token_id >= -1 for token_id in ids):
                raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, got {eos!r}")
            eos_token_ids += [token_id for token_id in ids if token_id != -1]  # -1: none
        return cls(
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
            temperature=0.0 if generation.get("do_sample") is False else generation.get("temperature"),
            top_k=generation.get("top_k") or None,  # 0 means that top-k is not used
            top_p=generation.get("top_p"),
            min_p=generation.get("min_p"),
            repetition_penalty=generation.get("repetition_penalty"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "GenerationDefaults":
        """Reads the end-of-text, end-of-turn and end-of-message tokens; a GGUF file has no sampling parameters."""
        return cls(eos_token_ids=end_token_ids(metadata))

    def ends(self, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """All end tokens: these and the tokenizer's, since each file may name one that the others lack."""
        return tuple(dict.fromkeys((*self.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ()))))

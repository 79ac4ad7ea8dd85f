"""A checkpoint's configuration, tensors and tokenizer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jfa_models.checkpoints.families import FAMILIES
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.tensors import StackedTensors, Tensor
from jfa_models.model.config import DecoderConfig
from jfa_models.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's configuration and the locations of its tensors. Only file headers have been read."""

    path: Path
    config: DecoderConfig
    generation: GenerationDefaults
    stored_dtype: str  # "bfloat16", "Q4_1", "int4 (gptq)": for display
    # by our parameter names
    tensors: Mapping[str, Tensor | StackedTensors] = dataclasses.field(repr=False)
    unknown: tuple[Tensor, ...] = ()  # tensors that belong to no parameter
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # of a GGUF file

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in blocks or groups with scales."""
        return any(tensor.is_quantized for tensor in self.tensors.values())

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer stored with the weights; None if there is none.

        Raises:
          ValueError: a part of the tokenizer is missing, or its type is not supported.
        """
        if self.metadata:
            has_vocabulary = self.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
            if not has_vocabulary:
                return None
            tokenizer, template = Tokenizer.from_gguf(self.metadata), FAMILIES[self.config.architecture].chat_template
            if not tokenizer.chat_templates and template is not None:
                return dataclasses.replace(tokenizer, chat_templates={"default": template})
            return tokenizer
        folder = self.path if self.path.is_dir() else self.path.parent
        return Tokenizer.from_folder(folder) if any(folder.glob("tokenizer*")) else None

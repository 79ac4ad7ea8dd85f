"""Texts of tokens that end a turn, a message or a document, whatever else the files say.

Source: llama.cpp, src/llama-vocab.cpp.
"""

from collections.abc import Collection

ENDS = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM2
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",  # Gemma
    "<|end|>",  # Phi-3
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<turn|>",
    "<|tool_response>",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "[e~[",
    # of models that fill in the middle of a text: padding, and the starts of other documents
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)
# where a model has these, <|end|> only ends a part of its answer
_PARTS_END = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})


def ends_among(texts: Collection[str]) -> list[str]:
    """The texts of ENDS among those of a vocabulary's control tokens."""
    found = [end for end in ENDS if end in texts]
    return [end for end in found if end != "<|end|>" or not any(marks <= {*found} for marks in _PARTS_END)]


def is_unmistakable(text: str) -> bool:
    """Whether a token with this text is an end whatever its kind: `</s>` may also be HTML, as in Gemma's vocabulary."""
    return text in ENDS and text != "</s>"

"""Texts of tokens that end a turn, a message or a document, whatever else the files say.

Source: llama.cpp, src/llama-vocab.cpp.
"""

ENDS = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM2
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",  # Gemma
    "<|end|>",  # Phi-3
    "<|endoftext|>",
    "<EOT>",
    "<end_of_utterance>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

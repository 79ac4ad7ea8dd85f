"""Models of a few thousand numbers, with text around them."""

import json
import shutil
from pathlib import Path

from tokenizers import pre_tokenizers

from jfa_models.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # printable ASCII comes first
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    metadata = {
        "model": "gpt2",
        "tokens": [*SPECIAL, *BYTES],
        "token_type": [CONTROL] * len(SPECIAL) + [NORMAL] * len(BYTES),
        "merges": [],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def sentence_piece_tokenizer() -> Tokenizer:
    """In the manner of Llama 2: the space belongs to the word behind it, and the first word of a text has none."""
    metadata = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"],
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 3],
        "scores": [0.0] * 259 + [-3.0, -2.0, -1.0],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def folder_with_text(weights: Path, to: Path) -> Path:
    """A copy of a folder of weights, with a tokenizer of bytes and a chat template beside them."""
    folder = Path(shutil.copytree(weights, to))
    byte_tokenizer().core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder

"""Models of a few thousand parameters, with tokenizers and chat templates."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import pre_tokenizers

from jfa_models.model.config import DecoderConfig
from jfa_models.model.decoder import Decoder
from jfa_models.model.rope import RopeConfig
from jfa_models.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # printable ASCII comes first
PRINTABLE = [len(SPECIAL) + BYTES.index(chr(code)) for code in range(33, 127)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*SPECIAL, *BYTES],
        "token_type": [CONTROL] * len(SPECIAL) + [NORMAL] * len(BYTES),
        "merges": [],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def sentence_piece_tokenizer() -> Tokenizer:
    """As in Llama 2: a space belongs to the word after it, and the first word of a text has none."""
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
    """A copy of a folder of weights, with a byte tokenizer and a chat template added."""
    folder = Path(shutil.copytree(weights, to))
    byte_tokenizer().core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def tiny_config(*, num_layers: int, context_length: int) -> DecoderConfig:
    """The vocabulary has more rows than the byte tokenizer has tokens, as in many checkpoints."""
    return DecoderConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_layers=num_layers,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        context_length=context_length,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
    )


def sharp_decoder(config: DecoderConfig) -> Decoder:
    """Generates printable letters: large weights give clear maxima, and the head is zero for other tokens."""
    decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    nnx.update(decoder, jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, nnx.state(decoder)))
    assert decoder.lm_head is not None
    head = decoder.lm_head.weight
    head[...] = jnp.where(jnp.isin(jnp.arange(config.vocab_size), jnp.array(PRINTABLE))[:, None], head[...], 0)
    return decoder


@contextlib.contextmanager
def counted_compilations():
    """A list that grows with every program that XLA compiles."""
    seconds = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

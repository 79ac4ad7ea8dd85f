"""A small model behind a server, for the tests of the protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from random_adapters import random_adapter
from tiny_model import byte_tokenizer, sharp_decoder, tiny_config

from jfa_models.decoding.language_model import LanguageModel
from jfa_models.model.decoder import Decoder

# Reads what templates of real models read: tools, calls of earlier turns, reasoning.
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool | tojson }}|{% endfor %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}|"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% if open_thought %}<think>\n{% endif %}{% endif %}"
    "{# </think> #}"
)


@pytest.fixture(scope="session")
def model():
    config = tiny_config(num_layers=2, context_length=1024)
    params = tuple(jax.tree.leaves(nnx.split(sharp_decoder(config))[1]))
    language_model = LanguageModel(
        decoder=nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))),
        params=params,
        tokenizer=dataclasses.replace(byte_tokenizer(), chat_templates={"default": TEMPLATE}),
        max_adapters=2,
        max_rank=4,
    )
    language_model.load_adapter("pirate", random_adapter(language_model, 1, rank=4))
    return language_model

"""No NumPy array is written after JAX has received it: on a CPU, JAX may read the array's own memory, and later.

Every array that reaches a compiled step, jnp.asarray or jax.device_put is made read-only, with the array that it is a
view of; a later write raises.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import GOLDEN
from runs import run
from tiny_model import byte_tokenizer, sharp_decoder, tiny_config

from jfa_models import BeamSearchParams, Engine, LanguageModel, SamplingParams, Session, from_pretrained
from jfa_models.decoding.options import CacheOptions

EVERYTHING = SamplingParams(
    max_tokens=8,
    min_tokens=2,
    seed=3,
    temperature=0.9,
    top_p=0.9,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    logit_bias={70: 2.0},
    stop="zz",
    logprobs=2,
)
GREEDY = SamplingParams(temperature=0, max_tokens=9)


def freeze(*trees):
    for x in jax.tree.leaves(trees):
        while isinstance(x, np.ndarray):
            x.flags.writeable = False
            x = x.base


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    """Counts the calls that receive an array."""
    calls = []

    def freezing(function):
        def call(*args, **options):
            calls.append(function)
            freeze(args, options)
            return function(*args, **options)

        return call

    monkeypatch.setattr(jnp, "asarray", freezing(jnp.asarray))
    monkeypatch.setattr(jax, "device_put", freezing(jax.device_put))

    def freeze_steps(model):
        for name, step in vars(model.steps).items():
            setattr(model.steps, name, freezing(step))
        return model

    yield freeze_steps
    assert len(calls) > 5


def new_model(kind="contiguous"):
    decoder = sharp_decoder(tiny_config(num_layers=1, context_length=96))
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    return LanguageModel(
        decoder=decoder, params=params, tokenizer=byte_tokenizer(), cache_options=CacheOptions(kind=kind)
    )


@pytest.mark.parametrize("kind", [run("contiguous", quick=True), run("paged", quick=False)])
def test_generate_stream_and_logits(frozen, kind):
    model = frozen(new_model(kind))
    model.generate(["Hi", "a longer prompt " * 3], [EVERYTHING, GREEDY])
    session = Session()
    for prompt in ("one turn", "one turn and another"):
        list(model.stream(prompt, EVERYTHING, session=session))
    model.logits([[70, 71, 72]], lengths=[2]).block_until_ready()


def test_an_engine_under_pressure(frozen):
    engine = Engine(frozen(new_model()), page_size=4, num_pages=15, max_num_seqs=4, max_num_batched_tokens=16)
    for i in range(3):
        engine.add_request("a shared beginning, " + "x" * 4 * i, EVERYTHING)
        engine.add_request("a shared beginning, " + "y" * i, SamplingParams(n=2, max_tokens=9, prompt_logprobs=1))
        engine.add_request("beams", BeamSearchParams(beam_width=2, max_tokens=5))
    assert len(list(engine.run())) == 9 and engine.metrics().preemptions > 0


def test_loading_and_random_weights(frozen):
    assert from_pretrained(GOLDEN / "llama3", dtype="float32").generate([[5, 6]], GREEDY)
    LanguageModel.random(tiny_config(num_layers=1, context_length=64))


def test_a_write_would_be_noticed():
    x = np.zeros(4)
    jnp.asarray(x[1:])
    for _ in range(5):
        jax.device_put(np.zeros(1))
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1

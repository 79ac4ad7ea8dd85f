"""Generation over pages: the text is that of a contiguous cache; with quantized pages the logits are close to it."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import GOLDEN
from tiny_model import PRINTABLE, byte_tokenizer, counted_compilations, folder_with_text, sharp_decoder, tiny_config

import jfa
from jfa import quant
from jfa_models import cli
from jfa_models.decoding.language_model import LanguageModel, Session
from jfa_models.decoding.options import KV_DTYPES, CacheOptions
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained

CONFIG = tiny_config(num_layers=2, context_length=128)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = ["Hi", "a prompt of more than one chunk.", "seven c"]


@pytest.fixture(scope="module", autouse=True)
def small_shapes():
    """Chunks of 16 tokens, and caches that start at 64: prompts of a line take several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jfa_models.decoding.caches.PREFILL_CHUNK", 16)
        patch.setattr("jfa_models.decoding.caches.SMALLEST_CAPACITY", 64)
        yield


@pytest.fixture(scope="module")
def decoder():
    return sharp_decoder(CONFIG)


@pytest.fixture(scope="module")
def make(decoder):
    """The model with given cache options; one model per options, so that its steps compile once."""
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    made = {}

    def make(**options):
        options = CacheOptions(**options)
        if options not in made:
            made[options] = LanguageModel(
                decoder=decoder, params=params, tokenizer=byte_tokenizer(), cache_options=options
            )
        return made[options]

    return make


@pytest.fixture(scope="module")
def contiguous(make):
    return make().generate(PROMPTS, GREEDY)


def last(results):
    *_, result = results
    return result


@pytest.mark.parametrize("page_size", [16, 5])
def test_pages_give_the_tokens_of_a_contiguous_cache_in_batches_and_compile_once(make, contiguous, page_size):
    model = make(kind="paged", page_size=page_size)
    assert len({result.outputs[0].text for result in contiguous}) == 3
    assert model.generate(PROMPTS, GREEDY) == contiguous
    with counted_compilations() as compilations:
        again = model.generate(["of the", "same shapes, but another text.", "!"], GREEDY)
    assert not compilations and again != contiguous


def test_a_stream_over_pages_gives_the_tokens_of_a_batch_over_a_contiguous_cache(make, contiguous):
    model = make(kind="paged", page_size=5)
    assert last(model.stream(PROMPTS[1], GREEDY)) == contiguous[1]
    with counted_compilations() as compilations:
        last(model.stream("shapes that were seen before", GREEDY))
    assert not compilations


def test_new_caches_have_pages_for_every_token_and_no_row_shares_one(make):
    for page_size in (1, 5, 16, 1000):
        cache = make(kind="paged", page_size=page_size).new_cache(batch=2, capacity=100)
        assert isinstance(cache, jfa.PagedKVCache) and cache.page_size == page_size and cache.capacity >= 128
        [table] = cache.page_tables
        assert sorted(table.reshape(-1).tolist()) == list(range(1, cache.num_pages[0]))
    assert isinstance(make().new_cache(batch=2, capacity=100), jfa.KVCache)


def test_a_decode_step_updates_the_pages_in_place(make):
    model = make(kind="paged", kv_dtype="int8")
    state = model.start("Hi", GREEDY)
    before = jax.tree.leaves((state.cache.k, state.cache.v))
    num_bytes = state.cache.num_bytes
    memory = model.steps.decode.lower(model.params, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes
    state, _ = model.steps.decode(model.params, state)
    assert all(x.is_deleted() for x in before)
    assert isinstance(state.cache, jfa.PagedKVCache) and state.cache.kv_len.tolist() == [3]


def test_a_session_that_outgrows_its_pages_keeps_its_tokens(make, monkeypatch):
    model = make(kind="paged", page_size=5)
    computed = []
    prefill = model.steps.prefill

    def spy(params, cache, hidden, tokens, lengths, *adapter, **adapters):
        computed.append((int(lengths[0]), cache.capacity))
        return prefill(params, cache, hidden, tokens, lengths, *adapter, **adapters)

    monkeypatch.setattr(model.steps, "prefill", spy)
    session = Session()

    def turn(prompt):
        computed.clear()
        [*_, result] = model.stream(prompt, GREEDY, session=session)
        output = result.outputs[0]
        # the likeliest tokens of a full forward pass, which has no cache
        ids = np.zeros((1, CONFIG.context_length), int)
        whole = [*result.prompt_token_ids, *output.token_ids]
        ids[0, : len(whole)] = whole
        likeliest = np.argmax(model.logits(ids)[0], axis=-1)
        assert list(output.token_ids) == likeliest[len(result.prompt_token_ids) - 1 : len(whole) - 1].tolist()
        return output.text, sum(length for length, _ in computed), computed[-1][1]

    answer, new, capacity = turn("Hi, you there")
    assert (new, capacity) == (13, 65)
    conversation = "Hi, you there" + answer + "and more than the cache had room for, by far"
    answer, new, capacity = turn(conversation)
    assert new == 1 + 44 and capacity == 130  # the last token of an answer is not in the cache
    conversation += answer
    assert turn(conversation[:30] + "~~")[1] == 2  # it diverges


# Quantized pages


def first_logits(decoder, model, spoil=lambda cache: cache):
    """Logits after two chunks of a prompt and a single token; each step attends to what the previous ones wrote."""
    tokens = np.array([model.tokenizer.encode(PROMPTS[1] + "!")], np.int32)
    assert tokens.shape[1] == 33
    cache, hidden = model.new_cache(batch=1, capacity=64), jnp.zeros((1, CONFIG.hidden_size))
    for chunk in np.split(tokens, [16, 32], axis=1):
        lengths = np.array([chunk.shape[1]], np.int32)
        cache, hidden = model.steps.prefill(model.params, cache, hidden, chunk, lengths)
        cache = spoil(cache)
    return np.asarray(decoder.unembed(hidden))


def without_scales(cache):
    def dropped(pages):
        return tuple(dataclasses.replace(page, scales=jnp.ones_like(page.scales)) for page in pages)

    return dataclasses.replace(cache, k=dropped(cache.k), v=dropped(cache.v))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_quantized_pages_give_nearly_the_same_logits(make, decoder, kv_dtype):
    want = first_logits(decoder, make())
    model = make(kind="paged", kv_dtype=kv_dtype)
    largest = quant.KINDS[kv_dtype][1]
    half_step = 2.0**-4 if kv_dtype == "fp8" else 0.5 / largest  # of the largest number; fp8: of each number
    # each layer adds the errors of its keys and values, and those that its MLP derives from them
    allowed = 3 * CONFIG.num_layers * half_step * np.abs(want).max()
    assert 0 < np.abs(first_logits(decoder, model) - want).max() <= allowed
    assert np.abs(first_logits(decoder, model, without_scales) - want).max() > allowed, "the bound would detect nothing"


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="ring"), "cache must be one of contiguous, paged, got 'ring'"),
        (dict(kv_dtype="int8"), "kv_dtype='int8' needs cache='paged': a contiguous cache is not quantized"),
        (dict(kind="paged", kv_dtype="int2"), "kv_dtype must be one of int8, fp8, int4, got 'int2'"),
        (dict(kind="paged", page_size=0), "page_size must be at least 1, got 0"),
    ],
)
def test_cache_options_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        CacheOptions(**options)
    options = {"cache" if key == "kind" else key: value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        from_pretrained(GOLDEN / "llama3", **options)


def test_the_dtypes_of_pages_are_those_of_quantized_arrays():
    assert KV_DTYPES == tuple(quant.KINDS)


def test_from_pretrained_takes_the_options_of_the_cache():
    model = from_pretrained(GOLDEN / "llama3", cache="paged", kv_dtype="int4", page_size=7)
    cache = model.new_cache(batch=1, capacity=10)
    assert cache.page_size == 7 and cache.k[0].kind == "int4"


# The command


@pytest.fixture
def command(make, monkeypatch, tmp_path, capsys, own_cache):
    """Runs `jfa` and returns (exit status, stdout, stderr, the options of the model that it loaded).

    The text comes from another model, whose steps are already compiled.
    """
    loaded = [None]

    def load(*args, **options):
        loaded[0] = from_pretrained(*args, **options).cache_options
        return make(**dataclasses.asdict(loaded[0]))

    monkeypatch.setattr("jfa_models.cli.running.from_pretrained", load)
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "tiny")

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["jfa", *map(str, arguments), "--model", str(folder)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr(), loaded[0]

    return run


def test_generate_uses_the_requested_pages(command, make):
    wanted = ("--cache", "paged", "--kv-dtype", "int8", "--max-tokens", GREEDY.max_tokens)
    status, out, err, options = command("generate", "--json", "Hi", *wanted)
    assert (status, err, options) == (0, "", CacheOptions(kind="paged", kv_dtype="int8"))
    output = last(make(kind="paged", kv_dtype="int8").stream("Hi", GREEDY)).outputs[0]
    assert json.loads(out)["token_ids"] == list(output.token_ids)
    assert len(output.token_ids) == GREEDY.max_tokens and set(output.token_ids) <= set(PRINTABLE)


def test_without_options_the_command_uses_a_contiguous_cache(command):
    *_, options = command("generate", "")
    assert options == CacheOptions()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-dtype", "int8"), "kv_dtype='int8' needs cache='paged': a contiguous cache is not quantized"),
        (("--cache", "contiguous", "--kv-dtype", "fp8"), "kv_dtype='fp8' needs cache='paged'"),
        (("--cache", "ring"), "'ring' is not one of 'contiguous', 'paged'"),
        (("--cache", "paged", "--kv-dtype", "int2"), "'int2' is not one of 'int8', 'fp8', 'int4'"),
    ],
    ids=["int8_alone", "fp8_contiguous", "cache", "kv_dtype"],
)
def test_the_command_refuses_in_one_line(command, options, message):
    status, out, err, _ = command("generate", "Hi", *options)
    assert (status, out) == (2, "")
    assert err.startswith("jfa: ") and err.count("\n") == 1 and message in err

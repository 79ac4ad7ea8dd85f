"""Adapters in LanguageModel: each prompt's text is that of its own adapter, whatever the others of its batch use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import GOLDEN
from random_adapters import random_adapter
from runs import run
from tiny_model import byte_tokenizer, counted_compilations, sharp_decoder, tiny_config

from jfa_models import from_pretrained
from jfa_models.checkpoints.peft import save_adapter
from jfa_models.decoding import adapters
from jfa_models.decoding.language_model import LanguageModel, Session, abstract_decoder
from jfa_models.decoding.options import CacheOptions
from jfa_models.decoding.params import SamplingParams

CONFIG = tiny_config(num_layers=1, context_length=128)
GREEDY = SamplingParams(temperature=0, max_tokens=10)
PROMPTS = ["Hi", "a longer prompt of 30 letters.", "x", "seven c"]
NAMES = ["all", "qv", "dora", "rs"]
ADAPTERS = GOLDEN / "adapters"


def new_model(dtype="float32", **options):
    params = tuple(x.astype(dtype) for x in jax.tree.leaves(nnx.split(sharp_decoder(CONFIG))[1]))
    return LanguageModel(decoder=abstract_decoder(CONFIG, dtype), params=params, tokenizer=byte_tokenizer(), **options)


def adapters_of(model):
    return {
        "all": random_adapter(model, 1, rank=4, strength=0.3),
        "qv": random_adapter(model, 2, rank=2, targets=["q_proj", "v_proj"]),
        "dora": random_adapter(model, 3, rank=3, strength=0.3, use_dora=True),
        "rs": random_adapter(model, 4, rank=4, strength=0.3, targets=r".*\.mlp\..*", use_rslora=True),
    }


@functools.cache
def loaded_model(kind="contiguous", dtype="float32"):
    """A model with NAMES loaded and, if its cache is contiguous, two free slots; tests leave it as it is."""
    room = dict(max_adapters=6, max_rank=4) if kind == "contiguous" else {}
    model = new_model(dtype, cache_options=CacheOptions(kind=kind, page_size=4), **room)
    for name, adapter in adapters_of(model).items():
        model.load_adapter(name, adapter)
    return model


@pytest.fixture
def model():
    model = loaded_model()
    yield model
    assert model.adapters.names == tuple(NAMES) and not users(model)


def users(model):
    return sum(one.users for one in model.adapters._slots if one is not None)


def texts(results):
    return [result.outputs[0].text for result in results]


def alone(model, prompt, name, params=GREEDY):
    [result] = model.generate(prompt, params, adapter=name)
    return result.outputs[0].text


# Batches


@pytest.mark.parametrize(
    ("kind", "max_batch"),
    [
        run("contiguous", 8, quick=True),
        run("paged", 8, quick=False, soak=True),
        run("paged", 3, quick=False, soak=True),
    ],
)
def test_a_prompt_gives_with_its_adapter_the_same_by_itself_and_in_any_batch(kind, max_batch):
    model = loaded_model(kind)
    prompts = PROMPTS + ["Hi"] * 4
    names = [*NAMES[::-1], *NAMES[:3], None]
    together = texts(model.generate(prompts, GREEDY, adapter=names, max_batch=max_batch))
    assert [alone(model, prompt, name) for prompt, name in zip(prompts, names, strict=True)] == together
    assert len(set(together[-5:])) == 5, "each adapter should change the text"


def test_one_name_is_that_of_all_prompts(model):
    prompts = PROMPTS * 2
    assert model.generate(prompts, GREEDY, adapter="qv") == model.generate(prompts, GREEDY, adapter=["qv"] * 8)
    assert model.generate(prompts, GREEDY, adapter=[None] * 8) == model.generate(prompts, GREEDY)


@pytest.mark.parametrize("name", [run(name, quick=name == "dora") for name in NAMES])
def test_a_merged_model_computes_the_same_and_has_no_adapters(model, name):
    merged = model.merge_adapter(name)
    ids = [model.prompt_ids("some letters")]
    np.testing.assert_allclose(merged.logits(ids), model.logits(ids, adapter=name), atol=1e-4)
    assert merged.adapters.names == () and merged.adapters.on_device is None
    with pytest.raises(ValueError, match=f"there is no adapter {name!r}; loaded: none is"):
        merged.generate("Hi", GREEDY, adapter=name)


@pytest.mark.parametrize("kind", [run("contiguous", quick=False, soak=True), run("paged", quick=False)])
def test_layers_with_a_window(kind):
    model = from_pretrained(GOLDEN / "gemma3", dtype="float32", cache=kind, page_size=4)
    for seed, name in enumerate("ab"):
        model.load_adapter(name, random_adapter(model, seed, rank=2 + seed))
    prompts = np.random.default_rng(0).integers(3, 96, (3, 20)).tolist()
    names = ["a", None, "b"]
    written = [result.outputs[0].token_ids for result in model.generate(prompts, GREEDY, adapter=names)]
    wholes = np.array([[*prompt, *tokens] for prompt, tokens in zip(prompts, written, strict=True)])
    assert np.array_equal(np.argmax(model.logits(wholes, adapter=names), -1)[:, 19:-1], written)


@functools.cache
def mixture():
    model = from_pretrained(GOLDEN / "qwen3_moe", dtype="float32")
    for name in MIXED[1:3]:
        model.load_adapter(name, ADAPTERS / name)
    return model, np.load(ADAPTERS / "moe_experts.npz")["input_ids"]


MIXED = [None, "moe_experts", "moe_all_linear", None, "moe_experts"]


def test_experts_with_and_without_an_adapter_in_one_batch():
    model, ids = mixture()
    base = np.asarray(model.logits(ids))
    for row, name in zip(np.asarray(model.logits(np.repeat(ids[:1], 5, axis=0), adapter=MIXED)), MIXED, strict=True):
        want = base[0] if name is None else np.load(ADAPTERS / f"{name}.npz")["logits"][0]
        assert np.abs(row - want).max() < 1e-4 * want.std()


@pytest.mark.exhaustive
def test_experts_write_in_any_batch_what_they_write_alone():
    model, ids = mixture()
    prompts = [ids[i % 2].tolist() for i in range(5)]
    together = model.generate(prompts, GREEDY, adapter=MIXED)
    assert [one.outputs for one in together] == [
        model.generate(prompt, GREEDY, adapter=name)[0].outputs for prompt, name in zip(prompts, MIXED, strict=True)
    ]


def test_a_model_in_bfloat16():
    model, exact = loaded_model(dtype="bfloat16"), loaded_model()
    assert {x.dtype for x in jax.tree.leaves(model.adapters.on_device) if x.ndim > 2} == {jnp.dtype(jnp.bfloat16)}
    ids = np.array([model.prompt_ids("a prompt in few bits")] * 5)
    want = np.asarray(exact.logits(ids, adapter=[None, *NAMES]))
    found = np.asarray(model.logits(ids, adapter=[None, *NAMES]))
    for change, rounded in zip(want[1:] - want[0], found[1:] - found[0], strict=True):
        assert np.linalg.norm(rounded - change) < 0.1 * np.linalg.norm(change)


@pytest.mark.exhaustive
def test_a_model_in_bfloat16_writes_in_any_batch_what_it_writes_alone():
    model = loaded_model(dtype="bfloat16")
    together = texts(model.generate(["Hi"] * 5, GREEDY, adapter=[None, *NAMES]))
    assert together == [alone(model, "Hi", name) for name in (None, *NAMES)]


# Numbers that are not finite


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_an_adapter_with_numbers_that_are_not_finite_is_refused(model, kind, number):
    """As 0 * NaN is not 0, they would reach the rows of others."""
    adapter = adapters_of(model)["dora"]
    adapter.tensors["layers.0.mlp.down_proj"][kind].reshape(-1)[5] = number
    with pytest.raises(
        ValueError, match=r"adapter 'bad' changes layers.0.mlp.down \(\w+\) by numbers that are not fin"
    ):
        model.load_adapter("bad", adapter)


def test_what_overflows_with_one_adapter_ends_only_its_own_rows(model):
    want = model.generate(PROMPTS, GREEDY, adapter=[None, "qv", None, "dora"])
    adapter = adapters_of(model)["all"]
    for kinds in adapter.tensors.values():
        kinds["lora_A"][:] = 3e38
    model.load_adapter("bad", adapter)
    *found, bad = model.generate([*PROMPTS, "Hi"], GREEDY, adapter=[None, "qv", None, "dora", "bad"])
    model.unload_adapter("bad")
    assert found == want
    assert bad.outputs[0].finish_reason == "error" and bad.error.startswith("the logits are not finite")


# Loading and unloading


def test_an_adapter_is_loaded_from_a_folder_or_when_the_model_is(tmp_path):
    model = from_pretrained(GOLDEN / "llama3_tiny", dtype="float32", adapters={"a": ADAPTERS / "lora"})
    model.load_adapter("b", str(ADAPTERS / "lora"))
    ids = [[5, 6, 7]]
    assert model.adapters.names == ("a", "b") and model.adapters.first == "a"
    want = np.asarray(model.logits(ids, adapter="a"))
    assert np.array_equal(want, model.logits(ids, adapter="b"))
    save_adapter(tmp_path, model.adapters.find("a").adapter)
    model.unload_adapter("a")
    model.load_adapter("a", tmp_path)
    assert model.adapters.names == ("a", "b") and np.array_equal(want, model.logits(ids, adapter="a"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("none", r"there is no adapter 'none'; loaded: 'all', 'qv', 'dora', 'rs' \(load_adapter loads one\)"),
        (["qv", ""], "there is no adapter ''; loaded: 'all', "),
        (["qv", 5], "there is no adapter 5; loaded: 'all', "),
        (["qv"], "adapter must be one name, or one per prompt, got 1 for 2 prompts"),
        (["qv"] * 3, "adapter must be one name, or one per prompt, got 3 for 2 prompts"),
        (5, "adapter must be one name, or one per prompt, got 5"),
        ({"qv"}, "adapter must be one name, or one per prompt, got {'qv'}"),
    ],
)
def test_names_that_select_no_adapter_are_refused(model, names, message):
    calls = [
        lambda: model.generate(["Hi", "x"], GREEDY, adapter=names),
        lambda: model.start(["Hi", "x"], GREEDY, adapter=names),
        lambda: model.logits([[5, 6], [7, 8]], adapter=names),
    ]
    if isinstance(names, str):
        calls += [lambda: model.stream("Hi", GREEDY, adapter=names), lambda: model.unload_adapter(names)]
        calls += [lambda: model.merge_adapter(names)]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


@pytest.mark.parametrize("name", ["", None, 5])
def test_an_adapter_needs_a_name(model, name):
    with pytest.raises(ValueError, match="the name of an adapter must be a string that is not empty, got"):
        model.load_adapter(name, adapters_of(model)["qv"])


def test_a_name_is_used_once(model):
    with pytest.raises(ValueError, match="an adapter 'qv' is loaded already: unload it first, or use another name"):
        model.load_adapter("qv", adapters_of(model)["all"])


def test_a_name_that_is_loaded_again_has_the_new_weights(model):
    given, found = adapters_of(model), []
    for name in ("rs", "all", "rs"):
        model.load_adapter("a", given[name])
        found.append(alone(model, "Hi", "a"))
        assert found[-1] == alone(model, "Hi", name)
        model.unload_adapter("a")
    assert found[0] != found[1]


def test_without_a_limit_there_is_room_for_any_number_and_none_is_kept():
    model, ids = new_model(), [[5, 6, 7]]
    base = np.asarray(model.logits(ids))
    adapters = {f"{seed}": random_adapter(model, seed, rank=1 + seed, strength=0.3) for seed in range(3)}
    for name, adapter in adapters.items():
        model.load_adapter(name, adapter)
    want = {name: np.asarray(model.logits(ids, adapter=name)) for name in adapters}
    model.unload_adapter("1")
    model.load_adapter("3", adapters["1"])
    np.testing.assert_allclose(model.logits(ids, adapter="3"), want["1"], atol=1e-5)
    np.testing.assert_allclose(model.logits(ids, adapter="2"), want["2"], atol=1e-5)
    for name in model.adapters.names:
        model.unload_adapter(name)
    assert model.adapters.names == () and model.adapters.on_device is None
    assert np.array_equal(model.logits(ids), base)


@pytest.mark.parametrize("options", [{}, dict(max_adapters=2, max_rank=4)])
def test_other_threads_see_an_adapter_only_when_its_weights_are_there(options, monkeypatch):
    model, seen = new_model(**options), []
    given = adapters_of(model)
    model.load_adapter("one", given["qv"])
    before, with_slot = model.adapters.on_device, adapters._with_slot

    def spy(*args):
        seen.append((model.adapters.on_device is before, model.adapters.names))
        return with_slot(*args)

    monkeypatch.setattr(adapters, "_with_slot", spy)
    model.load_adapter("two", given["dora"])
    assert seen == [(True, ("one",))] * 2 and model.adapters.names == ("one", "two")
    monkeypatch.setattr(adapters, "_with_slot", lambda *args: 1 / 0)
    before = model.adapters.on_device
    model.unload_adapter("two")
    with pytest.raises(ZeroDivisionError):
        model.load_adapter("two", given["dora"])
    assert model.adapters.on_device is before and model.adapters.names == ("one",)


def test_a_stream_keeps_the_adapter_that_is_unloaded_meanwhile(model):
    given, want = adapters_of(model), alone(model, "Hi", "all")
    model.load_adapter("a", given["all"])
    stream = model.stream("Hi", GREEDY, adapter="a")
    next(stream)
    assert users(model) == 1
    model.unload_adapter("a")
    model.load_adapter("a", given["qv"])
    assert alone(model, "Hi", "a") == alone(model, "Hi", "qv") != want
    assert [result.outputs[0].text for result in stream][-1] == want
    model.unload_adapter("a")
    assert sum(one is not None for one in model.adapters._slots) == len(NAMES)


def test_a_stream_that_is_closed_or_not_begun_holds_no_adapter(model):
    stream = model.stream("Hi", GREEDY, adapter="qv")
    next(stream)
    stream.close()
    model.load_adapter("a", adapters_of(model)["rs"])
    late = model.stream("Hi", GREEDY, adapter="a")
    assert not users(model)
    model.unload_adapter("a")
    with pytest.raises(ValueError, match="adapter 'a' was unloaded"):
        next(late)


def test_a_call_that_fails_holds_no_adapter(model, monkeypatch):
    monkeypatch.setattr(model, "_run_batch", lambda requests: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(["Hi", "x"], GREEDY, adapter=["qv", "all"])
    assert not users(model)
    one, gone = (model.adapters.find(name) for name in ("qv", "rs"))
    monkeypatch.setattr(gone, "is_unloaded", True)
    with pytest.raises(ValueError, match="adapter 'rs' was unloaded"), model.adapters.using([one, gone]):
        pass
    assert not users(model)


def test_room_that_is_reserved():
    model = new_model(max_adapters=2, max_rank=3)
    given = adapters_of(model)
    with pytest.raises(ValueError, match="adapter 'all' has rank 4, more than max_rank=3"):
        model.load_adapter("all", given["all"])
    model.load_adapter("qv", given["qv"])
    model.load_adapter("dora", given["dora"])
    full = r"all 2 slots are in use \(qv, dora\): unload an adapter, or raise max_adapters"
    with pytest.raises(ValueError, match=full):
        model.load_adapter("other", given["qv"])
    with model.adapters.using([model.adapters.find("qv")]):
        model.unload_adapter("qv")
        assert model.adapters.names == ("dora",)
        with pytest.raises(ValueError, match=full):  # a request still uses it
            model.load_adapter("other", given["qv"])
    model.load_adapter("other", given["qv"])
    assert model.adapters.names == ("other", "dora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(max_adapters=2),
            "max_adapters and max_rank reserve memory together: give both or neither, got 2 and None",
        ),
        (dict(max_rank=2), "max_adapters and max_rank reserve memory together: give both or neither, got None and 2"),
        *(
            (dict(max_adapters=x, max_rank=2), "max_adapters must be an integer >= 1, or None")
            for x in (0, "2", 1.5, True)
        ),
        *((dict(max_adapters=2, max_rank=x), "max_rank must be an integer >= 1, or None") for x in (0, -1, [4])),
    ],
)
def test_room_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        new_model(**options)


def test_with_reserved_room_nothing_compiles_after_a_first_pass(model):
    def all_calls(name, seed, **options):
        model.load_adapter(name, random_adapter(model, seed, strength=0.3, **options))
        model.generate(PROMPTS * 2, GREEDY, adapter=[name, None] * 4)
        model.logits([[5, 6], [7, 8]], adapter=[name, None])
        list(model.stream("Hi", GREEDY, adapter=name))
        model.unload_adapter(name)

    all_calls("first", 0, rank=1, targets=["k_proj"])
    with counted_compilations() as compilations:
        for seed, targets in enumerate(("all-linear", ["down_proj"], r".*\.0\.mlp.*", ["q_proj", "up_proj"])):
            all_calls(f"{seed}", seed, rank=1 + seed, targets=targets)
        for name in "ab":
            model.load_adapter(name, random_adapter(model, 0, rank=3))
        for name in "ab":
            model.unload_adapter(name)
    assert not compilations


# The scale


def test_a_scale_multiplies_the_change(model):
    adapter = random_adapter(model, 1, rank=2, strength=0.3)
    config = dataclasses.replace(adapter.config, alpha_pattern={"q_proj": 1.0})
    adapter = dataclasses.replace(adapter, config=config)
    doubled = dataclasses.replace(config, lora_alpha=2 * config.lora_alpha, alpha_pattern={"q_proj": 2.0})
    ids = [model.prompt_ids("some letters")]

    def found(given, **options):
        model.load_adapter("a", given, **options)
        logits = np.asarray(model.logits(ids, adapter="a"))
        model.unload_adapter("a")
        return logits

    base, one, two = np.asarray(model.logits(ids)), found(adapter), found(adapter, scale=2)
    np.testing.assert_allclose(found(adapter, scale=0), base, atol=1e-5)
    assert np.array_equal(two, found(dataclasses.replace(adapter, config=doubled)))
    assert np.abs(two - one).max() > 0.1 * one.std() < np.abs(one - base).max()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None, True, [2.0]])
def test_a_scale_must_be_a_number(model, scale):
    with pytest.raises(ValueError, match="scale must be a number, got "):
        model.load_adapter("x", adapters_of(model)["qv"], scale=scale)


@pytest.mark.parametrize(
    ("name", "base", "kinds"),
    [
        ("modules_to_save", "llama3_tiny", "weight"),
        ("bias_only", "qwen2", "bias"),
        ("trainable_tokens", "llama3_tiny", "rows"),
    ],
)
def test_replaced_parameters_have_no_scale(name, base, kinds):
    model = from_pretrained(GOLDEN / base, dtype="float32")
    with pytest.raises(ValueError, match=rf"scale=0.5 needs an adapter of low-rank parts only, .* \({kinds}\): use sc"):
        model.load_adapter(name, ADAPTERS / name, scale=0.5)
    model.load_adapter(name, ADAPTERS / name, scale=1)


# Streams and sessions


def test_a_stream_writes_what_generate_writes(model):
    for name in (None, *NAMES):
        *_, last = model.stream("Hi there", GREEDY, adapter=name)
        assert [last] == model.generate("Hi there", GREEDY, adapter=name)


def test_a_session_that_changes_its_adapter_starts_over(model, monkeypatch):
    computed = []
    prefill = model.steps.prefill

    def spy(params, cache, hidden, tokens, lengths, *slots, **adapters):
        computed.append(int(lengths[0]))
        return prefill(params, cache, hidden, tokens, lengths, *slots, **adapters)

    session, text, news = Session(), "Hi", []
    for name in ("qv", "qv", "all", None, None, "qv"):
        with monkeypatch.context() as patch:
            patch.setattr(model.steps, "prefill", spy)
            *_, last = model.stream(text, GREEDY, session=session, adapter=name)
        assert last.outputs[0].text == alone(model, text, name)
        news.append(sum(computed) == len(last.prompt_token_ids))
        computed.clear()
        text += last.outputs[0].text + "?"
    assert news == [True, False, True, True, False, True]


def test_a_session_starts_over_if_its_adapter_is_loaded_again(model):
    session, given = Session(), adapters_of(model)
    for name in ("all", "qv"):
        model.load_adapter("a", given[name])
        *_, last = model.stream("a prompt", GREEDY, session=session, adapter="a")
        assert last.outputs[0].text == alone(model, "a prompt", name)
        model.unload_adapter("a")


def test_steps_that_a_caller_runs(model):
    state = model.start(["Hi", "x"], GREEDY, adapter=["qv", None])
    tokens = [np.asarray(state.token)]
    for _ in range(3):
        state, emitted = model.steps.decode(model.params, state, adapters=model.adapters.on_device)
        tokens.append(np.asarray(emitted.sampled.token))
    found = np.transpose(tokens).tolist()
    for row, (prompt, name) in enumerate([("Hi", "qv"), ("x", None)]):
        [result] = model.generate(prompt, GREEDY, adapter=name)
        assert found[row] == list(result.outputs[0].token_ids[:4])

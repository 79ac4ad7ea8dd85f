"""Models that are divided over a mesh of eight virtual devices compute what they compute on one."""

import collections
import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from engines import assert_clean
from golden import GOLDEN
from jax.sharding import PartitionSpec
from runs import run
from tiny_model import counted_compilations

import jfa
from jfa_models import LLM, Engine, LanguageModel, SamplingParams, from_pretrained
from jfa_models.decoding.options import CacheOptions
from jfa_models.engine import Replicas
from jfa_models.model.config import DecoderConfig, ExpertsConfig
from jfa_models.model.rope import RopeConfig

CLOSE = 1e-4  # of the spread of the logits, as in test_families.py
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
TINY = DecoderConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=8,
    context_length=256,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
)
CONTEXT = {"phi3_short": 64}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rotates by its factors for long texts"),
    pytest.mark.filterwarnings("ignore:over [0-9]+ devices, each has all of"),
]


def mesh_of(tensor, expert=1, context=1):
    sizes = {"tensor": tensor, "expert": expert, "context": context}
    sizes = {axis: size for axis, size in sizes.items() if size > 1} or {"tensor": 1}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[: tensor * expert * context])


@functools.cache
def tiny(mesh=None, **options):
    changes = {name: options.pop(name) for name in set(options) & set(vars(TINY))}
    config = TINY if not changes else DecoderConfig(**(vars(TINY) | changes))
    return LanguageModel.random(config, dtype="float32", mesh=mesh, **options)


def prompts(count, longest=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, TINY.vocab_size, rng.integers(1, longest)).tolist() for _ in range(count)]


def tokens(results):
    return [[one.token_ids for one in result.outputs] for result in results]


def ran(engine, requests):
    names = [engine.add_request(prompt, params) for prompt, params in requests]
    found = {result.request_id: result for result in engine.run()}
    assert_clean(engine)
    return tokens(found[name] for name in names)


def distance(got, want):
    return np.abs(np.asarray(got) - want).max() / want.std()


FAMILIES = [
    run("llama3", 4, 1, 1, quick=True),
    run("gemma3", 2, 1, 2, quick=True),
    run("qwen3_moe", 2, 4, 1, quick=True),
    run("mixtral", 1, 2, 2, quick=False, soak=True),
    run("mixtral", 4, 2, 1, quick=False, soak=True),
    run("qwen3_next", 2, 1, 2, quick=False, soak=True),
    run("granitemoehybrid", 2, 1, 2, quick=False, soak=True),
    run("granitemoehybrid_moe", 2, 2, 2, quick=False, soak=True),
    run("mamba2", 8, 1, 1, quick=False, soak=True),
    run("gemma2", 2, 1, 2, quick=False, soak=True),
    run("gemma3_six", 4, 1, 2, quick=False, soak=True),
    run("gemma", 2, 1, 2, quick=False, soak=True),
    run("mistral", 4, 1, 2, quick=False, soak=True),
    run("qwen2", 2, 1, 2, quick=False, soak=True),
    run("qwen2_window", 4, 1, 2, quick=False, soak=True),
    run("qwen3", 4, 1, 2, quick=False, soak=True),
    run("qwen3_moe_sparse", 1, 4, 2, quick=False, soak=True),
    run("phi2", 4, 1, 2, quick=False, soak=True),
    run("phi3", 2, 1, 2, quick=False, soak=True),
    run("phi3_short", 4, 1, 2, quick=False, soak=True),
]


@pytest.fixture
def short_chunks(monkeypatch):
    """Tokens are divided however few they are."""
    monkeypatch.setattr("jfa_models.model.partition.LEAST_CHUNK", 1)


@pytest.mark.parametrize(("name", "tensor", "expert", "context"), FAMILIES)
def test_family(short_chunks, name, tensor, expert, context):
    truth = dict(np.load(GOLDEN / f"{name}.npz"))
    options = dict(dtype="float32", mesh=mesh_of(tensor, expert, context), context_length=CONTEXT.get(name))
    model = from_pretrained(GOLDEN / name, **options)
    assert distance(model.logits(truth["input_ids"]), truth["logits"]) < CLOSE
    rows = truth["input_ids"].tolist()
    want = [[tuple(row)] for row in truth["greedy"].tolist()]
    assert tokens(model.generate(rows, GREEDY)) == want
    assert ran(Engine(model, page_size=4, max_num_seqs=2), [(row, GREEDY) for row in rows]) == want
    if model.config.states is not None:
        drafts = {"method": "self", "num_layers": 1, "num_speculative_tokens": 3, "confidence_threshold": 0.0}
        engine = Engine(model, page_size=4, max_num_seqs=2, speculative_config=drafts | {"adaptive": False})
        assert ran(engine, [(row, GREEDY) for row in rows]) == want
        counts = engine.metrics().speculation["self"]
        assert 0 < counts.accepted < counts.proposed


# heads, key heads, devices: key heads divided, shared by several devices, and attention on every device
HEADS = [(8, 8, 8), (8, 2, 8), (8, 1, 4), (12, 4, 2), (7, 7, 2), (6, 6, 4), (8, 4, 3)]


@pytest.mark.parametrize(("q_heads", "kv_heads", "count"), [run(*one, quick=one[2] != 3) for one in HEADS[:-1]])
def test_heads(q_heads, kv_heads, count):
    options = dict(num_q_heads=q_heads, num_kv_heads=kv_heads)
    one, many = tiny(**options), tiny(mesh=mesh_of(count), **options)
    ids = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 9))
    np.testing.assert_allclose(many.logits(ids), one.logits(ids), atol=1e-5)
    cache = many.new_cache(batch=1, capacity=16)
    divided = q_heads % count == 0 and (kv_heads % count == 0 or count % kv_heads == 0)
    assert cache.k[0].addressable_shards[0].data.shape[2] == (max(1, kv_heads // count) if divided else kv_heads)


@pytest.mark.parametrize(
    "context", [run(3, quick=False), run(8, quick=False, soak=True), run(5, quick=False, soak=True)]
)
def test_any_number_of_devices_shares_any_number_of_tokens(short_chunks, context):
    one, many = tiny(), tiny(mesh=mesh_of(1, context=context))
    ids = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 37))
    np.testing.assert_allclose(many.logits(ids), one.logits(ids), atol=1e-5)
    if context == 3:
        counts, _ = collectives(many.steps.logits.lower(many.params, ids, None).compile().as_text())
        assert counts["collective-permute"] and counts["all-gather"] == 1
    wanted = [tokens(model.generate(prompts(3), GREEDY)) for model in (one, many)]
    assert wanted[0] == wanted[1]


KINDS = [
    run("contiguous", None, quick=True),
    run("paged", "int8", quick=False, soak=True),
    run("paged", None, quick=False, soak=True),
    run("paged", "int4", quick=False, soak=True),
    run("paged", "fp8", quick=False, soak=True),
]


@pytest.mark.parametrize(("kind", "kv_dtype"), KINDS)
def test_caches_and_sampling(short_chunks, kind, kv_dtype):
    options = dict(cache_options=CacheOptions(kind=kind, kv_dtype=kv_dtype, page_size=4))
    one, many = tiny(**options), tiny(mesh=mesh_of(2, context=2), **options)
    sampled = SamplingParams(
        seed=3, temperature=0.9, top_p=0.9, top_k=40, repetition_penalty=1.1, logprobs=3, max_tokens=16, ignore_eos=True
    )
    banned = SamplingParams(temperature=0.0, logit_bias={5: -100.0}, min_tokens=8, max_tokens=16)
    params = [GREEDY, sampled, banned]
    assert tokens(many.generate(prompts(3), params)) == tokens(one.generate(prompts(3), params))
    assert tokens(many.generate(prompts(2), GREEDY)) == tokens(one.generate(prompts(2), GREEDY))


QUANTIZED = sorted(path.stem for path in (GOLDEN / "quantized").glob("*.npz"))


@pytest.mark.filterwarnings("ignore:.*are held as floats")
@pytest.mark.parametrize("name", [run(name, quick=name == "ct_int8", soak=True) for name in QUANTIZED])
def test_quantized(name):
    folder = GOLDEN / "quantized" / name
    options = dict(dtype="float32", quantization="stored")
    one = from_pretrained(folder, **options)
    ids = np.random.default_rng(1).integers(0, one.config.vocab_size, (2, 9))
    try:
        many = from_pretrained(folder, mesh=mesh_of(2), **options)
    except ValueError as error:
        assert "without cutting a group" in str(error)
        return
    # a device rounds its own part of the inputs: as exact, not equal
    rounds = any(x.rounds_inputs == 1 for x in one.params if isinstance(x, jfa.QuantizedArray))
    assert distance(many.logits(ids), np.asarray(one.logits(ids))) < (0.03 if rounds else 5e-3)


@pytest.mark.parametrize("quantization", [run("int8", quick=True), run("int4", quick=False), run("fp8", quick=False)])
def test_weights_quantized_at_load(quantization):
    wide = dict(num_q_heads=16, head_dim=16, intermediate_size=256)  # int4 in groups of 128
    one, many = (tiny(mesh=mesh, quantization=quantization, **wide) for mesh in (None, mesh_of(2)))
    ids = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 9))
    assert distance(many.logits(ids), np.asarray(one.logits(ids))) < 5e-3


ADAPTERS = ["lora", "dora", "bias_all", "modules_to_save", "tied_embeddings", "trainable_tokens", "moe_all_linear"]


@pytest.mark.parametrize("name", [run(name, quick=name == "dora", soak=True) for name in ADAPTERS])
def test_adapters(short_chunks, name):
    folder = GOLDEN / "adapters" / name
    truth = np.load(f"{folder}.npz")
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = from_pretrained(GOLDEN / base, dtype="float32", mesh=mesh_of(2, 2 if "moe" in name else 1, 2))
    model.load_adapter(name, folder)
    ids, want = truth["input_ids"], truth["logits"]
    assert distance(model.logits(ids, adapter=name), want) < CLOSE
    assert distance(model.logits(ids), want) > CLOSE
    assert distance(model.merge_adapter(name).logits(ids), want) < CLOSE


@pytest.mark.parametrize("count", [run(12, quick=True), run(300, quick=False, soak=True)])
def test_engine_with_random_requests(short_chunks, count):
    rng = np.random.default_rng(count)
    layers = 1 if count == 12 else 2
    one, many = (tiny(mesh=mesh, num_layers=layers) for mesh in (None, mesh_of(2, context=2)))
    requests = []
    shared = prompts(1, seed=7)[0]
    for prompt in prompts(count, seed=count):
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 1.0])),
            seed=int(rng.integers(100)),
            top_p=float(rng.choice([1.0, 0.8])),
            n=int(rng.choice([1, 1, 2])),
            max_tokens=int(rng.integers(1, 20)),
            logprobs=[None, 2][rng.integers(2)],
            prompt_logprobs=[None, 1][rng.integers(2)] if count > 12 else None,
            frequency_penalty=float(rng.choice([0.0, 0.5])),
        )
        requests.append(((shared if rng.random() < 0.5 else []) + prompt, params))
    sizes = dict(page_size=4, num_pages=60, max_num_seqs=6, max_num_batched_tokens=32, seed=1)
    want = ran(Engine(one, **sizes), requests)
    assert ran(Engine(many, **sizes), requests) == want
    if count == 12:
        return
    for drafts in (
        {"method": "ngram", "num_speculative_tokens": 3},
        {"method": "lookahead", "num_speculative_tokens": 7, "window_size": 2, "ngram_size": 3, "adaptive": False},
        {"method": "staged", "num_speculative_tokens": 6, "num_layers": 1, "adaptive": False},
    ):
        assert ran(Engine(many, **sizes, speculative_config=drafts), requests) == want


def collectives(text):
    """The collective operations of a compiled program, by kind, with the shapes of their results."""
    found = re.findall(
        r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    return collections.Counter(kind for _, kind in found), found


def test_collectives_of_a_decode_step():
    """Two sums a layer, one for the embedding, and one exchange to sample: nothing else crosses."""
    model = tiny(mesh=mesh_of(4))
    state = model.start(prompts(2), GREEDY)
    text = model.steps.decode.lower(model.params, state).compile().as_text()
    counts, found = collectives(text)
    assert counts == {"all-reduce": 2 * TINY.num_layers + 1, "all-gather": 1}, found
    sizes = [shape for shape, kind in found if kind == "all-reduce"]
    assert all(re.match(r"f32\[2,(1,)?32\]", shape) for shape in sizes), sizes


def test_collectives_of_a_prefill_step():
    """Two sums a layer, of a device's own tokens, and the keys and values of all; two sums for the embedding and the
    last tokens."""
    model = tiny(mesh=mesh_of(2, context=2))
    cache, hidden = model.new_cache(batch=2, capacity=256), model.partition.everywhere(np.zeros((2, 32), np.float32))
    given = (np.zeros((2, 128), np.int32), np.full(2, 128, np.int32), None)
    text = model.steps.prefill.lower(model.params, cache, hidden, *given).compile().as_text()
    counts, found = collectives(text)
    assert counts == {"all-reduce": 2 * TINY.num_layers + 2, "all-gather": 2 * TINY.num_layers}, found
    shapes = collections.Counter(re.sub("{.*", "", shape) for shape, _ in found)
    assert shapes == {"f32[2,64,32]": 2 * TINY.num_layers + 1, "f32[2,128,2,8]": 2 * TINY.num_layers, "f32[2,32]": 1}


def test_nothing_of_a_cache_crosses_or_is_copied():
    model = tiny(mesh=mesh_of(4), cache_options=CacheOptions(kind="paged", page_size=4))
    state = model.start(prompts(2), GREEDY)
    compiled = model.steps.decode.lower(model.params, state).compile()
    shards = [x.addressable_shards[0].data.nbytes for x in (*state.cache.k, *state.cache.v)]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(shards)
    assert memory.temp_size_in_bytes < sum(shards)


def test_parameters_are_divided():
    many = tiny(mesh=mesh_of(4))
    held = dict(zip(many.names, many.params, strict=True))
    own = sum(x.addressable_shards[0].data.nbytes for x in held.values())
    whole = sum(x.nbytes for x in held.values())
    norms = sum(x.nbytes for name, x in held.items() if "norm" in name)
    assert own == (whole - norms) // 4 + norms


def test_saved_model_is_the_whole(tmp_path):
    many = from_pretrained(GOLDEN / "llama3", dtype="float32", mesh=mesh_of(4))
    many.save_pretrained(tmp_path)
    ids = np.load(GOLDEN / "llama3.npz")["input_ids"]
    saved = from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_allclose(saved.logits(ids), many.logits(ids), atol=1e-5)


EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=16)
REFUSED = [
    (
        dict(mesh=jax.make_mesh((2,), ("model",))),
        "the mesh has an axis 'model'; the axes of a decoder are .* or --mesh",
    ),
    (dict(mesh=(4,)), r"mesh must be a jax.sharding.Mesh, such as .*, got \(4,\)"),
    (dict(mesh=mesh_of(1, 2)), "the model has no experts"),
    (dict(mesh=mesh_of(1, 3), experts=EXPERTS), "4 experts cannot be divided by the 3 devices .* 1, 2, 4"),
    (dict(mesh=mesh_of(5)), "nothing of the model can be divided by 5 devices: attention .8 query and 4 key heads"),
    (dict(mesh=mesh_of(8), quantization="int4"), "in groups of .*, which cannot be divided by 8 devices"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_mesh_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_tokens_of_layers_with_states_are_not_divided():
    with pytest.raises(ValueError, match="an axis 'context' of 2 devices divides the tokens of attention, which no"):
        from_pretrained(GOLDEN / "mamba2", mesh=mesh_of(1, context=2))


@pytest.mark.parametrize("count", [0, 9, 2.0])
def test_number_of_devices_is_refused(count):
    with pytest.raises(ValueError, match=f"tensor_parallel must be 1 to 8, .* got {count}"):
        from_pretrained(GOLDEN / "llama3", tensor_parallel=count)


def test_mesh_and_tensor_parallel_together_are_refused():
    with pytest.raises(ValueError, match="both say how the model is divided"):
        from_pretrained(GOLDEN / "llama3", tensor_parallel=2, mesh=mesh_of(2))


def test_what_every_device_has_is_named():
    with pytest.warns(UserWarning, match=r"over 3 devices, each has all of: attention \(8 query and 4 key heads"):
        tiny(mesh=mesh_of(3))


@pytest.mark.exhaustive
@pytest.mark.soak
def test_replicas_share_the_requests():
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "expert"))
    one, many = (LLM(tiny(mesh=given, experts=EXPERTS), page_size=4, max_num_seqs=2) for given in (None, mesh))
    assert isinstance(many.engine, Replicas)
    params = [GREEDY, SamplingParams(seed=5, max_tokens=8, n=2)] * 3
    assert tokens(many.generate(prompts(6), params)) == tokens(one.generate(prompts(6), params))
    assert [engine.finished_requests for engine in many.engine.metrics()] == [3, 3]
    first = many.engine.add_request([3, 4], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        many.engine.add_request([3, 4], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="prompt is empty"):
        many.engine.add_request([], GREEDY, request_id="b")
    many.engine.abort(first)
    assert [result.outputs[0].finish_reason for result in many.engine.run()] == ["abort"]
    assert not many.engine.has_unfinished
    devices = [set().union(*(x.sharding.device_set for x in one.params)) for one in many.model.replicas()]
    assert len(devices[0]) == len(devices[1]) == 4 and not devices[0] & devices[1]


def test_replicas_have_the_adapters():
    model = from_pretrained(GOLDEN / "llama3_tiny", dtype="float32", mesh=jax.make_mesh((2,), ("data",)))
    model.load_adapter("lora", GOLDEN / "adapters" / "lora")
    both = model.replicas()
    assert [one.adapters.names for one in both] == [("lora",), ("lora",)]
    model.load_adapter("later", GOLDEN / "adapters" / "lora")
    model.unload_adapter("lora")
    assert [one.adapters.names for one in both] == [("later",), ("later",)]


def test_bias_of_a_shared_expert_is_added_once():
    experts = dataclasses.replace(EXPERTS, shared_size=24)
    one, many = (tiny(mesh=mesh, experts=experts, mlp_bias=True, num_layers=1) for mesh in (None, mesh_of(2)))
    place = one.names.index("layers.0.mlp.shared.down.bias")
    bias = np.arange(32, dtype=np.float32)
    ids = np.random.default_rng(1).integers(0, TINY.vocab_size, (1, 5))
    got, want = (
        LanguageModel(decoder=model.decoder, params=(*model.params[:place], given, *model.params[place + 1 :]))
        for model, given in ((many, many.partition.put(bias, PartitionSpec())), (one, jax.numpy.asarray(bias)))
    )
    assert distance(got.logits(ids), np.asarray(want.logits(ids))) < CLOSE


def test_nothing_compiles_after_warm_up_and_reset():
    params = [GREEDY, SamplingParams(temperature=0.0, logit_bias={5: 1.0}, max_tokens=2)]
    engine = Engine(tiny(mesh=mesh_of(2), num_layers=1), page_size=4, max_num_seqs=1, max_num_batched_tokens=16)
    engine.warm_up(params)
    with counted_compilations() as count:
        for _ in range(2):
            ran(engine, [(prompt, one) for one in params for prompt in prompts(2)])
            engine.reset()
    assert not count


def test_pools_are_sized_by_the_memory_of_their_own_devices(monkeypatch):
    asked = []
    room = "jfa_models.engine.engine._room"
    monkeypatch.setattr(room, lambda device, _: asked.append(device) or 1 << (20 - device.id))
    sizes = dict(max_model_len=64, max_num_seqs=64, page_size=4)
    pools = [
        engine.num_slots for engine in Replicas(tiny(mesh=jax.make_mesh((2, 2), ("data", "tensor"))), **sizes)._engines
    ]
    assert {device.id for device in asked} == {0, 1, 2, 3} and pools[0] > pools[1]


def test_callers_may_have_set_their_mesh():
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    model, ids = tiny(mesh=mesh, num_layers=1), np.arange(6)[None]
    want = np.asarray(model.logits(ids))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(model.logits(ids), want)
        assert ran(Engine(model, page_size=4, max_num_seqs=1), [([3, 4], GREEDY)])


def test_results_of_one_replica_survive_the_failure_of_another(monkeypatch):
    engine = Replicas(tiny(mesh=jax.make_mesh((2,), ("data",))), page_size=4, num_pages=9, max_num_seqs=1)
    first, second = engine._engines
    engine.add_request([3], SamplingParams(max_tokens=1), request_id="a")
    engine.add_request([4], SamplingParams(max_tokens=1), request_id="b")
    monkeypatch.setattr(first, "step", lambda: ["done"])

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(second, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    assert engine._ended == ["done"]
    engine.reset()
    assert not engine._ended and not engine.has_unfinished

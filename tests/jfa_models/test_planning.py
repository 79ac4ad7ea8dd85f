"""Plans agree with what is loaded, with what is compiled, and with rooflines written out by hand."""

import dataclasses
import math
import re

import jax
import pytest
from golden import GOLDEN
from runs import run

from jfa_bench.proof import by_xla, steps
from jfa_models import Engine, LanguageModel, SamplingParams, planning
from jfa_models.checkpoints.presets import preset
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.planning import Load, seconds, splits, step_seconds
from jfa_models.rates import CARDS, COLLECTIVE_US, HOST_COLLECTIVE_US, Card

MI300X = CARDS["gfx942"]
ENDLESS = Card(
    name="endless",
    memory_gb=1e9,
    memory_gb_per_s=1e15,
    tflops=1e15,
    link_gb_per_s=1e15,
    host_link_gb_per_s=1e15,
)
ONE_STEP = Load(batch=3, context=40, prompt=40)

pytestmark = pytest.mark.filterwarnings("ignore:over [0-9]+ devices, each has all of")


def config_of(name):
    return open_checkpoint(GOLDEN / name).config


def mesh_of(sizes):
    count = sizes["tensor"] * sizes.get("expert", 1)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])


def planned(config, sizes, card=MI300X, load=ONE_STEP, **options):
    devices = options.pop("devices", math.prod(sizes.values()))
    [split] = splits(config, card, load, devices=devices, mesh=sizes, **options)
    return split


def on_first_device(tree):
    shards = (shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


HELD = [
    run("llama3", 2, 1, None, None, quick=True),
    run("llama3", 1, 1, "int4", None, quick=True),
    run("llama3", 2, 1, "int8", "int8", quick=True),
    run("gemma3", 2, 1, None, "fp8", quick=True),
    run("qwen3_moe", 2, 2, None, None, quick=True),
    run("qwen3_next", 2, 1, None, None, quick=True),
    run("mamba2", 8, 1, "int8", None, quick=True),
    run("mixtral", 1, 2, "fp8", "int4", quick=False),
    run("granitemoehybrid", 2, 1, "int8", None, quick=False),
    run("phi2", 4, 1, None, None, quick=False),
]


@pytest.mark.parametrize(("name", "tensor", "expert", "quantization", "kv_dtype"), HELD)
def test_bytes_are_those_of_a_loaded_model_and_its_engine(name, tensor, expert, quantization, kv_dtype):
    config, sizes = config_of(name), {"tensor": tensor} | ({"expert": expert} if expert > 1 else {})
    options = dict(dtype="bfloat16", quantization=quantization)
    plan = planned(config, sizes, kv_dtype=kv_dtype, **options)
    model = LanguageModel.random(config, mesh=mesh_of(sizes), **options)
    assert plan.num_bytes["weights"] == on_first_device(model.params)
    sequences = dict(max_num_seqs=3, max_model_len=40, max_num_batched_tokens=planning.STEP_TOKENS)
    sequences["num_state_snapshots"] = 0  # a plan shares no prefixes
    cache = Engine(model, kv_dtype=kv_dtype, num_pages=1 + 3 * 3, **sequences)._new_cache()
    assert plan.num_bytes["KV pages"] == on_first_device((cache.k, cache.v))
    assert plan.num_bytes["states"] == on_first_device(cache.states)


@pytest.mark.parametrize(
    ("name", "tensor", "expert"), [run("llama3", 2, 1, quick=False), run("qwen3_next", 2, 2, quick=False)]
)
def test_collectives_are_those_of_the_compiled_step(name, tensor, expert):
    config, sizes = config_of(name), {"tensor": tensor} | ({"expert": expert} if expert > 1 else {})
    model = LanguageModel.random(config, dtype="float32", mesh=mesh_of(sizes))
    state = model.start([[5, 6], [7]], SamplingParams(temperature=0.0, max_tokens=4))
    text = model.steps.decode.lower(model.params, state).compile().as_text()
    collectives = re.findall(r"= \S+ (?:all-reduce|all-gather)(?:-start)?\(", text)
    *_, part = planned(config, sizes, ENDLESS).decode
    assert (part.name, part.bound) == ("collectives", "links: latency")
    assert part.seconds == pytest.approx(len(collectives) * COLLECTIVE_US * 1e-6)


@pytest.mark.parametrize(
    ("name", "layers"), [run("llama-3.2-1b", 4, quick=False), run("llama-3-70b", 80, quick=False, soak=True)]
)
def test_arguments_of_the_program_for_eight_cards(name, layers):
    if reason := by_xla.why_not("rocm"):
        pytest.skip(reason)
    load = Load(batch=8, context=1024, prompt=1024)
    row = steps.Row(model=name, step="decode", arch="gfx942", batch=8, context=1024, cache="paged", devices=8)
    held = planned(preset(name).with_layers(layers), {"tensor": 8}, load=load).num_bytes
    compiled = steps.compiled(row, layers).bytes
    assert held["weights"] + held["KV pages"] == pytest.approx(compiled["arguments"], rel=3e-3)
    assert compiled["temporaries"] < held["temporaries"]


def test_a_decode_step_reads_the_weights_and_every_key_and_value():
    config, card = preset("llama-3-8b"), dataclasses.replace(ENDLESS, memory_gb_per_s=1000.0)
    load = Load(batch=4, context=1000, prompt=1)
    products, attention = planned(config, {"tensor": 1}, card, load).decode
    embedding = config.vocab_size * config.hidden_size
    assert products.seconds == pytest.approx(2 * (config.num_params - embedding) / 1e12)
    assert attention.seconds == pytest.approx(2 * 4 * config.cache_elements(1000) / 1e12)
    assert (products.bound, attention.bound) == ("memory: weights", "memory: KV pages")


def test_a_step_of_a_few_tokens_reads_what_a_step_of_one_does():
    config, card = preset("llama-3-8b"), CARDS["gfx942"]
    one, few = (step_seconds(config, card, rows=1, new=new, context=1024) for new in (1, 32))
    [whole] = splits(config, card, Load(batch=1, context=1024, prompt=1), devices=1)
    assert one == seconds(whole.decode) == pytest.approx(few, rel=1e-3)
    # 32 rows of 32 tokens are bound by their products
    assert step_seconds(config, card, rows=32, new=32, context=1024) > 3 * few


def test_a_prompt_is_multiplied_with_every_weight_and_each_token_with_those_before_it():
    config, card = preset("llama-3-8b"), dataclasses.replace(ENDLESS, tflops=1.0)
    n = 5000  # three steps
    products, attention = planned(config, {"tensor": 1}, card, Load(batch=1, context=n, prompt=n)).first_token
    head, norms = config.vocab_size * config.hidden_size, (2 * config.num_layers + 1) * config.hidden_size
    # each of three steps has the logits of one token
    flop = 2 * n * (config.num_params - 2 * head - norms) + 3 * 2 * head
    assert products.seconds == pytest.approx(flop / 1e12)
    pairs = n * (n + 1) / 2
    assert attention.seconds == pytest.approx(4 * pairs * config.num_layers * config.num_q_heads * 128 / 1e12)
    assert (products.bound, attention.bound) == ("FLOP", "FLOP")


def test_tokens_choose_some_experts_of_which_a_batch_reads_more():
    config, card = preset("mixtral-8x7b"), dataclasses.replace(ENDLESS, memory_gb_per_s=1000.0)

    def read(batch):
        return planned(config, {"tensor": 1}, card, Load(batch=batch, context=1, prompt=1)).decode[0].seconds * 1e12

    experts = config.num_layers * 3 * 8 * config.hidden_size * config.intermediate_size * 2
    rest = 2 * (config.num_params - config.vocab_size * config.hidden_size) - experts
    assert read(1) == pytest.approx(rest + experts / 4)
    assert read(1000) == pytest.approx(rest + experts)


def test_bytes_over_links_within_a_host_and_between_hosts():
    """Each device sends 2 (n - 1) / n of an array in its host, and of the host's part to other hosts."""
    config, load = preset("llama-3-70b"), Load(batch=64, context=100, prompt=100)
    array, count = 64 * config.hidden_size * 2, 2 * config.num_layers + 1
    card = dataclasses.replace(ENDLESS, link_gb_per_s=1.0)
    latency = (count + 1) * COLLECTIVE_US * 1e-6
    sent = planned(config, {"tensor": 8}, card, load).decode[-1].seconds - latency
    assert sent == pytest.approx((count * 2 * 7 / 8 * array + 7 * 64 * 8) / 1e9)
    card = dataclasses.replace(ENDLESS, host_link_gb_per_s=1.0)
    latency = (count + 1) * (COLLECTIVE_US + HOST_COLLECTIVE_US) * 1e-6
    sent = planned(config, {"tensor": 16}, card, load, devices=8, hosts=2).decode[-1].seconds - latency
    assert sent == pytest.approx((count * 2 * 1 / 2 * array / 8 + 8 * 64 * 8) / 1e9)


def test_devices_share_the_tokens_of_a_prompt_and_exchange_keys_and_values():
    config, n = preset("llama-3-8b"), 32768
    load = Load(batch=1, context=n, prompt=n)
    card = dataclasses.replace(ENDLESS, tflops=1.0)
    alone, shared = (planned(config, sizes, card, load, devices=8) for sizes in ({"tensor": 1}, {"context": 8}))
    for one, other in zip(alone.first_token, shared.first_token, strict=False):
        assert one.seconds == pytest.approx(8 * other.seconds, rel=1e-2)  # the last token's logits are not shared
    assert alone.decode[0].seconds == shared.decode[0].seconds
    assert alone.num_bytes["KV pages"] == shared.num_bytes["KV pages"]
    card = dataclasses.replace(ENDLESS, link_gb_per_s=1.0)
    *_, links = planned(config, {"context": 8}, card, load, devices=8).first_token
    keys_and_values, last = n * config.num_layers * 2 * 8 * 128 * 2, 2 * 2 * config.hidden_size * 2
    steps = n / (8 * planning.STEP_TOKENS)
    waited = steps * (2 * config.num_layers + 1) * COLLECTIVE_US * 1e-6
    assert links.seconds - waited == pytest.approx(7 / 8 * (keys_and_values + last) / 1e9)


def test_experts_get_the_tokens_of_all_devices():
    config, load = preset("mixtral-8x7b"), Load(batch=1, context=16384, prompt=16384)
    card = dataclasses.replace(ENDLESS, tflops=1.0)
    alone, shared = (planned(config, sizes, card, load, devices=8) for sizes in ({"tensor": 1}, {"expert": 8}))
    for one, other in zip(alone.first_token, shared.first_token, strict=False):
        assert one.seconds == pytest.approx(8 * other.seconds, rel=1e-2)
    card = dataclasses.replace(ENDLESS, link_gb_per_s=1.0)
    *_, links = planned(config, {"expert": 8}, card, load, devices=8).first_token
    sent = 1.25 * 2048 * (1 - (7 / 8) ** 2) * 7 * 2 * 2 * config.hidden_size * config.num_layers  # there and back
    gathered = 7 / 8 * 16384 * config.num_layers * 2 * 8 * 128 * 2
    assert links.seconds == pytest.approx((sent + gathered) / 1e9, rel=1e-2)


@pytest.mark.parametrize(("new", "context", "window"), [(1, 9, None), (4, 9, None), (4, 9, 3), (4, 9, 7), (9, 9, 4)])
def test_visible_keys_are_counted(new, context, window):
    seen = [min(i + 1, window or context) for i in range(context - new, context)]
    assert planning._visible(new, context, window) == sum(seen)


@pytest.mark.parametrize("name", ["llama-3-70b", "gemma-3-27b", "mamba-codestral-7b"])
def test_the_most_that_fits_is_the_most_that_fits(name):
    load = Load(batch=16, context=8192, prompt=1)
    plan = planned(preset(name), {"tensor": 2}, load=load, devices=4) if name != "mamba-codestral-7b" else None
    plan = plan or planned(preset(name), {"tensor": 1}, load=load, devices=1)

    def fits(**changes):
        options = dict(devices=plan.engines * plan.mesh["tensor"])
        return planned(preset(name), plan.mesh, load=dataclasses.replace(load, **changes), **options).fits

    assert plan.fits and plan.most_sequences % plan.engines == 0
    assert fits(batch=plan.most_sequences) and not fits(batch=plan.most_sequences + 1)
    if plan.most_context is None:
        assert name == "mamba-codestral-7b" and fits(context=10**6)
    else:
        assert fits(context=plan.most_context) and not fits(context=plan.most_context + 1)


def test_engines_are_of_devices_of_one_host_or_of_whole_hosts():
    found = splits(preset("llama-3-8b"), MI300X, ONE_STEP, devices=6, hosts=2)
    assert [one.mesh["tensor"] for one in found] == [1, 2, 3, 6, 12]
    with pytest.raises(ValueError, match="12 devices in 2 hosts cannot be divided in engines of 4; sizes that do: 1, "):
        splits(preset("llama-3-8b"), MI300X, ONE_STEP, devices=6, hosts=2, mesh={"tensor": 4})


def test_thousands_of_devices():
    load = Load(batch=4096, context=8192, prompt=8192)
    found = splits(preset("qwen3-30b-a3b"), MI300X, load, devices=8, hosts=512, quantization="int8")
    assert len(found) > 50 and {one.engines * one.mesh["tensor"] * one.mesh.get("expert", 1) for one in found} == {4096}
    fastest = max((one for one in found if one.fits), key=lambda one: one.tokens_per_s)
    assert fastest.mesh["tensor"] * fastest.mesh.get("expert", 1) <= 8  # links between hosts are slower
    assert all(seconds(one.decode) > 0 for one in found)


def test_groups_of_quantized_weights_are_not_cut():
    with pytest.raises(ValueError, match="cannot be divided by 64 devices without cutting a group"):
        planned(preset("llama-3-70b"), {"tensor": 64}, quantization="int4", devices=8, hosts=8)

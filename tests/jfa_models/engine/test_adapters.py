"""Adapters in the engine: a request's tokens are those of its adapter, whatever is loaded, unloaded and runs beside."""

import dataclasses
import functools
import json
import random

import jax
import numpy as np
import pytest
from engines import assert_clean
from flax import nnx
from random_adapters import random_adapter
from runs import run as run_of
from tiny_model import byte_tokenizer, counted_compilations, sharp_decoder, tiny_config

from jfa_models import BeamSearchParams, Engine, LanguageModel, SamplingParams, batch

CONFIG = tiny_config(num_layers=1, context_length=128)
GREEDY = SamplingParams(temperature=0, max_tokens=10)
TIE = 1e-3
SMALL = dict(max_num_seqs=4, page_size=4, num_pages=33, max_num_batched_tokens=32)
ROOM = dict(max_adapters=8, max_rank=4)
TARGETS = ["all-linear", ["q_proj", "v_proj"], ["down_proj"], r".*\.mlp\..*", ["o_proj", "up_proj"]]


def new_model(**options):
    decoder = sharp_decoder(CONFIG)
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    return LanguageModel(decoder=decoder, params=params, tokenizer=byte_tokenizer(), **options)


@functools.cache
def language_model():
    """A model without adapters, but with room for eight."""
    return new_model(**ROOM)


@functools.cache
def adapter(number):
    """One of eight; the last is DoRA."""
    options = dict(targets=TARGETS[number % len(TARGETS)], use_rslora=number == 3, use_dora=number == 7)
    return random_adapter(language_model(), number, rank=1 + number % 4, strength=0.5, **options)


@pytest.fixture
def model():
    """The model with the adapters "a" and "b"."""
    model = language_model()
    model.load_adapter("a", adapter(0))
    model.load_adapter("b", adapter(1))
    yield model
    for name in model.adapters.names:
        model.unload_adapter(name)
    assert not any(model.adapters._slots)


@pytest.fixture
def engine(model):
    engine = Engine(model, **SMALL)
    yield engine
    assert_clean(engine)


def run(engine, *requests):
    """The results of (prompt, params, adapter), in their order."""
    ids = [engine.add_request(prompt, params, adapter=name) for prompt, params, name in requests]
    results = {result.request_id: result for result in engine.run()}
    return [results[i] for i in ids]


def assert_same(got, want):
    """The same tokens and texts, up to a tie that rounding may decide; want has the log-probabilities."""
    for one, other in zip(got, want, strict=True):
        ours, theirs = one.outputs[0].token_ids, other.outputs[0].token_ids
        if ours == theirs:
            assert one.outputs[0].text == other.outputs[0].text
            assert one.outputs[0].finish_reason == other.outputs[0].finish_reason
            continue
        same = next(i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y)
        likely = other.outputs[0].logprobs[same]
        assert ours[same] in likely, (one.request_id, same, ours, theirs)
        assert likely[theirs[same]].logprob - likely[ours[same]].logprob < TIE, (one.request_id, same, ours, theirs)


def alone(model, prompts, params, names):
    """The results of `generate`, with log-probabilities; in batches of at least four, so that few shapes compile."""
    rest = max(0, 4 - len(prompts))
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    params = [dataclasses.replace(one, logprobs=20) for one in (*params, *[GREEDY] * rest)]
    results = model.generate([*prompts, *["x"] * rest], params, adapter=[*names, *[None] * rest], max_batch=64)
    return results[: len(prompts)]


def logprobs_of(model, rows, name, length=32):
    """Of the tokens after each token of each row, by full forward passes of one shape."""
    tokens = np.zeros((4, length), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    logits = np.asarray(model.logits(tokens, adapter=name), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("seed", "count"), [run_of(0, 40, quick=True), run_of(1, 300, quick=False, soak=True)])
def test_random_arrivals_aborts_loads_and_unloads(seed, count):
    """Over pages for four requests, with shared prefixes; adapters change their names, and names their adapters."""
    rng, model = random.Random(seed), language_model()
    for number in range(8):
        model.load_adapter(str(number), adapter(number))
    stems = [[rng.randrange(3, 250) for _ in range(12)] for _ in range(3)]
    prompts = [[*rng.choice(stems)[: rng.randint(1, 12)], *rng.choices(range(3, 250), k=5)] for _ in range(count)]
    params = [dataclasses.replace(GREEDY, max_tokens=rng.randint(1, 16), ignore_eos=True) for _ in prompts]
    numbers = [rng.choice([None, *range(8)]) for _ in prompts]  # of adapters
    want = alone(model, prompts, params, [None if number is None else str(number) for number in numbers])
    for number in range(8):
        model.unload_adapter(str(number))
    engine = Engine(model, **SMALL | dict(num_pages=14), max_model_len=40)
    engine.warm_up()
    loaded, left, got, aborted = {}, list(range(count)), {}, set()  # loaded: from the adapter's number to its name
    most_unloaded = 0
    with counted_compilations() as compilations:
        while left or engine.has_unfinished:
            for _ in range(min(len(left), rng.choice([0, 0, 1, 3]))):
                number = numbers[left[-1]]
                if number is not None and number not in loaded:
                    name = rng.choice([x for x in "abcdefgh" if x not in loaded.values()])
                    try:
                        model.load_adapter(name, adapter(number))
                    except ValueError as full:
                        assert "all 8 slots are in use" in str(full)
                        break
                    loaded[number] = name
                i = left.pop()
                engine.add_request(
                    prompts[i],
                    params[i],
                    request_id=str(i),
                    priority=rng.choice([0, 0, 0, 1]),
                    adapter=None if number is None else loaded[number],
                )
                if rng.random() < 0.05:
                    aborted.add(str(i))
            if loaded and rng.random() < 0.3:
                model.unload_adapter(loaded.pop(rng.choice(sorted(loaded))))
            if aborted and rng.random() < 0.2:
                engine.abort(rng.choice(sorted(aborted)))
            got |= {result.request_id: result for result in engine.step()}
            engine._scheduler.pools.pools[0].allocator.check()
            held = [one for one in model.adapters._slots if one is not None]
            assert sum(one.users for one in held) == sum(
                request.adapter is not None for request in engine._results.requests.values()
            )
            most_unloaded = max(most_unloaded, sum(one.is_unloaded for one in held))
    assert not compilations and most_unloaded > 0
    ended = [i for i in range(count) if got[str(i)].outputs[0].finish_reason != "abort"]
    assert len(got) == count and len(ended) >= 0.9 * count
    assert_same([got[str(i)] for i in ended], [want[i] for i in ended])
    assert engine.metrics().preemptions > 0 and engine.metrics().prefix_hits > 0
    assert_clean(engine)
    for name in model.adapters.names:
        model.unload_adapter(name)
    assert not any(model.adapters._slots)


@pytest.mark.exhaustive
@pytest.mark.soak
def test_an_engine_without_reserved_room():
    """Loading makes larger arrays while requests run, which then compile anew."""
    model = new_model()
    engine = Engine(model, **SMALL)
    names = []
    for number in range(3):
        model.load_adapter(str(number), adapter(number))
        names += [str(number), None]
        for name in names[-2:]:
            engine.add_request("Hi", GREEDY, request_id=f"{number}, {name}", adapter=name)
        engine.step()
    got = {result.request_id: result for result in engine.run()}
    want = alone(model, ["Hi"] * len(names), GREEDY, names)
    assert_same([got[f"{i // 2}, {name}"] for i, name in enumerate(names)], want)
    for number in range(3):
        model.unload_adapter(str(number))
    assert model.adapters.on_device is None
    assert_same(run(engine, ("Hi", GREEDY, None)), want[1:2])


def test_pages_of_one_adapter_serve_no_other(model, engine):
    prompt = list(range(30, 54))
    names = ["a", "b", None]
    pools = engine._scheduler.pools

    def hits(name):
        before = pools.hit_tokens
        assert_same(run(engine, (prompt, GREEDY, name)), alone(model, [prompt], GREEDY, [name]))
        return pools.hit_tokens - before

    assert [hits(name) for name in names] == [0, 0, 0]
    assert [hits(name) for name in names] == [20, 20, 20]
    model.unload_adapter("a")
    model.load_adapter("a", adapter(2))
    assert [hits(name) for name in names] == [0, 20, 20]
    model.unload_adapter("a")
    model.load_adapter("a", adapter(0))  # the first weights, in the same slot
    assert [hits(name) for name in ("a", "a")] == [0, 20]


def test_a_request_keeps_the_adapter_that_is_unloaded_while_it_runs(model, engine):
    [old, other] = alone(model, ["Hi"] * 2, GREEDY, ["a", "b"])
    first = engine.add_request("Hi", GREEDY, adapter="a")
    engine.step()
    waiting = engine.add_request("Hi", GREEDY, adapter="a", priority=1)
    model.unload_adapter("a")
    with pytest.raises(ValueError, match="there is no adapter 'a'; loaded: 'b'"):
        engine.add_request("Hi", GREEDY, adapter="a")
    model.load_adapter("a", adapter(2))
    second = engine.add_request("Hi", GREEDY, adapter="a")
    third = engine.add_request("Hi", GREEDY, adapter="b")
    assert sum(one is not None for one in model.adapters._slots) == 3
    got = {result.request_id: result for result in engine.run()}
    assert_same([got[first], got[waiting], got[third]], [old, old, other])
    assert_same([got[second]], alone(model, ["Hi"], GREEDY, ["a"]))
    assert sum(one is not None for one in model.adapters._slots) == 2


def test_a_request_without_a_place_holds_no_adapter(model, engine):
    engine.add_request("Hi", GREEDY, request_id="mine", adapter="a")
    refused = {
        "in use": dict(prompt="Hi", request_id="mine"),
        "is empty": dict(prompt=[]),
        "together more than": dict(prompt="x" * 200),
    }
    for message, request in refused.items():
        with pytest.raises(ValueError, match=message):
            engine.add_request(**request, params=GREEDY, adapter="b")
    for name in ("c", "", 5):
        with pytest.raises(ValueError, match=f"there is no adapter {name!r}; loaded: 'a', 'b'"):
            engine.add_request("Hi", GREEDY, adapter=name)
        with pytest.raises(ValueError, match=f"there is no adapter {name!r}; loaded: 'a', 'b'"):
            engine.stream("Hi", GREEDY, adapter=name)
    assert [one.users for one in model.adapters._slots[:2]] == [1, 0]


ENDS = {
    "abort": lambda engine, i: engine.abort(i),
    "finish": lambda engine, i: None,
    "reset": lambda engine, i: engine.reset(),
    "error": lambda engine, i: engine._results.requests[i].completions[0].__dict__.update(take=lambda token: 1 / 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_however_a_request_ends_it_releases_its_adapter(model, engine, end):
    engine.add_request("x", GREEDY, adapter="b")
    i = engine.add_request("Hi", GREEDY, adapter="a")
    engine.step()
    waiting = engine.add_request("Hi", GREEDY, adapter="a", request_id="waits")
    model.unload_adapter("a")
    assert [one.users for one in model.adapters._slots[:2]] == [2, 1]
    ENDS[end](engine, i)
    if end != "reset":
        engine.abort(waiting)
        list(engine.run())
    assert model.adapters._slots[0] is None and model.adapters._slots[1].users == 0
    assert_same(run(engine, ("Hi", GREEDY, "b")), alone(model, ["Hi"], GREEDY, ["b"]))


def test_a_callback_that_raises_releases_the_adapter(model, engine):
    def angry(result):
        raise ZeroDivisionError("no more")

    engine.add_request("Hi", GREEDY, on_output=angry, adapter="a")
    [result] = engine.run()
    assert result.error == "on_output raised ZeroDivisionError('no more')"
    assert not any(one.users for one in model.adapters._slots if one is not None)


def test_streams_with_adapters(model, engine):
    streams = [engine.stream("Hi", GREEDY, adapter=name) for name in ("a", None, "b")]
    last = [list(stream)[-1] for stream in streams]
    assert_same(last, alone(model, ["Hi"] * 3, GREEDY, ["a", None, "b"]))
    closed = engine.stream("Hi", GREEDY, adapter="a")
    next(closed)
    closed.close()
    list(engine.run())
    assert not any(one.users for one in model.adapters._slots if one is not None)


def test_samples_have_the_probabilities_of_their_adapter(model, engine):
    params = SamplingParams(temperature=1.0, n=3, seed=3, max_tokens=8, logprobs=0, ignore_eos=True)
    names = ["a", None, "b"]
    results = run(engine, *(("many ways", params, name) for name in names))
    prompt = model.prompt_ids("many ways")
    for result, name in zip(results, names, strict=True):
        rows = [[*prompt, *output.token_ids] for output in result.outputs]
        want = logprobs_of(model, rows, name)
        for row, output in enumerate(result.outputs):
            for i, (token, entries) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
                assert entries[token].logprob == pytest.approx(want[row, len(prompt) + i - 1, token], abs=2e-3)
    singles = alone(model, ["many ways"] * 3, dataclasses.replace(params, n=1), names)
    assert_same(results, singles)


def brute_force(model, prompt, params, name):
    """The rules of beam search with the logits of whole sequences, without an end token."""
    live = [((), 0.0)]
    for length in range(params.max_tokens):
        logprobs = logprobs_of(model, [[*prompt, *tokens] for tokens, _ in live], name)[:, len(prompt) + length - 1]
        candidates = [
            (total + logprobs[row, token], (*tokens, token))
            for row, (tokens, total) in enumerate(live)
            for token in np.argsort(-logprobs[row])[: params.beam_width].tolist()
        ]
        live = [(tokens, total) for total, tokens in sorted(candidates, reverse=True)[: params.beam_width]]
    return live


def test_beams_are_those_of_a_search_without_a_cache(model, engine):
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    names = ["a", None, "b"]
    results = run(engine, *(("where to go", params, name) for name in names))
    for result, name in zip(results, names, strict=True):
        want = brute_force(model, model.prompt_ids("where to go"), params, name)
        assert [output.token_ids for output in result.outputs] == [tokens for tokens, _ in want]
        for output, (_, total) in zip(result.outputs, want, strict=True):
            assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_prompt_logprobs_are_those_of_the_adapter(model, engine):
    prompt = model.prompt_ids("a prompt of some tokens")
    names = ["a", None, "b"]
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    for result, name in zip(run(engine, *((prompt, params, name) for name in names)), names, strict=True):
        want = logprobs_of(model, [prompt], name)[0]
        for place, entries in enumerate(result.prompt_logprobs[1:], start=1):
            assert entries[prompt[place]].logprob == pytest.approx(want[place - 1, prompt[place]], abs=2e-3)


# Batch files


def written(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return batch.read(path)


def by_line(found):
    return {one["line"]: one for one in found}


def test_each_line_of_a_batch_names_its_adapter(model, engine, tmp_path):
    lines = written(
        tmp_path / "in",
        {"prompt": "Hi"},
        {"prompt": "Hi", "adapter": "b"},
        {"prompt": "Hi", "adapter": None},
        {"prompt": "Hi", "adapter": "c", "id": "unknown"},
        {"prompt": "Hi", "adapter": 5},
        {"prompt": "Hi", "adapter": ["a"]},
    )
    output = tmp_path / "out"
    for default in ("a", None):
        found = by_line(batch.run(engine, lines, output, GREEDY, default))
        want = alone(model, ["Hi"] * 3, GREEDY, [default, "b", None])
        assert [found[i]["text"] for i in (1, 2, 3)] == [one.outputs[0].text for one in want]
        assert "adapter" not in found[1] and found[2]["adapter"] == "b" and found[3]["adapter"] is None
        assert found[4] == {
            "line": 4,
            "id": "unknown",
            "adapter": "c",
            "prompt": "Hi",
            "error": "there is no adapter 'c'; loaded: 'a', 'b' (load_adapter loads one)",
        }
        assert found[5]["error"].startswith("there is no adapter 5; loaded: 'a', 'b'")
        assert found[6]["error"].startswith("there is no adapter ['a']; loaded: 'a', 'b'")
    assert by_line(map(json.loads, output.read_text().splitlines())) == found


def test_a_batch_with_adapters_is_resumed(model, engine, tmp_path):
    lines = written(tmp_path / "in", *({"prompt": "Hi", "adapter": name} for name in ("a", "b", "c", None)))
    output = tmp_path / "out"
    list(batch.run(engine, lines[:3], output, GREEDY, "a"))
    assert batch.done(output, lines) == {1, 2, 3}
    [last] = batch.run(engine, lines[3:], output, GREEDY, "a")
    assert batch.done(output, lines) == {1, 2, 3, 4}
    assert last["text"] == alone(model, ["Hi"], GREEDY, [None])[0].outputs[0].text


def test_results_of_other_adapters_are_not_continued(model, engine, tmp_path):
    output = tmp_path / "out"
    list(batch.run(engine, written(tmp_path / "in", {"prompt": "Hi", "adapter": "a"}), output, GREEDY))
    for line in ({"prompt": "Hi", "adapter": "b"}, {"prompt": "Hi"}):
        with pytest.raises(
            ValueError, match="has the results of another batch: the adapter of line 1 differs; use ano"
        ):
            batch.done(output, written(tmp_path / "in", line))

"""Guided decoding in the engine: every text that ends has its form, beside requests without one."""

import dataclasses
import functools
import itertools
import json
import random
import re

import jax
import jsonschema
import numpy as np
import pytest
from engines import assert_clean
from flax import nnx
from runs import run as run_of
from tiny_model import PRINTABLE, byte_tokenizer, counted_compilations, sharp_decoder, tiny_config

from jfa_models import BeamSearchParams, Engine, LanguageModel, SamplingParams, StructuredOutputsParams, from_pretrained
from jfa_models.text import guided

CONFIG = tiny_config(num_layers=2, context_length=256)
SMALL = dict(max_num_seqs=4, page_size=4, num_pages=129, max_num_batched_tokens=32)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["short", "long"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
FORMS = {
    "json": StructuredOutputsParams(json=SCHEMA),
    "compact": StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    "regex": StructuredOutputsParams(regex="[a-f]{3}-[0-9]{2,4}"),
    "choice": StructuredOutputsParams(choice=["yes", "no", "perhaps", "größer", "🙂"]),
    "grammar": StructuredOutputsParams(grammar='start: ("ab" | "cd")+ "."'),
}
FREE = SamplingParams(temperature=0, max_tokens=20)
SAMPLINGS = [
    dict(temperature=0.0),
    dict(temperature=1.0, seed=3, logprobs=2),
    dict(temperature=0.9, seed=4, top_k=20, top_p=0.9, presence_penalty=0.5),
    dict(temperature=0.0, repetition_penalty=1.2, logit_bias={100: 3.0}, logprobs=20),
    dict(temperature=1.0, seed=5, min_tokens=60, stop_token_ids=[PRINTABLE[ord("Q") - 33]]),
]


@functools.cache
def language_model():
    decoder = sharp_decoder(CONFIG)
    params = tuple(jax.tree.leaves(nnx.split(decoder)[1]))
    return LanguageModel(decoder=decoder, params=params, tokenizer=byte_tokenizer())


def asked(form, **sampling):
    return SamplingParams(max_tokens=60, structured_outputs=FORMS[form], **sampling)


def fits(form, text):
    kind = FORMS[form].kind
    if kind == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
        return form == "json" or not re.search(r"\s", text)
    pattern = {"regex": FORMS["regex"].regex, "grammar": r"(ab|cd)+\."}.get(form)
    return text in FORMS[form].choice if pattern is None else bool(re.fullmatch(pattern, text))


def assert_fits(form, result):
    for one in result.outputs:
        assert one.finish_reason in ("stop", "length"), result.error
        assert one.finish_reason == "length" or fits(form, one.text), one.text


def run(engine, *requests):
    """The results of (prompt, params), in their order."""
    ids = [engine.add_request(prompt, params, number=i) for i, (prompt, params) in enumerate(requests)]
    results = {result.request_id: result for result in engine.run()}
    return [results[i] for i in ids]


def mixed():
    """Requests of every form and sampling, and free ones between them."""
    requests = []
    for i, (form, sampling) in enumerate(itertools.product(FORMS, SAMPLINGS)):
        requests.append((form, f"{form} {i}: ", asked(form, **sampling)))
        if i % 4 == 0:
            requests.append((None, f"free {i} {'xy' * i}", FREE))
    return requests


@pytest.mark.parametrize(
    "method",
    [
        run_of(None, quick=True),
        *(run_of(method, quick=False, soak=True) for method in ("ngram", "self", "lookahead", "staged")),
    ],
)
def test_every_form_and_option(method):
    """The engine, with and without speculation, generate, and stream give the same tokens."""
    model, requests = language_model(), mixed()
    options = {"num_layers": 1} if method in ("self", "staged") else {}
    config = None if method is None else {"method": method} | options
    engine = Engine(model, speculative_config=config and config | {"adaptive": False}, **SMALL)
    results = run(engine, *((prompt, params) for _, prompt, params in requests))
    for (form, _, _), result in zip(requests, results, strict=True):
        assert form is None or assert_fits(form, result) is None
    counts = engine.metrics().speculation["grammar"]
    assert 0 < counts.accepted == counts.proposed
    assert_clean(engine)
    prompts, params = [one[1] for one in requests], [one[2] for one in requests]
    same = [[one.outputs[0].token_ids for one in found] for found in (results, model.generate(prompts, params))]
    assert same[0] == same[1]
    if method is None:
        for place in (0, 1, 8, 14):
            *_, last = model.stream(prompts[place], params[place])
            for name in ("token_ids", "text", "finish_reason", "stop_reason"):
                assert getattr(last.outputs[0], name) == getattr(results[place].outputs[0], name)


def test_samples_of_one_prompt_have_their_own_places():
    engine = Engine(language_model(), **SMALL)
    [result] = run(engine, ("several: ", dataclasses.replace(asked("json", temperature=1.0, seed=1), n=6)))
    assert_fits("json", result)
    assert len({one.text for one in result.outputs}) > 1


@pytest.mark.parametrize(("seed", "count"), [run_of(0, 20, quick=True), run_of(1, 150, quick=False, soak=True)])
def test_random_requests(seed, count):
    """Arrivals, aborts and preemption in a small pool; each has the tokens that generate gives it alone."""
    rng, model = random.Random(seed), language_model()
    engine = Engine(model, speculative_config={"method": "ngram"}, **SMALL | dict(num_pages=66))
    alone, results, aborted = {}, {}, set()
    for number in range(count):
        form = rng.choice([*FORMS, None])
        params = FREE if form is None else asked(form, **rng.choice(SAMPLINGS))
        params = dataclasses.replace(params, seed=number)
        prompt = "".join(rng.choices("abc", k=rng.randrange(1, 40)))
        name = engine.add_request(prompt, params)
        alone[name] = form, prompt, params
        for _ in range(rng.randrange(8)):
            results |= {one.request_id: one for one in engine.step()}
        if rng.random() < 0.1:
            aborted.add(name := rng.choice(list(alone)))
            engine.abort(name)
    results |= {one.request_id: one for one in engine.run()}
    assert_clean(engine)
    wanted = model.generate([one[1] for one in alone.values()], [one[2] for one in alone.values()])
    for (name, (form, _, _)), want in zip(alone.items(), wanted, strict=True):
        assert results[name].error is None
        if results[name].outputs[0].finish_reason == "abort":
            assert name in aborted
            continue
        assert results[name].outputs[0].token_ids == want.outputs[0].token_ids
        assert form is None or assert_fits(form, results[name]) is None


def test_nothing_compiles_after_warm_up():
    engine = Engine(language_model(), **SMALL | dict(max_num_seqs=2))
    requests = [("a: ", asked("json", temperature=0.0)), ("b: ", asked("compact", temperature=0.0)), ("c", FREE)]
    engine.warm_up([one for _, one in requests])
    with counted_compilations() as count:
        run(engine, *requests, *requests)
    assert not count


def test_the_form_ends_a_text_before_min_tokens_and_without_an_end_token():
    [result] = run(Engine(language_model(), **SMALL), ("x", asked("choice", min_tokens=50, temperature=0.0)))
    [one] = result.outputs
    assert one.finish_reason == "stop" and one.stop_reason is None and one.text in FORMS["choice"].choice
    assert one.token_ids == tuple(language_model().tokenizer.encode(one.text, add_special_tokens=False))


@pytest.mark.parametrize("name", ["_fill", "accept", "allowed_after", "forced"])
def test_a_form_that_cannot_be_followed_ends_its_request_alone(monkeypatch, name):
    model = language_model()
    engine = Engine(model, speculative_config={"method": "ngram", "adaptive": False}, **SMALL)
    want = run(engine, ("abab abab", FREE))[0].outputs[0].token_ids
    right, calls = getattr(guided.Guide, name), itertools.count()

    def fail(self, *arguments):
        if self.grammar.params == FORMS["json"] and next(calls) >= 3:
            raise guided.GrammarError("it gave up")
        return right(self, *arguments)

    bad, good = asked("json", temperature=0.0), asked("compact", temperature=0.0)
    model.generate("x", bad)  # compiled before anything fails
    monkeypatch.setattr(guided.Guide, name, fail)
    failed, fine, free = run(engine, ("x", bad), ("y", good), ("abab abab", FREE))
    assert_clean(engine)
    assert_fits("compact", fine)
    assert free.outputs[0].token_ids == want
    if name == "forced":  # nothing is lost but drafts
        assert_fits("json", failed)
        return
    assert failed.outputs[0].finish_reason == "error" and failed.error == "it gave up"
    if name != "allowed_after":
        for result in (model.generate(["x", "y"], [bad, good])[0], list(model.stream("x", bad))[-1]):
            assert result.outputs[0].finish_reason == "error" and result.error == "it gave up"


def test_not_finite_logits_are_an_error():
    model = language_model()
    params = tuple(np.full_like(x, np.nan) if x.ndim == 2 else x for x in model.params)
    broken = LanguageModel(decoder=model.decoder, params=params, tokenizer=model.tokenizer)
    [result] = run(Engine(broken, **SMALL), ("x", asked("json", temperature=0.0)))
    assert result.outputs[0].finish_reason == "error" and "not finite" in result.error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "so ignore_eos must be False"),
        (
            {"structured_outputs": {"pattern": "a"}},
            "structured_outputs has no field pattern; its fields are json, regex",
        ),
        ({"structured_outputs": "a"}, "structured_outputs must be StructuredOutputsParams(...) or its fields, got 'a'"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "takes exactly one of json, regex, choice"),
        ({"guided_decoding": {}}, "SamplingParams has no guided_decoding: use structured_outputs"),
    ],
)
def test_faulty_params(fields, message):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**fields)
    assert message in str(caught.value)


def test_faulty_requests_start_nothing():
    model = language_model()
    engine = Engine(model, **SMALL)
    for form in ({"regex": "("}, {"grammar": "start: missing"}, {"json": {"type": "array", "uniqueItems": True}}):
        with pytest.raises(ValueError, match="cannot be enforced"):
            engine.add_request("x", SamplingParams(structured_outputs=form))
    assert not engine.has_unfinished
    without = LanguageModel(decoder=model.decoder, params=model.params)
    with pytest.raises(ValueError, match="this model has no tokenizer, so structured_outputs cannot be enforced"):
        Engine(without, **SMALL).add_request([5, 6], asked("regex"))
    with pytest.raises(ValueError, match="start cannot follow structured_outputs"):
        model.start("x", asked("regex"))
    with pytest.raises(ValueError, match="BeamSearchParams has no structured_outputs: beams are not masked; use Samp"):
        BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs=FORMS["json"])


def schema(rng, depth):
    """A random schema of our own."""
    kinds = ["string", "integer", "number", "boolean", "enum", "pattern", "date"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * depth)
    if kind == "object":
        names = rng.sample(["id", "name", "kind", "tags", "size", "when", "ok"], rng.randrange(1, 4))
        fields = {name: schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.8]
        return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": schema(rng, depth - 1), "minItems": 1, "maxItems": rng.randrange(1, 4)}
    if kind == "anyOf":
        return {"anyOf": [schema(rng, depth - 1), {"type": "null"}]}
    return {
        "string": {"type": "string", "maxLength": 12},
        "integer": {"type": "integer", "minimum": -5, "maximum": rng.choice([9, 99])},
        "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
        "boolean": {"type": "boolean"},
        "enum": {"enum": ["red", 7, None, "a longer one"]},
        "pattern": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,3}$"},
        "date": {"type": "string", "format": "date"},
    }[kind]


@pytest.mark.exhaustive
@pytest.mark.soak
def test_a_real_model_answers_schemas():
    """SmolLM2, greedy and sampled: every answer that ended is valid. Its steps take longer to compile than to run."""
    rng, count = random.Random(0), 60
    schemas = [{"$schema": "https://json-schema.org/draft/2020-12/schema", **schema(rng, 2)} for _ in range(count)]
    engine = Engine(from_pretrained("smollm2"), max_num_seqs=8, num_pages=400)
    requests = [
        (
            "A JSON document: ",
            SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=48, structured_outputs={"json": one}),
        )
        for i, one in enumerate(schemas)
    ]
    ended = 0
    for one, result in zip(schemas, run(engine, *requests), strict=True):
        [output] = result.outputs
        if output.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(output.text), one, format_checker=jsonschema.FormatChecker())
        else:
            assert output.finish_reason == "length"
    assert ended > 0.8 * count

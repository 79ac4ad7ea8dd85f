"""`jfa-bench accuracy`: how quantized pages or weights change a model's perplexity on a text, and its completions.

The text is processed through the cache in chunks, so that every token attends to keys and values, its own too, as
stored in the pages. Greedy tokens are compared with those of float pages, prompt by prompt.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jfa
from jfa_models.decoding.caches import PREFILL_CHUNK
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.params import SamplingParams

from . import machine

PROMPTS = ("The capital of France is", "Once upon a time, there was a little", "def fibonacci(n):\n")


def measure(models: dict[str, LanguageModel], text: str, *, tokens: int, new_tokens: int) -> Iterator[dict]:
    """A record for each kind of page; the first model is the baseline for the others.

    greedy_same: for each of PROMPTS, the number of tokens, of new_tokens, before the first one that differs.
    """
    shared = machine.circumstances() | {"benchmark": "accuracy"}
    greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    first: dict = {}
    for name, model in models.items():
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer, which a text needs; use a model that has one")
        ids = model.tokenizer.encode(text)[: tokens + 1]
        written = [result.outputs[0].token_ids for result in model.generate(PROMPTS, greedy)]
        cache = model.new_cache(batch=1, capacity=1)
        assert isinstance(cache, jfa.PagedKVCache)
        own = {
            "perplexity": perplexity(model, ids),
            "bytes_per_token": cache.num_bytes // (cache.num_pages[0] * cache.page_size),
            "greedy": [list(one) for one in written],
        }
        first = first or own
        same = [_same(one, other) for one, other in zip(own["greedy"], first["greedy"], strict=True)]
        yield (
            shared
            | own
            | {
                "case": {"tokens": len(ids) - 1, "new_tokens": new_tokens, "prompts": list(PROMPTS)},
                **{"implementation": name, "status": "ok", "reason": None},
                "perplexity_ratio": own["perplexity"] / first["perplexity"],
                "bytes_ratio": own["bytes_per_token"] / first["bytes_per_token"],
                "greedy_same": " ".join(f"{count}/{new_tokens}" for count in same),
            }
        )


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))


def perplexity(model: LanguageModel, ids: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first, each given those before it in the cache."""
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least two tokens, got {len(ids)}")
    cache = model.new_cache(batch=1, capacity=len(ids))
    surprise = 0.0
    for start in range(0, len(ids) - 1, PREFILL_CHUNK):
        chunk = ids[start : min(start + PREFILL_CHUNK, len(ids) - 1)]
        tokens = np.zeros((1, PREFILL_CHUNK), np.int32)
        tokens[0, : len(chunk)] = chunk
        cache, logits = model.steps.score(model.params, cache, tokens, np.array([len(chunk)], np.int32))
        log_probs = jax.nn.log_softmax(logits[0, : len(chunk)])
        following = np.asarray(ids[start + 1 : start + 1 + len(chunk)])
        surprise -= float(jnp.take_along_axis(log_probs, following[:, None], axis=1).sum())
    return math.exp(surprise / (len(ids) - 1))

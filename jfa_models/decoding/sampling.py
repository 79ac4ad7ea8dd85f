"""From logits to tokens: the sampling parameters of a batch as device arrays, and sampling itself.

Nothing is sorted. Non-negative floats have the same order as their bit patterns, so the cut-offs of top-k and top-p are
found by bisecting the bits of a token's distance below the best logit: at most 31 masked sums over the vocabulary.

Probabilities are summed as integers. A float sum depends on the compiler's order of additions, which depends on the
batch; an integer sum does not. So a row samples the same token in any batch, and the token that the inverse CDF finds
never has weight 0.

Meanings and order are vLLM's; the penalties are those of CTRL (arXiv:1909.05858, section 4.1: repetition) and of the
OpenAI API (presence, frequency); top-p is arXiv:1904.09751, min-p arXiv:2407.01082.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from jfa_models.decoding.params import MAX_INT32, MAX_LOGPROBS, SamplingParams, bias_pairs, check_token_ids

MAX_LOGIT = float(np.finfo(np.float32).max)  # finite on purpose: inf - inf is NaN in a distance
MAX_FINITE_BITS = 0x7F7FFFFF  # the bits of the largest finite float32: a cut-off that keeps all but -inf logits
NO_TOKEN = -1  # "sampled" in a row whose logits are not finite
DRAW_BLOCK = 128  # tokens whose weights are summed before the cumulative sum, which is 5 to 10 times less work
COUNT_ROWS = 64  # partial counts fit int8, whose sums are 2 to 4 times as fast as int32 on a CPU


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """The SamplingParams of a batch as arrays, one row per request, made by `sampling_rows`.

    `output_counts` (how often a row has emitted each token) is the only state; `update` returns the next one. A feature
    that no row of the batch uses is None or disabled by a static field, and costs nothing. This changes only the cost,
    never the result of a row.
    """

    temperature: Float32[Array, " b"]  # 0 for greedy rows
    top_k: Int32[Array, " b"]  # 0 keeps all
    top_p: Float32[Array, " b"]
    min_p: Float32[Array, " b"]
    presence_penalty: Float32[Array, " b"]
    frequency_penalty: Float32[Array, " b"]
    repetition_penalty: Float32[Array, " b"]
    key: UInt32[Array, "b 2"]  # threefry key data
    stop_ids: Int32[Array, "b n_stop"]  # end tokens (unless ignored) and stop tokens, then -1
    max_tokens: Int32[Array, " b"]  # the largest int32 where there is no limit
    min_tokens: Int32[Array, " b"] | None
    logit_bias: Float32[Array, "b vocab"] | None
    prompt_seen: Bool[Array, "b vocab"] | None  # for the repetition penalty
    output_counts: Int32[Array, "b vocab"] | None  # for all three penalties
    allowed: Int32[Array, "b words"] | None = None  # one bit per token, the lowest first: what a grammar allows
    greedy: bool = dataclasses.field(metadata=dict(static=True))  # every row is greedy
    truncates: bool = dataclasses.field(metadata=dict(static=True))  # some row has top_k, top_p or min_p
    num_logprobs: int | None = dataclasses.field(metadata=dict(static=True))  # None, 0 or MAX_LOGPROBS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """One token per row. The natural-log probabilities are those of the raw logits, and None unless requested.

    `rank` is 1 for the likeliest token. The `k` alternatives are sorted, likeliest first; `k` is MAX_LOGPROBS (or the
    vocabulary size) if any row requests some, so that few shapes are compiled: cut each row to its own `logprobs`.
    """

    token: Int32[Array, " b"]
    logprob: Float32[Array, " b"] | None = None
    rank: Int32[Array, " b"] | None = None
    top_ids: Int32[Array, "b k"] | None = None
    top_logprobs: Float32[Array, "b k"] | None = None


def sampling_rows(
    params: Sequence[SamplingParams],
    *,
    vocab_size: int,
    prompt_ids: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int],
    default_seed: int = 0,
    request_ids: Sequence[int] | None = None,
) -> SamplingRows:
    """The device arrays of a batch; row i belongs to params[i] and prompt_ids[i].

    A request without a seed gets one from (default_seed, its number in `request_ids`, by default its row).

    Raises:
      ValueError: the sequences differ in length, or a token id is outside the vocabulary.
    """
    request_ids = range(len(params)) if request_ids is None else request_ids
    if not len(params) == len(prompt_ids) == len(request_ids):
        raise ValueError(
            "params, prompt_ids and request_ids must have one entry per request, "
            f"got {len(params)}, {len(prompt_ids)} and {len(request_ids)}; give each prompt its own SamplingParams"
        )
    for one in params:
        check_token_ids(one, vocab_size=vocab_size)
    seeds = [seed_sequence(one, default_seed, i) for one, i in zip(params, request_ids, strict=True)]
    columns = _columns(params, seeds, eos_token_ids, vocab_size)
    has_repetition = any(one.repetition_penalty != 1 for one in params)
    has_penalty = has_repetition or any(one.presence_penalty or one.frequency_penalty for one in params)
    num_logprobs = max((one.logprobs for one in params if one.logprobs is not None), default=None)
    return SamplingRows(
        **jax.tree.map(jnp.asarray, columns),
        min_tokens=_min_tokens(params) if any(p.min_tokens for p in params) else None,
        logit_bias=jnp.asarray(dense_bias(params, vocab_size)) if any(p.logit_bias for p in params) else None,
        prompt_seen=jnp.asarray(seen(prompt_ids, vocab_size)) if has_repetition else None,
        output_counts=jnp.zeros((len(params), vocab_size), jnp.int32) if has_penalty else None,
        greedy=all(one.is_greedy for one in params),
        truncates=bool(columns["top_k"].any() or (columns["top_p"] < 1).any() or (columns["min_p"] > 0).any()),
        num_logprobs=MAX_LOGPROBS if num_logprobs else num_logprobs,
    )


def slot_rows(
    params: Sequence[SamplingParams],
    seeds: Sequence[np.random.SeedSequence],
    *,
    vocab_size: int,
    eos_token_ids: Sequence[int],
) -> SamplingRows:
    """The rows of an engine's step, whose dense arrays are kept by slot (steps.Slots). Only eight variants exist.

    min_tokens is set if any row adjusts its logits.
    """
    greedy = all(one.is_greedy for one in params)
    return SamplingRows(
        **jax.tree.map(jnp.asarray, _columns(params, seeds, eos_token_ids, vocab_size)),
        min_tokens=_min_tokens(params) if any(one.adjusts_logits for one in params) else None,
        logit_bias=None,
        prompt_seen=None,
        output_counts=None,
        greedy=greedy,
        truncates=not greedy,
        num_logprobs=None if all(one.logprobs is None for one in params) else MAX_LOGPROBS,
    )


def _columns(
    params: Sequence[SamplingParams],
    seeds: Sequence[np.random.SeedSequence],
    eos_token_ids: Sequence[int],
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """The fields of SamplingRows that hold one or a few numbers per row."""
    filters = [(0, 1.0, 0.0) if one.is_greedy else (one.top_k, one.top_p, one.min_p) for one in params]
    floats = {
        "temperature": [0.0 if one.is_greedy else one.temperature for one in params],
        "top_p": [p for _, p, _ in filters],
        "min_p": [p for _, _, p in filters],
        "presence_penalty": [one.presence_penalty for one in params],
        "frequency_penalty": [one.frequency_penalty for one in params],
        "repetition_penalty": [one.repetition_penalty for one in params],
    }
    integers = {
        "top_k": [k if 0 < k < vocab_size else 0 for k, _, _ in filters],
        "max_tokens": [MAX_INT32 if one.max_tokens is None else one.max_tokens for one in params],
    }
    return {
        **{name: np.asarray(values, np.float32) for name, values in floats.items()},
        **{name: np.asarray(values, np.int32) for name, values in integers.items()},
        "key": np.stack([sequence.generate_state(2, np.uint32) for sequence in seeds]),
        "stop_ids": _padded_stop_ids(params, eos_token_ids),
    }


def _min_tokens(params: Sequence[SamplingParams]) -> Int32[Array, " b"]:
    return jnp.asarray([one.min_tokens for one in params], jnp.int32)


def sample(logits: Float[Array, "b vocab"], rows: SamplingRows, num_generated: Int[Array, " b"]) -> Sampled:
    """The next token of each row, which has emitted `num_generated` tokens before it. Computed in float32.

    The result depends only on the row's own logits, settings, key and `num_generated`. A token whose probability is
    below about 2**-26 of the likeliest one's (2**-13 if 128k tokens are equally likely) counts as impossible. NaN
    logits count as -inf, and +inf as the largest float32; a row without any finite logit gives NO_TOKEN.

    Source: the order of steps is that of vLLM 0.22, vllm.v1.sample.sampler.Sampler.
    """
    vocab_size = logits.shape[-1]
    raw = logits.astype(jnp.float32)
    raw = jnp.where(jnp.isnan(raw), -jnp.inf, jnp.minimum(raw, MAX_LOGIT))
    x = _penalized(raw, rows, num_generated)
    best = jnp.max(x, axis=-1)
    # The first maximum, like argmax: two plain reductions take a third to two thirds of its time on a CPU.
    token = jnp.min(jnp.where(x == best[:, None], jnp.arange(vocab_size, dtype=jnp.int32), vocab_size), axis=-1)
    if not rows.greedy:
        weights = _token_weights(x, best, rows)
        has_mass = jnp.any(weights > 0, axis=-1)
        token = jnp.where(has_mass & (rows.temperature > 0), _draw(weights, rows.key, num_generated), token)
    is_finite = (best if x is raw or rows.allowed is not None else jnp.max(raw, axis=-1)) > -jnp.inf
    token = jnp.where(is_finite, token, NO_TOKEN)
    if rows.num_logprobs is None:
        return Sampled(token=token)
    return with_logprobs(token, raw, min(rows.num_logprobs, vocab_size))


def update(rows: SamplingRows, token: Int[Array, " b"], active: Bool[Array, " b"]) -> SamplingRows:
    """Counts the emitted token of each active row; writes one element per row."""
    if rows.output_counts is None:
        return rows
    row = jnp.arange(token.shape[0])
    active &= token != NO_TOKEN
    token = jnp.maximum(token, 0)
    counts = rows.output_counts.at[row, token].add(active.astype(jnp.int32), mode="promise_in_bounds")
    return dataclasses.replace(rows, output_counts=counts)


def finished_by_id(rows: SamplingRows, token: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Whether the token just emitted is an end or stop token of its row, or NO_TOKEN. Before min_tokens none of the
    former can be sampled."""
    return (token == NO_TOKEN) | jnp.any(rows.stop_ids == token[:, None], axis=-1)


def _penalized(
    x: Float32[Array, "b vocab"], rows: SamplingRows, num_generated: Int[Array, " b"]
) -> Float32[Array, "b vocab"]:
    """Applies grammar, bias, ban of stop tokens and penalties: all options that can change a greedy row."""
    if rows.allowed is not None:
        x = jnp.where(_bits(rows.allowed, x.shape[-1]), x, -jnp.inf)
    if rows.logit_bias is not None:
        x = x + rows.logit_bias
    if rows.min_tokens is not None:
        is_banned = (num_generated < rows.min_tokens)[:, None] & (rows.stop_ids >= 0)
        banned_ids = jnp.where(is_banned, rows.stop_ids, x.shape[-1])  # an id past the end is dropped
        unbanned, x = x, x.at[jnp.arange(x.shape[0])[:, None], banned_ids].set(-jnp.inf, mode="drop")
        if rows.allowed is not None:  # a grammar may allow nothing else
            x = jnp.where(jnp.any(x > -jnp.inf, axis=-1, keepdims=True), x, unbanned)
    if rows.output_counts is not None:
        emitted = rows.output_counts > 0
        if rows.prompt_seen is not None:
            factor = jnp.where(rows.prompt_seen | emitted, rows.repetition_penalty[:, None], 1.0)
            x = jnp.where(x > 0, x / factor, x * factor)
        x = x - rows.frequency_penalty[:, None] * rows.output_counts
        x = x - rows.presence_penalty[:, None] * emitted
    return x


def _bits(words: Int32[Array, "b words"], n: int) -> Bool[Array, "b n"]:
    bits = (words[:, :, None] >> jnp.arange(32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :n].astype(jnp.bool_)


def _token_weights(
    x: Float32[Array, "b vocab"], best: Float32[Array, " b"], rows: SamplingRows
) -> Int32[Array, "b padded_vocab"]:
    """Applies temperature and filters: integers proportional to the probabilities, 0 for filtered tokens.

    Each row sums to less than 2**31. All zero only if no logit is finite; padded with zeros to whole blocks.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % DRAW_BLOCK)), constant_values=-jnp.inf)
    # A row without a finite logit must have only infinite distances, and no NaN.
    distance = jnp.maximum(best, -MAX_LOGIT)[:, None] - x
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    relative = jnp.exp(-distance / temperature[:, None])  # probability divided by that of the likeliest token
    if not rows.truncates:
        return _as_integers(relative)
    bits = lax.bitcast_convert_type(distance, jnp.int32)
    top_k_cutoff = _smallest_cutoff(bits, lambda cutoff: _count_within(bits, cutoff), rows.top_k, rows.top_k > 0)
    kept = (bits <= top_k_cutoff[:, None]) & (relative >= rows.min_p[:, None])
    weights = _as_integers(jnp.where(kept, relative, 0.0))
    total = jnp.sum(weights, axis=-1, dtype=jnp.int32)
    enough = jnp.maximum(jnp.ceil(rows.top_p * total.astype(jnp.float32)), 1.0)
    # Rows with top_p = 1 are not searched: rounded to float32, their total may be unreachable or too small.
    top_p_cutoff = _smallest_cutoff(
        bits,
        lambda cutoff: jnp.sum(jnp.where(bits <= cutoff[:, None], weights, 0), axis=-1, dtype=jnp.int32),
        enough.astype(jnp.int32),
        rows.top_p < 1,
    )
    return jnp.where(bits <= top_p_cutoff[:, None], weights, 0)


def _smallest_cutoff(
    bits: Int32[Array, "b padded_vocab"],
    amount_within: Callable[[Int32[Array, " b"]], Int32[Array, " b"]],
    need: Int32[Array, " b"],
    is_used: Bool[Array, " b"],
) -> Int32[Array, " b"]:
    """The smallest cut-off (or one that keeps the same tokens) that keeps an amount of at least `need`, by bisection.

    It is MAX_FINITE_BITS if even that keeps too little, and in rows that do not use this filter, which cost no step.
    """

    def is_row_open(bounds: tuple[Array, Array, Array, Array]) -> Array:
        low, high, low_count, high_count = bounds
        # A single token between the two cut-offs also decides the row, after 10 to 20 of the 31 steps.
        return (high - low > 1) & (high_count - low_count > 1)

    def is_open(bounds: tuple[Array, Array, Array, Array]) -> Array:
        return jnp.any(is_row_open(bounds))

    def halve(bounds: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        low, high, low_count, high_count = bounds
        middle = low + (high - low) // 2
        count = _count_within(bits, middle)
        is_enough = amount_within(middle) >= need
        raises, lowers = is_row_open(bounds) & ~is_enough, is_row_open(bounds) & is_enough
        return (
            jnp.where(raises, middle, low),
            jnp.where(lowers, middle, high),
            jnp.where(raises, count, low_count),
            jnp.where(lowers, count, high_count),
        )

    high = jnp.full_like(need, MAX_FINITE_BITS)
    low = jnp.where(is_used, -1, high - 1)  # the likeliest token is at distance 0, so -1 is always too small
    return lax.while_loop(is_open, halve, (low, high, jnp.zeros_like(need), jnp.full_like(need, bits.shape[-1])))[1]


def _count_within(bits: Int32[Array, "b padded_vocab"], cutoff: Int32[Array, " b"]) -> Int32[Array, " b"]:
    within = (bits <= cutoff[:, None]).reshape(bits.shape[0], COUNT_ROWS, -1)
    return jnp.sum(jnp.sum(within, axis=1, dtype=jnp.int8), axis=-1, dtype=jnp.int32)


def _as_integers(relative: Float32[Array, "b padded_vocab"]) -> Int32[Array, "b padded_vocab"]:
    """Scales values in [0, 1] by the largest power of two that surely keeps their sum below 2**31, rounding down."""
    vocab_size = relative.shape[-1]
    coarse_shift = 30 - vocab_size.bit_length()
    coarse_sum = jnp.sum((relative * 2.0**coarse_shift).astype(jnp.int32), axis=-1, dtype=jnp.int32)
    bound = coarse_sum + vocab_size  # each token lost less than 1 by rounding down
    scale = jnp.left_shift(jnp.int32(1), coarse_shift + lax.clz(bound) - 1).astype(jnp.float32)
    return (relative * scale[:, None]).astype(jnp.int32)


def _draw(
    weights: Int32[Array, "b padded_vocab"], key: UInt32[Array, "b 2"], num_generated: Int[Array, " b"]
) -> Int32[Array, " b"]:
    """Samples a token with probability weight / sum of weights, by inverse CDF: its block, then its index in it."""
    blocks = weights.reshape(weights.shape[0], -1, DRAW_BLOCK)
    block_sums = jnp.sum(blocks, axis=-1, dtype=jnp.int32)
    ends = jnp.cumsum(block_sums, axis=-1, dtype=jnp.int32)
    point = _uniform_below(ends[:, -1], key, num_generated)
    block = jnp.sum(ends <= point[:, None], axis=-1, dtype=jnp.int32)
    index = jnp.minimum(block, ends.shape[1] - 1)[:, None]  # past the end only where all weights are 0
    start = jnp.take_along_axis(ends - block_sums, index, axis=1)
    inside = jnp.take_along_axis(blocks, index[:, :, None], axis=1)[:, 0]
    inner_ends = start + jnp.cumsum(inside, axis=-1, dtype=jnp.int32)
    return index[:, 0] * DRAW_BLOCK + jnp.sum(inner_ends <= point[:, None], axis=-1, dtype=jnp.int32)


def _uniform_below(
    limit: Int32[Array, " b"], key: UInt32[Array, "b 2"], num_generated: Int[Array, " b"]
) -> Int32[Array, " b"]:
    """An integer in [0, limit), uniform to within limit / 2**32; depends only on (key, num_generated)."""

    def random_bits(key_data: UInt32[Array, " 2"], step: Int[Array, ""]) -> UInt32[Array, ""]:
        row_key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(row_key, step), dtype=jnp.uint32)

    bits = jax.vmap(random_bits)(key, num_generated)
    return _high_half_of_product(bits, limit.astype(jnp.uint32)).astype(jnp.int32)


def _high_half_of_product(x: UInt32[Array, " b"], y: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
    """x * y // 2**32, by 16-bit halves: JAX disables 64-bit integers by default."""
    x_high, x_low, y_high, y_low = x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF
    middle = x_high * y_low + ((x_low * y_low) >> 16)
    carry = (x_low * y_high + (middle & 0xFFFF)) >> 16
    return x_high * y_high + (middle >> 16) + carry


def with_logprobs(token: Int32[Array, " b"], raw: Float32[Array, "b vocab"], num_top: int) -> Sampled:
    """Each row's token with its log-probability and rank under raw logits, and the num_top likeliest ones."""
    base = jnp.maximum(jnp.max(raw, axis=-1, keepdims=True), -MAX_LOGIT)
    log_sum = jnp.log(jnp.sum(jnp.exp(raw - base), axis=-1, keepdims=True))

    def logprob(logit: Float32[Array, "b k"]) -> Float32[Array, "b k"]:
        return jnp.where(logit == -jnp.inf, -jnp.inf, (logit - base) - log_sum)

    chosen = jnp.take_along_axis(raw, token[:, None], axis=-1)
    top_logits, top_ids = lax.top_k(raw, num_top)
    return Sampled(
        token=token,
        logprob=logprob(chosen)[:, 0],
        rank=1 + jnp.sum(raw > chosen, axis=-1, dtype=jnp.int32),
        top_ids=top_ids,
        top_logprobs=logprob(top_logits),
    )


def seed_sequence(params: SamplingParams, default_seed: int, request_id: int, index: int = 0) -> np.random.SeedSequence:
    """The random seed of one continuation: from its index and either its own seed or default_seed and request_id."""
    if params.seed is None:
        return np.random.SeedSequence(default_seed, spawn_key=(request_id, index) if index else (request_id,))
    return np.random.SeedSequence(params.seed, spawn_key=(0, 0, index) if index else ())


def _padded_stop_ids(params: Sequence[SamplingParams], eos_token_ids: Sequence[int]) -> np.ndarray:
    """Unique ids per row; the width is 8 or a larger power of two, so that few shapes are compiled."""
    ids = [sorted({*one.stop_token_ids, *(() if one.ignore_eos else eos_token_ids)}) for one in params]
    width = 1 << (max(8, *map(len, ids)) - 1).bit_length()
    return np.asarray([row + [-1] * (width - len(row)) for row in ids], np.int32)


def dense_bias(params: Sequence[SamplingParams], vocab_size: int) -> np.ndarray:
    """The logit bias of each request, f32[b, vocab]."""
    bias = np.zeros((len(params), vocab_size), np.float32)
    for row, one in enumerate(params):
        for token_id, value in bias_pairs(one.logit_bias or ()):
            bias[row, token_id] = value
    return bias


def seen(prompt_ids: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """Which tokens each prompt contains, bool[b, vocab]."""
    found = np.zeros((len(prompt_ids), vocab_size), np.bool_)
    for row, ids in enumerate(prompt_ids):
        found[row, np.asarray(ids, np.int64)] = True
    return found

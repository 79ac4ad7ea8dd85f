"""Sampling where each device has the logits of its part of the vocabulary: what crosses are candidates, or rows.

If every row is greedy, a device sends the best logit and the token of each row, 8 bytes. Otherwise the devices exchange
parts of rows, so that each has the whole logits of its share of the rows, and samples those: no device gets all logits,
and a row's token is that of one device (sampling.py).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jfa_models.decoding.sampling import MAX_LOGIT, NO_TOKEN, Sampled, SamplingRows, sample
from jfa_models.model.partition import Axes, first_of


def sample_divided(
    logits: Float[Array, "b part"], rows: SamplingRows, num_generated: Int[Array, " b"], axes: Axes
) -> Sampled:
    """As `sample`, of logits that are divided over these axes of a mesh; (): they are whole."""
    if not axes:
        return sample(logits, rows, num_generated)
    changes_nothing = all(x is None for x in (rows.allowed, rows.logit_bias, rows.min_tokens, rows.output_counts))
    if rows.greedy and changes_nothing and rows.num_logprobs is None:
        return Sampled(token=_best(logits, axes))
    return _by_rows(logits, rows, num_generated, axes)


def _best(logits: Float[Array, "b part"], axes: Axes) -> Int[Array, " b"]:
    """The first token with the largest logit."""
    size = logits.shape[-1]
    x = logits.astype(jnp.float32)
    x = jnp.where(jnp.isnan(x), -jnp.inf, jnp.minimum(x, MAX_LOGIT))
    own = jnp.max(x, axis=-1)
    index = jnp.min(jnp.where(x == own[:, None], jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    # as integers: a small token would be a denormal float, which a device may flush to zero
    candidate = jnp.stack([lax.bitcast_convert_type(own, jnp.int32), index + first_of(axes, size)], axis=-1)
    candidates: Int32[Array, "devices b 2"] = lax.all_gather(candidate, axes)
    logit, tokens = lax.bitcast_convert_type(candidates[..., 0], jnp.float32), candidates[..., 1]
    best = jnp.max(logit, axis=0)
    first = jnp.min(jnp.where(logit == best, tokens, jnp.iinfo(jnp.int32).max), axis=0)
    return jnp.where(best > -jnp.inf, first, NO_TOKEN)


def _by_rows(
    logits: Float[Array, "b part"], rows: SamplingRows, num_generated: Int[Array, " b"], axes: Axes
) -> Sampled:
    """Each device samples an equal share of the rows, the last of which repeat."""
    b, count = logits.shape[0], lax.axis_size(axes)
    share = -(-b // count)

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, share * count - b), *[(0, 0)] * (x.ndim - 1)], mode="edge")

    def own(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(padded(x), lax.axis_index(axes) * share, share)

    whole = lax.all_to_all(padded(logits), axes, split_axis=0, concat_axis=1, tiled=True)
    sampled = sample(whole, jax.tree.map(own, rows), own(num_generated))
    return jax.tree.map(lambda x: lax.all_gather(x, axes, tiled=True)[:b], sampled)

"""Trains two layers on their own source code: linear attention, whose state has a fixed size, then attention.

It needs optax. The linear layer decays each head's state as much as the token says, and has a short convolution before.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jfa

WIDTH, HEADS, CONTEXT = 128, 4, 128
TEXT = jnp.frombuffer(Path(__file__).read_bytes(), jnp.uint8).astype(jnp.int32)  # one token per byte


class Mixer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, is_linear: bool):
        self.is_linear = is_linear
        self.qkv, self.out = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        if is_linear:
            self.decay = nnx.Linear(WIDTH, HEADS, rngs=rngs)
            self.kernel = nnx.Param(jnp.full((3 * WIDTH, 4), 0.25))

    def __call__(self, x):
        qkv = self.qkv(x)
        if self.is_linear:
            qkv = nnx.silu(jfa.causal_conv(qkv, self.kernel[...])[0])
        q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(qkv, 3, axis=-1))
        if self.is_linear:
            mixed, _ = jfa.linear_attention(q, k, v, -nnx.softplus(self.decay(x)))
        else:
            mixed = jfa.dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class Hybrid(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(4)])
        self.mixers = nnx.List([Mixer(rngs, is_linear=is_linear) for is_linear in (True, False)])
        self.mlps = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)  # no positions: the first layer knows the order
        for i in range(2):
            x = x + self.mixers[i](self.norms[2 * i](x))
            x = x + nnx.gelu(self.mlps[i](self.norms[2 * i + 1](x)))
        return self.embed.attend(x)


@nnx.jit
def step(model, optimizer, key):
    starts = jax.random.randint(key, (16, 1), 0, len(TEXT) - CONTEXT - 1)
    tokens = TEXT[starts + jnp.arange(CONTEXT + 1)]  # rows of consecutive bytes
    entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    loss, grads = nnx.value_and_grad(lambda model: entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean())(model)
    optimizer.update(model, grads)
    return loss


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()
model = Hybrid(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for i in range(args.steps):
    loss = step(model, optimizer, jax.random.key(i))
    if i % 20 == 0:
        print(f"step {i}: loss {loss:.3f}")

"""Trains a small causal transformer on its own source code, with jfa's attention in Flax's layer. It needs optax."""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

import jfa.flax

WIDTH, HEADS, LAYERS, CONTEXT = 128, 4, 2, 128
TEXT = jnp.frombuffer(Path(__file__).read_bytes(), jnp.uint8).astype(jnp.int32)  # one token per byte


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        attend = functools.partial(jfa.flax.attention_fn, is_causal=True)
        self.embed, self.position = nnx.Embed(256, WIDTH, rngs=rngs), nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2 * LAYERS)])
        attention = functools.partial(nnx.MultiHeadAttention, HEADS, WIDTH, decode=False, attention_fn=attend)
        self.attention = nnx.List([attention(rngs=rngs) for _ in range(LAYERS)])
        self.mlps = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for i in range(LAYERS):
            x = x + self.attention[i](self.norms[2 * i](x))
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
parser.add_argument("--folder", type=Path, default=Path("checkpoint"), help="where the checkpoint is saved")
args = parser.parse_args()
model = Transformer(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for i in range(args.steps):
    loss = step(model, optimizer, jax.random.key(i))
    if i % 20 == 0:
        print(f"step {i}: loss {loss:.3f}")
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(args.folder.resolve(), nnx.to_pure_dict(nnx.state(model)), force=True)

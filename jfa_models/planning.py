"""What a decoder needs of devices, and what they could do at best: memory, and time from bytes, FLOP and links.

Sizes are those of the code that loads: the decoder's shapes, the forms of quantized weights, partition.py and an
engine's pools. Times are a roofline (doi:10.1145/1498765.1498785): the products of a step take as long as reading the
weights or as computing, whichever is longer; its attention as reading keys and values, or as computing; and its
collectives, which nothing overlaps, come on top. Nothing is allocated, and no device is asked.
"""

import bisect
import collections
import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.typing import DTypeLike

import jfa
from jfa_models.checkpoints.load import is_weight, shape_of
from jfa_models.decoding.language_model import abstract_decoder, named_leaves
from jfa_models.engine.pools import pool_sizes
from jfa_models.model.attention import paged_cache
from jfa_models.model.config import DecoderConfig
from jfa_models.model.layers import tokens_of_round
from jfa_models.model.mixers import state_cache
from jfa_models.model.partition import TENSOR, WHOLE, Axes, Partition, partition_of
from jfa_models.rates import COLLECTIVE_US, HOST_COLLECTIVE_US, Card

STEP_TOKENS = 2048  # of an engine's step on a GPU, for each device
ROLES = ("layers", "mixers", "experts", "head", "embedding", "others")
PAGE_SIZE = 16
CANDIDATE_BYTES = 8  # a row's best logit and its token, from each device: decoding/divided.py
MOST_TOKENS, MOST_SEQUENCES = 2**24, 2**20  # where searches end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for.

    Attributes:
      batch: sequences at a time, over all engines.
      context: tokens of each, which a decode step reads.
      prompt: tokens of the prompt whose first token is waited for, on an idle engine.
    """

    batch: int
    context: int
    prompt: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step: what takes the time, and how long it does."""

    name: str
    bound: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A way to divide devices, and what it gives.

    Attributes:
      mesh: the devices of an engine by axis.
      engines: independent replicas.
      num_bytes: of each device, by kind.
      free_bytes: of each device; negative if it does not fit.
      decode, first_token: a decode step at the batch and the context; a whole prompt.
      most_sequences: at this context, over all engines; 0: not even one for each engine.
      most_context: at this batch; None: any.
      tokens_per_s, most_tokens_per_s: over all engines, at the batch, and at most_sequences.
      whole: what each device of an engine has all of, in words; None: nothing large.
    """

    mesh: Mapping[str, int]
    engines: int
    num_bytes: Mapping[str, int]
    free_bytes: int
    decode: tuple[Part, ...]
    first_token: tuple[Part, ...]
    most_sequences: int
    most_context: int | None
    tokens_per_s: float
    most_tokens_per_s: float
    whole: str | None

    @property
    def fits(self) -> bool:
        """Whether each device has enough memory."""
        return self.free_bytes >= 0


def splits(
    config: DecoderConfig,
    card: Card,
    load: Load,
    *,
    devices: int,
    hosts: int = 1,
    dtype: DTypeLike = "bfloat16",
    quantization: str | None = None,
    kv_dtype: str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> list[Split]:
    """Every way to divide the devices of some hosts; engines are of devices of one host, or of whole hosts.

    Args:
      devices: of each host.
      quantization: see Weights; None: floats of this dtype.
      kv_dtype: see CacheOptions.
      mesh: only this way to divide an engine.

    Raises:
      ValueError: the model cannot be divided in the way of `mesh`, or the devices cannot.
    """
    model = _Model(config, np.dtype(dtype), quantization, kv_dtype)
    split = functools.partial(_split, model, card, load, devices, hosts)
    if mesh is None:
        found = []
        for sizes in _meshes(config, devices, hosts):
            with contextlib.suppress(ValueError):  # the model cannot be divided so
                found.append(split(sizes))
        return found
    size, total = math.prod(mesh.values()), devices * hosts
    if not _is_even(size, devices, hosts):
        fits = ", ".join(str(n) for n in _divisors(total) if _is_even(n, devices, hosts))
        of_hosts = "" if hosts == 1 else f" in {hosts} hosts"
        raise ValueError(f"{total} devices{of_hosts} cannot be divided in engines of {size}; sizes that do: {fits}")
    return [split(mesh)]


def step_seconds(
    config: DecoderConfig,
    card: Card,
    *,
    rows: int,
    new: int,
    context: int,
    dtype: DTypeLike = "bfloat16",
    quantization: str | None = None,
    kv_dtype: str | None = None,
) -> float:
    """A step of one card at best: so many sequences, each with new tokens, the last of context tokens."""
    model = _Model(config, np.dtype(dtype), quantization, kv_dtype)
    return seconds(_Engine.of(model, {"tensor": 1}, card, 1).step(rows, new, context))


def _meshes(config: DecoderConfig, devices: int, hosts: int) -> Iterator[dict[str, int]]:
    num_experts = config.experts.num_experts if config.experts else 1
    for size in _divisors(devices * hosts):
        if _is_even(size, devices, hosts):
            for experts in _divisors(math.gcd(size, num_experts)):
                yield {"tensor": size // experts} | ({"expert": experts} if experts > 1 else {})


def _is_even(size: int, devices: int, hosts: int) -> bool:
    """Whether engines of this size are of devices of one host, or of whole hosts, and none is left over."""
    return devices * hosts % size == 0 and (devices % size == 0 or size % devices == 0)


def _split(model: "_Model", card: Card, load: Load, devices: int, hosts: int, mesh: Mapping[str, int]) -> Split:
    size = math.prod(mesh.values())
    engines = devices * hosts // size
    engine = _Engine.of(model, mesh, card, devices)
    rows = -(-load.batch // engines)
    held, room = engine.num_bytes(rows, load.context), card.memory_gb * 1e9
    most_rows = _most(MOST_SEQUENCES, room, lambda n: sum(engine.num_bytes(n, load.context).values()))
    most_context = _most(MOST_TOKENS, room, lambda n: sum(engine.num_bytes(rows, n).values()))
    decode = engine.step(rows, 1, load.context)
    most = engine.step(most_rows, 1, load.context) if most_rows else ()
    return Split(
        mesh=dict(mesh),
        engines=engines,
        num_bytes=held,
        free_bytes=int(room) - sum(held.values()),
        decode=decode,
        first_token=engine.prompt(load.prompt),
        most_sequences=engines * most_rows,
        most_context=None if most_context == MOST_TOKENS else most_context,
        tokens_per_s=load.batch / seconds(decode),
        most_tokens_per_s=engines * most_rows / seconds(most) if most else 0.0,
        whole=engine.whole,
    )


def seconds(parts: tuple[Part, ...]) -> float:
    """Of a whole step."""
    return sum(part.seconds for part in parts)


def _most(limit: int, room: float, num_bytes: Callable[[int], int]) -> int:
    """The largest number up to limit whose bytes fit; 0: none does."""
    return bisect.bisect_right(range(limit + 1), room, key=num_bytes, lo=1) - 1


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter as it is held, and how many layers have one like it."""

    name: str
    held: Any
    layers: int


class _Model:
    """The shapes of a decoder and of what its engine keeps, undivided."""

    def __init__(self, config: DecoderConfig, dtype: np.dtype, quantization: str | None, kv_dtype: str | None):
        self.config, self.dtype = config, dtype
        self.parameters = tuple(_parameters(config, dtype, quantization))
        self.windows = collections.Counter(config.window(i) for i in config.attention_layers)  # in order of patterns
        create = functools.partial(
            paged_cache, config, page_size=PAGE_SIZE, batch=1, pages_per_seq=1, dtype=dtype, kv_dtype=kv_dtype
        )

        def cache(num_pages: list[int]) -> jfa.PagedKVCache:
            return jax.eval_shape(lambda: create(num_pages=num_pages))

        # what a page more of each pattern adds to the smallest pools is the size of a page in all its layers
        least = [2] * max(1, len(self.windows))
        self.smallest = cache(least)
        self.with_one_more = [cache([n + (i == at) for i, n in enumerate(least)]) for at in range(len(self.windows))]
        states = jax.eval_shape(functools.partial(state_cache, config, batch=1, dtype=dtype))
        self.state_bytes = 0 if states is None else states.num_bytes  # of a sequence


def _parameters(config: DecoderConfig, dtype: np.dtype, quantization: str | None) -> Iterator[_Parameter]:
    """Those of the first layer of each kind, and those outside of layers."""
    kinds = [(config.mixer(i), config.has_experts(i)) for i in range(config.num_layers)]
    first = {kind: kinds.index(kind) for kind in kinds}
    some = abstract_decoder(config.with_layers(1 + max(first.values())), dtype)
    for name, x in named_leaves(some).items():
        path, count = name.split("."), 1
        if path[0] == "layers":
            kind = kinds[int(path[1])]
            if first[kind] != int(path[1]):
                continue
            count = kinds.count(kind)
        held = shape_of(name, x.shape, quantization) if quantization and is_weight(name) else x
        yield _Parameter(name, held, count)


@dataclasses.dataclass
class _Weights:
    """Weights of one role on one device: bytes, and elements that each token is multiplied by."""

    num_bytes: int = 0
    elements: float = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Engine:
    """A model divided over the devices of one engine.

    weights: by role: "layers", "mixers" (of layers with a state), "experts" (that tokens choose), "head", "embedding"
      (of which rows are looked up), "others" (norms and biases).
    page_bytes: of one page on one device, in all layers of each pattern.
    local: devices of an engine in one host.
    order: the axes of the partition's mesh; devices along the last are neighbours.
    """

    model: _Model
    partition: Partition
    card: Card
    local: int
    order: Axes
    weights: Mapping[str, _Weights]
    page_bytes: tuple[int, ...]
    whole: str | None

    @classmethod
    def of(cls, model: _Model, mesh: Mapping[str, int], card: Card, devices: int) -> "_Engine":
        size = math.prod(mesh.values())
        partition, whole = WHOLE, None
        if size > 1 or set(mesh) - {"tensor"}:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                partition = partition_of(model.config, AbstractMesh(tuple(mesh.values()), tuple(mesh)))
            whole = str(caught[0].message) if caught else None
        smallest = partition.num_bytes(model.smallest)
        return cls(
            model=model,
            partition=partition,
            card=card,
            local=min(size, devices),
            order=sum((TENSOR if axis == "tensor" else (axis,) for axis in mesh), start=()),
            weights=_weights(model, partition),
            page_bytes=tuple(partition.num_bytes(cache) - smallest for cache in model.with_one_more),
            whole=whole,
        )

    def num_bytes(self, rows: int, context: int) -> dict[str, int]:
        """Of each device, for so many sequences of context tokens."""
        pools = pool_sizes(
            1 + rows * -(-context // PAGE_SIZE),
            [(window, self.model.config.sinks_of(window)) for window in self.model.windows],
            page_size=PAGE_SIZE,
            max_num_seqs=rows,
            max_num_batched_tokens=self._step_tokens,
        )
        return {
            "weights": sum(one.num_bytes for one in self.weights.values()),
            "KV pages": sum(n * size for n, size in zip(pools, self.page_bytes, strict=True)),
            "states": rows * self.model.state_bytes,
            "temporaries": self._temporary_bytes(rows),
        }

    def _temporary_bytes(self, rows: int) -> int:
        """An estimate: of a step, some hidden and inner vectors of each token, and float32 logits twice, to sample.

        There are about as many vectors as XLA's programs for AMD cards have, or more (docs/plan.md).
        """
        config, size = self.model.config, self.partition.size
        hidden, inner = 6, config.intermediate_size // size(self.partition.inner)
        if (experts := config.experts) is not None:
            count, k = size(self.partition.experts), experts.experts_per_token
            inner = max(inner, k * experts.intermediate_size // size(self.partition.expert_inner))
            if count > 1:  # a device has room for all experts of the tokens that it gets
                k *= count * tokens_of_round(STEP_TOKENS, k, count) / STEP_TOKENS
            hidden += 2 * k  # in the order of experts, and what these return
        if self.partition.tokens:
            hidden += 2 * self._key_width * size(self.partition.tokens) / config.hidden_size
        vectors = max(STEP_TOKENS, rows) * (hidden * config.hidden_size + 3 * inner) * self.model.dtype.itemsize
        return int(vectors) + 2 * rows * config.vocab_size // size(self.partition.vocab) * 4

    def prompt(self, tokens: int) -> tuple[Part, ...]:
        """A prompt alone, in an engine's steps; the bound of each part is that of most of its time."""
        found: dict[str, dict[str, float]] = {}
        for start in range(0, tokens, self._step_tokens):
            end = min(tokens, start + self._step_tokens)
            for part in self.step(1, end - start, end):
                bounds = found.setdefault(part.name, {})
                bounds[part.bound] = bounds.get(part.bound, 0.0) + part.seconds
        return tuple(
            Part(name=name, bound=max(bounds, key=bounds.__getitem__), seconds=sum(bounds.values()))
            for name, bounds in found.items()
        )

    def step(self, rows: int, new: int, context: int) -> tuple[Part, ...]:
        """So many sequences, each with new tokens, the last of context tokens."""
        # devices that share the tokens
        portion = self.partition.portion(rows * new) if new > 1 else None
        sharing = 1 if portion is None else portion.parts
        parts = [self._products(rows, rows * new, sharing)]
        if self.model.config.attention_layers:
            parts.append(self._attention(rows, new, context, sharing))
        if self.model.state_bytes:
            parts.append(self._states(rows, new))
        if collectives := list(self._collectives(rows, rows * new, sharing)):
            sent, waited = (sum(x) for x in zip(*collectives, strict=True))
            bound = "links: bytes" if sent >= waited else "links: latency"
            parts.append(Part(name="collectives", bound=bound, seconds=sent + waited))
        return tuple(parts)

    def _products(self, rows: int, tokens: int, sharing: int) -> Part:
        experts, chosen = self.model.config.experts, 0.0
        of_experts = tokens / sharing * (self.partition.size(self.partition.experts) if sharing > 1 else 1)
        read = sum(self.weights[role].num_bytes for role in ("layers", "mixers", "head", "others"))
        if experts is not None:
            chosen = experts.experts_per_token / experts.num_experts
            # the experts that some token chooses, if all are equally likely
            read += self.weights["experts"].num_bytes * (1 - (1 - chosen) ** of_experts)
        counts = {"layers": tokens / sharing, "mixers": tokens, "experts": chosen * of_experts, "head": rows}
        flop = 2 * sum(count * self.weights[role].elements for role, count in counts.items())
        return self._bounded("products", "weights", read, flop)

    def _attention(self, rows: int, new: int, context: int, sharing: int) -> Part:
        config = self.model.config
        read = sum(
            rows * min(context, (window or context) + new - 1) * size / PAGE_SIZE
            for window, size in zip(self.model.windows, self.page_bytes, strict=True)
        )
        seen = sum(layers * _visible(new, context, window) for window, layers in self.model.windows.items())
        heads = config.num_q_heads // self.partition.size(self.partition.q_heads)
        return self._bounded("attention", "KV pages", read, 4 * rows * seen * heads * config.head_dim / sharing)

    def _states(self, rows: int, new: int) -> Part:
        held = rows * self.model.state_bytes
        # of float32 elements: each token decays one, adds to it and multiplies it by the query
        return self._bounded("states", "states", 2 * held, 5 * new * held / 4)

    def _bounded(self, name: str, read_what: str, read: float, flop: float) -> Part:
        reading, computing = read / self.card.memory_gb_per_s / 1e9, flop / self.card.tflops / 1e12
        bound = f"memory: {read_what}" if reading >= computing else "FLOP"
        return Part(name=name, bound=bound, seconds=max(reading, computing))

    def _collectives(self, rows: int, tokens: int, sharing: int) -> Iterator[tuple[float, float]]:
        """Of each collective of a step, the seconds that its bytes take, and those of its latency."""
        config, partition = self.model.config, self.partition
        itemsize, over = self.model.dtype.itemsize, partition.tokens
        hidden = config.hidden_size * itemsize

        def all_reduce(axes: Axes, num_bytes: float) -> tuple[float, float]:
            return self._all_reduce_seconds(axes, num_bytes), self._latency(axes)

        def all_gather(axes: Axes, num_bytes: float) -> tuple[float, float]:
            return self._all_reduce_seconds(axes, num_bytes) / 2, self._latency(axes)

        for axes in self._sums(sharing > 1):
            yield all_reduce(axes, tokens / sharing * hidden)
        if axes := partition.vocab:
            yield self._exchange_seconds(axes, rows * CANDIDATE_BYTES), self._latency(axes)
        if sharing == 1:
            return
        for _ in config.attention_layers:
            yield from [all_gather(over, tokens * self._key_width * itemsize)] * 2
        for _ in config.state_layers:
            yield all_gather(over, tokens * hidden)
        yield all_reduce(over, rows * hidden)
        if axes := partition.experts:
            assert config.experts is not None
            k = config.experts.experts_per_token
            sent = tokens_of_round(-(-tokens // sharing), k, self.partition.size(axes))
            for _ in filter(config.has_experts, range(config.num_layers)):
                yield all_reduce(axes, 4)  # the number of rounds
                for width in (hidden, 4 * k, 4 * k, hidden):  # tokens, their experts and weights; what experts return
                    yield self._exchange_seconds(axes, sent * width), self._latency(axes)

    def _sums(self, is_divided: bool) -> Iterator[Axes]:
        """The axes over which hidden vectors of all tokens are summed, for each sum of a step."""
        config, partition = self.model.config, self.partition
        sums = [partition.vocab, *[partition.q_heads for _ in config.attention_layers]]
        for layer in range(config.num_layers if config.has_mlp else 0):
            if not config.has_experts(layer):
                sums.append(partition.inner)
                continue
            routed = partition.expert_inner if is_divided else (*partition.expert_inner, *partition.experts)
            sums.append(routed)
            if partition.experts or partition.shared_inner != routed:
                sums.append(partition.shared_inner)
        return filter(None, sums)

    @property
    def _step_tokens(self) -> int:
        """Most of a step."""
        return STEP_TOKENS * self.partition.size(self.partition.tokens)

    @property
    def _key_width(self) -> int:
        """Numbers of a token's key, or value, in one layer of one device."""
        config = self.model.config
        return config.num_kv_heads * config.head_dim // self.partition.size(self.partition.kv_heads)

    def _exchange_seconds(self, axes: Axes, num_bytes: float) -> float:
        """Each device sends so much to each other."""
        local, hosts = self._span(axes)
        between = local * (hosts - 1) * num_bytes / self.card.host_link_gb_per_s
        return ((local - 1) * num_bytes / self.card.link_gb_per_s + between) / 1e9

    def _all_reduce_seconds(self, axes: Axes, num_bytes: float) -> float:
        """Each device sends 2 (n - 1) / n of the array: in its host, and of its host's part to the other hosts."""
        local, hosts = self._span(axes)
        in_host = 2 * (local - 1) / local * num_bytes
        between = 2 * (hosts - 1) / hosts * num_bytes / local
        return in_host / self.card.link_gb_per_s / 1e9 + between / self.card.host_link_gb_per_s / 1e9

    def _latency(self, axes: Axes) -> float:
        return 1e-6 * (COLLECTIVE_US + (HOST_COLLECTIVE_US if self._span(axes)[1] > 1 else 0))

    def _span(self, axes: Axes) -> tuple[int, int]:
        """Of the devices along these axes, how many are in a host, and in how many hosts they are."""
        offsets, stride = np.zeros(1, int), 1
        for axis in reversed(self.order):
            size = self.partition.size((axis,))
            if axis in axes:
                offsets = np.add.outer(offsets, stride * np.arange(size)).reshape(-1)
            stride *= size
        hosts = len(set(offsets // self.local))
        return len(offsets) // hosts, hosts


def _weights(model: _Model, partition: Partition) -> dict[str, _Weights]:
    found: dict[str, _Weights] = {role: _Weights() for role in ROLES}
    for one in model.parameters:
        partition.check_groups(one.name, one.held, one.held.shape[-1])
        into = found[_role(one, model.config)]
        into.num_bytes += one.layers * _local_bytes(one, partition)
        parts = math.prod(map(partition.size, partition.of_module(one.name.rpartition(".")[0])))
        into.elements += one.layers * math.prod(one.held.shape) / parts
    return found


def _role(parameter: _Parameter, config: DecoderConfig) -> str:
    name, shape = parameter.name, parameter.held.shape
    if name == "embed.weight":
        return "head" if config.tie_word_embeddings else "embedding"
    if name == "lm_head.weight":
        return "head"
    if not name.endswith(".weight"):
        return "others"
    if ".mixer." in name:
        return "mixers"
    return "experts" if len(shape) == 3 else "layers"


def _local_bytes(parameter: _Parameter, partition: Partition) -> int:
    specs, mesh = partition.of_parameter(parameter.name, parameter.held), partition.mesh

    def local(x: jax.ShapeDtypeStruct, spec: Any) -> int:
        shape = x.shape if mesh is None else NamedSharding(mesh, spec).shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(local, parameter.held, specs)))


def _visible(new: int, context: int, window: int | None) -> int:
    """The keys that the last `new` tokens of a context see, together."""
    reach = context if window is None else min(context, window)
    growing = max(0, min(context, reach) - (context - new))  # the first of them see all there is
    first = context - new + 1
    return growing * (2 * first + growing - 1) // 2 + (new - growing) * reach


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})

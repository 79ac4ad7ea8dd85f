"""A decoder that generates text: full forward passes, offline batches, and streaming for a single prompt."""

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from jfa import QuantizedArray
from jfa.quant import dequantize
from jfa_models.checkpoints.changes import merged
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.load import is_weight, quantized
from jfa_models.checkpoints.peft import Adapter, read_adapter
from jfa_models.checkpoints.presets import preset
from jfa_models.checkpoints.save import save_checkpoint
from jfa_models.decoding import caches
from jfa_models.decoding.adapters import AdapterBank, Loaded, Names, names_of
from jfa_models.decoding.completion import Completion, allowed_tokens
from jfa_models.decoding.options import DTYPES, CacheOptions
from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.params import (
    SEED_ADVICE,
    SamplingParams,
    check_kind,
    check_token_ids,
    integer,
    one_per_prompt,
)
from jfa_models.decoding.prompts import Prompt, as_prompts, text_of, unpacked
from jfa_models.decoding.sampling import SamplingRows, sampling_rows
from jfa_models.decoding.steps import DecodeState, Emitted, Steps, named_leaves
from jfa_models.model.attention import Cache
from jfa_models.model.config import DecoderConfig
from jfa_models.model.decoder import Decoder
from jfa_models.model.lora import Adapters
from jfa_models.model.partition import WHOLE, Partition, partition_of
from jfa_models.model.sparse_config import SparseConfig
from jfa_models.text.guided import Grammars, Guide
from jfa_models.text.structured import StructuredOutputsParams
from jfa_models.text.tokenizer import Tokenizer


def abstract_decoder(
    config: DecoderConfig, dtype: DTypeLike, implementation: str | None = None, partition: Partition = WHOLE
) -> Decoder:
    """A decoder with shapes instead of parameters."""
    options: dict[str, Any] = dict(attention_implementation=implementation, partition=partition)
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0), **options))


def compute_dtype(dtype: DTypeLike | None) -> np.dtype:
    """The dtype of this name; None: the platform's default.

    Raises:
      ValueError: decoders do not compute in this dtype.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {name}")
    return jnp.dtype(name)


class LanguageModel:
    """A decoder with its parameters and its tokenizer.

    Attributes:
      config: the decoder's configuration.
      decoder: the decoder with shapes instead of parameters.
      partition: how it is divided over the devices of a mesh.
      params: the decoder's parameters as a flat tuple, in the form that the steps take; some may be quantized.
      names, shapes: the name of each parameter, and its shape by name.
      dtype: of activations and of a cache that is not quantized.
      tokenizer: None if the model has none; prompts must then be token ids.
      defaults: the sampling parameters that the checkpoint's authors recommend.
      eos_token_ids: the end-of-text, -turn and -message tokens of the defaults and of the tokenizer.
      cache_options: the options of new_cache.
      sparse_prefill: which scores layers that see the whole context compute in the prefill of a prompt from its first
        token on; None: those of config.sparse_attention.
      adapters: those that load_adapter has loaded.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        params: tuple[Array | QuantizedArray, ...],
        tokenizer: Tokenizer | None = None,
        defaults: GenerationDefaults | None = None,
        cache_options: CacheOptions | None = None,
        sparse_prefill: SparseConfig | None = None,
        max_adapters: int | None = None,
        max_rank: int | None = None,
    ):
        self.config: DecoderConfig = decoder.config
        self.decoder = decoder
        self.partition = decoder.partition
        leaves = named_leaves(decoder)
        self.names = tuple(leaves)
        self.params = params
        self.tokenizer = tokenizer
        self.defaults = defaults or GenerationDefaults()
        ends = self.defaults.ends(tokenizer)
        if outside := [token_id for token_id in ends if token_id >= self.config.vocab_size]:
            warnings.warn(
                f"the end tokens {outside} are outside the model's vocabulary of {self.config.vocab_size} and ignored",
                stacklevel=3,
            )
        self.eos_token_ids = tuple(token_id for token_id in ends if token_id not in outside)
        self.cache_options = cache_options or CacheOptions()
        self.dtype = next(iter(leaves.values())).dtype
        if self.config.streaming is not None and self.partition.mesh is not None:
            raise ValueError("attention_window is not offered for a model that is divided over a mesh; leave it out")
        self.sparse_prefill = sparse_prefill
        self._check_sparse()
        self._sparse = self.config.sparse_attention if self.config.sparse_layers else ()
        if sparse_prefill is not None:
            whole = {i for i in self.config.attention_layers if self.config.window(i) is None}
            self._sparse = tuple(sparse_prefill if i in whole else None for i in range(self.config.num_layers))
        self.steps = Steps(decoder, self._sparse)
        self._grammars: Grammars | None = None
        self._copies: list[LanguageModel] = []  # on the devices of other replicas
        self.shapes = {name: tuple(x.shape) for name, x in leaves.items()}
        self.adapters = AdapterBank(
            self.config,
            self.shapes,
            self.float32,
            dtype=self.dtype,
            max_adapters=max_adapters,
            max_rank=max_rank,
            partition=self.partition,
        )

    @classmethod
    def random(
        cls,
        config: DecoderConfig | str,
        *,
        dtype: DTypeLike | None = None,
        seed: int = 0,
        quantization: str | None = None,
        attention_implementation: str | None = None,
        cache_options: CacheOptions | None = None,
        sparse_prefill: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "LanguageModel":
        """A model with normally distributed random weights, without a tokenizer; fast to create.

        Args:
          config: a configuration, or the name of a preset such as "llama-3-8b" (presets.PRESETS).
          dtype, quantization, sparse_prefill, mesh: see from_pretrained; without quantization, weights are floats.
          attention_implementation: the `implementation` argument of jfa's attention ops.
        """
        dtype = compute_dtype(dtype)
        if quantization == "stored":
            raise ValueError("quantization='stored' keeps a checkpoint's blocks, but random weights have none")
        config = preset(config) if isinstance(config, str) else config
        abstract = abstract_decoder(config, dtype, attention_implementation, partition_of(config, mesh))
        # one array of noise is repeated over all weights; its large odd length makes the rows of a weight differ
        noise = (0.02 * np.random.default_rng(seed).standard_normal(1_000_003)).astype(dtype)
        params, start = [], 0
        for name, shape in named_leaves(abstract).items():
            if name.endswith(("scale", "bias", ".D")):
                plus_one = config.norm == "rms_plus_one" and ".mixer." not in name
                is_one = not name.endswith("bias") and not plus_one
                params.append(abstract.partition.put_parameter(name, jnp.full(shape.shape, float(is_one), dtype)))
            else:
                weight = np.resize(np.roll(noise, start), shape.shape)
                if quantization not in (None, "none") and is_weight(name):
                    weight = quantized(name, weight.shape, [(slice(None), weight)], quantization)
                params.append(abstract.partition.put_parameter(name, weight))
                start += 7919
        sparse = None if sparse_prefill is None else SparseConfig.of(sparse_prefill)
        return cls(decoder=abstract, params=tuple(params), cache_options=cache_options, sparse_prefill=sparse)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that from_pretrained and transformers can load.

        It contains config.json, the weights as safetensors, the tokenizer and its chat template. Of several processes
        that have the model, all must call this; the first one writes, and all return when it has.

        Raises:
          ValueError: config.json cannot represent the model, or it was loaded with attention_window.
          RuntimeError: another process had an error; the message has it.
        """
        if self.config.streaming is not None:
            raise ValueError("attention_window is not part of a checkpoint: load the model without it to save it")
        named = dict(zip(self.names, self.params, strict=True))
        rest: dict[str, Any] = dict(generation=self.defaults, tokenizer=self.tokenizer, partition=self.partition)
        save_checkpoint(Path(folder), self.config, named, **rest)

    def load_adapter(self, name: str, adapter: str | os.PathLike[str] | Adapter, *, scale: float = 1.0) -> None:
        """Loads an adapter, which requests then choose by its name; also while requests run.

        Args:
          adapter: a folder in the format of PEFT (LoRA, rsLoRA, DoRA), a Hugging Face repository, "owner/name", or an
            Adapter in memory.
          scale: multiplies its low-rank changes; 0 leaves the base, except for the norms of DoRA.

        Raises:
          ValueError: there is no such adapter, it does not fit this model, the name is taken, or there is no room.
        """
        adapter = adapter if isinstance(adapter, Adapter) else self.read_adapter(adapter)
        for one in (self, *self._copies):
            one.adapters.load(name, adapter, scale)

    def read_adapter(self, path: str | os.PathLike[str]) -> Adapter:
        """Reads an adapter for this model without loading it. Arguments and errors: see load_adapter."""
        return read_adapter(path if isinstance(path, str) else Path(path), self.config, self.shapes)

    def unload_adapter(self, name: str) -> None:
        """Removes an adapter. Requests that use it end with it; new ones cannot choose it.

        Raises:
          ValueError: there is none of this name.
        """
        for one in (self, *self._copies):
            one.adapters.unload(name)

    def merge_adapter(self, name: str) -> "LanguageModel":
        """A model whose weights include an adapter, and which has no adapters; this one stays as it is.

        Sums are float32, and rounded once to the dtype of the weights. If the adapter changes only one use of a tied
        embedding, the new model has an output layer of its own.

        Raises:
          ValueError: there is no such adapter, or it changes quantized weights or biases that the model does not have.
        """
        one = self.adapters.find(name)
        assert one is not None
        config, params = merged(self.config, dict(zip(self.names, self.params, strict=True)), one.changes)
        decoder = self.decoder
        if config != self.config:
            decoder = abstract_decoder(config, self.dtype, self.decoder.implementation, self.partition)
        return LanguageModel(
            decoder=decoder,
            params=tuple(self.partition.put_parameter(name, params[name]) for name in named_leaves(decoder)),
            tokenizer=self.tokenizer,
            defaults=self.defaults,
            cache_options=self.cache_options,
            sparse_prefill=self.sparse_prefill,
        )

    def with_layers(self, num_layers: int) -> "LanguageModel":
        """The model of the first num_layers layers, which shares the parameters of this one and has no adapters.

        Raises:
          ValueError: num_layers is out of range.
        """
        config = self.config.with_layers(num_layers)
        decoder = abstract_decoder(config, self.dtype, self.decoder.implementation, self.partition)
        held = dict(zip(self.names, self.params, strict=True))
        return LanguageModel(
            decoder=decoder,
            params=tuple(held[name] for name in named_leaves(decoder)),
            tokenizer=self.tokenizer,
            defaults=self.defaults,
            cache_options=self.cache_options,
            sparse_prefill=self.sparse_prefill,
        )

    def replicas(self) -> "list[LanguageModel]":
        """This model, and a copy on the devices of each other replica of its mesh, which always has its adapters."""
        if not self._copies:
            self._copies = [*map(self._on, self.partition.others)]
        return [self, *self._copies]

    def _on(self, mesh: jax.sharding.Mesh) -> "LanguageModel":
        partition = dataclasses.replace(self.partition, mesh=mesh, others=())
        held = zip(self.names, self.params, strict=True)
        copy = LanguageModel(
            decoder=abstract_decoder(self.config, self.dtype, self.decoder.implementation, partition),
            params=tuple(partition.put_parameter(name, x) for name, x in held),
            tokenizer=self.tokenizer,
            defaults=self.defaults,
            cache_options=self.cache_options,
            sparse_prefill=self.sparse_prefill,
            **self.adapters.limits,
        )
        for name in self.adapters.names:
            loaded = self.adapters.find(name)
            assert loaded is not None
            copy.load_adapter(name, loaded.adapter)
        return copy

    def float32(self, name: str) -> Float[np.ndarray, "..."]:
        """A parameter by name, on the host; a quantized one dequantized."""
        held = self.params[self.names.index(name)]
        return np.asarray(dequantize(held, np.float32) if isinstance(held, QuantizedArray) else held, np.float32)

    def logits(
        self, input_ids: ArrayLike, lengths: ArrayLike | None = None, *, adapter: Names = None
    ) -> Float[Array, "b t vocab"]:
        """The logits of the next token after every token, computed without a cache.

        Args:
          input_ids: i32[b, t], rows padded on the right with any valid id.
          lengths: i32[b], number of tokens in each row; the logits of the padding are meaningless. None: all.
          adapter: the name of a loaded adapter, or one for each row; None: none.
        """
        tokens = np.asarray(input_ids)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"input_ids must be integers [batch, length], got {tokens.dtype} of shape {list(tokens.shape)}; "
                "pass a single row as [row]"
            )
        self._check_ids(tokens)
        t = tokens.shape[1]
        if len(tokens) == 0:
            raise ValueError(f"input_ids must have at least one row, got shape {list(tokens.shape)}")
        if not 1 <= t <= self.config.context_length:
            raise ValueError(f"rows must have 1 to {self.config.context_length} tokens, the context length, got {t}")
        if lengths is not None:
            lengths = np.asarray(lengths)
            if lengths.shape != tokens.shape[:1] or lengths.dtype.kind not in "iu":
                raise ValueError(f"lengths must be {len(tokens)} integers, one for each row, got {lengths.tolist()}")
            if lengths.size and not 0 <= lengths.min() <= lengths.max() <= t:
                raise ValueError(f"lengths must be 0 to {t}, the length of a row, got {lengths.tolist()}")
            lengths = lengths.astype(np.int32)
        loaded = [self.adapters.find(name) for name in names_of(adapter, len(tokens))]
        with self.adapters.using(loaded):
            slots, adapters = self.adapters.for_rows(loaded, len(tokens))
            return self.steps.logits(self.params, tokens.astype(np.int32), lengths, slots, adapters=adapters)

    def default_params(self, **overrides) -> SamplingParams:
        """The SamplingParams that the checkpoint's authors recommend, with vLLM's defaults for unspecified fields."""
        recommended = {name: value for name, value in dataclasses.asdict(self.defaults).items() if value is not None}
        recommended.pop("eos_token_ids")
        return SamplingParams(**(recommended | overrides))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_batch: int = 8,
        seed: int = 0,
        adapter: Names = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; returns the results in the order of the prompts.

        The tokens of a prompt depend neither on the other prompts nor on how they are batched. A request without a seed
        gets one from (seed, index of its prompt).

        Args:
          prompts: one or several prompts of any length, each a string or token ids.
          sampling_params: one for all prompts or one per prompt; None: default_params().
          max_batch: maximum number of prompts per batch.
          adapter: the name of a loaded adapter, or one per prompt; None: none.

        Raises:
          ValueError: a prompt is empty, or prompt and max_tokens together exceed the context length.
        """
        max_batch = integer("max_batch", max_batch, 1, None, "it is the number of rows that are computed together")
        requests = self._requests(as_prompts(prompts), sampling_params, seed, adapter)
        with self.adapters.using([request.adapter for request in requests]):
            for first in range(0, len(requests), max_batch):
                self._run_batch(requests[first : first + max_batch])
        return [request.output() for request in requests]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        session: "Session | None" = None,
        seed: int = 0,
        adapter: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Continues one prompt and yields the result so far after every token; the last one has a finish_reason.

        Args:
          session: stores the cache for the next call, which then computes only the new part of its prompt.
          adapter: the name of a loaded adapter; None: none.

        Raises:
          ValueError: as in generate, before the first token.
        """
        [request] = self._requests([prompt], sampling_params, seed, adapter)
        session = Session() if session is None else session
        return self._stream(request, session)

    def start(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        adapter: Names = None,
    ) -> DecodeState:
        """Prefills a batch of prompts and samples the first tokens; for callers that run `steps.decode` themselves.

        The number of rows is rounded up to a power of two, as in generate; rows without a prompt are not active. If a
        row has an adapter, the steps need adapters=model.adapters.on_device.
        """
        requests = self._requests(as_prompts(prompts), sampling_params, seed, adapter)
        if any(request.completion.guide is not None for request in requests):
            raise ValueError("start cannot follow structured_outputs: the steps after it need masks; use generate")
        return self._start(requests, whole=True)[0]

    def _stream(self, request: "_Request", session: "Session") -> Iterator[RequestOutput]:
        prompt_ids = request.prompt_ids
        with self.adapters.using([request.adapter]):
            cache, known = session.take(self, prompt_ids, len(prompt_ids) + request.max_tokens, request.adapter)
            adapters = self.adapters.for_rows([request.adapter], 1)
            state, emitted = self._prefill([request], cache, [prompt_ids[known:]], *adapters)
            if request.finished:  # its form allows no first token
                yield request.output()
            try:
                while not request.finished:
                    shown = emitted
                    is_guided = request.completion.guide is not None
                    if not is_guided and len(request.completion.token_ids) + 1 < request.max_tokens:
                        # the next step runs on the device while the host reads and prints this one
                        state, emitted = self.steps.decode(self.params, state, adapters=adapters[1])
                    shown = jax.device_get(shown)
                    request.completion.push(shown.sampled, 0)
                    if is_guided and not request.finished:
                        state = self._masked(state, [request])
                        if not request.finished:  # the mask may have failed
                            state, emitted = self.steps.decode(self.params, state, adapters=adapters[1])
                    yield request.output()
            finally:
                if request.completion.error is None:  # otherwise the cache may hold NaN: the next call starts over
                    # a step that ran ahead may have added the last token
                    held = [*prompt_ids, *request.completion.token_ids][: int(state.cache.kv_len[0])]
                    session.give(state.cache, held)

    def _run_batch(self, requests: "Sequence[_Request]") -> None:
        """Runs one batch until all its requests have finished."""
        state, emitted, adapters = self._start(requests)
        self._push(requests, jax.tree.map(lambda x: x[None], jax.device_get(emitted)), 1)
        while not all(request.finished for request in requests):
            # stop strings are detected on the host: tell the device which rows have ended
            active = np.zeros(state.active.shape, bool)
            active[: len(requests)] = [not request.finished for request in requests]
            state = self._masked(dataclasses.replace(state, active=active), requests)
            if state.rows.allowed is None:
                state, emitted, num_steps = self.steps.decode_many(self.params, state, adapters=adapters)
                self._push(requests, jax.device_get(emitted), int(num_steps))
            else:
                state, emitted = self.steps.decode(self.params, state, adapters=adapters)
                self._push(requests, jax.tree.map(lambda x: x[None], jax.device_get(emitted)), 1)

    def _masked(self, state: DecodeState, requests: "Sequence[_Request]") -> DecodeState:
        """With the tokens that the guides of the requests allow next."""
        return dataclasses.replace(state, rows=self._rows_masked(state.rows, requests))

    def _rows_masked(self, rows: SamplingRows, requests: "Sequence[_Request]") -> SamplingRows:
        asked = [(row, request.completion, None) for row, request in enumerate(requests)]
        allowed = allowed_tokens(asked, rows.temperature.shape[0], self.config.vocab_size)
        return dataclasses.replace(rows, allowed=allowed)

    @staticmethod
    def _push(requests: "Sequence[_Request]", emitted: Emitted, num_steps: int) -> None:
        for step in range(num_steps):
            sampled = jax.tree.map(lambda x, step=step: x[step], emitted.sampled)
            for row, request in enumerate(requests):
                if not request.finished:
                    request.completion.push(sampled, row)

    def _start(
        self, requests: "Sequence[_Request]", *, whole: bool = False
    ) -> tuple[DecodeState, Emitted, Adapters | None]:
        """Also returns the adapters that the next steps need. whole: all of them."""
        longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        size = caches.power_of_two(len(requests))
        cache = self.new_cache(batch=size, capacity=longest)
        slots, adapters = self.adapters.for_rows([request.adapter for request in requests], size, whole=whole)
        prompts = [request.prompt_ids for request in requests]
        return *self._prefill(requests, cache, prompts, slots, adapters), adapters

    def _prefill(
        self,
        requests: "Sequence[_Request]",
        cache: Cache,
        prompts: Sequence[Sequence[int]],
        slots: Int[np.ndarray, " b"] | None,
        adapters: Adapters | None,
    ) -> tuple[DecodeState, Emitted]:
        """Prefills the prompts, after the tokens that are already in the cache, and samples each row's first token."""
        size = cache.kv_len.shape[0]
        empty = [_EMPTY] * (size - len(requests))
        rows = sampling_rows(
            [*(dataclasses.replace(request.params, max_tokens=request.max_tokens) for request in requests), *empty],
            vocab_size=self.config.vocab_size,
            prompt_ids=[*(request.prompt_ids for request in requests), *([0] for _ in empty)],
            eos_token_ids=self.eos_token_ids,
            default_seed=requests[0].seed,
            request_ids=[*(request.index for request in requests), *range(len(empty))],
        )
        rows = self._rows_masked(rows, requests)
        hidden = self.partition.everywhere(jnp.zeros((size, self.config.hidden_size), self.dtype))
        # what follows tokens that are in the cache sees all of them
        is_whole = all(len(prompt) == len(one.prompt_ids) for prompt, one in zip(prompts, requests, strict=True))
        is_sparse = bool(self._sparse) and is_whole
        prefill = self.steps.prefill_sparse if is_sparse else self.steps.prefill
        for tokens, lengths in caches.prefill_chunks(prompts, size, self.partition, is_whole=is_sparse):
            cache, hidden = prefill(self.params, cache, hidden, tokens, lengths, slots, adapters=adapters)
        active = np.arange(size) < len(requests)
        return self.steps.first(self.params, cache, hidden, rows, active, slots, adapters=adapters)

    def new_cache(self, *, batch: int, capacity: int) -> Cache:
        """An empty cache for at least capacity tokens per row."""
        options: dict[str, Any] = dict(batch=batch, capacity=capacity, dtype=self.dtype)
        cache = caches.new_cache(self.config, self.cache_options, **options, partition=self.partition)
        return self.partition.everywhere(cache)

    def _requests(self, prompts: Sequence[Prompt], sampling_params, seed: int, adapter: Names) -> "list[_Request]":
        seed = integer("seed", seed, 0, None, SEED_ADVICE)
        adapters = [self.adapters.find(name) for name in names_of(adapter, len(prompts))]
        given = zip(prompts, one_per_prompt(sampling_params, len(prompts)), adapters, strict=True)
        return [self._request(i, prompt, params, seed, loaded) for i, (prompt, params, loaded) in enumerate(given)]

    def _request(
        self, index: int, prompt: Prompt, params: SamplingParams | None, seed: int, adapter: Loaded | None
    ) -> "_Request":
        params = self.default_params() if params is None else params
        check_kind(params, SamplingParams)
        for name, value, none in (("n", params.n, 1), ("prompt_logprobs", params.prompt_logprobs, None)):
            if value != none:
                raise ValueError(f"{name} must be {none} in LanguageModel, got {value}; use jfa_models.LLM instead")
        ids = self.prompt_ids(prompt, name=f"prompt {index}")
        completion = self.completion(ids, params, name=f"prompt {index}")
        return _Request(
            index=index, prompt=text_of(prompt), prompt_ids=ids, completion=completion, seed=seed, adapter=adapter
        )

    def prompt_ids(self, prompt: Prompt, *, name: str = "the prompt") -> list[int]:
        """The token ids of a prompt. Error messages refer to it by `name`.

        Args:
          prompt: a string, token ids, or {"prompt": string} or {"prompt_token_ids": ids} as in vLLM.

        Raises:
          ValueError: the prompt has another form or is empty, an id is outside the vocabulary, or it is a string and
            there is no tokenizer.
        """
        ids = unpacked(prompt, name)
        if isinstance(ids, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer: pass the prompt as token ids")
            ids = self.tokenizer.encode(ids)
        if not ids:
            raise ValueError(f"{name} is empty: pass at least one token")
        if text_of(prompt) and self.tokenizer and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            warnings.warn(
                f"{name} begins with {self.tokenizer.special_tokens['bos_token']!r}, and the tokenizer adds another: "
                "encode the output of a chat template with add_special_tokens=False",
                stacklevel=2,
            )
        self._check_ids(np.asarray(ids))
        return ids

    def completion(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, index: int = 0, name: str = "the prompt"
    ) -> Completion:
        """A new Completion of a prompt.

        Raises:
          ValueError: the model does not support the params, or prompt and max_tokens exceed its context length.
        """
        if self.tokenizer is None and params.stop:
            raise ValueError("this model has no tokenizer, so stop strings cannot be detected: use stop_token_ids")
        check_token_ids(params, vocab_size=self.config.vocab_size)
        params = self._with_stop_ids(params)
        room = self.config.context_length - len(prompt_ids)
        if room < 1 or (params.max_tokens or 1) > room:
            raise ValueError(
                f"{name} has {len(prompt_ids)} tokens and max_tokens is {params.max_tokens}, together more than the "
                f"context length of {self.config.context_length}; shorten the prompt or lower max_tokens"
            )
        if params.min_tokens > room:
            raise ValueError(
                f"{name} has {len(prompt_ids)} tokens, which leaves {room} of the context length of "
                f"{self.config.context_length}, fewer than min_tokens, {params.min_tokens}; lower min_tokens"
            )
        return Completion(
            prompt_ids,
            params,
            max_tokens=params.max_tokens or room,
            index=index,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            guide=self._guide(params),
        )

    def _guide(self, params: SamplingParams) -> Guide | None:
        """A guide at the beginning of the text that a request asks for."""
        form = params.structured_outputs
        if form is None:
            return None
        assert isinstance(form, StructuredOutputsParams)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so structured_outputs cannot be enforced")
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.config.vocab_size, self.eos_token_ids)
        return self._grammars.compile(form).start()

    def _with_stop_ids(self, params: SamplingParams) -> SamplingParams:
        """The params with the ids of the stop strings that are special tokens: these have no text to be found in."""
        ids = [self.tokenizer.special_token_id(stop) for stop in params.stop] if self.tokenizer else []
        found = [token_id for token_id in ids if token_id is not None]
        return dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *found)) if found else params

    @property
    def sparse(self) -> str | None:
        """What of a whole prompt is not computed, as messages name it; None: nothing is left out."""
        if self.sparse_prefill is not None:
            return f"sparse_prefill={self.sparse_prefill}"
        if not self.config.sparse_layers:
            return None
        layer = self.config.sparse_layers[0]
        return f"sparse_attention={self.config.sparse_attention[layer]} of layer {layer}"

    def _check_sparse(self) -> None:
        """Raises ValueError if the model or its cache cannot compute a part of a prompt's scores as asked."""
        config, sparse = self.config, self.sparse
        if sparse is None:
            return
        if self.sparse_prefill is not None and config.sparse_layers:
            layer = config.sparse_layers[0]
            raise ValueError(
                f"{sparse}: this model has sparse_attention={config.sparse_attention[layer]} of its own in layer "
                f"{layer}; leave sparse_prefill out"
            )
        if self.sparse_prefill is not None and all(config.window(i) is not None for i in config.attention_layers):
            has = "layers with a state" if not config.attention_layers else "layers with a window"
            raise ValueError(
                f"{sparse}: this {config.architecture} model has only {has}, whose time does not grow with the square "
                "of the prompt's length; leave it out"
            )
        if self.partition.size(self.partition.tokens) > 1:
            raise ValueError(
                f"{sparse}: all tokens of a prompt must be on one device, but the mesh divides them over "
                f"{', '.join(self.partition.tokens)}; use a mesh without {self.partition.tokens[0]!r}"
            )
        if self.cache_options.kind == "paged" and any(window is not None for window in config.patterns):
            raise ValueError(
                f"{sparse}: a paged cache has no pages for whole prompts in layers with a window; use "
                "cache='contiguous'"
            )

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"token ids must be 0 to {self.config.vocab_size - 1}, got {wrong}")


class Session:
    """The KV cache of a conversation, kept between calls of stream. It supports one call at a time.

    If the beginning of a prompt is already in the cache, only the tokens from the first difference on are computed; of
    a model with states, which cannot go back, only if the cache has nothing else.
    """

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self._adapter: Loaded | None = None
        self._cache: Cache | None = None
        self._ids: list[int] = []

    def take(
        self, model: LanguageModel, prompt_ids: Sequence[int], capacity: int, adapter: Loaded | None
    ) -> tuple[Cache, int]:
        """A cache with room for capacity tokens, and how many of prompt_ids are already in it (never all of them).

        With another adapter than in the last call, none are.

        Raises:
          ValueError: the cache belongs to another model.
        """
        if self._model not in (None, model):
            raise ValueError("this session has the cache of another model; use a separate session for each model")
        self._model = model
        cache, self._cache = self._cache, None
        known = 0
        if self._adapter is adapter:
            while known < min(len(self._ids), len(prompt_ids) - 1) and self._ids[known] == prompt_ids[known]:
                known += 1
        self._adapter = adapter
        if cache is None or (cache.states is not None and known < len(self._ids)):
            return model.new_cache(batch=1, capacity=capacity), 0
        if cache.capacity < capacity:
            cache = caches.grown(model.config, cache, caches.power_of_two(capacity), model.partition)
        windows = [window for window in model.config.patterns if window is not None]
        if windows and len(self._ids) - known > caches.SLACK and len(self._ids) > min(windows):
            known = 0  # keys that the next tokens must see are no longer stored in layers with a window
        return dataclasses.replace(cache, kv_len=np.array([known], np.int32)), known

    def give(self, cache: Cache, ids: Sequence[int]) -> None:
        """Stores a cache that contains these tokens for the next call."""
        self._cache, self._ids = cache, list(ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """One prompt and its completion."""

    index: int
    prompt: str | None
    prompt_ids: list[int]
    completion: Completion
    seed: int
    adapter: Loaded | None

    @property
    def params(self) -> SamplingParams:
        return self.completion.params

    @property
    def max_tokens(self) -> int:
        return self.completion.max_tokens

    @property
    def finished(self) -> bool:
        return self.completion.finished

    def output(self) -> RequestOutput:
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=tuple(self.prompt_ids),
            outputs=(self.completion.output(),),
            error=self.completion.error,
        )


_EMPTY = SamplingParams(temperature=0.0, max_tokens=1)

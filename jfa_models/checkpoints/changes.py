"""What a decoder applies for an adapter: its stored tensors as changes of our modules, and weights with them merged."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfa import QuantizedArray
from jfa_models.checkpoints.lora_config import LoraConfig, matches
from jfa_models.checkpoints.peft import Adapter
from jfa_models.checkpoints.places import Place, place_of
from jfa_models.model.config import DecoderConfig
from jfa_models.model.lora import Change


def changes_of(
    adapter: Adapter,
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    weight_of: Callable[[str], Any],
    *,
    constant: Callable[[Any], Any] = lambda x: x,
) -> dict[str, Change]:
    """What an adapter changes, by our module names, with one slot. Of NumPy or JAX arrays, as those of the adapter.

    Args:
      weight_of: a parameter of the decoder by name, as float32.
      constant: applied to that of which no gradient is taken: DoRA's norms.
    """
    changes: dict[str, dict[str, Any]] = {}
    of_experts: dict[str, dict[int, tuple[Any, Any]]] = {}
    for module, kinds in adapter.tensors.items():
        place = place_of(module, kinds, config, shapes)
        assert place is not None, module
        if place.num_experts is not None:
            scale = adapter.config.scale(place.theirs)
            for name, change in _of_all_experts(place, kinds, scale).items():
                changes.setdefault(name, {}).update(change)
            continue
        if place.expert is not None:
            b = place.split(kinds["lora_B"] * adapter.config.scale(place.theirs))
            for name, part in zip(place.modules, b, strict=True):
                of_experts.setdefault(name, {})[place.expert] = (kinds["lora_A"], part)
            continue
        for name, change in _of_module(adapter.config, module, place, kinds, weight_of, constant).items():
            changes.setdefault(name, {}).update(change)
        is_tied = "lm_head.weight" not in shapes and module == "embed_tokens"
        if is_tied and ("rows" in kinds or ("weight" in kinds and adapter.config.ensure_weight_tying)):
            changes["lm_head"] = changes["embed"]  # of one matrix: both uses see the change
    for name, parts in of_experts.items():
        changes[name] = _of_some_experts(shapes[f"{name}.weight"], parts)
    found = {name: Change(**fields) for name, fields in changes.items()}
    if changes.get("lm_head") is changes.get("embed") is not None:
        found["lm_head"] = found["embed"]
    return found


def _of_module(
    config: LoraConfig,
    module: str,
    place: Place,
    kinds: Mapping[str, Any],
    weight_of: Callable[[str], Any],
    constant: Callable[[Any], Any],
) -> dict[str, dict[str, Any]]:
    """The fields of Change for each of our modules."""
    changes: dict[str, dict[str, Any]] = {name: {} for name in place.modules}
    is_embedding, scale = module == "embed_tokens", config.scale(place.theirs)

    def base(name: str) -> Any:
        return weight_of("embed.weight" if place.is_tied_head else f"{name}.weight")

    if "lora_A" in kinds or "lora_embedding_A" in kinds:
        a = kinds["lora_embedding_B"].T if is_embedding else kinds["lora_A"]
        b = kinds["lora_embedding_A"].T if is_embedding else kinds["lora_B"]
        magnitude = kinds.get("lora_magnitude_vector")
        # those of an embedding belong to its columns
        magnitudes = [magnitude] if is_embedding or magnitude is None else place.split(magnitude)
        for i, (name, part) in enumerate(zip(place.modules, place.split(b * scale), strict=True)):
            changes[name] |= {"a": a[None], "b": part.T[None]}
            if magnitude is not None:
                changed = base(name) + constant(part) @ constant(a)
                norms = (changed * changed).sum(0 if is_embedding else 1) ** 0.5
                changes[name]["factor"] = (magnitudes[i] / norms - 1.0)[None]
    if "lora_B.bias" in kinds:
        for name, part in zip(place.modules, place.split(kinds["lora_B.bias"] * scale), strict=True):
            changes[name]["bias"] = part[None]
    if "weight" in kinds:
        for name, part in zip(place.modules, place.split(kinds["weight"]), strict=True):
            if part.ndim == 1:
                changes[name]["scale"] = (part - weight_of(f"{name}.scale"))[None]
            else:
                changes[name] |= {"whole": (part - base(name))[None], "whole_slot": np.zeros(1, np.int32)}
    if "bias" in kinds:
        for name, part in zip(place.modules, place.split(kinds["bias"]), strict=True):
            changes[name]["bias"] = (part - weight_of(f"{name}.bias"))[None]
    if "rows" in kinds:
        [name] = place.modules
        ids = np.asarray(next(ids for key, ids in config.trainable_token_indices.items() if matches((key,), module)))
        own = np.zeros((place.rows[0], len(ids)), np.float32)
        own[ids, np.arange(len(ids))] = 1.0
        changes[name] |= {"a": (kinds["rows"] - base(name)[ids])[None], "b": own.T[None]}
    if "base" in kinds:
        for name, part in zip(place.modules, place.split(kinds["base"]), strict=True):
            _check_base(module, part, base(name))
    return changes


def _check_base(module: str, given: Any, held: Any) -> None:
    """Files with a changed embedding repeat the base's, which a checkpoint with more tokens may have replaced."""
    difference, size = np.abs(given - held).max(), np.abs(held).max()
    if difference > 0.1 * size:
        raise ValueError(
            f"the adapter was trained on another {module}: the copy in the adapter's file differs from the model's "
            f"by up to {difference:.2g}, where its largest number is {size:.2g}; load the model that it was trained on"
        )


def _of_all_experts(place: Place, kinds: Mapping[str, Any], scale: float) -> dict[str, dict[str, Any]]:
    """A has the experts outermost in its rows, B has them innermost in its columns."""
    assert place.num_experts is not None
    a = kinds["lora_A"].reshape(place.num_experts, 1, -1, place.columns)
    b = (kinds["lora_B"] * scale).reshape(place.shape[0], -1, place.num_experts)
    parts = place.split(b)
    return {
        name: {"a": a, "b": part.transpose(2, 1, 0)[:, None]} for name, part in zip(place.modules, parts, strict=True)
    }


def _of_some_experts(shape: tuple[int, ...], parts: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    """From (a, scaled b) of some experts; the others have zeros."""
    num_experts, out, columns = shape
    lib = np if all(isinstance(x, np.ndarray) for part in parts.values() for x in part) else jnp  # jnp: while training
    rank = max(a.shape[0] for a, _ in parts.values())
    none = np.zeros((0, columns), np.float32), np.zeros((out, 0), np.float32)
    pairs = [parts.get(expert, none) for expert in range(num_experts)]
    a = lib.stack([lib.pad(one, ((0, rank - len(one)), (0, 0))) for one, _ in pairs])
    b = lib.stack([lib.pad(other, ((0, 0), (0, rank - other.shape[1]))) for _, other in pairs])
    return {"a": a[:, None], "b": b.swapaxes(1, 2)[:, None]}


def merged(
    config: DecoderConfig, params: Mapping[str, Array | QuantizedArray], changes: Mapping[str, Change]
) -> tuple[DecoderConfig, dict[str, Array | QuantizedArray]]:
    """A decoder's parameters with an adapter's changes, and its configuration, in which a tied head may be untied.

    Raises:
      ValueError: a changed weight is quantized, or a bias is not part of the decoder.
    """
    params = dict(params)
    if config.tie_word_embeddings and changes.get("embed") is not changes.get("lm_head"):
        config = dataclasses.replace(config, tie_word_embeddings=False)
        params["lm_head.weight"] = params["embed.weight"]
    for name, change in changes.items():
        if name == "lm_head" and config.tie_word_embeddings:
            continue  # the same as that of the embedding
        for kind, held in _merged_module(change, is_embedding=name == "embed"):
            parameter = f"{name}.{kind}"
            if parameter not in params:
                raise ValueError(
                    f"the adapter adds a bias to {name}, which has none in this model: it cannot be merged"
                )
            before = params[parameter]
            if isinstance(before, QuantizedArray):
                raise ValueError(
                    f"an adapter cannot be merged into quantized weights such as {parameter}: load the model with "
                    "quantization='none', merge, and quantize the result"
                )
            params[parameter] = held(before.astype(np.float32)).astype(before.dtype)
    return config, params


def _merged_module(change: Change, *, is_embedding: bool) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """For each parameter that changes, its kind and the function of it that gives the new one."""

    def weight(held: Array) -> Array:
        if change.a is not None and change.b is not None:
            held = held + jnp.matmul(change.b[..., 0, :, :].mT, change.a[..., 0, :, :], precision="highest")
        if change.whole is not None:
            held = held + change.whole[0]
        if change.factor is not None:
            factor = 1.0 + change.factor[0]
            held = held * (factor if is_embedding else factor[:, None])
        return held

    if change.a is not None or change.whole is not None or change.factor is not None:
        yield "weight", weight
    for kind, added in (("scale", change.scale), ("bias", change.bias)):
        if added is not None:
            yield kind, lambda held, added=added: held + added[0]

"""How each linear layer of a checkpoint is quantized: what `quantization_config` in config.json says.

Sources: quantization/quant_config.py and quant_args.py of compressed-tensors 0.20.0; quantization/config.py of
gptqmodel 7.7.0; FineGrainedFP8Config of transformers 5.24.0.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

_WAY_OUT = "use the unquantized checkpoint or a GGUF file of the model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one weight [out, in] is quantized.

    Attributes:
      method: the quant_method of config.json, for display.
      layout: how its tensors are stored: a key of layouts.LAYOUTS.
      bits: bits per number.
      block: (rows, columns) that share a scale; None: all of them.
      zero_points: whether there must be a tensor of zero points.
      rounds_inputs: the inputs of the layer are rounded to int8, with a scale for each token.
    """

    method: str
    layout: str
    bits: int
    block: tuple[int | None, int | None]
    zero_points: bool = False
    rounds_inputs: bool = False


SchemeOf = Callable[[str], Scheme]


def schemes_of(config: Mapping[str, Any]) -> SchemeOf | None:
    """A function from the name of a module in the file to its scheme; None if config.json has no quantization_config.

    The function raises ValueError if the module is ignored by the configuration, matches none of its groups, or several
    that differ.

    Raises:
      ValueError: a field has a value that is not supported.
    """
    inner = config.get("text_config")
    for source in (config, inner if isinstance(inner, Mapping) else {}):
        if source.get("quantization_config"):
            found = source["quantization_config"]
            break
        if source.get("compression_config"):  # the name that early compressed-tensors used
            found = {"quant_method": "compressed-tensors"} | source["compression_config"]
            break
    else:
        return None
    return _METHODS[_one_of(found, "quant_method", None, *_METHODS)](found)


def _refused(field: str, value: object, reason: str = "is not supported", way_out: str = _WAY_OUT) -> ValueError:
    return ValueError(f"config.json: quantization_config: {field} {value!r} {reason}; {way_out}")


def _one_of(source: Mapping[str, Any], field: str, default: object, *supported: Any, where: str = "") -> Any:
    """The value of a field; raises ValueError unless it is one of these. Strings are compared in lower case."""
    value = source.get(field)
    value = default if value is None else value
    found = value.lower() if isinstance(value, str) else value
    if not any(type(found) is type(one) and found == one for one in supported):
        listed = ", ".join(map(repr, supported))
        raise _refused(f"{where}{field}", value, f"is not supported, only {listed}")
    return found


def _group(source: Mapping[str, Any], where: str = "") -> int | None:
    """group_size; None if one group is as long as a row, which files write as -1."""
    value = source.get("group_size")
    if type(value) is not int or (value < 1 and value != -1):
        raise _refused(f"{where}group_size", value, "must be an integer >= 1, or -1")
    return None if value == -1 else value


# compressed-tensors


_INTEGERS = tuple(range(1, 9))  # stored in int8, whatever their number of bits
_FORMATS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {  # format: {type: (layout, supported num_bits)}
    "pack-quantized": {"int": ("packed", (4, 8))},  # 3, 5, 6, 7: two layouts exist under the same names
    "int-quantized": {"int": ("int8", _INTEGERS)},
    "float-quantized": {"float": ("fp8", (8,))},
    "naive-quantized": {"int": ("int8", _INTEGERS), "float": ("fp8", (8,))},
    "mxfp4-pack-quantized": {"float": ("mxfp4", (4,))},
}


def _compressed_tensors(config: Mapping[str, Any]) -> SchemeOf:
    sparsity = config.get("sparsity_config") or {}
    _one_of(sparsity, "format", "dense", "dense", where="sparsity_config.")
    for field in ("transform_config", "moe_sparsity_config"):
        if config.get(field):
            raise _refused(field, config[field])
    if config.get("kv_cache_scheme"):
        warnings.warn(
            "config.json: kv_cache_scheme is not used: pass kv_dtype to choose a quantized cache", stacklevel=6
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("config_groups", groups, "must have a group")
    ignore = config.get("ignore") or ()
    targets = [
        (target, scheme)
        for name, group in groups.items()
        for scheme in [_scheme_of_group(group, f"config_groups.{name}", config)]
        for target in group["targets"]
    ]
    for pattern in (*ignore, *(target for target, _ in targets)):
        _check_pattern(pattern)

    def scheme_of(module: str) -> Scheme:
        if any(matches(module, pattern) for matches in _MATCHES for pattern in ignore):
            raise ValueError(
                f"{module} is in quantization_config.ignore of config.json, but its tensors are quantized; "
                "use the config.json that belongs to these weights"
            )
        for matches in _MATCHES:
            found = {scheme: target for target, scheme in targets if matches(module, target)}
            if len(found) > 1:
                listed = " and ".join(map(repr, found.values()))
                raise ValueError(
                    f"config.json: quantization_config: {module} matches the targets {listed}, whose weights differ; "
                    "name each layer in the targets of one group"
                )
            if found:
                return next(iter(found))
        raise ValueError(
            f"{module} is quantized, but matches no targets in quantization_config of config.json; "
            "use the config.json that belongs to these weights"
        )

    return scheme_of


# From the most to the least specific, as in utils/match.py of compressed-tensors: name, pattern, class
_MATCHES: tuple[Callable[[str, str], bool], ...] = (
    lambda module, target: module == target,
    lambda module, target: target.startswith("re:") and re.match(target[3:], module) is not None,
    lambda module, target: target == ("Embedding" if module.endswith("embed_tokens") else "Linear"),
)


def _check_pattern(pattern: object) -> None:
    try:
        re.compile(pattern.removeprefix("re:") if isinstance(pattern, str) and pattern.startswith("re:") else "")
    except re.error as error:
        raise _refused("pattern", pattern, f"is no regular expression ({error})") from None
    if not isinstance(pattern, str):
        raise _refused("pattern", pattern, "must be a string")


def _scheme_of_group(group: Any, where: str, config: Mapping[str, Any]) -> Scheme:
    if not isinstance(group, Mapping) or not group.get("targets") or not group.get("weights"):
        raise _refused(where, group, "must have targets and weights", "write the scheme out, or " + _WAY_OUT)
    weights, inputs = group["weights"], group.get("input_activations") or {}
    in_weights = f"{where}.weights."
    # a group's own format counts before the common one, which may be "mixed-precision"
    source = group if group.get("format") else config
    types = _FORMATS[_one_of(source, "format", None, *_FORMATS)]
    kind = _one_of(weights, "type", "int", *types, where=in_weights)
    layout, bits = types[kind]
    _one_of(weights, "dynamic", False, False, where=in_weights)
    _one_of(weights, "actorder", False, False, "weight", "static", where=in_weights)
    block = _block_of(weights, in_weights)
    per_row = layout == "int8" and block[0] in (1, None) and block[1] is None
    per_token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    rounds = {"num_bits": 8, "type": "int", "symmetric": True} | inputs
    return Scheme(
        method="compressed-tensors",
        layout=layout,
        bits=_one_of(weights, "num_bits", 8, *bits, where=in_weights),
        block=block,
        zero_points=not _one_of(
            weights, "symmetric", True, True, *([False] if kind == "int" else []), where=in_weights
        ),
        rounds_inputs=per_row and all(rounds.get(key) == value for key, value in per_token.items()),
    )


def _block_of(weights: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """The rows and columns that share a scale."""
    unstated = "tensor" if weights.get("group_size") is None else "channel" if weights["group_size"] == -1 else "group"
    strategy = _one_of(weights, "strategy", unstated, "tensor", "channel", "group", "block", where=where)
    if strategy == "block":
        return _block(weights, "block_structure", where)
    if strategy == "group":
        return 1, _group(weights, where)
    return (1, None) if strategy == "channel" else (None, None)


def _block(source: Mapping[str, Any], field: str, where: str = "") -> tuple[int, int]:
    value = source.get(field)
    if isinstance(value, str):  # "128x128"
        value = [int(n) for n in value.split("x") if n.isdecimal()]
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise _refused(where + field, source.get(field), "must be two integers >= 1")
    return value[0], value[1]


# The other methods have one scheme for all layers.


def _gptq(config: Mapping[str, Any]) -> SchemeOf:
    field = "checkpoint_format" if config.get("checkpoint_format") else "format"
    layout = _one_of(config, field, "gptq", "gptq", "gptq_v2")
    _one_of(config, "pack_dtype", "int32", "int32")
    for pattern, changes in (config.get("dynamic") or {}).items():
        for changed in ("bits", "group_size", field, "pack_dtype"):
            if changed in (changes or {}) and changes[changed] != config.get(changed):
                raise _refused(f"dynamic {pattern!r}: {changed}", changes[changed], "differs from the other layers'")
    scheme = Scheme(
        method="gptq",
        layout=layout,
        bits=_one_of(config, "bits", None, 4, 8),
        block=(1, _group(config)),
        zero_points=True,
    )
    return lambda module: scheme


def _awq(config: Mapping[str, Any]) -> SchemeOf:
    field = next((name for name in ("version", "checkpoint_format", "format") if config.get(name)), "version")
    _one_of(config, field, "gemm", "gemm")
    _one_of(config, "zero_point", True, True)
    bits = _one_of(config, "bits", None, 4)
    scheme = Scheme(method="awq", layout="awq", bits=bits, block=(1, _group(config)), zero_points=True)
    return lambda module: scheme


def _fp8(config: Mapping[str, Any]) -> SchemeOf:
    _one_of(config, "fmt", "e4m3", "e4m3")
    _one_of(config, "expert_dtype", "fp8", "fp8")
    block = _block(config, "weight_block_size") if config.get("weight_block_size") else (None, None)
    scheme = Scheme(method="fp8", layout="fp8", bits=8, block=block)
    return lambda module: scheme


_METHODS: dict[str, Callable[[Mapping[str, Any]], SchemeOf]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
}

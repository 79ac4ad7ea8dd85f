"""Reads and writes adapters in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

An adapter is kept as its file has it, a few tensors for each module under the module's Hugging Face name; `changes_of`
turns them into what a decoder applies. Every tensor of a file is used, and every one that its configuration asks for
must be there: PEFT itself drops what it cannot place.

Source: the behavior of peft 0.21.2.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jfa_models.checkpoints.locate import download_adapter
from jfa_models.checkpoints.lora_config import LoraConfig, lora_config, matches
from jfa_models.checkpoints.names import PREFIX
from jfa_models.checkpoints.places import Place, all_modules, experts_of, place_of, places_of_experts, spellings
from jfa_models.checkpoints.safetensors import read_header
from jfa_models.model.config import DecoderConfig
from jfa_models.text.files import read_json, write_json

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"

# In the name of a tensor, after the module: the adapter's own name may stand in it.
_LORA = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?"
)
_ROWS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
_BASE = re.compile(r"(.+)\.base_layer\.(weight|bias)")
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save)?(?:\.default)?\.(weight|bias)")
_WRITTEN = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "base": "base_layer.weight"}
_WRITTEN |= {"rows": "token_adapter.trainable_tokens_delta"}

Tensors = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as it is stored.

    Attributes:
      tensors: by module (its Hugging Face name without "model."), then kind: lora_A [r, in], lora_B [out, r],
        lora_B.bias [out], lora_magnitude_vector [out]; for an embedding lora_embedding_A [r, vocab] and
        lora_embedding_B [hidden, r]; weight and bias of a module that is replaced; of an embedding also rows,
        which trainable_token_indices replace, and base, a copy of what the adapter was trained on.
      path: where it was read from, for messages.
    """

    config: LoraConfig
    tensors: Tensors
    path: Path | None = None

    def for_base(self, name: str) -> "Adapter":
        """With the name of the model that it belongs to."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, base_model_name_or_path=name))

    @property
    def num_params(self) -> int:
        """Numbers in all its tensors."""
        return sum(math.prod(x.shape) for kinds in self.tensors.values() for x in kinds.values())


def read_adapter(path: str | Path, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Reads an adapter for a decoder.

    Args:
      path: a folder, or a Hugging Face repository, "owner/name".
      shapes: of the decoder's parameters by name.

    Raises:
      ValueError: there is no adapter, it is of a kind that is not supported, or it does not fit the decoder; the
        message names the fields or tensors.
    """
    folder = _locate(path)
    lora = lora_config(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    tensors = _grouped(folder / TENSOR_FILE)
    adapter = Adapter(config=lora, tensors=tensors, path=folder)
    check_fit(adapter, config, shapes)
    return adapter


def save_adapter(folder: Path, adapter: Adapter, *, prefix: str = "model.") -> None:
    """Writes a folder that PEFT and read_adapter can load. Tensors are float32, as PEFT writes them.

    prefix: Family.prefix of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, kinds in adapter.tensors.items():
        for kind, x in kinds.items():
            before = "" if module == "lm_head" else prefix
            inside = "base_layer." if kind == "bias" and "lora_A" in kinds else ""
            name = f"base_model.model.{before}{module}.{inside}{_WRITTEN.get(kind, kind)}"
            tensors[name] = np.ascontiguousarray(x, np.float32)
    about = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(adapter.config).items()}
    patterns = ("rank_pattern", "alpha_pattern")  # the others that are empty must be null
    about = {name: x if x or name in patterns or x in (False, 0) else None for name, x in about.items()}
    write_json(folder / CONFIG_FILE, {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True} | about)
    save_file(tensors, folder / TENSOR_FILE, {"format": "pt"})


def _locate(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir() or not isinstance(path, str):
        missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not (folder / name).exists()]
        if (folder / "adapter_model.bin").exists() and missing == [TENSOR_FILE]:
            raise ValueError(
                f"{folder} has only pickled weights (adapter_model.bin), which may execute code when they are loaded; "
                "convert them to safetensors (with save_pretrained of PEFT)"
            )
        if missing:
            raise ValueError(f"{folder} is not an adapter of PEFT: it lacks {' and '.join(missing)}")
        return folder
    return _locate(download_adapter(path))


def _grouped(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a file by module and kind, float32."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for stored in read_header(file).values():
        name = stored.name.removeprefix("base_model.model.")
        name = name.removeprefix(PREFIX.match(name)[0])  # type: ignore[index]
        if match := _LORA.fullmatch(name):
            module, kind = match[1], match[2] + (".bias" if match[3] == "bias" else "")
        elif match := _ROWS.fullmatch(name):
            module, kind = match[1], "rows"
        elif match := _BASE.fullmatch(name):
            module, kind = match[1], "base" if match[2] == "weight" else "bias"
        elif match := _WHOLE.fullmatch(name):
            module, kind = match[1], match[2]
        else:
            raise ValueError(f"{file}: {stored.name} is not a tensor of LoRA")
        if kind in found.setdefault(module, {}):
            raise ValueError(f"{file} has {kind} of {module} twice; one of them is {stored.name}")
        found[module][kind] = stored.read(np.float32)
    return found


def check_fit(adapter: Adapter, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless every tensor of an adapter has a place in a decoder, and none is missing."""
    lora, problems = adapter.config, []
    places: dict[tuple[str, ...], tuple[Place, Mapping[str, Any]]] = {}  # by our modules
    owners: dict[str, list[tuple[int | None, str]]] = {}  # experts and names, by our module
    for module, kinds in adapter.tensors.items():
        place = place_of(module, kinds, config, shapes)
        if place is None:
            problems.append(_why_no_place(module, kinds, lora, shapes))
            continue
        if place.expert is None:
            places[place.modules] = (place, kinds)
        for ours in place.modules:
            for expert, other in owners.setdefault(ours, []):
                if expert == place.expert or None in (expert, place.expert):
                    problems.append(f"{other} and {module} are the same module")
            owners[ours].append((place.expert, module))
        expected = _expected_shapes(place, module, kinds, lora)
        problems += _mixtures(place, module, kinds, lora)
        for kind in sorted(expected.keys() | kinds.keys()):
            if kind not in kinds:
                problems.append(f"{module} lacks {kind}")
            elif kind == "bias" and not place.has_bias:
                problems.append(f"{module} has bias, but that of the model has none")
            elif kind not in expected:
                problems.append(f"{module} has {kind}, which adapter_config.json does not ask for")
            elif tuple(kinds[kind].shape) != expected[kind]:
                got = list(kinds[kind].shape)
                problems.append(f"{kind} of {module} has shape {got}, the model needs {list(expected[kind])}")
    if not adapter.tensors:
        problems.append("it has no tensors")
    problems += _missing(lora, places, config, shapes)
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ValueError(
            f"{adapter.path or 'the adapter'} does not fit the model ({config.architecture}), and may belong to "
            f"{lora.base_model_name_or_path or 'another one'}: {shown}"
        )


def _why_no_place(
    module: str, kinds: Mapping[str, Any], lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
) -> str:
    wanted = ("lora_A", "lora_B")
    places = places_of_experts(module, shapes) if {*wanted} & kinds.keys() else []
    if not places:
        return f"{module} ({', '.join(kinds)}) is not part of the model"
    if missing := [kind for kind in wanted if kind not in kinds]:
        return f"{module} lacks {missing[0]}"
    given = " and ".join(f"{kind} {list(kinds[kind].shape)}" for kind in wanted)
    fitting = []
    for place in places:
        a, b = (list(shape) for shape in _expected_shapes(place, module, kinds, lora).values())
        fitting.append(f"{place.theirs.rpartition('.')[2]} {a} and {b}")
    return f"{module} has {given}, but the model needs for {' or for '.join(fitting)}"


def _mixtures(place: Place, module: str, kinds: Mapping[str, Any], lora: LoraConfig) -> Iterator[str]:
    """The problems of a module whose tensors cannot be applied together, or not there."""
    has_parts = any(kind.startswith("lora_") for kind in kinds)
    if place.expert is not None and (kinds.keys() != {"lora_A", "lora_B"} or lora.use_dora or lora.lora_bias):
        yield f"{module} is one expert's, which can have lora_A and lora_B only, without DoRA"
    elif place.num_experts is not None and (lora.use_dora or lora.lora_bias):
        yield f"{module} is of experts, which PEFT changes by lora_A and lora_B only, without DoRA and lora_bias"
    elif place.is_norm and has_parts:
        yield f"{module} is a norm, and cannot have low-rank parts"
    changes = ["low-rank parts"] * has_parts + [kind for kind in ("weight", "rows") if kind in kinds]
    if len(changes) > 1:
        yield f"{module} has both {changes[0]} and {changes[1]}, which is not supported"


def _missing(
    lora: LoraConfig,
    places: Mapping[tuple[str, ...], tuple[Place, Mapping[str, Any]]],
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[str]:
    """What the configuration asks for and the tensors lack, and low-rank parts that it does not ask for."""
    for module, place in all_modules(config, shapes):
        if place.num_experts is not None:
            continue
        given, kinds = places.get(place.modules, (place, {}))
        has_parts = any(kind.startswith("lora_") for kind in kinds)
        if _is_saved(lora, module) and not place.is_tied_head and "weight" not in kinds:
            yield f"{module} is one of modules_to_save, but no tensors replace it"
        if place.is_norm:
            continue
        wanted = [
            name
            for name, is_wanted in (
                ("target_modules", lora.targets(given.theirs)),
                ("target_parameters", _is_parameter(lora, given, config)),
            )
            if is_wanted
        ]
        if wanted and not has_parts:
            yield f"{module} is one of {wanted[0]}, but has no tensors"
        if has_parts and not wanted:
            yield f"{module} has tensors, but is not one of target_modules"
        if place.has_bias and "bias" not in kinds and _asks_for_bias(lora, given):
            yield f"{module} lacks bias, which bias={lora.bias!r} asks for"
    experts = [place for _, of_layer in experts_of(config, shapes) for place in of_layer]
    modules = [place for _, place in all_modules(config, shapes)]
    older = [place for place in modules if place.num_experts is not None]
    others = [place.parameter for place in modules if place.num_experts is None]
    # a name that fits nothing else is one of them even if none has tensors
    of_older = [x for x in lora.target_parameters if not any(matches((x,), other) for other in others)]
    is_older = any(place in older for place, _ in places.values())
    is_older = is_older or any(matches(of_older, place.parameter) for place in older)
    for place in older if is_older else experts:
        given, kinds = places.get(place.modules, (place, {}))
        wanted = _is_parameter(lora, given, config)
        if wanted != bool(kinds):
            name = given.theirs.removeprefix("model.")
            is_one = "is one of target_parameters, but has no tensors"
            yield f"{name} {is_one if wanted else 'has tensors, but is not one of target_parameters'}"
    for name, ids in lora.trainable_token_indices.items():
        found = [place for place, kinds in places.values() if "rows" in kinds and matches((name,), place.theirs)]
        if not found:
            yield f"{name} is one of trainable_token_indices, but no tensors replace its rows"
        elif ids and max(ids) >= found[0].shape[0]:
            yield f"trainable_token_indices has {max(ids)}, but {name} has {found[0].shape[0]} rows"


def _is_parameter(lora: LoraConfig, place: Place, config: DecoderConfig) -> bool:
    """Whether target_parameters asks for a place's weight, under one of its names."""
    return any(matches(lora.target_parameters, name) for name in spellings(place.parameter, config))


def _is_saved(lora: LoraConfig, module: str) -> bool:
    """Whether modules_to_save asks for a module or one around it: PEFT compares ends of names, also within a part."""
    around = itertools.accumulate(module.split("."), "{}.{}".format)
    return any(one.endswith(name) for one in around for name in lora.modules_to_save)


def _asks_for_bias(lora: LoraConfig, place: Place) -> bool:
    return lora.bias == "all" or (lora.bias == "lora_only" and lora.targets(place.theirs))


def _expected_shapes(
    place: Place, module: str, kinds: Mapping[str, Any], lora: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """The tensors that must be there if those of the given kinds are."""
    (out, columns), rank = place.shape, lora.rank(place.theirs)
    expected: dict[str, tuple[int, ...]] = {}
    if place.num_experts is not None:
        return {"lora_A": (place.num_experts * rank, columns), "lora_B": (out, place.num_experts * rank)}
    # PEFT also writes embeddings whose size was changed
    if "weight" in kinds and (_is_saved(lora, module) or module in ("embed_tokens", "lm_head")):
        expected["weight"] = (out,) if place.is_norm else (out, columns)
    if "bias" in kinds and (_is_saved(lora, module) or _asks_for_bias(lora, place)):
        expected["bias"] = (out,)
    if "rows" in kinds:
        for name, ids in lora.trainable_token_indices.items():
            if matches((name,), module):
                expected["rows"] = (len(ids), columns)
    if "base" in kinds:
        expected["base"] = (out, columns)
    if not any(kind.startswith("lora_") for kind in kinds):
        return expected
    if module == "embed_tokens":
        expected |= {"lora_embedding_A": (rank, out), "lora_embedding_B": (columns, rank)}
    else:
        expected |= {"lora_A": (rank, columns), "lora_B": (out, rank)}
        expected |= {"lora_B.bias": (out,)} if lora.lora_bias else {}
    if lora.use_dora:
        expected["lora_magnitude_vector"] = (columns if module == "embed_tokens" else out,)
    return expected

"""Reads and writes adapters in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

An adapter is kept as its file has it, a few tensors for each module under the module's Hugging Face name; `changes_of`
turns them into what a decoder applies. Every tensor of a file is used, and every one that its configuration asks for
must be there: PEFT itself drops what it cannot place.

Source: the behavior of peft 0.21.2.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jfa_models.checkpoints.families import Names, hugging_face_names
from jfa_models.checkpoints.locate import download_adapter
from jfa_models.checkpoints.lora_config import LoraConfig, lora_config, matches
from jfa_models.checkpoints.names import PREFIX, our_modules
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
# The weights of all experts in one parameter, of which a module can have two.
_EXPERTS = re.compile(r"layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts(?:\.base_layer)?")

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


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Writes a folder that PEFT and read_adapter can load. Tensors are float32, as PEFT writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, kinds in adapter.tensors.items():
        for kind, x in kinds.items():
            prefix = "" if module == "lm_head" else "model."
            inside = "base_layer." if kind == "bias" and "lora_A" in kinds else ""
            name = f"base_model.model.{prefix}{module}.{inside}{_WRITTEN.get(kind, kind)}"
            tensors[name] = np.ascontiguousarray(x, np.float32)
    about = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(adapter.config).items()}
    patterns = ("rank_pattern", "alpha_pattern")  # the others that are empty must be null
    about = {name: x if x or name in patterns or x is False else None for name, x in about.items()}
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the tensors of a module go: our modules, and how many rows of the stored weight each has.

    Attributes:
      columns: of the weight; 1 for a norm.
      expert: the number of the expert whose weight it is.
      num_experts: of a module that has one parameter for all experts.
      theirs: the full name, as patterns see it.
    """

    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    theirs: str
    expert: int | None = None
    num_experts: int | None = None
    is_tied_head: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.columns

    def split(self, x: Any, axis: int = 0) -> list[Any]:
        """The part of each of our modules."""
        ends = np.cumsum(self.rows)
        parts = [slice(end - n, end) for end, n in zip(ends, self.rows, strict=True)]
        return [x[(slice(None),) * axis + (part,)] for part in parts]


def place_of(
    module: str, kinds: Mapping[str, Any], config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Place | None:
    """None: the decoder has no such module."""
    table = hugging_face_names(config.architecture)
    theirs = module if module == "lm_head" else f"model.{module}"
    if (match := _EXPERTS.fullmatch(module)) and "lora_A" in kinds:
        mlp = f"layers.{match[1]}.mlp"
        for modules, name in (((f"{mlp}.gate", f"{mlp}.up"), "gate_up_proj"), ((f"{mlp}.down",), "down_proj")):
            found = [shapes.get(f"{one}.weight", ()) for one in modules]
            if any(len(shape) != 3 for shape in found):
                return None
            num_experts, _, columns = found[0]
            place = Place(
                modules=modules,
                rows=tuple(shape[1] for shape in found),
                columns=columns,
                num_experts=num_experts,
                theirs=f"{theirs.removesuffix('.base_layer')}.{name}",
            )
            # the name does not tell which of the two parameters it is
            if (kinds["lora_A"].shape[1], kinds["lora_B"].shape[0]) == (columns, sum(place.rows)):
                return place
        return None
    modules, expert = our_modules(module, table)
    if not modules:
        return None
    if module == "lm_head" and "lm_head.weight" not in shapes:  # tied to the embedding
        rows, columns = shapes["embed.weight"]
        return Place(modules=("lm_head",), rows=(rows,), columns=columns, is_tied_head=True, theirs=theirs)
    found: list[tuple[int, ...]] = [shapes.get(f"{one}.weight", shapes.get(f"{one}.scale", ())) for one in modules]
    if not all(found) or any((len(shape) == 3) != (expert is not None) for shape in found):
        return None
    rows = tuple(next(iter(shape[-2:])) for shape in found)
    columns = found[0][-1] if len(found[0]) > 1 else 1  # of a norm
    return Place(modules=modules, rows=rows, columns=columns, expert=expert, theirs=theirs)


def check_fit(adapter: Adapter, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless every tensor of an adapter has a place in a decoder, and none is missing."""
    lora, problems = adapter.config, []
    for module, kinds in adapter.tensors.items():
        place = place_of(module, kinds, config, shapes)
        if place is None:
            problems.append(f"{module} ({', '.join(kinds)}) is not part of the model")
            continue
        expected = _expected_shapes(place, module, kinds, lora)
        for kind in sorted(expected.keys() | kinds.keys()):
            if kind not in kinds:
                problems.append(f"{module} lacks {kind}")
            elif kind not in expected:
                problems.append(f"{module} has {kind}, which adapter_config.json does not ask for")
            elif tuple(kinds[kind].shape) != expected[kind]:
                got = list(kinds[kind].shape)
                problems.append(f"{kind} of {module} has shape {got}, the model needs {list(expected[kind])}")
    for module in linear_modules(config, shapes):
        has_parts = any(kind.startswith("lora_") for kind in adapter.tensors.get(module, ()))
        wanted = lora.targets(module if module == "lm_head" else f"model.{module}")
        if wanted and not has_parts:
            problems.append(f"{module} is one of target_modules, but has no tensors")
        if has_parts and not wanted and not lora.target_parameters:
            problems.append(f"{module} has tensors, but is not one of target_modules")
    if not adapter.tensors:
        problems.append("it has no tensors")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ValueError(
            f"{adapter.path or 'the adapter'} does not fit the model ({config.architecture}), and may belong to "
            f"{lora.base_model_name_or_path or 'another one'}: {shown}"
        )


def _expected_shapes(
    place: Place, module: str, kinds: Mapping[str, Any], lora: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """The tensors that must be there if those of the given kinds are."""
    (out, columns), rank = place.shape, lora.rank(place.theirs)
    is_norm = columns == 1 and place.modules[0].endswith("norm")
    expected: dict[str, tuple[int, ...]] = {}
    if place.num_experts is not None:
        return {"lora_A": (place.num_experts * rank, columns), "lora_B": (out, place.num_experts * rank)}
    if "weight" in kinds or "bias" in kinds:
        expected |= {"weight": (out,) if is_norm else (out, columns)} if "weight" in kinds else {}
        expected |= {"bias": (out,)} if "bias" in kinds else {}
    if "rows" in kinds:
        ids = next((ids for name, ids in lora.trainable_token_indices.items() if matches((name,), module)), ())
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


def linear_modules(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The Hugging Face names of the modules that can have low-rank parts, except experts, without "model."."""
    table: Names = hugging_face_names(config.architecture)
    for theirs in table:
        if "*" in theirs or theirs.endswith("norm"):
            continue
        for layer in range(config.num_layers) if "#" in theirs else (0,):
            module = theirs.replace("#", str(layer))
            if place_of(module, {}, config, shapes) is not None:
                yield module

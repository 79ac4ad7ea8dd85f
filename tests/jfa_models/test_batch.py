"""Files of prompts: each line gets exactly one result, also after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from golden import GOLDEN
from tiny_model import folder_with_text

from jfa_models import Engine, SamplingParams, batch, from_pretrained

GREEDY = SamplingParams(temperature=0.0, max_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_with_text(GOLDEN / "llama3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(from_pretrained(folder), max_num_seqs=4, num_pages=33, page_size=4, max_num_batched_tokens=32)


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def results(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_each_line_gets_its_result_with_its_own_params(engine, tmp_path):
    prompts = written(
        tmp_path / "in",
        {"prompt": "Hi", "id": "first"},
        "",
        {"prompt_token_ids": [70, 71], "max_tokens": 2},
        {"prompt": "two", "n": 2, "temperature": 1.0, "seed": 4},
    )
    output = tmp_path / "out"
    lines = batch.read(prompts)
    assert len(list(batch.run(engine, lines, output, GREEDY))) == 3
    first, second, third = sorted(results(output), key=lambda one: one["line"])
    [want] = engine.model.generate("Hi", GREEDY)
    assert first == {
        "line": 1,
        "id": "first",
        "prompt": "Hi",
        "text": want.outputs[0].text,
        "token_ids": list(want.outputs[0].token_ids),
        "finish_reason": "length",
    }
    assert second["line"] == 3 and second["prompt_token_ids"] == [70, 71] and len(second["token_ids"]) == 2
    assert third["line"] == 4 and len(third["outputs"]) == 2


def test_log_probabilities_that_are_not_numbers_become_null(folder, tmp_path):
    model = from_pretrained(folder)
    model.params = tuple(jnp.full_like(x, jnp.nan) if x.ndim == 1 else x for x in model.params)
    engine = Engine(model, max_num_seqs=4, num_pages=33, page_size=4, max_num_batched_tokens=32)
    lines = batch.read(written(tmp_path / "in", {"prompt_token_ids": [70, 71], "prompt_logprobs": 0, "logprobs": 0}))
    list(batch.run(engine, lines, tmp_path / "out", GREEDY))
    [result] = results(tmp_path / "out")
    assert result["error"].startswith("the logits are not finite")
    assert result["prompt_logprobs"] == [None, {"71": None}] and result["logprobs"] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("oops", "not valid JSON: Expecting value"),
        ('{"prompt": "x", "id": 1e999}', "not valid JSON: the number 1e999 is too large"),
        pytest.param("[" * 100_000, "not valid JSON: ", id="nested"),
        ('{"prompt": "x", "id": NaN}', "not valid JSON: JSON has no NaN"),
        ("[1]", "must be a JSON object with either prompt or prompt_token_ids"),
        ({"prompt": "x", "prompt_token_ids": [5]}, "must be a JSON object with either prompt or prompt_token_ids"),
        ({"prompt": "x", "temprature": 1}, "unknown fields temprature; allowed are id, adapter and the fields of"),
        ({"prompt": "x", "temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 5}, "prompt must be a string, got 5; pass token ids as prompt_token_ids"),
        ({"prompt_token_ids": None}, "prompt_token_ids must be a list of integers, got None"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids must be a list of integers, got 'ab'"),
        ({"prompt": "x" * 200}, "the prompt has 200 tokens and max_tokens is 5, together more than max_model_len=128"),
    ],
)
def test_a_line_that_cannot_be_served_gets_an_error_as_its_result(engine, tmp_path, line, message):
    prompts = written(tmp_path / "in", {"prompt": "Hi"}, line)
    found = list(batch.run(engine, batch.read(prompts), tmp_path / "out", GREEDY))
    assert [one["line"] for one in found] == [2, 1]
    assert found[0]["error"].startswith(message) and "text" in found[1]


def test_finished_lines_are_skipped_and_a_truncated_line_is_removed(engine, tmp_path):
    lines = batch.read(written(tmp_path / "in", *({"prompt": f"{i}"} for i in range(4))))
    output = tmp_path / "out"
    assert batch.done(output, lines) == set()
    list(batch.run(engine, lines[:2], output, GREEDY))
    whole = output.read_text()
    output.write_text(whole + '{"line": 3, "prom')
    assert batch.done(output, lines) == {1, 2} and output.read_text() == whole
    output.write_text('{"li')
    assert batch.done(output, lines) == set() and output.read_text() == ""


def test_results_of_another_batch_are_not_continued(tmp_path):
    lines = batch.read(written(tmp_path / "in", {"prompt": "a"}))
    output = written(tmp_path / "out", {"line": 1, "prompt": "b", "text": ""})
    with pytest.raises(ValueError, match="has the results of another batch: the prompt of line 1 differs; use another"):
        batch.done(output, lines)
    for other in ({"line": 2}, {"prompt": "a"}, "no json"):
        with pytest.raises(ValueError, match="contains a line that is not a result of this batch"):
            batch.done(written(output, other), lines)


def test_any_character_is_written_and_read_back(engine, tmp_path):
    asked = [{"prompt": f"a{separator}b", "id": "\ud800"} for separator in ("\u2028", "\x85", "\x1e", "\ud800")]
    lines = batch.read(written(tmp_path / "in", *asked, '{"prompt": "raw \u2028 line"}'))
    output = tmp_path / "out"
    list(batch.run(engine, lines, output, GREEDY))
    assert batch.done(output, lines) == {1, 2, 3, 4, 5}
    assert sum("error" in one for one in results(output)) <= 1


def test_a_line_may_have_all_sampling_parameters(engine, tmp_path):
    asked = {"prompt": "Hi", "logit_bias": {"70": 90}, "logprobs": 1, "prompt_logprobs": 0, "stop_token_ids": [70]}
    [result] = batch.run(engine, batch.read(written(tmp_path / "in", asked)), tmp_path / "out", GREEDY)
    assert result["token_ids"] == [70] and result["stop_reason"] == 70 and result["cumulative_logprob"] < 0
    assert 70 in result["logprobs"][0] and result["prompt_logprobs"][0] is None and len(result["prompt_logprobs"]) == 2
    assert results(tmp_path / "out")[0]["logprobs"][0].keys() == {str(i) for i in result["logprobs"][0]}


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.soak), signal.SIGKILL])
def test_an_interrupted_command_resumes_where_it_stopped(folder, tmp_path, how):
    count = 30
    prompts = written(tmp_path / "in", *({"prompt": f"prompt {i}", "max_tokens": 20} for i in range(count)))
    output = tmp_path / "out"
    # a shell starts background jobs with SIGINT ignored, which the processes that tests start would inherit
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program += "; from jfa_models import cli; cli.main()"
    command = [sys.executable, "-c", program, "generate", "--model", str(folder), "--max-num-seqs", "2"]
    command += ["--batch-file", str(prompts), "--output", str(output)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not output.exists() or output.read_text().count("\n") < 3:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    first.send_signal(how)
    _, said = first.communicate()
    early = results(output)[:3]
    if how is signal.SIGINT:
        assert first.returncode == 130 and "run the same command again to continue" in said
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    found = results(output)
    assert sorted(one["line"] for one in found) == list(range(1, count + 1))
    assert found[:3] == early and all(len(one["token_ids"]) <= 20 for one in found)

"""Several processes that run one batch, each with some of the devices."""

import contextlib
import json
import signal
import time
import urllib.request

import numpy as np
import pytest
from click.testing import CliRunner
from golden import GOLDEN
from together import COMMAND, ended, free_port, started

from jfa_models import processes
from jfa_models.cli import commands

FILES = ["--batch-file", "in.jsonl", "--output", "out.jsonl"]


def start(count, folder, *options, own=lambda i: (), command="generate", devices=1):
    """The commands of all processes, running."""
    joined = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", count]
    arguments = [[command, *options, *joined, "--process-id", i, *own(i)] for i in range(count)]
    return started(COMMAND, folder, arguments, devices)


def batch(folder, lines, max_tokens):
    rows = np.load(GOLDEN / "llama3.npz")["input_ids"].tolist()
    given = [dict(prompt_token_ids=rows[i % 2][: 3 + i % 9], max_tokens=max_tokens + i % 3) for i in range(lines)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line | {"ignore_eos": True}) + "\n" for line in given))
    return ["--model", str(GOLDEN / "llama3"), "--max-num-seqs", "4", "--temperature", "0"]


def results(folder, name):
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    assert len({line["line"] for line in lines}) == len(lines)
    return {line["line"]: line["token_ids"] for line in lines}


def alone(folder, options):
    files = ["--batch-file", str(folder / "in.jsonl"), "--output", str(folder / "one.jsonl")]
    done = CliRunner().invoke(commands, ["generate", *options, *files])
    assert done.exit_code == 0, done.stderr
    return results(folder, "one.jsonl")


@pytest.mark.exhaustive
@pytest.mark.soak
@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_of_several_processes(tmp_path, count):
    options = batch(tmp_path, lines=5, max_tokens=4)
    divided = [*FILES, "--tensor-parallel", str(count)]
    done = ended(start(count, tmp_path, *options, *divided))
    assert [code for *_, code in done] == [0] * count, done
    assert "5 results written to out.jsonl" in done[0][1] and "written" not in done[1][1]
    assert results(tmp_path, "out.jsonl") == alone(tmp_path, options)


@pytest.mark.exhaustive
@pytest.mark.soak
def test_a_batch_goes_on_after_a_process_was_killed(tmp_path):
    options = batch(tmp_path, lines=60, max_tokens=30)
    divided = [*FILES, "--tensor-parallel", "2"]
    running = start(2, tmp_path, *options, *divided)
    output = tmp_path / "out.jsonl"
    while not (output.exists() and output.stat().st_size):
        assert running[0].poll() is None
        time.sleep(0.05)
    running[1].send_signal(signal.SIGKILL)
    [(_, told, code), _] = ended(running)
    assert code == 2 and "jfa: process 0: a step failed: another process or a device is gone" in told
    assert 0 < len(output.read_text().splitlines()) < 60
    assert [code for *_, code in ended(start(2, tmp_path, *options, *divided))] == [0, 0]
    assert results(tmp_path, "out.jsonl") == alone(tmp_path, options)


MESHES = [(2, 2, "data=2,tensor=2"), (2, 2, "data=4"), (4, 1, "data=2,tensor=2")]


@pytest.mark.exhaustive
@pytest.mark.soak
@pytest.mark.parametrize(("count", "devices", "mesh"), MESHES)
def test_replicas_of_several_processes_share_a_batch(tmp_path, count, devices, mesh):
    options = batch(tmp_path, lines=9, max_tokens=4)
    done = ended(start(count, tmp_path, *options, *FILES, "--mesh", mesh, devices=devices))
    assert [code for *_, code in done] == [0] * count, done
    assert "9 results written to out.jsonl" in done[0][1] and not any(told for _, told, _ in done[1:])
    assert results(tmp_path, "out.jsonl") == alone(tmp_path, options)


@pytest.mark.exhaustive
@pytest.mark.soak
@pytest.mark.parametrize("victim", [1, 3])
def test_a_batch_of_replicas_goes_on_after_a_process_was_killed(tmp_path, victim):
    """All end with one line, also those whose replica has lost no process."""
    options = [*batch(tmp_path, lines=90, max_tokens=30), *FILES, "--mesh", "data=2,tensor=2"]
    running = start(4, tmp_path, *options)
    output = tmp_path / "out.jsonl"
    while not (output.exists() and output.stat().st_size):
        assert running[0].poll() is None
        time.sleep(0.05)
    running[victim].send_signal(signal.SIGKILL)
    for i, (_, told, code) in enumerate(ended(running)):
        lines = told.splitlines()
        assert i == victim or (code == 2 and len(lines) == 1 and "start all again" in lines[0]), told
    assert 0 < len(output.read_text().splitlines()) < 90
    assert [code for *_, code in ended(start(4, tmp_path, *options))] == [0] * 4
    assert results(tmp_path, "out.jsonl") == alone(tmp_path, options[: -len(FILES) - 2])


@pytest.mark.exhaustive
@pytest.mark.soak
def test_a_mesh_that_cuts_replicas_is_refused(tmp_path):
    options = [*batch(tmp_path, lines=2, max_tokens=4), *FILES, "--mesh", "tensor=2,data=2"]
    for _, told, code in ended(start(2, tmp_path, *options, devices=2)):
        assert code == 2 and "replica 0 of the axis 'data' is on processes 0, 1, and replica 1 on 0, 1" in told


@pytest.mark.exhaustive
@pytest.mark.soak
def test_other_arguments_are_named_in_all_processes(tmp_path):
    options = [*batch(tmp_path, lines=2, max_tokens=4), *FILES, "--tensor-parallel", "2"]
    for _, told, code in ended(start(2, tmp_path, *options, own=lambda i: ("--max-num-seqs", str(4 + i)))):
        assert code == 2 and "process 1 has max_num_seqs=5, and process 0 4: start all processes with" in told


@pytest.mark.exhaustive
@pytest.mark.soak
def test_a_server_of_several_processes(tmp_path):
    """The first process serves; all end with it, and it with them."""
    row = np.load(GOLDEN / "llama3.npz")["input_ids"].tolist()[0]
    truth = np.load(GOLDEN / "llama3.npz")["greedy"].tolist()[0]
    port = free_port()
    options = f"--model {GOLDEN / 'llama3'} --port {port} --tensor-parallel 2 --warm-up none --max-num-seqs 2"
    for way in (signal.SIGTERM, signal.SIGKILL):
        running = start(2, tmp_path, *options.split(), command="serve")
        with running[0].stdout as told:
            assert any("jfa serves" in line for line in told)
            asked = json.dumps(dict(prompt=row, max_tokens=16, temperature=0, logprobs=0, ignore_eos=True)).encode()
            for _ in range(2):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", asked)
                request.add_header("content-type", "application/json")
                [choice] = json.load(urllib.request.urlopen(request, timeout=120))["choices"]
                assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in truth]
            running[0 if way == signal.SIGTERM else 1].send_signal(way)
            if way == signal.SIGTERM:
                assert [process.wait(60) for process in running] == [0, 0]
            else:
                with contextlib.suppress(OSError):  # a step notices
                    urllib.request.urlopen(request, timeout=120)
                assert running[0].wait(60) == 2
                assert "start all again" in running[0].stderr.read()
        for process in running:
            process.wait(60)
            process.stderr.close()
            process.stdout.close()


JOINED = [
    (("nowhere", 2, 0), "the coordinator must be HOST:PORT of the first process, or auto, got 'nowhere'"),
    (("127.0.0.1:65536", 2, 1), "the coordinator must be HOST:PORT .* got '127.0.0.1:65536'"),
    (("127.0.0.1:99", None, None), "each process needs the number of processes and its own"),
    (("127.0.0.1:99", 2, 2), "the number of a process must be 0 to 1, got 2"),
    (("auto", 2, None), "the coordinator auto finds out how many processes there are"),
]


@pytest.mark.parametrize(("given", "message"), JOINED, ids=range(len(JOINED)))
def test_wrong_arguments_of_join(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*given)


def test_a_coordinator_that_does_not_answer():
    with pytest.raises(ValueError, match=r"no process answers at 127.0.0.1:.* after 0.2 s: start the first process"):
        processes.join(f"127.0.0.1:{free_port()}", 2, 1, timeout=0.2)


USED = [
    ("hello --coordinator a:1", "--coordinator needs --batch-file: several processes run batches"),
    ("{batch} --coordinator a:1", "--coordinator needs --tensor-parallel or --mesh"),
    (
        '{batch} --coordinator a:1 --tensor-parallel 2 --speculative-config {{"method":"ngram"}}',
        "--speculative-config adapts to times, which differ between processes: leave it out",
    ),
    ("hello --mesh tensor", "'tensor' must be sizes of axes, integers above 0, such as tensor=4,expert=2"),
    ("hello --mesh tensor=²", "'tensor=²' must be sizes of axes"),
    ("hello --mesh tensor=0", "'tensor=0' must be sizes of axes"),
    ("hello --mesh tensor=3,expert=3 --model {model}", "--mesh tensor=3,expert=3 needs 9 devices, and JAX sees 8"),
    ("hello --mesh data=2 --model {model}", "data=2: this command runs one engine, not replicas; leave it out, or"),
    ("hello --num-processes 2", "--num-processes needs --coordinator"),
]


@pytest.mark.parametrize(("arguments", "message"), USED, ids=range(len(USED)))
def test_user_errors(tmp_path, arguments, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    used = f"--batch-file {tmp_path}/in.jsonl --output {tmp_path}/out.jsonl"
    done = CliRunner().invoke(commands, ["generate", *arguments.format(batch=used, model=GOLDEN / "llama3").split()])
    told = done.stderr or str(done.exception)
    assert done.exit_code and message in " ".join(told.split())

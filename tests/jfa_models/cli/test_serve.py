"""`jfa serve` as a process: how it starts, and how it ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
from golden import GOLDEN
from running import PATIENCE
from tiny_model import folder_with_text

OPTIONS = ["--port", 0, "--num-pages", 200, "--max-num-seqs", 4, "--max-num-batched-tokens", 32, "--warm-up", "none"]
LONG = {"prompt": "hi", "max_tokens": 200, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_with_text(GOLDEN / "llama3", tmp_path_factory.mktemp("serve") / "tiny")


@contextlib.contextmanager
def started(folder, *options):
    """A server in a process of its own, and its address."""
    code = "import sys; from jfa_models.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        "--model",
        folder,
        "--served-model-name",
        "tiny",
        *OPTIONS,
        *options,
    ]
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(folder.parent)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "jfa serves tiny at http://127.0.0.1:" in line, process.stderr.read()
        yield process, line.split()[4]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.exhaustive
@pytest.mark.soak
def test_the_first_signal_lets_requests_finish(folder):
    with started(folder, "--log-json", "--grace", 600) as (process, url), ThreadPoolExecutor(1) as threads:
        assert httpx.get(f"{url}/ready", timeout=PATIENCE).status_code == 200

        has_begun = threading.Event()

        def ask():
            lines = []
            with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"n": 64}, timeout=PATIENCE) as answer:
                for line in answer.iter_lines():
                    has_begun.set()
                    lines += [line] if line else []
            return lines

        asked = threads.submit(ask)
        assert has_begun.wait(PATIENCE)
        process.send_signal(signal.SIGTERM)
        lines = asked.result()
        assert lines[-1] == "data: [DONE]" and sum('"finish_reason":"length"' in line for line in lines) == 64
        assert process.wait(PATIENCE) == 0
        log = process.stderr.read()
        assert '"path": "/v1/completions"' in log and '"hi"' not in log and "SIGTERM" in log


@pytest.mark.exhaustive
@pytest.mark.soak
def test_the_second_signal_ends_at_once(folder):
    with started(folder, "--grace", 600) as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"n": 64}, timeout=PATIENCE) as answer:
            lines = answer.iter_lines()  # kept: the stream is closed with it
            assert next(lines)
            process.send_signal(signal.SIGINT)
            while httpx.get(f"{url}/ready", timeout=PATIENCE).status_code != 503:
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 128 + signal.SIGINT


@pytest.mark.exhaustive
@pytest.mark.soak
def test_a_killed_server_gives_no_short_answers(folder):
    """32 streams: each one breaks or is whole; the next start serves again."""
    with started(folder) as (process, url), ThreadPoolExecutor(32) as threads:

        def ask(number):
            lines = []
            with contextlib.suppress(httpx.HTTPError):
                with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=PATIENCE) as answer:
                    for line in answer.iter_lines():
                        lines.append(line)
                        if number == 0:
                            process.kill()
                return lines, True
            return lines, False

        results = list(threads.map(ask, range(32)))
    for lines, is_whole in results:
        has_reason = any('"finish_reason":"length"' in line for line in lines)
        assert has_reason == ("data: [DONE]" in lines) == is_whole
    assert not results[0][1]
    with started(folder) as (_, url):
        answer = httpx.post(f"{url}/v1/completions", json=LONG | {"stream": False}, timeout=PATIENCE).json()
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--api-key-file", "EMPTY"], "has no key: write one per line"),
        (["--api-key-file", "BINARY"], "is not a text in UTF-8"),
        (["--port", "TAKEN"], "choose another --port"),
        (["--max-model-len", "100000000"], "must be"),
    ],
)
def test_what_cannot_start_is_one_line(jfa, tmp_path, folder, options, message):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known = {"EMPTY": tmp_path / "empty", "BINARY": tmp_path / "binary", "TAKEN": taken.getsockname()[1]}
        status, out, err = jfa("serve", "--model", folder, *OPTIONS, *[known.get(option, option) for option in options])
    assert status == 2 and not out and message in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("jfa: ")


def test_a_missing_package_is_named(jfa, monkeypatch):
    monkeypatch.setitem(sys.modules, "jfa_models.serving.server", None)
    for name in [name for name in sys.modules if name.startswith("jfa_models.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, out, err = jfa("serve")
    assert status == 2 and not out and 'jfa serve needs uvicorn: pip install "jfa[serve]"' in err

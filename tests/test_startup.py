"""Help texts, versions and usage errors do not import JAX. The tests count modules and measure no time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jfa_bench import cli as bench_cli
from jfa_models import cli as jfa_cli

GROUPS = {"jfa": ("jfa_models.cli", jfa_cli.commands), "jfa-bench": ("jfa_bench.cli", bench_cli.commands)}

HELP = [
    [name, *arguments]
    for name, (_, group) in GROUPS.items()
    for arguments in ([], ["--help"], ["--version"], *([command, "--help"] for command in group.commands))
]

USAGE_ERRORS = [
    ["jfa", "genrate"],
    ["jfa", "generate"],
    ["jfa", "generate", "x", "--prompt", "y"],
    ["jfa", "generate", "x", "--tempreature", "1"],
    ["jfa", "generate", "x", "--temperature", "-1"],
    ["jfa", "generate", "x", "--top-p", "much"],
    ["jfa", "generate", "x", "--dtype", "int4"],
    ["jfa", "generate", "x", "--max-num-seqs", "4"],
    ["jfa", "generate", "--batch-file", __file__],
    ["jfa", "generate", "x", "--batch-file", __file__, "--output", "y"],
    ["jfa", "chat", "--max-tokens", "0"],
    ["jfa", "info", "model"],
    ["jfa", "plan", "--model", "llama-3-70b", "--arch", "gfx9"],
    ["jfa", "plan", "--model", "llama-3-70b", "--arch", "gfx942", "--devices", "0"],
    ["jfa", "plan", "--model", "llama-3-70b", "--arch", "gfx942", "--mesh", "tensor=2", "--tensor-parallel", "2"],
    ["jfa", "serve", "--port", "70000"],
    ["jfa", "serve", "--speculative-config", "x"],
    ["jfa", "serve", "--api-key-file", "no-such-file"],
    ["jfa-bench", "atention"],
    ["jfa-bench", "attention", "--heads", "3", "--kv-heads", "2"],
    ["jfa-bench", "attention", "--grid", "fa2", "--batch", "2"],
    ["jfa-bench", "attention", "--plot", "a.jpeg"],
    ["jfa-bench", "paged", "--heads", "8", "--kv-heads", "3"],
    ["jfa-bench", "prefill", "--models", "llama-9"],
    ["jfa-bench", "prefill", "--seq-lens", "0"],
    ["jfa-bench", "prefill", "--models", "phi-2", "--seq-lens", "4096"],
    ["jfa-bench", "decode", "--models", "phi-2", "--context", "2048"],
    ["jfa-bench", "throughput", "--n", "2", "--beam-width", "2"],
    ["jfa-bench", "serve", "--request-rate", "0"],
    ["jfa-bench", "serve", "--max-num-seqs", "4"],
    ["jfa-bench", "card", "--minutes", "0"],
    ["jfa-bench", "card", "--output", __file__],
    ["jfa-bench", "compile", "--arch", "gfx9"],
    ["jfa-bench", "prove", "--op", "conv"],
    ["jfa-bench", "tune", "--offline"],
    ["jfa-bench", "compare", "no-such-file", "nor-this"],
    ["jfa-bench", "report", "no-such-folder"],
    ["jfa-bench", "plot", __file__, "--plot", "a.jpeg"],
]

RUN = """
import importlib, json, sys
modules, lines, results = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
for name, *arguments in lines:
    sys.argv = [name, *arguments]
    try:
        importlib.import_module(modules[name]).main()
    except SystemExit as end:
        heavy = {"jax", "flax", "gguf", "rich", "numpy"} & set(sys.modules)
        results.append([end.code, sorted(heavy), len(sys.modules)])
json.dump(results, open(PATH, "w"))
"""


def run(lines, tmp_path):
    """[status, heavy modules, number of modules] of each command line, run in sequence in one process."""
    out = tmp_path / "results.json"
    code = f"PATH = {str(out)!r}\n{RUN}"
    modules = {name: module for name, (module, _) in GROUPS.items()}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(modules), json.dumps(lines)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done


def test_no_help_text_imports_jax(tmp_path):
    results, done = run(HELP, tmp_path)
    assert [status for status, *_ in results] == [0] * len(HELP)
    assert all(not heavy for _, heavy, _ in results), results
    assert results[-1][2] < 300, "a help text imports more than the command line"
    assert done.stdout.count("Usage: ") == len(HELP) - len(GROUPS)


def test_no_usage_error_imports_jax(tmp_path):
    results, done = run(USAGE_ERRORS, tmp_path)
    assert [status for status, *_ in results] == [2] * len(USAGE_ERRORS), done.stderr
    assert all("jax" not in heavy and "numpy" not in heavy for _, heavy, _ in results), results
    assert len(done.stderr.splitlines()) == len(USAGE_ERRORS), "a usage error is one line"


@pytest.mark.parametrize(("name", "variable"), [("jfa", "_JFA_COMPLETE"), ("jfa-bench", "_JFA_BENCH_COMPLETE")])
def test_a_shell_can_complete_commands_options_and_models(name, variable, tmp_path):
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        pytest.skip(f"the command {name} is not installed next to this Python")

    def completed(words):
        environment = {variable: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return subprocess.run([program], env=environment, capture_output=True, text=True).stdout

    assert (
        f"{variable}=bash_complete"
        in subprocess.run([program], env={variable: "bash_source"}, capture_output=True, text=True).stdout
    )
    if name == "jfa":
        assert completed("jfa gen") == "plain,generate\n"
        assert "plain,--max-tokens" in completed("jfa generate --max")
        assert completed("jfa generate --model smol").splitlines() == [
            "plain,smollm2",
            "plain,smollm2-135m",
            "plain,smollm2-135m-instruct",
        ]
        assert completed("jfa generate --model ./fol") == "file,./fol\n"
    else:
        assert completed("jfa-bench pre") == "plain,prefill\n"


def test_importing_jfa_adds_no_slow_modules_to_jax():
    """Of the modules that `import jfa` loads after JAX, Pallas' Triton lowering would be by far the slowest."""
    code = "import jax, sys; before = set(sys.modules); import jfa; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if "pallas" in name or name.startswith("flax")]

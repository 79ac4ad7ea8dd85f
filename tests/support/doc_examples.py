"""Runs the Python and console blocks of a page, in order, as a reader would.

    python tests/support/doc_examples.py README.md       # with the real model; exit status 1 if a block fails

The Python blocks of a page share one namespace. A console block is run line by line: `jfa` and `jfa-bench` in this
process, in a temporary folder per page; the lines after a command are the start of its output. Two kinds of lines are
checked without running them: installation, whose extras and packages must be those of pyproject.toml, and blocks after
a comment `<!-- parsed only: reason -->`, whose options must be valid.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
GROUPS = {"jfa": "jfa_models.cli", "jfa-bench": "jfa_bench.cli"}


class Console:
    """Evaluates console blocks. compares: whether outputs must match the page."""

    def __init__(self, *, compares: bool):
        self.compares = compares

    def __call__(self, example: Example) -> str | None:
        """The problems of a block; None: it has none."""
        before = example.document.text[: example.region.start]
        is_run = not re.search(r"<!-- parsed only: [^>]*-->\s*\Z", before)
        found = [self._run(command, output, is_run) for command, output in _commands(example.parsed)]
        return "\n".join(problem for problem in found if problem) or None

    def _run(self, command: str, output: str, is_run: bool) -> str | None:
        words = shlex.split(command, comments=True)
        if words[:2] == ["uv", "run"]:
            words = words[2:]
            while words and words[0] == "--extra":
                if words[1] not in _project()["optional-dependencies"]:
                    return f"{command}: no extra {words[1]}"
                words = words[2:]
        if words[0] in GROUPS:
            return self._call(words, output) if is_run else _parse(words)
        if words[:2] == ["pip", "install"]:
            return _check_installation(words[2:])
        if words[0] == "python":  # tests/test_examples.py runs them
            return None if (ROOT / words[1]).exists() else f"{command}: there is no {words[1]}"
        if words[0] == "printf":  # a file for the next command
            text, _, file = words[1:]
            Path(file).write_text(text.replace("\\n", "\n"))
            return None
        return None if words[0] in ("pytest", "mkdocs") else f"{command}: not a command that is known here"

    def _call(self, words: list[str], output: str) -> str | None:
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                importlib.import_module(GROUPS[words[0]]).main()
            except SystemExit as end:
                status = end.code
        if status:
            return f"{shlex.join(words)}: exit status {status}: {err.getvalue()}"
        if self.compares and output and not out.getvalue().startswith(output.rstrip("\n")):
            return f"{shlex.join(words)}: printed {out.getvalue()!r}, and not {output!r}"
        return None


def _commands(block: str) -> Iterator[tuple[str, str]]:
    """Each command of a block, and the output that is written after it."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _parse(words: list[str]) -> str | None:
    """Parses the options of a command without running it."""
    import click

    command = importlib.import_module(GROUPS[words[0]]).commands.commands.get(words[1])
    if command is None:
        return f"{words[0]} has no command {words[1]}"
    try:
        command.make_context(words[1], words[2:])
    except click.ClickException as error:
        return f"{shlex.join(words)}: {error.format_message()}"
    return None


def _check_installation(words: list[str]) -> str | None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    known = {package for group in groups.values() for package in group}
    for word in words:
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            if match[1] not in _project()["optional-dependencies"]:
                return f"pip install {word}: there is no such extra"
        elif word not in (".", "--no-deps") and word not in known:
            return f"pip install {word}: not a package of pyproject.toml"
    return None


def run_page(page: Path, *, compares: bool = True) -> int:
    """Runs the blocks of a page and returns how many there were.

    Raises:
      SybilFailure: a block failed; the error names file and line.
    """
    parsers = [
        PythonCodeBlockParser(),
        CodeBlockParser(language="console", evaluator=Console(compares=compares)),
    ]
    document = Sybil(parsers=parsers, path=str(page.parent), pattern=page.name).parse(page)
    count = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("LICENSE").write_text((ROOT / "LICENSE").read_text())  # input of a page's benchmark
        for example in document.examples():
            example.evaluate()
            count += 1
    return count


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in sys.argv[1:]:
        print(f"{name}: {run_page(Path(name).resolve())} blocks", flush=True)

"""What the tests of the commands share."""

import io
import sys

import pytest

from jfa_models import cli


@pytest.fixture
def jfa(capsys, monkeypatch, own_cache):
    """Runs `jfa` with arguments and returns (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["jfa", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run

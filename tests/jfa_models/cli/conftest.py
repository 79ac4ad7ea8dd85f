"""What the tests of the commands share."""

import io
import sys

import jax
import pytest

from jfa_models import cli


@pytest.fixture
def jfa(capsys, monkeypatch, tmp_path):
    """Runs `jfa` with arguments and returns (exit status, stdout, stderr); compiled programs are not cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    jax.config.update("jax_enable_compilation_cache", False)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["jfa", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    yield run
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)

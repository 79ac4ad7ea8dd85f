"""`jfa-bench all`: every line of its plans is a valid command, and a failing command does not stop the others."""

import json

import click
import pytest
from click.testing import CliRunner

from jfa_bench import cli
from jfa_bench.cli import suite
from jfa_bench.records import plot, report


@pytest.mark.parametrize("plan", [suite.QUICK, suite.FULL], ids=["quick", "full"])
def test_every_line_is_a_valid_command(plan, tmp_path):
    """Options, choices and models are parsed; nothing runs."""
    for name, line in plan.items():
        command, *arguments = line.split()
        found = cli.commands.commands[command]
        context = found.make_context(command, [*arguments, "--save", str(tmp_path / f"{name}.json")])
        assert str(context.params["save"]) == str(tmp_path / f"{name}.json")
    assert {line.split()[0] for line in plan.values()} == {
        *("attention", "sparse", "linear", "paged", "prefill", "decode", "throughput", "memory")
    }


def planned(monkeypatch, tmp_path, **actions):
    """Runs `all` with fake commands, one for each of `actions`; the report writes nothing."""
    plan = {}
    for name, action in actions.items():

        @click.command(name)
        @click.option("--save")
        @click.pass_context
        def command(context, save, action=action):
            action(context, save)

        monkeypatch.setitem(cli.commands.commands, name, command)
        plan[name] = name
    monkeypatch.setattr(suite, "QUICK", plan)
    monkeypatch.setattr(plot, "check", lambda path: None)
    monkeypatch.setattr(report, "write", lambda folder: click.echo("reported"))
    return CliRunner().invoke(cli.commands, ["all", "--quick", "--into", str(tmp_path / "new" / "results")])


def writes(context, save):
    with open(save, "w") as file:
        json.dump([], file)


def fails(context, save):
    raise ValueError("there is\nno such thing")


def ends(context, save):
    context.exit(130)


def test_a_failure_is_one_line_and_the_other_commands_run(monkeypatch, tmp_path):
    done = planned(monkeypatch, tmp_path, one=fails, two=writes)
    assert done.exit_code == 0 and done.stdout == "reported\n"
    assert done.stderr == "jfa-bench one\none: there is no such thing\njfa-bench two\n"
    assert (tmp_path / "new" / "results" / "two.json").exists()


def test_ctrl_c_ends_the_whole_run(monkeypatch, tmp_path):
    done = planned(monkeypatch, tmp_path, one=ends, two=writes)
    assert done.exit_code == 130 and done.stdout == "" and "jfa-bench two" not in done.stderr

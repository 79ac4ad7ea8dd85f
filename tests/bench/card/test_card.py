"""`jfa-bench card`: the order of its work, when it stops, where it goes on, and its page; on a clock of its own."""

import dataclasses

import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from golden import LLAMA3

import jfa
from jfa.device import describe
from jfa_bench import cli, names
from jfa_bench.card import correctness, ledger, plan, session, tuning
from jfa_bench.measure import machine, peers, roofline
from jfa_bench.proof import prove
from jfa_bench.records import record, report
from jfa_bench.truth import cases, linear_cases, paged_cases, product_cases, row_cases, sparse_cases

CALL = {
    "device": {"name": "MI300X", "arch": "gfx942", "platform": "rocm", "host": "EPYC", "driver": None, "power": {}},
    **{"versions": {"jax": "0.12.0"}, "git_commit": "abc1234", "date": "2026-11-28T10:00:00+00:00", "flags": ""},
}


OTHER = {"benchmark": "other", "case": {}, "implementation": "jfa", "status": "ok", "reason": None}


class Folder:
    """A folder, and a plan of fake units, each of which takes some seconds on a clock that nothing else advances."""

    def __init__(self, path, monkeypatch):
        self.path, self.now, self.ran, self.lines = path / "card", 0.0, [], []
        self._units, self.circumstances = [], dict(CALL)
        monkeypatch.setattr(plan, "units", lambda size, device: (list(self._units), {}))
        monkeypatch.setattr(machine, "circumstances", lambda: dict(self.circumstances))

    def unit(self, stage, name, seconds, action=lambda: []):
        def run(records):
            self.ran.append(name)
            self.now += seconds
            yield from action()

        self._units.append(plan.Unit(stage=stage, name=name, run=run))

    def work(self, minutes, size=plan.QUICK):
        """One call; returns its exit status."""
        self.ran.clear(), self.lines.clear()
        return session.run(self.path, minutes=minutes, size=size, say=self.lines.append, clock=lambda: self.now)

    @property
    def page(self):
        return (self.path / "card.md").read_text()

    @property
    def events(self):
        return [one.get("event") for one in record.load(self.path / ledger.NAME) if "event" in one]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return Folder(tmp_path, monkeypatch)


def three(folder, seconds=60):
    for name in ("a", "b", "c"):
        folder.unit(plan.CORRECTNESS, name, seconds)


def test_it_stops_before_a_unit_that_may_exceed_the_time_and_goes_on_there(folder):
    three(folder)
    assert folder.work(2.5) == 0 and folder.ran == ["a", "b"]
    assert folder.lines[-1].startswith("the time is over: 30 s are left, and the next unit may take 60 s\n2 of 3 units")
    assert "Not all cases were checked: 2 of 3 units are done." in folder.page
    assert f"$ jfa-bench card --minutes 2.5 --output {folder.path} --quick\n" in folder.page
    assert folder.work(2.5) == 0 and folder.ran == ["c"]
    assert folder.lines[-1].startswith("everything is done\n3 of 3 units are done; see ")
    assert "Continue with" not in folder.page and "Calls of the command: 2." in folder.page
    assert folder.work(2.5) == 0 and folder.ran == []


def test_the_time_that_a_unit_may_take_is_that_of_its_own_stage(folder):
    folder.unit(plan.CORRECTNESS, "long", 100)
    folder.unit("paged", "first", 10)  # no unit of its stage so far: the longest of all counts
    folder.unit("paged", "second", 10)
    folder.unit("paged", "third", 10)
    assert folder.work(215 / 60) == 0 and folder.ran == ["long", "first", "second", "third"]
    folder.unit("models", "fourth", 10)
    assert folder.work(1) == 0 and folder.ran == []


def test_units_run_in_the_order_of_the_plan_and_their_records_are_kept(folder):
    folder.unit(plan.CORRECTNESS, "a", 1)
    folder.unit("attention", "b", 1, lambda: [OTHER | {"number": n} for n in (1, 2)])
    assert folder.work(1) == 0
    found = record.load(folder.path / ledger.NAME)
    assert [one.get("number", one.get("event")) for one in found] == [
        *("call", "started", "done", "started", 1, 2, "done")
    ]
    assert found[-1] | {"seconds": 1.0, "status": "ok", "reason": None, "stage": "attention"} == found[-1]


def test_a_unit_that_fails_is_recorded_and_the_others_run(folder):
    def fails():
        yield OTHER
        raise RuntimeError("RESOURCE_EXHAUSTED: 80 GiB\nmore")

    folder.unit("paged", "a", 1, fails)
    folder.unit("paged", "b", 1)
    assert folder.work(1) == 0 and folder.ran == ["a", "b"]
    assert "paged: a, 1 s: oom: RESOURCE_EXHAUSTED: 80 GiB" in folder.lines
    assert "* paged: a: oom: RESOURCE_EXHAUSTED: 80 GiB\n" in folder.page
    assert folder.work(1) == 0 and folder.ran == []


def test_ctrl_c_keeps_what_is_done_and_repeats_the_unit(folder):
    stop = [True]

    def interrupted():
        yield OTHER | {"number": 1}
        if stop:
            raise KeyboardInterrupt

    folder.unit("paged", "a", 1)
    folder.unit("paged", "b", 1, interrupted)
    for _ in range(ledger.ATTEMPTS + 1):
        assert folder.work(1) == 130 and "interrupted in paged: b" in folder.lines[-1]
    assert "| paged                    | 1    | 0      | 1    |" in folder.page
    stop.clear()
    assert folder.work(1) == 0 and folder.ran == ["b"]
    assert [one["number"] for one in ledger.Ledger(folder.path, CALL | {"size": "quick"}).records] == [1]


def test_a_unit_that_ends_the_process_twice_is_not_tried_again(folder):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed
        yield

    folder.unit("paged", "a", 1, killed)
    folder.unit("paged", "b", 1)
    for _ in range(2):
        with pytest.raises(Killed):
            folder.work(1)
    assert folder.work(1) == 0 and folder.ran == ["b"]
    assert "* paged: a: crashed: the process ended 2 times while this ran" in folder.page


def test_a_device_that_stopped_answering_ends_the_call(folder, monkeypatch):
    three(folder)
    answers = iter([None, "RuntimeError: illegal address"])
    monkeypatch.setattr(session, "_silence", lambda: next(answers))
    assert folder.work(10) == 1 and folder.ran == ["a", "b"]
    assert folder.lines[-1].startswith(
        "the device stopped answering in correctness: b: RuntimeError: illegal address; call the command again\n"
    )


def test_a_line_that_was_cut_off_is_dropped(folder):
    folder.unit("paged", "a", 1, lambda: [OTHER | {"number": 1}])
    folder.work(1)
    file = folder.path / ledger.NAME
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rindex(b'{"benchmark"') + 30])  # the record is there, its unit's end is not
    assert folder.work(1) == 0 and folder.ran == ["a"]
    assert [one.get("number") for one in record.load(file) if "number" in one] == [1]
    assert folder.events == ["call", "started", "call", "started", "done"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"git_commit": "def5678"}, "git commit abc1234, not of def5678"),
        ({"versions": {"jax": "0.12.1"}}, "jax 0.12.0, not of 0.12.1"),
        (
            {"device": CALL["device"] | {"name": "RX 7900 XTX", "arch": "gfx1100"}},
            "card MI300X, not of RX 7900 XTX, architecture gfx942, not of gfx1100",
        ),
    ],
)
def test_records_of_something_else_are_refused(folder, changed, message):
    three(folder)
    folder.work(10)
    before = (folder.path / ledger.NAME).read_bytes()
    folder.circumstances |= changed
    with pytest.raises(ValueError) as error:
        folder.work(10)
    assert str(error.value) == f"{folder.path} holds records of {message}; choose another folder with --output"
    assert (folder.path / ledger.NAME).read_bytes() == before and folder.ran == []


def test_records_of_another_size_are_refused(folder):
    three(folder)
    folder.work(10)
    with pytest.raises(ValueError, match="holds records of size quick, not of full; choose another folder"):
        folder.work(10, plan.FULL)


@pytest.mark.parametrize("text", ["[]\n", "no JSON\n", '{"benchmark": "attention"}\n'])
def test_a_file_of_another_command_is_refused(folder, text):
    folder.path.mkdir()
    (folder.path / ledger.NAME).write_text(text)
    with pytest.raises(ValueError, match=r"records.jsonl was not written by jfa-bench card; choose another folder"):
        folder.work(1)
    assert (folder.path / ledger.NAME).read_text() == text


def run(*arguments):
    return CliRunner().invoke(cli.commands, ["card", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "Invalid value for '--minutes': 0.0 is not in the range x>0."),
        (["--minutes", "-3"], "Invalid value for '--minutes': -3.0 is not in the range x>0."),
        (["--minutes", "nan"], "Invalid value for --minutes: nan is not a number of minutes"),
        (["--output", __file__], f"Directory '{__file__}' is a file."),
        ([], "there is no GPU on this machine (JAX's device: cpu); try the command out with --quick"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path):
    done = run("--output", tmp_path / "card", *arguments)
    assert done.exit_code == 2 and message in done.stderr and not (tmp_path / "card").exists()


TINY = dataclasses.replace(
    plan.QUICK,
    samples=1,
    lengths=(16,),
    other_lengths=(24,),
    heads=2,
    head_dim=16,
    models=(str(LLAMA3),),
    prompts=(8,),
    decodes=(plan.Rows(1, 8),),
    pages=(plan.Rows(1, 32),),
    page_heads=(2, 1),
    page_head_dim=16,
)


@pytest.fixture
def tiny(monkeypatch):
    """The whole command in seconds: tiny shapes, two cases of the oracle for each op, and no measured ceilings."""
    monkeypatch.setattr(roofline, "ceilings", lambda dtype, *, clock: {"matrix_tflops": 2.0, "copy_gb_per_s": 10.0})
    monkeypatch.setattr(prove, "QUICK_OPTIONS", ("gqa", "int4_odd", "chunk_fp8"))
    monkeypatch.setattr(peers, "usual", lambda platform: ("reference", "xla"))
    monkeypatch.setattr(plan, "QUICK", TINY)


def test_the_whole_command_on_a_cpu(tiny, tmp_path):
    done = run("--quick", "--minutes", 1e6, "--output", tmp_path)
    assert done.exit_code == 0 and done.stdout == ""
    page = (tmp_path / "card.md").read_text()
    assert page.startswith("# cpu (cpu)\n") and "All results are within the numerics contract." in page
    for heading in ("Correctness", "Attention", "Prefill", "Decode", "Paged", "Left to do"):
        assert f"\n## {heading}\n" in page
    assert "tuning: left out: there is no GPU to measure on" in page and "Continue with" not in page
    units = [one for one in record.load(tmp_path / "records.jsonl") if one.get("event") == "done"]
    assert {one["status"] for one in units} == {"ok"}
    assert list(dict.fromkeys(one["stage"] for one in units)) == [one for one in plan.STAGES if one != plan.TUNING]
    assert {*report.gather(tmp_path)} == {"attention", "prefill", "decode", "paged"}
    assert run("--quick", "--minutes", 1e6, "--output", tmp_path).stderr.startswith("everything is done\n")


def test_nothing_is_timed_if_a_result_is_wrong(tiny, tmp_path, monkeypatch):
    attend = jfa.dot_product_attention

    def wrong(*args, **options):
        out, lse = attend(*args, **options)
        return out.at[0, 0, 0, 0].add(jnp.ones((), out.dtype)), lse

    monkeypatch.setattr(jfa, "dot_product_attention", wrong)
    for _ in range(2):
        done = run("--quick", "--minutes", 1e6, "--output", tmp_path)
        assert done.exit_code == 1
        assert "nothing is timed, since results are wrong: 1, the first: flash_attention, forward, bf" in done.stderr
    units = [one for one in record.load(tmp_path / "records.jsonl") if one.get("event") == "done"]
    assert {one["stage"] for one in units} == {plan.CORRECTNESS}
    page = (tmp_path / "card.md").read_text()
    assert "**Results are wrong; nothing is timed:**" in page
    assert "* flash_attention, forward, bfloat16, options, gqa: at (0, 0, 0, 0): " in page


def test_a_call_that_fails_is_wrong(tiny, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(jfa, "paged_decode_attention", fails)
    [row] = [row for row in correctness.rows("cpu", quick=True) if row.op == "paged_decode_attention"]
    [one] = correctness.check(row, ["int4_odd"])
    assert (one["status"], one["reason"]) == ("wrong", "RuntimeError: no such instruction")


@pytest.mark.parametrize(("arch", "tiles"), [("gfx942", True), ("gfx1101", True), ("sm_120", False)])
def test_every_named_case_is_checked_and_the_tiles_of_known_architectures(arch, tiles):
    named = set()
    rows = correctness.rows(arch, quick=False)
    for row in rows:
        parts = correctness.parts(row)
        assert all(len(part) <= correctness.CASES for part in parts)
        named |= {(row.op, row.direction, name) for part in parts for name in part} if row.head_dim is None else set()
    paged = {name: case.queries for name, case in paged_cases.CASES.items()}
    products = {name: product_cases.CASES[name].rows <= 16 for name in product_cases.ON_GPUS}
    linear = {name: linear_cases.CASES[name].op for name in linear_cases.ON_GPUS}
    differentiated = {name: op for name, op in linear.items() if linear_cases.CASES[name].rows is None}
    directions = ("forward", "backward")
    assert named == {
        *(("flash_attention", direction, name) for direction in directions for name in cases.CASES),
        *(("paged_decode_attention", "forward", name) for name, queries in paged.items() if queries is None),
        *(("ragged_paged_attention", "forward", name) for name, queries in paged.items() if queries is not None),
        *(("quantized_matmul_few_rows", "forward", name) for name, few in products.items() if few),
        *(("quantized_matmul", "forward", name) for name, few in products.items() if not few),
        *(("matmul_few_rows", "forward", name) for dtype in names.ROW_DTYPES for name in row_cases.cases(dtype)),
        *((op, "forward", name) for name, op in linear.items()),
        *((op, "backward", name) for name, op in differentiated.items()),
        *(("block_sparse_attention", direction, name) for direction in directions for name in sparse_cases.ON_GPUS),
    }
    assert any(row.head_dim is not None for row in rows) == tiles


def test_the_plan_is_ordered_by_value_and_its_units_are_small(monkeypatch):
    monkeypatch.setattr(tuning, "why_not", lambda: None)
    units, left_out = plan.units(plan.FULL, describe("rocm", "gfx942"))
    assert not left_out and len({one.key for one in units}) == len(units)
    stages = [one.stage for one in units]
    assert stages == sorted(stages, key=plan.STAGES.index)
    names = {stage: [one.name for one in units if one.stage == stage] for stage in plan.STAGES}
    assert names["attention"] == [
        f"{direction}, {length} tokens"
        for direction in ("forward", "backward")
        for length in (4096, 2048, 1024, 512, 256)
    ]
    command = cli.commands.commands["attention"]
    lengths = next(one for one in command.params if one.name == "seq_lens")
    assert {*plan.FULL.lengths, *plan.FULL.other_lengths} == {*lengths.type.convert(lengths.default, None, None)}
    assert names["models"][:2] == ["prefill, mistral-7b, 2048 tokens", "prefill, llama-3-8b, 2048 tokens"]
    assert names["tuning"][:3] == [
        "candidates of flash_attention, bfloat16, head_dim 128",
        "flash_attention, bfloat16, head_dim 128, round 1",
        "candidates of flash_attention_dq, bfloat16, head_dim 128",
    ]

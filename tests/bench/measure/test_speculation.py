"""The speculation benchmark: prompts, records, and the table of the guide."""

import json
import re
import sys
from pathlib import Path

import pytest
from tiny_model import byte_tokenizer, tiny_config

from jfa_bench import cli
from jfa_bench.measure import speculation
from jfa_models import LanguageModel

ROOT = Path(__file__).parents[3]


def test_prompts_of_both_kinds_come_with_the_package():
    prompts = speculation.read_prompts(speculation.PROMPTS)
    kinds = [one["kind"] for one in prompts]
    assert kinds.count("grounded") >= 6 and kinds.count("open") >= 3
    assert len({one["task"] for one in prompts}) == len(prompts)


def test_a_faulty_line_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"kind": "a", "task": "b", "prompt": "c"}\n{"kind": "a"}\n')
    with pytest.raises(ValueError, match=r'x\.jsonl:2: not a JSON object with kind, task and prompt: \'{"kind": "a"}'):
        speculation.read_prompts(tmp_path / "x.jsonl")


def test_two_configurations_of_one_name_are_refused(monkeypatch, capsys):
    given = [f'{{"method": "ngram", "prompt_lookup_{end}": 4}}' for end in ("min", "max")]
    monkeypatch.setattr(sys, "argv", ["jfa-bench", "speculation", "--config", given[0], "--config", given[1]])
    with pytest.raises(SystemExit):
        cli.main()
    assert "two have the same name, of ngram 4: measure one of them" in capsys.readouterr().err


def test_records():
    model = LanguageModel.random(tiny_config(num_layers=1, context_length=128))
    model.tokenizer = byte_tokenizer()
    prompts = [{"kind": "k", "task": name, "prompt": name * 4} for name in ("ab", "cd")]
    configs = {"none": None, "ngram": {"method": "ngram", "adaptive": False}}
    records = list(speculation.measure(model, prompts, configs, case={}, batch=2, output_len=12, rounds=2))
    assert len(records) == 6
    for one in records[:4]:
        assert one["same_as_plain"] == 1 and one["tokens_per_s"] > 0 and one["tokens_per_step"] >= 1 - 1e-9
    assert records[-1]["case"]["task"] == "geometric mean" and records[-1]["least"] <= records[-1]["speedup"]


def test_the_table_of_the_guide_is_the_record():
    records = json.loads((ROOT / "bench/results/speculation-cpu-epyc-zen4.json").read_text())
    found = {one["case"]["task"]: one for one in records if one["implementation"] != "none"}
    rows = re.findall(
        r"^\| (.+) \(\w+\) \| \d+ \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs/speculation.md").read_text(),
        re.M,
    )
    means = re.findall(r"is ([\d.]+) for prompts|\n([\d.]+) for open ones", (ROOT / "docs/speculation.md").read_text())
    found_means = [one["speedup"] for one in records if one["implementation"] != "none" and "least" in one]
    assert [a or b for a, b in means] == [f"{x:.2f}" for x in found_means]
    assert len(rows) == len(speculation.read_prompts(speculation.PROMPTS))
    for task, rate, speedup, per_step in rows:
        one = found[task]
        assert (rate, speedup) == (f"{one['tokens_per_s']:.0f}", f"{one['speedup']:.2f}")
        assert per_step == f"{one['tokens_per_step']:.2f}"

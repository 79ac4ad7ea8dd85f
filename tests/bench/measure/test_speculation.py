"""The speculation benchmark: prompts, records, and the table of the guide."""

import functools
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
from tiny_model import byte_tokenizer, tiny_config

from jfa_bench import cli
from jfa_bench.measure import speculation
from jfa_models import LanguageModel
from jfa_models.checkpoints.presets import PRESETS

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
    shape = dict(batch=2, output_len=12, rounds=2, arch="gfx942")
    records = list(speculation.measure(model, prompts, configs, case={}, **shape))
    assert len(records) == 6
    for one in records[:4]:
        assert 0 < one["computed_speedup"] <= one["tokens_per_step"] + 1e-9 and one["case"]["arch"] == "gfx942"
        assert one["same_as_plain"] == 1 and one["tokens_per_s"] > 0 and one["tokens_per_step"] >= 1 - 1e-9
    assert records[-1]["case"]["task"] == "geometric mean" and records[-1]["least"] <= records[-1]["speedup"]


def test_what_drafts_would_bring_on_a_card_is_computed_from_the_bytes_of_its_steps():
    """Where a step takes as long as its weights do, whatever it verifies."""
    config, case = PRESETS["llama-3-8b"], {"batch": 1, "output_len": 60, "arch": "gfx942"}
    figures = {"tokens_per_step": 3.0, "proposed": 20 * 8, "accepted": 40}
    by = functools.partial(speculation.on_card, config, case=case, figures=figures)
    assert by(None) == 1.0
    assert by({"method": "ngram"}) == pytest.approx(3.0, rel=0.01)
    # eight steps of half of the layers, and of the output layer (0.53 of 8.03 billion weights)
    half = (8.03 - 2 * 0.525) / 2 / (8.03 - 0.525) + 0.525 / (8.03 - 0.525)
    assert by({"method": "self", "num_layers": 16}) == pytest.approx(3.0 / (1 + 8 * half), rel=0.03)
    assert by({"method": "staged", "num_layers": 16}) is None
    busy = {"case": case | {"batch": 256}, "figures": figures | {"proposed": 256 * figures["proposed"]}}
    assert by({"method": "ngram"}, **busy) < 1.5  # its products take as long as their FLOP do


def test_the_table_of_the_guide_is_the_record():
    records = json.loads((ROOT / "bench/results/speculation-cpu-epyc-zen4.json").read_text())
    found = {one["case"]["task"]: one for one in records if one["implementation"] != "none"}
    rows = re.findall(
        r"^\| (.+) \(\w+\) \| \d+ \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs/speculation.md").read_text().partition("## Tokens per step")[0],
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


def test_the_guides_tokens_per_step_are_those_of_the_record():
    records = json.loads((ROOT / "bench/results/speculation-methods-cpu-epyc-zen4.json").read_text())
    configs = {
        "ngram False": {"method": "ngram"},
        "lookahead False": {"method": "lookahead"},
        "self 20 False": {"method": "self", "num_layers": 20},
        "staged 20 False": {"method": "staged", "num_layers": 20},
    }
    found = {(one["case"]["task"], one["implementation"]): one for one in records if "tokens_per_step" in one}
    assert all(one["same_as_plain"] == 1 for one in found.values())
    text = (ROOT / "docs/speculation.md").read_text().partition("## Tokens per step")[2]
    rows = re.findall(r"^\| (.+) \((\w+)\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == len(speculation.read_prompts(speculation.PROMPTS))
    for task, _, *per_step in rows:
        assert per_step == [f"{found[task, name]['tokens_per_step']:.2f}" for name in configs]
    computed = re.findall(r"^\| (\w+), MI300X, computed \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| \|$", text, re.M)
    assert [kind for kind, *_ in computed] == ["grounded", "open"]
    for kind, *means in computed:
        for name, mean in zip(configs, means, strict=False):
            gains = [
                speculation.on_card(
                    PRESETS["smollm2-135m"], configs[name], found[task, name]["case"] | {"arch": "gfx942"}, one
                )
                for (task, other), one in found.items()
                if other == name and one["case"]["kind"] == kind
            ]
            assert mean == f"{statistics.geometric_mean(gains):.2f}"

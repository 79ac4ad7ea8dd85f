"""`jfa-bench prefill` and `decode`: the contents of records, and what is refused."""

import json
import sys

import jax
import pytest
from golden import LLAMA3

import jfa
from jfa_bench import cli, configs
from jfa_bench.measure import models, roofline
from jfa_bench.records import record
from jfa_models.decoding.language_model import LanguageModel

FIELDS = {  # of every record of the two benchmarks
    *("benchmark", "case", "implementation", "status", "reason"),
    *("device", "versions", "runtime", "flags", "git_commit", "date"),
    *("time_ms_p20", "time_ms_p50", "time_ms_p80", "samples_ms", "share_of_peak"),
    *("tokens_per_s", "tokens_per_s_mean", "tokens_per_s_deviation"),
}


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs the command and returns (exit status, stdout, stderr)."""
    found = {"matrix_tflops": 2.0, "copy_gb_per_s": 10.0}
    monkeypatch.setattr(roofline, "ceilings", lambda dtype, *, clock: found)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jfa-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


def test_decode_records_compare_jfa_with_the_matrix_products(bench):
    asked = ("--models", LLAMA3, "--batch", "1,3", "--context", 5, "--samples", 3, "--dtype", "float32")
    status, out, err = bench("decode", *asked, "-o", "json")
    assert (status, err) == (0, "")
    records = json.loads(out.splitlines()[-1])
    told = [(r["case"]["batch"], r["case"]["context"], r["implementation"]) for r in records]
    assert told == [(b, 5, name) for b in (1, 3) for name in (models.LIMIT, "jfa")]
    more = {"gb_per_s", "share_of_bandwidth", "ceilings"}
    for one in records:
        assert set(one) == FIELDS | more | ({"host_ms_per_step", "config"} if one["implementation"] == "jfa" else set())
        assert (one["benchmark"], one["status"], one["reason"]) == ("decode", "ok", None)
        assert (one["case"]["model"], one["case"]["dtype"]) == (str(LLAMA3), "float32")
        assert one["case"]["layers"] == one["case"]["of_layers"] == configs.config_of(str(LLAMA3)).num_layers
        assert len(one["samples_ms"]) == 3 and min(one["samples_ms"]) > 0
        assert one["time_ms_p20"] <= one["time_ms_p50"] <= one["time_ms_p80"]
        assert one["tokens_per_s"] == pytest.approx(one["case"]["batch"] / one["time_ms_p50"] * 1e3, rel=1e-2)
        assert one["share_of_bandwidth"] == pytest.approx(one["gb_per_s"] / 10)
        assert one["device"]["platform"] == jax.default_backend() and one["versions"]["jax"] == jax.__version__
    # the keys and values of 5 tokens are read in addition to the weights
    products, jfa = records[:2]
    c = configs.config_of(str(LLAMA3))
    read = [one["gb_per_s"] * one["time_ms_p50"] * 1e6 for one in (products, jfa)]
    kv_bytes = 2 * 5 * c.num_layers * c.num_kv_heads * c.head_dim * 4
    assert read[1] - read[0] == pytest.approx(kv_bytes, rel=0.2)


def test_prefill_is_compared_with_its_products_and_the_plain_formula(bench):
    asked = ("--models", LLAMA3, "--layers", 2, "--seq-lens", "20", "--samples", 2, "--batch", 2)
    status, out, err = bench("prefill", *asked, "-o", "jsonl")
    assert (status, err) == (0, "")
    products, plain, jfa = (json.loads(line) for line in out.splitlines())
    assert [one["implementation"] for one in (products, plain, jfa)] == [models.LIMIT, "reference", "jfa"]
    assert set(products) == FIELDS and set(jfa) == set(plain) == FIELDS | {"speedup", "config"}
    assert jfa["case"]["layers"] == 2 and jfa["case"]["of_layers"] == configs.config_of(str(LLAMA3)).num_layers
    assert jfa["tokens_per_s"] == pytest.approx(2 * 20 / jfa["time_ms_p50"] * 1e3, rel=1e-2)
    assert jfa["config"]["backend"] == "xla" and plain["config"] == {"backend": "reference", "forward": None}
    assert products["share_of_peak"] == 1 and plain["speedup"] == 1
    assert jfa["share_of_peak"] == pytest.approx(products["time_ms_p50"] / jfa["time_ms_p50"], rel=1e-2)
    assert jfa["speedup"] == pytest.approx(plain["time_ms_p50"] / jfa["time_ms_p50"], rel=1e-2)


def test_tables_have_a_heading_for_each_model_and_fit_a_terminal(bench):
    status, out, _ = bench("prefill", "--models", LLAMA3, "--layers", 1, "--seq-lens", "16", "--samples", 2)
    heading, _, *lines = out.splitlines()
    assert status == 0 and heading.endswith("llama3, 1 of 3 layers, float32")
    assert len(lines) == 5 and max(map(len, lines)) <= 80


def test_implementations_share_their_weights_and_differ_in_attention(monkeypatch):
    chosen = []
    random = LanguageModel.random

    def spy(config, **options):
        chosen.append(options["attention_implementation"])
        return random(config, **options)

    monkeypatch.setattr(LanguageModel, "random", spy)
    about, built, refused = models.build(
        str(LLAMA3), layers=1, dtype=None, quantization=None, implementations=("jfa", "reference")
    )
    assert about["layers"] == 1 and not refused
    assert chosen == [None, "reference"] and built["jfa"].params is built["reference"].params


@pytest.mark.parametrize(("command", "length"), [("prefill", "--seq-lens"), ("decode", "--context")])
def test_an_unsupported_implementation_is_a_row_with_a_reason(bench, monkeypatch, command, length):
    def refuses(*args, implementation=None, **options):
        if implementation == "triton":
            raise jfa.UnsupportedError("not on this card")
        return attend(*args, implementation=implementation, **options)

    attend = jfa.dot_product_attention
    monkeypatch.setattr(jfa, "dot_product_attention", refuses)
    asked = ("--models", LLAMA3, length, "16", "--samples", 1, "--implementation", "triton,jfa", "--layers", 1)
    status, out, _ = bench(command, *asked, "-o", "json")
    rows = {one["implementation"]: one for one in json.loads(out)}
    assert status == 0 and rows["jfa"]["status"] == "ok" and not rows["jfa"].get("speedup")
    assert (rows["triton"]["status"], rows["triton"]["reason"]) == ("unsupported", "not on this card")


def test_a_model_that_exceeds_the_memory_is_rows_with_a_reason(bench, monkeypatch):
    monkeypatch.setattr(models.machine, "free_bytes", lambda: 1000)
    for command, length in (("prefill", "--seq-lens"), ("decode", "--context")):
        status, out, _ = bench(command, "--models", LLAMA3, "--layers", 1, length, "16", "--samples", 1, "-o", "json")
        found = json.loads(out)
        assert status == 0 and {one["status"] for one in found} == {"oom"} and found[0]["case"]["layers"] == 1
        assert "GiB for its weights, 0.0 are free; try --layers" in record.refusals(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--batch", "0,x"], "'0,x' is not a list of integers above 0, such as 1,8"),
        (["decode", "--batch", ""], "'' is not a list of integers above 0"),
        (["prefill", "--seq-lens", "\u00b2"], "is not a list of integers above 0"),
        (["prefill", "--samples", "0"], "Invalid value for '--samples'"),
        (["decode", "-o", "xml"], "'xml' is not one of 'md', 'csv', 'json', 'jsonl'"),
        (["decode", "--models", "no/where"], "unknown model 'no/where'; use one of "),
        (["prefill", "--models", "mistral"], "mistral-7b"),
        (["prefill", "--models", LLAMA3, "--layers", "40"], "num_layers must be 1 to 3, the model's own, got 40"),
        (["decode", "--models", LLAMA3, "--layers", "40"], "num_layers must be 1 to 3, the model's own, got 40"),
        (["prefill", "--models", LLAMA3, "--seq-lens", "513"], "has a context of 512 tokens, got 513"),
        (
            ["decode", "--models", LLAMA3, "--context", "512"],
            "supports at most 484 tokens of context in addition to the timed ones, got 512",
        ),
        (["prefill", "--implementation", "magic"], "unknown implementation 'magic'; use one of jfa, reference, xla"),
        (["compose"], "No such command 'compose'"),
        (
            ["decode", "--save", "/no/such/folder/a.json"],
            "cannot write /no/such/folder/a.json: No such file or directory",
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_status_2(bench, arguments, message):
    status, out, err = bench(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("jfa-bench: ") and err.count("\n") == 1 and message in err

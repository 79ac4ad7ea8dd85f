"""`jfa plan` as its users see it: stdout, stderr and the exit status."""

import json
from pathlib import Path

import pytest
from doc_examples import run_page
from golden import GOLDEN

from jfa_models.engine.engine import FREE_MEMORY
from jfa_models.rates import CARDS

LLAMA = ("plan", "--model", "llama-3-70b", "--arch", "gfx942")
EIGHT = (*LLAMA, "--devices", 8)


def document(out):
    assert out.count("\n") == 1
    return json.loads(out)


def test_a_plan_is_a_page_of_80_columns_that_says_what_it_is_computed_from(jfa):
    status, out, err = jfa(*EIGHT, "--context", 32768)
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert "8 x MI300X (gfx942): 1 engine of tensor=8" in out
    assert "64 sequences of 32,768 tokens fit: at most " in out
    assert "note: the model's own context is 8,192 tokens" in out
    assert "Computed, not measured, from: 192 GB and 5.3 TB/s of memory, 1307.4 TFLOP/s" in out
    assert "between hosts" not in out
    status, out, err = jfa("plan", "--model", "qwen3-next-80b-a3b", "--arch", "sm_90", "--devices", 8, "--hosts", 64)
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert "512 x H100 SXM (sm_90) in 64 hosts: " in out and "not shown: " in out
    assert "50 GB/s between hosts" in " ".join(out.split())


def test_json_is_one_document_and_has_every_split(jfa):
    status, out, err = jfa(*EIGHT, "--context", 32768, "--json")
    found = document(out)
    assert (status, err) == (0, "")
    assert [one["mesh"] for one in found["splits"]] == [{"tensor": n} for n in (1, 2, 4, 8)]
    assert found["split"] == found["splits"][3] and found["split"]["fits"] and not found["splits"][0]["fits"]
    assert found["computed_from"]["memory_gb_per_s"] == 5300 and found["computed_from"]["collective_us"] == 10
    assert (found["batch"], found["context"], found["prompt"], found["dtype"]) == (64, 32768, 32768, "bfloat16")
    split = found["split"]
    assert split["token_ms"] == pytest.approx(sum(1e3 * part["seconds"] for part in split["decode"]))
    assert split["tokens_per_s"] == pytest.approx(64e3 / split["token_ms"])


def test_a_given_mesh_is_the_only_one(jfa):
    _, out, _ = jfa(*EIGHT, "--mesh", "tensor=4", "--json")
    assert [one["mesh"] for one in document(out)["splits"]] == [{"tensor": 4}]
    _, out, _ = jfa(*EIGHT, "--tensor-parallel", 4)
    assert "2 engines of tensor=4" in out and "mesh of an engine" not in out


def test_rates_can_be_given(jfa):
    rates = {"hbm-gb": 100, "hbm-tb-per-s": 1.5, "tflops": 300, "link-gb-per-s": 20, "host-link-gb-per-s": 2}
    _, out, _ = jfa(*EIGHT, "--hosts", 2, *(x for name, rate in rates.items() for x in (f"--{name}", rate)))
    said = " ".join(out.split())
    assert "from: 100 GB and 1.5 TB/s of memory, 300 TFLOP/s in 16 bits, 20 GB/s from a device" in said
    assert "2 GB/s between hosts" in said


def test_what_does_not_fit_is_said(jfa):
    status, out, _ = jfa("plan", "--model", "llama-3-70b", "--arch", "gfx1100", "--devices", 2)
    assert status == 0 and "MISSING" in out
    assert "64 sequences of 8,192 tokens do not fit: nothing does" in out
    assert "none of the 2 ways to divide them fits" in out
    _, out, _ = jfa(*LLAMA, "--quantization", "int8", "--kv-dtype", "int8")
    assert "weights in int8, keys and values in int8" in out and "do not fit: at most " not in out
    _, out, _ = jfa(*LLAMA, "--batch", 500)
    assert "500 sequences of 8,192 tokens do not fit: at most 18 of them, or 500 of 304" in out


def test_what_cannot_be_divided_is_on_every_device_and_said(jfa):
    _, out, _ = jfa(*EIGHT, "--hosts", 16, "--tensor-parallel", 128)
    assert "note: over 128 devices, each has all of: attention (64 query and 8 key heads" in out


def test_a_checkpoint_on_disk_is_planned_by_its_configuration(jfa):
    status, out, _ = jfa("plan", "--model", GOLDEN / "qwen3_moe", "--arch", "gfx942", "--devices", 2, "--json")
    assert status == 0
    assert [one["mesh"] for one in document(out)["splits"]] == [
        {"tensor": 1},
        {"tensor": 2},
        {"tensor": 1, "expert": 2},
    ]


ERRORS = [
    (("--model", "llama-9", "--arch", "gfx942"), "jfa: there is no preset 'llama-9'; the presets are llama-2-7b, "),
    (("--model", "llama-3-70b", "--arch", "gfx9"), "jfa: Invalid value for '--arch': 'gfx9' is not one of "),
    (("--arch", "gfx942"), "jfa: Missing option '--model'."),
    ((*EIGHT[1:], "--batch", -1), "jfa: Invalid value for '--batch': -1 is not in the range x>=1."),
    ((*EIGHT[1:], "--context", 0), "jfa: Invalid value for '--context': 0 is not in the range x>=1."),
    ((*EIGHT[1:], "--hbm-gb", -1), "jfa: Invalid value for '--hbm-gb': -1.0 is not in the range x>0."),
    ((*EIGHT[1:], "--mesh", "tensor=2", "--tensor-parallel", 2), "jfa: --tensor-parallel and --mesh both say how "),
    ((*EIGHT[1:], "--tensor-parallel", 3), "jfa: 8 devices cannot be divided in engines of 3; sizes that do: 1, 2, 4"),
    ((*EIGHT[1:], "--mesh", "data=2"), "jfa: the number of engines follows from that of the devices: leave data out"),
    ((*EIGHT[1:], "--mesh", "foo=2"), "jfa: the mesh has an axis 'foo'; the axes of a decoder are 'data', 'tensor', "),
    (
        ("--model", "mamba-codestral-7b", "--arch", "sm_90", "--kv-dtype", "int8"),
        "jfa: kv_dtype='int8': a mamba2 model ",
    ),
    ((*EIGHT[1:], "--mesh", "expert=2"), "jfa: the mesh has an axis 'expert' of 2 devices, but the model has no exp"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_mistakes_are_one_sentence(jfa, arguments, message):
    status, out, err = jfa("plan", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)


PAGE = Path(__file__).parents[3] / "docs" / "plan.md"


def test_the_page_shows_what_is_printed():
    assert run_page(PAGE, compares=True) == 2


def test_the_page_has_the_rates_that_are_used():
    text = PAGE.read_text()
    for arch, card in CARDS.items():
        links = f"{card.link_gb_per_s:g} | {card.host_link_gb_per_s:g}"
        memory = f"{card.memory_gb:g} | {card.memory_gb_per_s / 1e3:g}"
        assert f"| {arch} | {card.name} | {memory} | {card.tflops:g} | {links} |" in text
    assert f"takes {FREE_MEMORY:.0%} of".replace("%", " %") in text

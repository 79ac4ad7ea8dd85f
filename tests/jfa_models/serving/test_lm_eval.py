"""lm-evaluation-harness, as a client in an environment of its own, gets the numbers that the model gives."""

import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest
from servers import new_engine, serving

from jfa_models.decoding.params import SamplingParams

HARNESS = "lm_eval[api]==0.4.13"
CHOICES = ["red", "green", "blue"]
ITEMS = [{"question": f"number {i} is", "choices": CHOICES, "label": i % 3} for i in range(10)]
TASKS = {
    "choices": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "texts": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["never written"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv, which installs lm-evaluation-harness"),
]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Runs a task through an adapter of the harness; returns its samples."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "items.json").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {folder / 'items.json'}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + text)
    with serving(new_engine(model)) as served:

        def run(adapter, path, task, *options):
            out = folder / f"{adapter}-{task}"
            command = ["uv", "run", "--no-project", "--isolated", "--with", HARNESS, "lm_eval"]
            arguments = f"base_url={served.url}{path},model=tiny,tokenizer_backend=remote,num_concurrent=2"
            command += ["--model", adapter, "--model_args", arguments, "--tasks", task, "--include_path", folder]
            environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
            done = subprocess.run(
                [*map(str, command), "--output_path", str(out), "--log_samples", *options],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
                pytest.skip("the package index cannot be reached")
            assert done.returncode == 0, done.stderr[-3000:]
            [samples] = out.rglob(f"samples_{task}_*.jsonl")
            found = [json.loads(line) for line in samples.read_text().splitlines()]
            return sorted(found, key=lambda sample: sample["doc_id"])

        yield run


def test_log_likelihoods(run, model):
    samples = run("local-completions", "/v1/completions", "choices")
    assert len(samples) == len(ITEMS)
    for sample, item in zip(samples, ITEMS, strict=True):
        got = [(float(logprob), greedy in (True, "True")) for [[logprob, greedy]] in sample["resps"]]
        want = [_likelihood(model, item["question"], f" {choice}") for choice in CHOICES]
        np.testing.assert_allclose([one for one, _ in got], [one for one, _ in want], atol=1e-3)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
        best = max(range(len(CHOICES)), key=lambda i: want[i][0])
        assert sample["acc"] == float(best == item["label"])


def _likelihood(model, context, continuation):
    """Log-likelihood of a continuation, and whether it is what greedy decoding gives."""
    ids = [*model.tokenizer.encode(context), *(own := model.tokenizer.encode(continuation))]
    logprobs = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))[-len(own) - 1 : -1]
    return float(logprobs[np.arange(len(own)), own].sum()), bool((logprobs.argmax(-1) == own).all())


@pytest.mark.parametrize("adapter", ["local-completions", "local-chat-completions"])
def test_texts(run, model, adapter):
    is_chat = adapter == "local-chat-completions"
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    samples = run(adapter, path, "texts", *(["--apply_chat_template"] if is_chat else []))
    for sample, item in zip(samples, ITEMS, strict=True):
        prompt = item["question"]
        if is_chat:
            prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        want = model.generate(prompt, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
        assert sample["resps"] == [[want]]

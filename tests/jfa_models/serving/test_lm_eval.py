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
    """Runs tasks through an adapter of the harness; returns the samples of each."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "items.json").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {folder / 'items.json'}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + text)
    with serving(new_engine(model)) as served:

        def run(adapter, path, *tasks, options=()):
            out = folder / adapter
            command = ["uv", "run", "--no-project", "--isolated", "--with", HARNESS, "lm_eval"]
            arguments = f"base_url={served.url}{path},model=tiny,tokenizer_backend=remote,num_concurrent=2"
            command += [
                "--model",
                adapter,
                "--model_args",
                arguments,
                "--tasks",
                ",".join(tasks),
                "--include_path",
                folder,
            ]
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
            return {task: sorted(map(json.loads, _lines(out, task)), key=lambda one: one["doc_id"]) for task in tasks}

        yield run


def _lines(folder, task):
    [samples] = folder.rglob(f"samples_{task}_*.jsonl")
    return samples.read_text().splitlines()


@pytest.mark.exhaustive
@pytest.mark.soak
def test_completions(run, model):
    found = run("local-completions", "/v1/completions", "choices", "texts")
    samples = found["choices"]
    assert len(samples) == len(ITEMS)
    for sample, item in zip(samples, ITEMS, strict=True):
        got = [(float(logprob), greedy in (True, "True")) for [[logprob, greedy]] in sample["resps"]]
        want = [_likelihood(model, item["question"], f" {choice}") for choice in CHOICES]
        np.testing.assert_allclose([one for one, _ in got], [one for one, _ in want], atol=1e-3)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
        best = max(range(len(CHOICES)), key=lambda i: want[i][0])
        assert sample["acc"] == float(best == item["label"])
    check_texts(found["texts"], model, lambda question: question)


def _likelihood(model, context, continuation):
    """Log-likelihood of a continuation, and whether it is what greedy decoding gives."""
    ids = [*model.tokenizer.encode(context), *(own := model.tokenizer.encode(continuation))]
    logprobs = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))[-len(own) - 1 : -1]
    return float(logprobs[np.arange(len(own)), own].sum()), bool((logprobs.argmax(-1) == own).all())


def test_chat_completions(run, model):
    found = run("local-chat-completions", "/v1/chat/completions", "texts", options=["--apply_chat_template"])

    def prompt(question):
        return model.tokenizer.apply_chat_template([{"role": "user", "content": question}])

    check_texts(found["texts"], model, prompt)


def check_texts(samples, model, prompt):
    for sample, item in zip(samples, ITEMS, strict=True):
        params = SamplingParams(temperature=0, max_tokens=6)
        assert sample["resps"] == [[model.generate(prompt(item["question"]), params)[0].outputs[0].text]]

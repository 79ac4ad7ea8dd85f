"""Runs many questions with one long common prefix through the engine, and shows what prefix caching saves.

    python examples/batch_with_prefix.py --model smollm2

The model may be a folder, a GGUF file or a Hugging Face repository.
"""

import argparse
import time

import jfa_models

PREFIX = "Answer with one word.\n" + "".join(
    f"Q: What is the capital of {country}?\nA: {city}\n"
    for country, city in [("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo")]
)
COUNTRIES = ["France", "Germany", "Portugal", "Norway", "Peru", "Kenya", "Greece", "Austria"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2")
args = parser.parse_args()

prompts = [f"{PREFIX}Q: What is the capital of {country}?\nA:" for country in COUNTRIES]
params = jfa_models.SamplingParams(temperature=0, max_tokens=8, stop="\n")
model = jfa_models.from_pretrained(args.model)
for shares in (False, True):
    llm = jfa_models.LLM(model, max_num_seqs=4, max_model_len=512, enable_prefix_caching=shares)
    llm.engine.warm_up([params])  # compile before the clock starts
    start = time.perf_counter()
    results = llm.generate(prompts, params)
    seconds, metrics = time.perf_counter() - start, llm.engine.metrics()
    print(f"prefix caching {shares}: {seconds:.2f} s, {metrics.prefix_hits:.0%} of looked-up tokens found")
for country, result in zip(COUNTRIES, results, strict=True):
    print(f"{country}: {result.outputs[0].text.strip()}")

"""Teaches a model a fixed format with a LoRA adapter, and counts exact answers to new questions before and after.

    python examples/teach_a_format.py --model smollm2 --output format-adapter --plot format.png

--quantization int4 holds the base in 4 bits (QLoRA). The model needs a chat template.
"""

import argparse
import json
import random
from pathlib import Path

import jfa_models
from jfa_models import training
from jfa_models.training import curve

WORDS = "apple river stone cloud tiger lemon chair table bread glass horse paper light water green quiet happy sugar"
NEW = "music ocean winter garden window bottle silver copper forest planet rocket piano hotel carrot island candle"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--quantization", default="none")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--texts", type=int, default=300)
parser.add_argument("--questions", type=int, default=50)
parser.add_argument("--plot", type=Path)
args = parser.parse_args()


def question(words: list[str]) -> dict[str, str]:
    return {"role": "user", "content": f"Words: {', '.join(words)}"}


def answer(words: list[str]) -> str:
    return json.dumps({"count": len(words), "first": words[0], "last": words[-1]})


def samples(words: str, count: int) -> list[list[str]]:
    chosen = random.Random(0)
    return [chosen.sample(words.split(), chosen.randint(2, 4)) for _ in range(count)]


args.output.mkdir(parents=True, exist_ok=True)
file = args.output / "data.jsonl"
turns = [[question(one), {"role": "assistant", "content": answer(one)}] for one in samples(WORDS, args.texts)]
file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))

model = jfa_models.from_pretrained(args.model, quantization=args.quantization)
assert model.tokenizer is not None
data = training.read_data(file, model.tokenizer, max_length=256)
options = training.Options(row_length=256, rows=4, epochs=2, learning_rate=1e-3)
adapter = training.new_adapter(model, rank=8)
training.finetune(
    model, adapter, data, args.output, options, on_step=lambda done: print(f"{done.step}: {done.loss:.3f}")
)
if args.plot is not None:
    curve.save(args.output, args.plot)

llm = jfa_models.LLM(model, max_num_seqs=8, max_model_len=256)
model.load_adapter("format", args.output)
questions = samples(NEW, args.questions)
for name in (None, "format"):
    params = jfa_models.SamplingParams(temperature=0, max_tokens=40)
    results = llm.chat([[question(one)] for one in questions], params, adapter=name)
    right = [result.outputs[0].text == answer(one) for result, one in zip(results, questions, strict=True)]
    print(f"adapter {name}: {sum(right)} of {len(right)} answers are exact")

"""Teaches a model a fixed format with a LoRA adapter, and counts exact answers to new questions before and after.

    python examples/teach_a_format.py --output format-adapter --plot format.png

--quantization int4 holds the base in 4 bits (QLoRA). The model needs a chat template.
"""

import argparse
import json
import random
from pathlib import Path

import jfa_models
from jfa_models import training
from jfa_models.training import curve

WORDS = """apple river stone cloud tiger lemon chair table bread glass horse paper light water green quiet happy sugar
spoon clock beach train honey field smile tower queen north shell cabin pearl flame drum maple snow iron wolf rose lake
moon bridge farmer doctor pencil basket carpet market ladder hammer rabbit spider butter pepper dragon castle engine
pocket letter number street school family summer yellow purple orange violet marble cotton rubber leather diamond"""
NEW = "music ocean winter garden window bottle silver copper forest planet rocket piano hotel carrot island candle"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--quantization", default="none")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--texts", type=int, default=400)
parser.add_argument("--questions", type=int, default=50)
parser.add_argument("--plot", type=Path)
args = parser.parse_args()


def conversation(words: list[str]) -> list[dict[str, str]]:
    answer = json.dumps({"count": len(words), "first": words[0], "last": words[-1]})
    return [{"role": "user", "content": f"Words: {', '.join(words)}"}, {"role": "assistant", "content": answer}]


def conversations(words: str, count: int) -> list[list[dict[str, str]]]:
    chosen = random.Random(0)
    return [conversation(chosen.sample(words.split(), chosen.randint(2, 4))) for _ in range(count)]


args.output.mkdir(parents=True, exist_ok=True)
file = args.output / "data.jsonl"
file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations(WORDS, args.texts)))
model = jfa_models.from_pretrained(args.model, quantization=args.quantization)
data = training.read_data(file, model.tokenizer, max_length=256)
options = training.Options(row_length=256, rows=4, learning_rate=1e-3)
adapter = training.new_adapter(model, rank=8)
training.finetune(model, adapter, data, args.output, options, on_step=lambda one: print(f"{one.step}: {one.loss:.3f}"))
if args.plot:
    curve.save(args.output, args.plot)
model.load_adapter("format", args.output)
llm, params = jfa_models.LLM(model, max_num_seqs=8), jfa_models.SamplingParams(temperature=0, max_tokens=40)
questions = conversations(NEW, args.questions)
for name in (None, "format"):
    results = llm.chat([one[:1] for one in questions], params, adapter=name)
    right = [result.outputs[0].text == one[1]["content"] for result, one in zip(results, questions, strict=True)]
    print(f"adapter {name}: {sum(right)} of {len(right)} answers are exact")

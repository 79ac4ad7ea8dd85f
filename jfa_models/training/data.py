"""Training data: a file of texts or conversations as token ids with targets, packed into rows without padding between.

The order of texts and their rows depend on the seed and the epoch alone, so that a run can go on where it stopped.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jfa_models.text.tokenizer import Tokenizer
from jfa_models.training.step import Batch

TooLong = Literal["cut", "drop"]

_OPEN_ROWS = 64  # that packing can still add a text to

KINDS = ("messages", "prompt and completion", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One text.

    Attributes:
      ids: its tokens, at least two.
      is_target: for each token, whether it is to be predicted from those before it.
      line: its line in the file, counted from 1.
    """

    ids: np.ndarray
    is_target: np.ndarray
    line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The texts of a file.

    Attributes:
      num_cut, num_dropped: texts that were longer than the limit, and what was done with them.
      bad_lines: the messages of lines that were skipped.
    """

    path: Path
    examples: tuple[Example, ...]
    num_cut: int = 0
    num_dropped: int = 0
    bad_lines: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of all texts."""
        return sum(len(one.ids) for one in self.examples)

    def describe(self) -> str:
        """A line for a person, and one for each of the first bad lines."""
        targets = sum(int(one.is_target.sum()) for one in self.examples)
        counts = [
            f"{len(self.examples):,} texts, {self.num_tokens:,} tokens, of which {targets:,} are learned",
            *([f"{self.num_cut:,} too long and cut"] if self.num_cut else []),
            *([f"{self.num_dropped:,} too long and left out"] if self.num_dropped else []),
            *([f"{len(self.bad_lines):,} bad lines left out"] if self.bad_lines else []),
        ]
        return "\n".join([f"{self.path}: {'; '.join(counts)}", *self.bad_lines[:5]])


def read_data(
    path: Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: TooLong = "cut",
    train_on_prompts: bool = False,
    skip_bad_lines: bool = False,
) -> Data:
    """Reads JSON Lines, each an object with "messages", with "prompt" and "completion", or with "text".

    Messages are formatted by the model's chat template, with "tools" if the line has them, and the assistant's turns
    are targets; of a prompt and its completion, the completion and the end token after it; of a text, all tokens and
    the end token.

    Args:
      max_length: of a text in tokens.
      too_long: longer ones are cut at the end, or dropped.
      train_on_prompts: every token is a target.
      skip_bad_lines: leave out lines that cannot be used instead of raising.

    Raises:
      ValueError: a line is not valid JSON, lacks the fields, is refused by the chat template, or has nothing to learn;
        or no text is left. The message names the file and the line.
    """
    examples, bad = [], []
    num_cut = num_dropped = 0
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            ids, is_target = _encoded(text, tokenizer)
            if train_on_prompts:
                is_target = [True] * len(ids)
            if not any(is_target[1:]):
                raise ValueError(f"has nothing to learn: its {len(ids)} tokens have no learned one after the first")
        except ValueError as error:
            message = f"{path}, line {number}: {error}"
            if not skip_bad_lines:
                raise ValueError(f"{message}; --skip-bad-lines leaves such lines out") from None
            bad.append(message)
            continue
        is_target[0] = False  # there is nothing to predict it from
        wanted = np.array(is_target[:max_length], np.int32)
        if len(ids) > max_length and (too_long == "drop" or not wanted.any()):  # or only its prompt is left
            num_dropped += 1
            continue
        num_cut += len(ids) > max_length
        examples.append(Example(ids=np.array(ids[:max_length], np.int32), is_target=wanted, line=number))
    if not examples:
        why = f" ({num_dropped} are too long, {len(bad)} are bad)" if num_dropped or bad else ""
        first = f"; the first bad line: {bad[0]}" if bad else ""
        raise ValueError(f"{path} has no text to train on{why}{first}")
    return Data(path=path, examples=tuple(examples), num_cut=num_cut, num_dropped=num_dropped, bad_lines=tuple(bad))


def _encoded(text: bytes, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"must be a JSON object, got a {type(given).__name__}")
    found = [name for name in ("messages", "prompt", "text") if name in given]
    if len(found) != 1 or ("prompt" in given) != ("completion" in given):
        raise ValueError(f"must have one of {', or '.join(KINDS)}, got the fields {', '.join(given) or 'none'}")
    if found == ["messages"]:
        return _conversation(given["messages"], given.get("tools"), tokenizer)
    for name in ("prompt", "completion", "text"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{name} must be a string, got a {type(given[name]).__name__}")
    ends = list(tokenizer.eos_token_ids[:1])
    if "text" in given:
        if not given["text"]:
            raise ValueError("text is empty")
        ids = tokenizer.encode(given["text"])
        ids += ends if ids[-1:] != ends else []  # some tokenizers add it
        return ids, [True] * len(ids)
    before = tokenizer.encode(given["prompt"])
    if not before:
        raise ValueError("prompt has no tokens, so there is nothing to predict the completion from")
    answer = _continuation(given["prompt"], given["completion"], tokenizer) + ends
    return before + answer, [False] * len(before) + [True] * len(answer)


def _continuation(before: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text that follows another, whose tokens stay as they are.

    SentencePiece puts a space before a text that is encoded alone, which a model would learn to write.
    """
    for context in (before, "\n"):  # where tokens join the text's start to `before`: what hardly any joins
        first = tokenizer.encode(context, add_special_tokens=False)
        whole = tokenizer.encode(context + text, add_special_tokens=False)
        if whole[: len(first)] == first:
            return whole[len(first) :]
    return tokenizer.encode(text, add_special_tokens=False)


def _conversation(messages: Any, tools: Any, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Each turn of the assistant is encoded after the text that the model would see at that point when it generates."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise ValueError('messages must be a list of {"role": ..., "content": ...}')
    if not any(one["role"] == "assistant" for one in messages):
        raise ValueError("messages has no turn of the assistant, so there is nothing to learn")
    if messages[0]["role"] == "assistant":
        raise ValueError("messages starts with a turn of the assistant, which has nothing to answer")
    ids: list[int] = []
    is_target: list[bool] = []
    done = ""

    def add(text: str, wanted: bool) -> None:
        nonlocal done
        new = _continuation(done, text, tokenizer)
        done += text
        ids.extend(new)
        is_target.extend([wanted] * len(new))

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tools=tools, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tools=tools, add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"the chat template changes earlier turns when turn {i} is added, so no single text has all turns as "
                "the model would see them: use one line for each turn of the assistant"
            )
        answer = after[len(before) :]
        turn = answer.rstrip("\n")  # what follows the end of the turn is the template's, not the model's
        add(before[len(done) :], False)
        add(turn, True)
        add(answer[len(turn) :], False)
    return ids, is_target


def split(data: Data, fraction: float, seed: int) -> tuple[Data, Data | None]:
    """Separates a random part of the texts, to evaluate with; None if the fraction is 0."""
    count = round(len(data.examples) * fraction)
    if not fraction:
        return data, None
    if not 0 < fraction < 1 or not 0 < count < len(data.examples):
        raise ValueError(
            f"a fraction of {fraction} of {len(data.examples)} texts for the evaluation leaves no text on one side"
        )
    order = np.random.default_rng((seed, 1)).permutation(len(data.examples))
    chosen = set(order[:count].tolist())
    parts = [[one for i, one in enumerate(data.examples) if (i in chosen) == wanted] for wanted in (False, True)]
    train, held_out = (dataclasses.replace(data, examples=tuple(part)) for part in parts)
    return train, held_out


def batches(
    examples: Sequence[Example], *, row_length: int, rows: int, parts: int = 1, seed: int | None = None, epoch: int = 0
) -> Iterator[tuple[Batch, list[int]]]:
    """The batches of one epoch, on the host, and the lines of their texts. A batch has parts * rows rows.

    Args:
      row_length: tokens of a row.
      seed: None: in the order of the file.
    """
    order = range(len(examples))
    if seed is not None:
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(examples)).tolist()
    packed = pack([len(examples[i].ids) for i in order], row_length)
    for first in range(0, len(packed), rows * parts):
        tokens, segments, targets = np.zeros((3, parts * rows, row_length), np.int32)
        lines = []
        for row, members in enumerate(packed[first : first + rows * parts]):
            end = 0
            for number, member in enumerate(members, start=1):
                one = examples[order[member]]
                place = slice(end, end + len(one.ids))
                tokens[row, place], segments[row, place], targets[row, place] = one.ids, number, one.is_target
                end += len(one.ids)
                lines.append(one.line)
        shape = (parts, rows, row_length)
        found: list[Any] = [x.reshape(shape) for x in (tokens, segments, targets)]
        yield Batch(*found), lines


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Puts texts into rows: each into the fullest row that has room, within a window of open rows.

    Returns the texts of each row by index, in an order close to that of the texts.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for i, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(f"text {i} has {length} tokens, more than a row of {row_length}")
        row = min((row for row in open_rows if room[row] >= length), key=lambda row: (room[row], row), default=None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_length)
            open_rows.append(row)
        rows[row].append(i)
        room[row] -= length
        if len(open_rows) > _OPEN_ROWS or room[row] < 2:
            open_rows.remove(min(open_rows, key=lambda row: (room[row], row)))
    return rows

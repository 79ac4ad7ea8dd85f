"""The forms of a prompt: text, token ids, or a dictionary of either, as in vLLM."""

import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Converts one or several prompts to a list.

    Raises:
      ValueError: prompts is neither a prompt nor a sequence.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not _is_sequence(prompts):
        raise ValueError(f"prompts must be texts or lists of token ids, one or a list of them, got {prompts!r}")
    first: Any = next(iter(prompts), "")
    is_number = isinstance(first, Real) or (hasattr(first, "__index__") and getattr(first, "ndim", 0) == 0)
    return [prompts] if is_number else list(prompts)  # type: ignore[list-item]


def text_of(prompt: Prompt) -> str | None:
    """The text of a prompt; None if it was passed as token ids only."""
    if isinstance(prompt, Mapping):
        return prompt.get("prompt")
    return prompt if isinstance(prompt, str) else None


def unpacked(prompt: Prompt, name: str) -> str | list[int]:
    """The content of a prompt; of a dictionary with both, its token ids.

    Raises:
      ValueError: the prompt is neither a text nor integers, or a dictionary has neither a prompt nor prompt_token_ids,
        or other keys.
    """
    if not isinstance(prompt, Mapping):
        return prompt if isinstance(prompt, str) else _ids(prompt, name, "a text or a list of token ids")
    given: dict[str, Any] = {key: value for key, value in prompt.items() if value is not None}
    if not given or given.keys() - {"prompt", "prompt_token_ids"}:
        raise ValueError(
            f'{name} must have "prompt" or "prompt_token_ids" and nothing else, got the keys {list(given)}'
        )
    text = given.get("prompt", "")
    if not isinstance(text, str):
        raise ValueError(f'{name}: "prompt" must be a text, got {text!r}; pass token ids as "prompt_token_ids"')
    if "prompt_token_ids" not in given:
        return text
    return _ids(given["prompt_token_ids"], f'{name}: "prompt_token_ids"', "a list of token ids")


def _ids(prompt: Any, name: str, kind: str) -> list[int]:
    if isinstance(prompt, str) or not _is_sequence(prompt):
        raise ValueError(f"{name} must be {kind}, got {prompt!r}")
    ids = []
    for one in np.asarray(prompt).tolist() if hasattr(prompt, "dtype") else prompt:
        try:
            ids.append(operator.index(one))
        except TypeError:
            raise ValueError(f"{name} must be {kind}, got a list with {one!r}") from None
    return ids


def _is_sequence(x: Any) -> bool:
    """Whether x has a length and an order: a list, a tuple, or an array of any library; not bytes."""
    has_order = hasattr(x, "__len__") and hasattr(x, "__getitem__")
    has_order &= not isinstance(x, bytes | bytearray | memoryview | Mapping | type)
    return has_order and getattr(x, "ndim", 1) > 0

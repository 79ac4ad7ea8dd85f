"""The forms of a prompt: text, token ids, or a dictionary of either, as in vLLM."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Converts one or several prompts to a list."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    first: Any = prompts[0] if len(prompts) else ""
    if not isinstance(first, str | Mapping) and np.ndim(first) == 0:
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def text_of(prompt: Prompt) -> str | None:
    """The text of a prompt; None if it was passed as token ids only."""
    if isinstance(prompt, Mapping):
        return prompt.get("prompt")
    return prompt if isinstance(prompt, str) else None


def unpacked(prompt: Prompt, name: str) -> str | Sequence[int]:
    """The content of a prompt; of a dictionary with both, its token ids.

    Raises:
      ValueError: a dictionary has neither a prompt nor prompt_token_ids, or other keys.
    """
    if not isinstance(prompt, Mapping):
        return prompt
    given: dict[str, Any] = {key: value for key, value in prompt.items() if value is not None}
    if not given or given.keys() - {"prompt", "prompt_token_ids"}:
        raise ValueError(
            f'{name} must have "prompt" or "prompt_token_ids" and nothing else, got the keys {list(given)}'
        )
    return given["prompt_token_ids"] if "prompt_token_ids" in given else given["prompt"]

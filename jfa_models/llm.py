"""Many prompts in one call: the engine behind a face that people know."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jfa_models.decoding.language_model import LanguageModel, Prompt, as_prompts
from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.params import BeamSearchParams, SamplingParams
from jfa_models.decoding.pretrained import from_pretrained
from jfa_models.engine import Engine

Params = SamplingParams | BeamSearchParams
Message = dict[str, str]


class LLM:
    """A model that continues lists of prompts as fast as they go together, under vLLM's names.

    Attributes:
      engine: what runs the requests, for who wants to stream or to mix calls.
      model: its LanguageModel.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel = "smollm2",
        *,
        dtype: DTypeLike | None = None,
        kv_dtype: str | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        seed: int = 0,
    ):
        """Loads a model and makes its pool of pages.

        Args:
          model: what from_pretrained takes, or a LanguageModel, which has a dtype already.
          the others: as Engine has them.

        Raises:
          ValueError: as from_pretrained and Engine.
        """
        if not isinstance(model, LanguageModel):
            model = from_pretrained(model, dtype=dtype)
        elif dtype is not None:
            raise ValueError(f"dtype={dtype!r} came too late: the model is loaded, in {model.dtype}; leave it out")
        self.model = model
        self.engine = Engine(
            model,
            kv_dtype=kv_dtype,
            page_size=page_size,
            num_pages=num_pages,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        progress: bool | None = None,
        on_finished: Callable[[int, RequestOutput], Any] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; results in the order of the prompts.

        Without a seed of its own, a request draws by (the seed of this LLM, its place in prompts). When it is
        interrupted, or a callback raises, the engine starts anew: what was not finished is lost.

        Args:
          prompts: text or token ids, one or many, of any lengths.
          sampling_params: one for all or one each; None: as the model's authors advise.
          progress: a bar on stderr; None: if that is a terminal.
          on_finished: called with a prompt's place and result as soon as it has ended.

        Raises:
          ValueError: a prompt that can never be served; the message says which and why. None has begun then.
        """
        prompts = as_prompts(prompts)
        params = [sampling_params] * len(prompts) if not isinstance(sampling_params, Sequence) else sampling_params
        if len(params) != len(prompts):
            raise ValueError(f"there must be one params, or one for each prompt, got {len(params)} for {len(prompts)}")
        if self.engine.has_unfinished:
            raise RuntimeError("the engine is busy with requests of its own: wait for their end, or use add_request")
        results: dict[int, RequestOutput] = {}
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = sys.stderr.isatty() if progress is None else progress
        places = self._add_all(prompts, params)
        try:
            with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
                task = bar.add_task("generating", total=len(prompts))
                for result in self.engine.run():
                    if result.request_id not in places:
                        continue  # of somebody who never asked for it
                    place = places[result.request_id]
                    results[place] = result
                    if on_finished is not None:
                        on_finished(place, result)
                    bar.advance(task)
        except BaseException:  # Ctrl-C too: the requests are this call's alone, and nobody would end them
            self.engine.reset()
            raise
        return [results[place] for place in range(len(prompts))]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Sequence[Params] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, in the words of the model's chat template.

        Args:
          messages: {"role": ..., "content": ...}, the oldest first; or a list of such conversations.
          options: of generate.

        Raises:
          ValueError: the model has no chat template; or as generate.
        """
        tokenizer = self.model.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError("this model has no chat template, so it was not made for conversations: use generate")
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [
            tokenizer.encode(tokenizer.apply_chat_template(list(one)), add_special_tokens=False)
            for one in conversations
        ]
        return self.generate(prompts, sampling_params, **options)

    def _add_all(self, prompts: Sequence[Prompt], params: Sequence[Params | None]) -> dict[str, int]:
        """The place of each request by its id; all of them, or none."""
        places: dict[str, int] = {}
        for place, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            try:
                places[self.engine.add_request(prompt, one, number=place)] = place
            except ValueError as error:
                for request_id in places:
                    self.engine.abort(request_id)
                self.engine.step()
                raise ValueError(f"prompt {place}: {error}") from error
        return places

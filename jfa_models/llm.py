"""Generation for many prompts in one call: the engine with vLLM's interface."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jfa_models.decoding.adapters import Names, names_of
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.params import BeamSearchParams, SamplingParams, one_per_prompt
from jfa_models.decoding.pretrained import from_pretrained
from jfa_models.decoding.prompts import Prompt, as_prompts
from jfa_models.decoding.speculation import SpeculativeConfig
from jfa_models.engine import engine_of

Params = SamplingParams | BeamSearchParams
Message = dict[str, str]


class LLM:
    """Generates text for lists of prompts with continuous batching, under vLLM's names.

    Attributes:
      engine: runs the requests; use it directly to stream or to mix calls. Replicas, if the mesh has an axis "data".
      model: its LanguageModel.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel = "smollm2",
        *,
        dtype: DTypeLike | None = None,
        quantization: str | None = None,
        kv_dtype: str | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        num_state_snapshots: int = 16,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        seed: int = 0,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        max_adapters: int | None = None,
        max_rank: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        tensor_parallel: int | None = None,
        attention_window: int | None = None,
        attention_sinks: int | None = None,
    ):
        """Loads a model and allocates its pool of pages.

        Args:
          model: what from_pretrained takes, or a LanguageModel, which already has a dtype, its weights and adapters.
          dtype, quantization, adapters, max_adapters, max_rank, mesh, tensor_parallel, attention_window,
            attention_sinks: see from_pretrained.
          other arguments: see Engine.

        Raises:
          ValueError: see from_pretrained and Engine.
        """
        given = {"dtype": dtype, "quantization": quantization, "adapters": adapters}
        given |= {"max_adapters": max_adapters, "max_rank": max_rank}
        given |= {"mesh": mesh, "tensor_parallel": tensor_parallel}
        given |= {"attention_window": attention_window, "attention_sinks": attention_sinks}
        if not isinstance(model, LanguageModel):
            model = from_pretrained(model, **given, context_length=max_model_len)
        elif unused := {name: value for name, value in given.items() if value is not None}:
            name, value = next(iter(unused.items()))
            raise ValueError(
                f"{name}={value!r} has no effect: the model is already loaded in {model.dtype}; leave it out"
            )
        if (groups := model.partition.num_groups) > 1:
            raise ValueError(
                f"{groups} groups of processes have replicas of the model, and each would run all prompts: use a mesh "
                "without the axis 'data' here, or run a file of prompts (jfa generate --batch-file, jfa_models.batch)"
            )
        self.model = model
        self.engine = engine_of(
            model,
            kv_dtype=kv_dtype,
            page_size=page_size,
            num_pages=num_pages,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            num_state_snapshots=num_state_snapshots,
            speculative_config=speculative_config,
            seed=seed,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        adapter: Names = None,
        progress: bool | None = None,
        on_finished: Callable[[int, RequestOutput], Any] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; results are in the order of the prompts.

        A request without a seed gets one from (the seed of this LLM, its index in prompts). If the call is interrupted
        or a callback raises, the engine is reset: unfinished requests are lost.

        Args:
          prompts: text or token ids, one or many, of any length.
          sampling_params: one for all prompts or one per prompt; None: as the model's authors recommend.
          adapter: the name of a loaded adapter, or one per prompt; None: none.
          progress: whether to show a bar on stderr; None: if stderr is a terminal.
          on_finished: called with a prompt's index and result as soon as it finishes.

        Raises:
          ValueError: a prompt can never be served; the message says which and why. No request was started.
        """
        prompts = as_prompts(prompts)
        params = one_per_prompt(sampling_params, len(prompts))
        if self.engine.has_unfinished:
            raise RuntimeError("the engine runs other requests: wait until they finish, or use engine.add_request")
        results: dict[int, RequestOutput] = {}
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = sys.stderr.isatty() if progress is None else progress
        places = self._add_all(prompts, params, names_of(adapter, len(prompts)))
        try:
            with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
                task = bar.add_task("generating", total=len(prompts))
                for result in self.engine.run():
                    if result.request_id not in places:
                        continue  # added to the engine directly, not by this call
                    place = places[result.request_id]
                    results[place] = result
                    if on_finished is not None:
                        on_finished(place, result)
                    bar.advance(task)
        except BaseException:  # Ctrl-C too: nothing else would finish the requests of this call
            self.engine.reset()
            raise
        return [results[place] for place in range(len(prompts))]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers one or several conversations, formatted with the model's chat template.

        Args:
          messages: {"role": ..., "content": ...}, oldest first; or a list of such conversations.
          tools, chat_template, add_generation_prompt, continue_final_message: see Tokenizer.apply_chat_template.
          chat_template_kwargs: its extra arguments, such as {"enable_thinking": False}.
          options: passed to generate.

        Raises:
          ValueError: the model has no chat template; or see generate.
        """
        extra = chat_template_kwargs or {}
        if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
            raise ValueError(f"chat_template_kwargs must be a dictionary of arguments by name, got {extra!r}")
        tokenizer = self.model.tokenizer
        if tokenizer is None or not (tokenizer.chat_templates or chat_template or "chat_template" in extra):
            raise ValueError("this model has no chat template, so it was not made for conversations: use generate")
        conversations: Any = (
            [messages] if _is_list(messages) and isinstance(next(iter(messages), None), Mapping) else messages
        )
        if not _is_list(conversations) or not all(map(_is_list, conversations)):
            raise ValueError(f'messages must be a list of {{"role": ..., "content": ...}}, got {messages!r}')
        given: dict[str, Any] = dict(tools=tools, chat_template=chat_template)
        given |= dict(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        given |= extra
        if "messages" in given:
            raise ValueError("chat_template_kwargs must not have messages: they are the first argument")
        prompts = [
            tokenizer.encode(tokenizer.apply_chat_template(list(one), **given), add_special_tokens=False)
            for one in conversations
        ]
        return self.generate(prompts, sampling_params, **options)

    def _add_all(
        self, prompts: Sequence[Prompt], params: Sequence[Params | None], adapters: Sequence[str | None]
    ) -> dict[str, int]:
        """Adds all requests, or none if one is refused; returns the prompt index by request id."""
        places: dict[str, int] = {}
        for place, (prompt, one, adapter) in enumerate(zip(prompts, params, adapters, strict=True)):
            try:
                places[self.engine.add_request(prompt, one, number=place, adapter=adapter)] = place
            except Exception as error:
                for request_id in places:
                    self.engine.abort(request_id)
                self.engine.step()
                if isinstance(error, ValueError):
                    raise ValueError(f"prompt {place}: {error}") from error
                raise
        return places


def _is_list(x: object) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)

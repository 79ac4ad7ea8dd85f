"""/v1/completions: a prompt is continued."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import CompletionOutput, Logprob, RequestOutput
from jfa_models.decoding.prompts import Prompt
from jfa_models.serving.errors import ApiError
from jfa_models.serving.replies import DONE, Reply, event, likeliest, token_text, usage_of
from jfa_models.serving.schema import CompletionRequest, sampling_fields

DEFAULT_MAX_TOKENS = 16


class CompletionReply(Reply):
    """The answer of /v1/completions."""

    prefix = "cmpl"
    request: CompletionRequest

    def __init__(self, request: CompletionRequest, model: str, id: str, language_model: LanguageModel):
        super().__init__(request, model, id)
        self._tokenizer = language_model.tokenizer
        self.prompts = self._prompts()
        fields = sampling_fields(request)
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        self._is_empty = max_tokens == 0 and bool(request.echo)  # one token is computed, and left out
        fields["max_tokens"] = 1 if self._is_empty else max_tokens
        if request.logprobs is not None:
            fields["logprobs"] = request.logprobs
            if request.echo:
                fields["prompt_logprobs"] = request.logprobs
        self.params = language_model.default_params(**fields)

    def _prompts(self) -> list[Prompt]:
        given = self.request.prompt
        kinds = {type(one) for one in given}
        if len(kinds) > 1:
            raise ApiError(
                400, "prompt must be a list of texts, of token ids, or of lists of token ids", param="prompt"
            )
        prompts: list[Any] = [given] if isinstance(given, str) or kinds == {int} else list(given)
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise ApiError(400, "prompt is empty: pass at least one token", param="prompt")
        if self.request.add_special_tokens or self._tokenizer is None:
            return prompts
        encode = self._tokenizer.encode
        return [encode(one, add_special_tokens=False) if isinstance(one, str) else one for one in prompts]

    def whole(self, results: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._choice(place, result, one, 0, 0, result.prompt_token_ids if self.request.echo else ())
            for place, result in enumerate(results)
            for one in result.outputs
        ]
        return {**self._head(), "choices": choices, "usage": self._usage(results)}

    def grown(self, place: int, result: RequestOutput) -> Iterator[bytes]:
        for one in result.outputs:
            shown = self.shown(place, one)
            is_new = shown.num_tokens == 0
            echoed = result.prompt_token_ids if self.request.echo and is_new else ()
            has_news = len(one.text) > shown.num_characters or self.request.logprobs is not None or echoed
            if shown.is_ended or not one.token_ids or not (has_news or one.finish_reason):
                continue
            choice = self._choice(place, result, one, shown.num_tokens, shown.num_characters, echoed)
            shown.num_tokens, shown.num_characters = len(one.token_ids), len(one.text)
            shown.is_ended = one.finish_reason is not None
            yield event({**self._head(), "choices": [choice]})

    def end(self, results: Sequence[RequestOutput]) -> Iterator[bytes]:
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head(), "choices": [], "usage": self._usage(results)})
        yield DONE

    def _usage(self, results: Sequence[RequestOutput]) -> dict[str, int]:
        usage = usage_of(results)
        if self._is_empty:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _choice(
        self,
        place: int,
        result: RequestOutput,
        one: CompletionOutput,
        num_tokens: int,
        num_characters: int,
        echoed: Sequence[int],
    ) -> dict[str, Any]:
        """A choice from its num_tokens-th token and num_characters-th character on, after the echoed prompt."""
        echo = self._echo(result) if echoed else ""
        text = echo + ("" if self._is_empty else one.text[num_characters:])
        choice: dict[str, Any] = {
            "index": place * self.params.n + one.index,
            "text": text,
            "logprobs": None,
            "finish_reason": "length" if self._is_empty else one.finish_reason,
            "stop_reason": None if self._is_empty else one.stop_reason,
        }
        if one.logprobs is not None:
            generated = (
                () if self._is_empty else zip(one.token_ids[num_tokens:], one.logprobs[num_tokens:], strict=True)
            )
            prompt = zip(echoed, result.prompt_logprobs or (), strict=True) if echoed else ()
            offset = num_characters if echoed or not self.request.echo else num_characters + len(self._echo(result))
            choice["logprobs"] = self._logprobs([*prompt, *generated], offset)
        if self.request.return_token_ids:
            choice["token_ids"] = [] if self._is_empty else one.token_ids[num_tokens:]
            choice["prompt_token_ids"] = result.prompt_token_ids if num_tokens == 0 else None
        return choice

    def _echo(self, result: RequestOutput) -> str:
        if result.prompt is not None:
            return result.prompt
        if self._tokenizer is None:
            raise ApiError(400, "this model has no tokenizer, so echo has no text", param="echo")
        return self._tokenizer.decode(result.prompt_token_ids, skip_special_tokens=self.params.skip_special_tokens)

    def _logprobs(self, tokens: Sequence[tuple[int, Mapping[int, Logprob] | None]], offset: int) -> dict[str, Any]:
        as_id = self.request.return_tokens_as_token_ids
        texts, of_tokens, of_top, offsets = [], [], [], []
        for token_id, entries in tokens:
            if entries is None:  # the first token of a prompt has no predecessor
                text = self._first_text(token_id, as_id)
                of_tokens.append(None)
                of_top.append(None)
            else:
                text = token_text(token_id, entries[token_id], as_id=as_id)
                of_tokens.append(entries[token_id].logprob)
                top: dict[str, float] = {}  # with the token itself, and the very same number for it
                for other, one in likeliest(entries, len(entries)):
                    top.setdefault(token_text(other, one, as_id=as_id), one.logprob)
                of_top.append(top)
            texts.append(text)
            offsets.append(offset)
            offset += len(text)
        return {"tokens": texts, "token_logprobs": of_tokens, "top_logprobs": of_top, "text_offset": offsets}

    def _first_text(self, token_id: int, as_id: bool) -> str:
        if as_id or self._tokenizer is None or self._tokenizer.core.id_to_token(token_id) is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

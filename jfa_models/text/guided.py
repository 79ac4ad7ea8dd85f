"""Guided decoding: which tokens may come next, so that an answer has the form that its request asks for.

A `Grammar` is compiled once from StructuredOutputsParams; each continuation has a `Guide`, which follows its tokens and
fills rows of a bit mask, int32[words], bit i of word w for token 32 * w + i. The automata are llguidance's; this module
adds what it lacks: end tokens, refusals that name the place in a schema, errors that are no silent ends.

All end tokens of the model are allowed exactly where a document may end, and they alone where it must. No white space
is allowed before a document or after it. Special tokens other than ends are never allowed, unless a Lark grammar names
them.
"""

import collections
import functools
import itertools
import json
import os
import re
import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
import tokenizers
from jaxtyping import Int32

from jfa_models.text import schemas
from jfa_models.text.structured import StructuredOutputsParams
from jfa_models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# White space between two tokens of JSON: what json.dumps writes, with and without an indent, and no more.
WHITESPACE = r" |\r?\n {0,40}|\r?\n\t{1,10}"
_SHORT_ESCAPES = '"\\bfnrt'
EVERYTHING = np.int32(-1)  # a word of a mask that allows all tokens
_ENDS_OF_DOCUMENT = ("NoExtension", "NoExtensionBias", "EndOfSentence")  # reasons to stop that are no errors

_CALLED = {"json": "JSON schema", "json_object": "JSON object"}  # what messages call a kind, if not by its name
_NO_TOKEN = "no token of the model continues the document"


class GrammarError(ValueError):
    """Tokens do not fit a grammar, or llguidance gave up on it."""


@final
class Grammars:
    """Compiles and keeps the grammars of one model. Safe to share between threads."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int] | None = None, *, max_kept: int = 64
    ) -> None:
        """Builds nothing yet: the first grammar does, in about a second for 128k tokens.

        Args:
          vocab_size: the number of the model's logits; it may differ from the tokenizer's number of tokens.
          end_ids: all tokens that end an answer; None: the tokenizer's.
          max_kept: the number of compiled grammars to keep, those used last.

        Raises:
          ValueError: there is no end token, or one is outside of the model's vocabulary.
        """
        ends = tuple(dict.fromkeys(int(i) for i in (tokenizer.eos_token_ids if end_ids is None else end_ids)))
        if not ends:
            raise ValueError(
                "guided decoding needs the tokens that end an answer, and the model names none; pass end_ids"
            )
        if unknown := [i for i in ends if not 0 <= i < vocab_size or tokenizer.core.id_to_token(i) is None]:
            raise ValueError(
                f"end_ids must contain tokens of the tokenizer, with ids from 0 to {vocab_size - 1}, the model's "
                f"vocabulary, got {unknown}; use ids from this model's tokenizer"
            )
        self.vocab_size = vocab_size
        self.words = -(-vocab_size // 32)
        self.end_ids = ends
        added = tokenizer.core.get_added_tokens_decoder()
        # llguidance also allows such an end where a document has its text
        self.ends_with_text = any(i not in added or not added[i].special for i in ends)
        self._tokenizer = tokenizer
        self._max_kept = max_kept
        self._kept: collections.OrderedDict[StructuredOutputsParams, Grammar] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._built: llguidance.LLTokenizer | None = None

    def compile(self, params: StructuredOutputsParams) -> "Grammar":
        """The grammar of these parameters.

        Raises:
          ValueError: it is faulty, matches nothing, or asks for something that llguidance cannot enforce.
          RuntimeError: llguidance is not installed.

        Warns:
          UserWarning: a keyword of a schema is not enforced because it only annotates, or is unknown.
        """
        if not isinstance(params, StructuredOutputsParams):
            raise ValueError(f"structured_outputs must be StructuredOutputsParams(...), got {params!r}")
        with self._lock:
            if params in self._kept:
                self._kept.move_to_end(params)
                return self._kept[params]
        grammar = self._compile(params)  # without the lock: it may take a second
        with self._lock:
            grammar = self._kept.setdefault(params, grammar)
            self._kept.move_to_end(params)
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        return grammar

    def _compile(self, params: StructuredOutputsParams) -> "Grammar":
        matcher_class = _llguidance().LLMatcher
        called = _CALLED.get(params.kind, params.kind)
        if params.kind in ("json", "json_object"):
            text = self._of_schema(params)
        elif params.kind == "regex":
            text = matcher_class.grammar_from_regex(params.regex)
        elif params.kind == "choice":
            choices = params.choice or ()
            text = matcher_class.grammar_from_lark(
                "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
            )
        else:
            text = matcher_class.grammar_from_lark(self._of_lark(str(params.grammar)))
        matcher = self._matcher(text)
        if error := _error(matcher):
            raise ValueError(f"the {called} cannot be enforced: {error}")
        grammar = Grammar(self, params, matcher)
        row = np.zeros((1, self.words), np.int32)
        guide = grammar.start()
        try:
            guide.allowed(row[0])
        except GrammarError as error:
            raise ValueError(f"the {called} matches no text at all ({error}); nothing could be generated") from None
        if guide.may_end and not guide.masks_more_than_ends(row[0]):
            raise ValueError(f"the {called} matches the empty text only; nothing could be generated")
        return grammar

    def _of_schema(self, params: StructuredOutputsParams) -> str:
        schema = {"type": "object"} if params.json is None else json.loads(params.json)
        options: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
        if params.disable_any_whitespace:
            options = {"whitespace_flexible": False}
        return self._checked_schema(schema, options)[0]

    def _checked_schema(
        self, schema: dict[str, Any], options: dict[str, Any], root: str = "#"
    ) -> tuple[str, dict[str, Any]]:
        """llguidance's grammar of a schema, and the schema and options it was made from as one."""
        matcher_class = _llguidance().LLMatcher
        prepared = schemas.prepare(schema, root=root)
        if schemas.allows_other_names(prepared):
            # else a declared name may come again, with any value, as another one: "\\u0061" for "a"
            options = {**options, "json_allowed_escapes": _SHORT_ESCAPES}
            if place := schemas.place_of_control_character(prepared, root):
                raise ValueError(
                    f"the JSON schema cannot be enforced at {place}: a control character needs a \\u escape, which may "
                    "hide a property's name; use additionalProperties: false in all objects, or another text"
                )

        def grammar_of(schema: dict[str, Any]) -> str:
            return matcher_class.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), overrides=options)

        def error_of(schema: dict[str, Any]) -> str:
            return _error(self._matcher(grammar_of(schema)))

        if error := error_of(prepared):
            if in_pattern := error_of({"type": "array"}):
                raise ValueError(f"whitespace_pattern {options['whitespace_pattern']!r} cannot be used: {in_pattern}")
            place = root + schemas.place_of_error(prepared, error_of).removeprefix("#")
            advice = "; change it, or remove it and check the answer for it"
            if "oneOf" in error:
                error = "the branches of oneOf are not known to exclude each other"
                advice = "; use anyOf, or give each branch a required property with another const"
            raise ValueError(f"the JSON schema cannot be enforced at {place}: {error}{advice}")
        return grammar_of(prepared), {"x-guidance": options, **prepared}

    def _of_lark(self, grammar: str) -> str:
        texts = {self._tokenizer.core.id_to_token(i): i for i in self.end_ids}
        for name in schemas.lark_special_tokens(grammar):
            if name in texts or _ids_in(name) & {*self.end_ids}:
                raise ValueError(
                    f"the grammar names {name}, an end token of the model; leave it out: ends are allowed where the "
                    "document may end"
                )
        options = {"whitespace_pattern": WHITESPACE}
        for start, end, schema in reversed(schemas.lark_schemas(grammar)):
            _, prepared = self._checked_schema(schema, options, f"%json at character {start}: #")
            grammar = grammar[:start] + json.dumps(prepared, ensure_ascii=False) + grammar[end:]
        return grammar

    def _matcher(self, text: str) -> "llguidance.LLMatcher":
        package = _llguidance()
        limits = package.LLParserLimits(verbose_errors=False)
        return package.LLMatcher(self.tokenizer, text, log_level=0, limits=limits)

    @property
    def tokenizer(self) -> "llguidance.LLTokenizer":
        """llguidance's form of the tokenizer."""
        with self._building:
            if (built := self._built) is None:
                text, size = _without_gaps(self._tokenizer.core)
                built = self._built = _llguidance().LLTokenizer(
                    text,
                    n_vocab=max(self.vocab_size, size),
                    eos_token=list(self.end_ids),
                )
            return built


@final
class Grammar:
    """A compiled grammar. Safe to share between threads."""

    def __init__(self, owner: Grammars, params: StructuredOutputsParams, matcher: "llguidance.LLMatcher") -> None:
        self.owner = owner
        self.params = params
        self.called = _CALLED.get(params.kind, params.kind)  # in messages
        self._matcher = matcher

    def start(self, tokens: Sequence[int] = ()) -> "Guide":
        """A guide at the beginning of a document, or behind these tokens of it.

        Raises:
          GrammarError: the tokens do not fit.
        """
        guide = Guide(self, self._matcher.deep_copy())
        if len(tokens):
            guide.accept(tokens)
        return guide


@final
class Guide:
    """A position in a document of a grammar. Not safe to share between threads."""

    def __init__(self, grammar: Grammar, matcher: "llguidance.LLMatcher") -> None:
        self.grammar = grammar
        self.matcher = matcher
        self._tokens: list[int] = []  # those that were accepted
        owner = grammar.owner
        self._ends = owner.end_ids
        self._words = owner.words
        self._scratch: np.ndarray | None = None
        size = owner.tokenizer.vocab_size
        if size > owner.vocab_size or owner.ends_with_text:  # the masks are wider than the model's, or need a change
            self._scratch = np.zeros(-(-size // 32), np.int32)

    def fork(self) -> "Guide":
        """An independent copy."""
        guide = Guide(self.grammar, self.matcher.deep_copy())
        guide._tokens = self._tokens.copy()
        return guide

    @property
    def may_end(self) -> bool:
        """Whether a document ends here; it may also go on."""
        return self.matcher.is_accepting()

    @property
    def complete(self) -> bool:
        """Whether the document is finished, and nothing can follow.

        Where llguidance sees that only by its masks, as behind the number of `multipleOf`, it is False, and the mask
        has the end tokens alone all the same.
        """
        return self.matcher.is_stopped() and self.matcher.is_accepting() and not self.matcher.is_error()

    def accept(self, tokens: Sequence[int]) -> None:
        """Moves behind these tokens, which must not contain an end token.

        Raises:
          GrammarError: they do not fit, and the guide stays where it was; or llguidance gave up on the grammar.
        """
        tokens = [int(token) for token in tokens]
        for token in tokens:
            if token in self._ends:
                raise GrammarError(f"token {token} ends the answer and is no part of a document; end the request there")
            if not 0 <= token < self.grammar.owner.vocab_size:
                raise GrammarError(f"token {token} is not in the model's vocabulary of {self.grammar.owner.vocab_size}")
        taken = self.matcher.try_consume_tokens(tokens)
        self._check()
        if taken < len(tokens):
            self._roll_back(taken)
            raise GrammarError(f"token {tokens[taken]} does not fit the {self.grammar.called} that was asked for")
        self._tokens += tokens

    def allowed(self, out: Int32[np.ndarray, "words"]) -> None:
        """Fills the row with the tokens that may come next.

        Raises:
          GrammarError: llguidance gave up on the grammar, or no token fits; the row allows everything.
          ValueError: the row has another size or type.
        """
        _check_rows(out, (self._words,))
        self._fill(out)

    def allowed_after(
        self,
        draft: Sequence[int],
        out: Int32[np.ndarray, "drafted+1 words"],
        parents: Sequence[int] | None = None,
    ) -> int:
        """Fills row i + 1 with the tokens that may come after draft token i, row 0 with those before any.

        The guide stays where it is.

        Args:
          parents: for each token the index of the one before it, a smaller one; -1: none. None: they are a sequence.

        Returns:
          The number of draft tokens that fit, up to and including an end token; rows behind one that does not fit,
          behind an end token, and behind a token that nothing can follow, allow everything.

        Raises:
          GrammarError: llguidance gave up on the grammar, or no token fits where the guide is; all is allowed.
          ValueError: the rows have another size or type.
        """
        _check_rows(out, (len(draft) + 1, self._words))
        out[1:] = EVERYTHING
        parents = range(-1, len(draft) - 1) if parents is None else parents
        children: dict[int, list[int]] = {}
        for node in reversed(range(len(draft))):
            children.setdefault(parents[node], []).append(node)
        moved = num_fitting = 0
        self._fill(out[0])
        waiting = [(node, 0) for node in children.get(-1, ())]  # with the number of tokens before it
        while waiting:
            node, depth = waiting.pop()
            token = int(draft[node])
            if not self._has(out[parents[node] + 1], token):
                continue
            num_fitting += 1
            if token in self._ends:
                continue
            self._roll_back(moved - depth)
            moved = depth
            try:
                self._step(token)
                self._fill(out[node + 1])
            except GrammarError:
                # the text need not go there; llguidance may have ended the matcher
                path = [int(draft[one]) for one in _path(node, parents)[:-1]]
                self.matcher = self.grammar.start([*self._tokens, *path]).matcher
                continue
            moved += 1
            waiting += [(child, depth + 1) for child in children.get(node, ())]
        self._roll_back(moved)
        return num_fitting

    def permitted(self, draft: Sequence[int]) -> int:
        """How many draft tokens fit, without the cost of masks; the guide stays where it is.

        The masks may permit fewer: where the text is certain, they allow only its usual tokens.
        """
        before_end = list(itertools.takewhile(lambda token: token not in self._ends, map(int, draft)))
        return self.matcher.validate_tokens(before_end) if before_end and not self.complete else 0

    def forced(self, limit: int) -> list[int]:
        """Up to `limit` tokens that are certain to come next; the guide stays where it is.

        Each is the only token that the mask allows behind those before it, so they are what masked sampling gives.

        Raises:
          GrammarError: llguidance gave up on the grammar.
        """
        found: list[int] = []
        certain = self.matcher.compute_ff_tokens()[:limit] if limit > 0 and not self.complete else []
        self._check()
        row = np.empty(self._words, np.int32)
        try:
            for token in certain:
                self._fill(row)
                if token in self._ends or not self._has(row, token) or np.bitwise_count(row.view(np.uint32)).sum() != 1:
                    break
                self._step(token)
                found.append(token)
        finally:
            if not self.matcher.is_error():
                self._roll_back(len(found))
        return found

    def masks_more_than_ends(self, row: Int32[np.ndarray, "words"]) -> bool:
        """Whether a filled row allows a token that is no end."""
        return int(np.bitwise_count(row.view(np.uint32)).sum()) > len(self._ends)

    def _fill(self, row: np.ndarray) -> None:
        target = row if self._scratch is None else self._scratch
        self.matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        if self.matcher.is_error():
            row[:] = EVERYTHING
        elif self._scratch is not None:
            row[:] = self._scratch[: self._words]
            if self.grammar.owner.ends_with_text and not self.may_end:
                for end in self._ends:  # one that is a text as well
                    row[end >> 5 : (end >> 5) + 1].view(np.uint32)[:] &= ~np.uint32(1 << (end & 31))
            if extra := self._words * 32 - self.grammar.owner.vocab_size:
                row[-1:].view(np.uint32)[:] &= np.uint32(0xFFFFFFFF >> extra)
            if not row.any():
                row[:] = EVERYTHING
                raise GrammarError(f"the {self.grammar.called} cannot be followed any further: {_NO_TOKEN}")
        self._check()

    def _has(self, row: np.ndarray, token: int) -> bool:
        return 0 <= token < self.grammar.owner.vocab_size and bool(int(row[token >> 5]) >> (token & 31) & 1)

    def _step(self, token: int) -> None:
        """Moves behind a token that the mask allows."""
        if self.matcher.try_consume_tokens([token]) != 1:
            self._check()
            raise GrammarError(f"llguidance allows token {token} and refuses it then")

    def _roll_back(self, moved: int) -> None:
        if moved:
            self.matcher.rollback(moved)
            self._check()

    def _check(self) -> None:
        """Raises GrammarError if the matcher is dead: its masks allow the ends alone, as behind a finished document."""
        if error := self.error():
            raise error

    def error(self) -> GrammarError | None:
        """Why the guide can't go on, if it can't."""
        matcher = self.matcher
        if matcher.is_error():
            text = _error(matcher)
            if text in _ENDS_OF_DOCUMENT:
                text = _NO_TOKEN
            return GrammarError(f"the {self.grammar.called} cannot be followed any further: {text}")
        if matcher.is_stopped() and matcher.stop_reason() not in _ENDS_OF_DOCUMENT:
            reason = matcher.stop_reason()
            return GrammarError(f"the {self.grammar.called} cannot be followed any further: {reason}")
        return None


def _path(node: int, parents: Sequence[int]) -> list[int]:
    """The indices of drafted tokens up to that of a node."""
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found[::-1]


def fill(guides: Sequence[Guide | None], out: Int32[np.ndarray, "rows words"]) -> dict[int, GrammarError]:
    """Fills one row for each guide, in parallel where there are several processors; None: everything is allowed.

    Returns:
      By row, why a guide cannot go on; such a row allows everything, and its request has failed.

    Raises:
      ValueError: the rows have another size or type, or a guide stands in two rows.
    """
    _check_rows(out, (len(guides), out.shape[-1] if out.ndim else 0))
    rows = [(row, guide) for row, guide in enumerate(guides) if guide is not None]
    if wrong := [guide for _, guide in rows if guide._words != out.shape[1]]:
        raise ValueError(f"the rows must have {wrong[0]._words} words, as the model's vocabulary, got {out.shape[1]}")
    if len({id(guide) for _, guide in rows}) < len(rows):
        raise ValueError("a guide stands in two rows of a mask; use fork() for a second continuation")
    failed: dict[int, GrammarError] = {}
    for row, guide in enumerate(guides):
        if guide is None:
            out[row] = EVERYTHING
    executor = _executor() if len(rows) > 1 and not any(guide._scratch is not None for _, guide in rows) else None
    if executor is not None:
        matchers = [(guide.matcher, row) for row, guide in rows]
        executor.unsafe_compute_mask_ptr(matchers, out.ctypes.data, out.strides[0], len(out))
        for row, guide in rows:
            if (error := guide.error()) is not None:
                failed[row] = error
                out[row] = EVERYTHING
        return failed
    for row, guide in rows:
        try:
            guide._fill(out[row])
        except GrammarError as error:
            failed[row] = error
            out[row] = EVERYTHING
    return failed


def _check_rows(out: np.ndarray, shape: tuple[int, ...]) -> None:
    if not isinstance(out, np.ndarray) or out.dtype != np.int32 or out.shape != shape or not out.flags.c_contiguous:
        got = f"{out.dtype}{list(out.shape)}" if isinstance(out, np.ndarray) else repr(out)
        raise ValueError(f"a mask must be a contiguous NumPy array int32{list(shape)}, got {got}")


@functools.cache
def _executor() -> "llguidance.LLExecutor | None":
    """Threads of llguidance; None where there is one processor only."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _llguidance().LLExecutor(min(processors, 16)) if processors > 1 else None


def _without_gaps(core: tokenizers.Tokenizer) -> tuple[str, int]:
    """tokenizer.json and the number of its ids, with special tokens, which no mask allows, for ids without a token.

    llguidance does not know the text of tokens whose ids are not below the number of tokens.
    """
    used = {*core.get_vocab().values()}
    size = max(used) + 1
    text = core.to_str()
    if len(used) < size:
        content = json.loads(text)
        blank = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
        unused = {f"<|unused id {i}|>": i for i in range(size) if i not in used}
        content["model"]["vocab"] |= unused
        content["added_tokens"] += [{"id": i, "content": name, **blank} for name, i in unused.items()]
        content["added_tokens"].sort(key=lambda token: token["id"])
        text = json.dumps(content, ensure_ascii=False)
    return text, size


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        if error.name != "llguidance":
            raise
        raise RuntimeError("guided decoding needs llguidance: pip install 'jfa[guided]'") from None
    return llguidance


def _error(matcher: "llguidance.LLMatcher") -> str:
    """The matcher's error in one line, "" if there is none."""
    if not matcher.is_error():
        return ""
    lines = [line.strip() for line in matcher.get_error().split("<non-verbose/>")[0].split("<state>")[0].splitlines()]
    lines = [line for line in lines if line and not re.match(r"\d+ \||\^+$", line)]
    details = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = re.sub(r"; following special tokens are available: .*", "", lines[0]) if lines else "unknown error"
    return f"{text} {details[0]}" if details else text


def _ids_in(special: str) -> set[int]:
    """The ids that `<[5]>` or `<[5,7-9]>` names in a Lark grammar; all for `<[*]>` and for `<[^5]>`, all but 5."""
    if not re.fullmatch(r"<\[[\d,\s-]*\]>", special):
        return _AllIds() if special.startswith("<[") else set()
    found: set[int] = set()
    for part in special[2:-2].replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if first:
            found |= {*range(int(first), int(last or first) + 1)}
    return found


class _AllIds(set[int]):
    def __and__(self, other: Any) -> Any:
        return set(other)

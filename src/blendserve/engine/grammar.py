"""What answers must look like, as grammars: compiled once for each structure of a job, followed by its sequences.

llguidance does the work. It is imported when the first request with a structure comes, never before.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blendserve.dialect.grammars import grammar_text, parser_limits, refusal_of
from blendserve.errors import RequestError
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import StructuredOutputs, TokenIds

if TYPE_CHECKING:
    import llguidance

MAX_KEPT_GRAMMARS = 256
"""Compiled grammars kept at a time; a structure that comes again later is compiled again."""


MAX_KEPT_TEXTS, MAX_KEPT_CHARACTERS = 4096, 256
"""Texts whose tokens are remembered."""

_TEXT = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_TEXT}{{1,{length}}}" for length in range(2, 33, 2)), f"{_TEXT}+"]
"""Parts of the vocabulary that a mask takes or leaves whole: blanks, and text of JSON strings up to some lengths. With
these lengths masks inside strings with a `maxLength` take 25 us on average instead of 34 with llguidance's own two."""


@dataclass(slots=True)
class CompileStats:
    """Units: seconds."""

    num_grammars: int = 0
    compile_s: float = 0.0


def grammar_for(structure: StructuredOutputs, tokenizer: Tokenizer) -> str:
    """A structure as a grammar for one model. Raises: RequestError where the notation cannot be read."""

    def token_of(marker: str) -> int | None:
        """The special token that a marker is, which is no text to a grammar."""
        token_id = tokenizer.backend.token_to_id(marker) if marker else None
        return token_id if token_id in tokenizer.special_token_ids else None

    return grammar_text(structure, token_of(structure.after), token_of(structure.begin))


class GrammarCompiler:
    """Compiles the structures of requests for one model. `eos_token_ids` end an answer whose grammar is satisfied.

    Which tokens there are comes from the tokenizer, as bytes: so any tokenizer that we read will do.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.stats = CompileStats()
        self._tokenizer = tokenizer
        self._tokens: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutputs, llguidance.LLMatcher | RequestError] = OrderedDict()

    def start(self, structure: StructuredOutputs) -> llguidance.LLMatcher:
        """A matcher at the beginning of an answer. Raises: RequestError where the structure cannot be followed."""
        found = self._kept.get(structure)
        if found is None:
            found = self._kept[structure] = self._compile(structure)
            if len(self._kept) > MAX_KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(structure)
        if isinstance(found, RequestError):
            raise found.with_traceback(None)  # else every raise would lengthen it
        return found.deep_copy()

    def _compile(self, structure: StructuredOutputs) -> llguidance.LLMatcher | RequestError:
        import llguidance

        started = time.perf_counter()
        try:
            tokens = self._tokens = self._tokens or self._read_tokens()
            text = grammar_for(structure, self._tokenizer)
            matcher = llguidance.LLMatcher(tokens, text, log_level=0, limits=parser_limits())
            return matcher if (fault := _fault_of(matcher)) is None else refusal_of(structure, fault)
        except RequestError as error:
            return error
        finally:
            self.stats.num_grammars += 1
            self.stats.compile_s += time.perf_counter() - started

    def _read_tokens(self) -> llguidance.LLTokenizer:
        import llguidance

        if not self.eos_token_ids:
            raise RequestError(
                "the model names no end-of-text token, and a grammar cannot end an answer without one",
                code="unsupported_parameter",
                param="structured_outputs",
            )
        vocabulary = _Vocabulary(self._tokenizer, self.vocab_size, self.eos_token_ids)
        return llguidance.LLTokenizer(
            vocabulary,  # type: ignore[arg-type]
            n_vocab=self.vocab_size,
            eos_token=list(self.eos_token_ids),
            slices=_SLICES,
        )


def _fault_of(matcher: llguidance.LLMatcher) -> str | None:
    """Why a grammar cannot be followed, not even by its first token."""
    first = matcher.deep_copy()
    first.compute_bitmask()
    if not first.is_error():
        return None
    return "nothing fits it" if is_dead_end(first.get_error()) else first.get_error()


def is_dead_end(error: str) -> bool:
    """Is it that no token may come, where some must?"""
    return error.startswith("NoExtension")


class _Vocabulary:
    """A tokenizer as `LLTokenizer` asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = sorted({*tokenizer.special_token_ids, *eos_token_ids})
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self._kept: dict[str | bytes, list[int]] = {}

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that a grammar forces: the same few again and again, such as names of properties."""
        kept = self._kept.get(text)
        if kept is None:
            ids: TokenIds = self._tokenizer.encode(text if isinstance(text, str) else text.decode(), False)
            kept = list(ids.tolist())
            if len(self._kept) < MAX_KEPT_TEXTS and len(text) < MAX_KEPT_CHARACTERS:
                self._kept[text] = kept
        return kept

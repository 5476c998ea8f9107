"""How models mark what they think before they answer, and how that is told from the answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class SplitAnswer(NamedTuple):
    """`end` is where the reasoning, its end marker included, ends in the whole text; 0 where there is none."""

    reasoning: str
    rest: str
    end: int


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Reasoning stands between `begin` and `end`. Where the prompt ends with `begin`, answers lack it."""

    name: str
    begin: str
    end: str

    @property
    def markers(self) -> tuple[str, str]:
        return self.begin, self.end

    def is_open(self, prompt: str) -> bool:
        """Does an answer to this prompt begin inside the reasoning?"""
        return prompt.rstrip().endswith(self.begin)

    def split(self, text: str, *, is_open: bool) -> SplitAnswer:
        """Reasoning and the rest of an answer. An end without a beginning also ends reasoning, as in vLLM; reasoning
        that never ends is all there is.
        """
        begin = text.find(self.begin)
        is_begun = begin >= 0 and not text[:begin].strip()
        end = text.find(self.end)
        if end < 0:
            if is_begun or is_open:
                return SplitAnswer(text[begin + len(self.begin) if is_begun else 0 :].strip(), "", len(text))
            return SplitAnswer("", text, 0)
        if 0 <= begin < end and not (is_begun or is_open):
            return SplitAnswer("", text, 0)
        inside = text[begin + len(self.begin) if is_begun and begin < end else 0 : end]
        behind = end + len(self.end)
        return SplitAnswer(inside.strip(), text[behind:].lstrip(), behind)


HARMONY_REASONING = ReasoningFormat("harmony", "<|channel|>analysis<|message|>", "<|end|>")
"""Read with the calls of the same format: an answer may think several times."""

_ENTRIES: tuple[tuple[ReasoningFormat, Callable[[str], bool], tuple[str, ...]], ...] = (
    (
        HARMONY_REASONING,
        lambda source: "<|channel|>" in source and "<|message|>" in source,
        ("<|channel|>", "<|message|>"),
    ),
    (ReasoningFormat("mistral", "[THINK]", "[/THINK]"), lambda source: "[THINK]" in source, ("[THINK]", "[/THINK]")),
    (
        ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
        lambda source: "<seed:think>" in source,
        ("<seed:think>", "</seed:think>"),
    ),
    (
        ReasoningFormat("think", "<think>", "</think>"),
        lambda source: "<think>" in source or "</think>" in source,
        ("<think>", "</think>"),
    ),
)

REASONING_FORMATS: Mapping[str, ReasoningFormat] = {entry[0].name: entry[0] for entry in _ENTRIES}


def recognised_reasoning(template: str | None, tokens: Collection[str]) -> ReasoningFormat | None:
    """The format of a model with this chat template and these added tokens; None where it does not reason."""
    for found, is_in, marks in _ENTRIES:
        if (template is not None and is_in(template)) or all(mark in tokens for mark in marks):
            return found
    return None

"""Which tokens end an answer: all that any file of a model names.

Files disagree in practice: a base model's generation settings name the end of a document, its chat tokenizer the end of
a turn. A model that says either is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>"),
        *("[EOT]", "[EOS]", "<｜end▁of▁sentence｜>"),
    )
)
"""Tokens that end an answer wherever a vocabulary has them. Source: llama.cpp, llama-vocab.cpp."""

_HARMONY = ("<|return|>", "<|call|>", "<|end|>")
"""Where a vocabulary has all three, the last ends a message and not the answer."""


def united(*sources: Iterable[int]) -> tuple[int, ...]:
    """Ids of all sources, each once, those of the first source first."""
    return tuple(dict.fromkeys(token_id for source in sources for token_id in source))


def ends_by_name(vocabulary: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens that are ends by their name: a GGUF file names one or two of them, and often the wrong ones."""
    id_by_name = {token: token_id for token_id, token in enumerate(vocabulary) if token in END_NAMES}
    if all(name in id_by_name for name in _HARMONY):
        del id_by_name["<|end|>"]
    return tuple(id_by_name.values())

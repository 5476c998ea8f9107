"""Parameters that other servers have and nothing here does: each with the values that change nothing, and the reason
why others are refused. And the parameters that never change an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blendserve.dialect.values import shown
from blendserve.errors import RequestError

IGNORED_FIELDS = frozenset(
    (
        *("user", "metadata", "store", "safety_identifier", "service_tier", "request_id", "stream_options"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_salt"),
        *("priority", "kv_transfer_params", "provider", "timeout", "extra_headers", "extra_query"),
    )
)
"""Bookkeeping of the caller, and what tells a client or a server how to do its work: any value, no effect on the
answer.
"""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A parameter of which only `neutral` values, and null, are taken: they leave the answer as it is. `instead`: what
    does the same here.
    """

    why: str
    neutral: tuple[object, ...] = ()
    instead: str = ""

    def check(self, name: str, value: object, body: Mapping[str, Any]) -> None:
        """Raises: RequestError when the value would change the answer."""
        if _is_one_of(value, (*self.neutral, *_same_as_absent(name, body))):
            return
        choices = " or ".join(json.dumps(other) for other in self.neutral)
        remedy = self.instead or "remove it" + (f", or set it to {choices}" if choices else "")
        raise RequestError(
            f"{name} is {shown(value)}, which is not supported: {self.why}; {remedy}",
            code="unsupported_parameter",
            param=name,
        )


_BEAMS = "each answer is sampled on its own, and there is no beam search"
_SAMPLING = "tokens are chosen by temperature, top_p, top_k and min_p only"
_TEXTS = "responses hold texts, not token ids"

_UNSUPPORTED: Mapping[str, Unsupported] = {
    "stream": Unsupported("a batch file is answered by whole responses", (False,)),
    "best_of": Unsupported("answers are not ranked", (1,), "n gives several answers"),
    "use_beam_search": Unsupported(_BEAMS, (False,)),
    "length_penalty": Unsupported(_BEAMS, (1, 1.0)),
    "early_stopping": Unsupported(_BEAMS, (False,)),
    "detokenize": Unsupported("responses hold the text of every answer", (True,)),
    "return_token_ids": Unsupported(_TEXTS, (False,)),
    "return_tokens_as_token_ids": Unsupported(_TEXTS, (False,)),
    "logits_processors": Unsupported("code of a request is never run", ([],)),
    "mm_processor_kwargs": Unsupported("pictures are read with the model's own settings", ({},)),
    "safe_prompt": Unsupported("only Mistral's service adds a prompt", (False,), "write a system message"),
    "thinking_token_budget": Unsupported("max_tokens limits reasoning and answer together"),
    "grammar": Unsupported("it is llama.cpp's name", ("",), 'write "structured_outputs": {"grammar": "..."}'),
    "n_predict": Unsupported("it is llama.cpp's name", (), "write max_tokens"),
    "typical_p": Unsupported(_SAMPLING, (1, 1.0)),
    "mirostat": Unsupported(_SAMPLING, (0,)),
    "dry_multiplier": Unsupported(_SAMPLING, (0, 0.0)),
}
CHAT_UNSUPPORTED: Mapping[str, Unsupported] = {
    **_UNSUPPORTED,
    "echo": Unsupported("only /v1/completions repeats its prompt", (False,)),
    "functions": Unsupported("it is OpenAI's old name", ([],), "write tools"),
    "function_call": Unsupported("it is OpenAI's old name", ("none", "auto"), "write tool_choice"),
    "modalities": Unsupported("answers are text", (["text"],)),
    "audio": Unsupported("answers are text"),
    "prediction": Unsupported("only OpenAI's service takes predicted answers"),
    "verbosity": Unsupported("only OpenAI's models follow it", (), "ask for short answers in a message"),
    "web_search_options": Unsupported("nothing is fetched from the web"),
    "chat_template": Unsupported(
        "a line has no template of its own", (), "give one for the whole file with --chat-template"
    ),
}
COMPLETION_UNSUPPORTED: Mapping[str, Unsupported] = {
    **_UNSUPPORTED,
    "suffix": Unsupported("an answer follows its prompt and fills no gap", ("",)),
    "add_special_tokens": Unsupported(
        "a prompt begins as the model was trained", (True,), "give the prompt as token ids"
    ),
}


def _same_as_absent(name: str, body: Mapping[str, Any]) -> tuple[object, ...]:
    """The best n of n answers are all of them."""
    return (body["n"],) if name == "best_of" and body.get("n") is not None else ()


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in allowed)

"""A structure that a request asks for -> a grammar as llguidance reads it, or why there is none.

llguidance is imported when the first structure comes, never before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from blendserve.dialect.endless import endless_reference
from blendserve.errors import RequestError
from blendserve.request import StructuredOutputs

if TYPE_CHECKING:
    import llguidance

WHITESPACE = r"[ \t\r\n]{0,24}"
"""Between two parts of JSON. Models that are small repeat blank space for ever where they may."""
_JSON_OPTIONS = {
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "coerce_one_of": False,
    "lenient": False,
    "item_separator": ",",
    "key_separator": ":",
}
"""They overrule what a schema says in `x-guidance`: an answer never strays from the schema because of it."""
_SCHEMA_FAULT = "failed to compile JSON schema: "
_UNICODE_ESCAPES = {"json_allow_general_unicode_escapes": True}
_OLDER_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": f"{WHITESPACE},{WHITESPACE}",
    "key_separator": f"{WHITESPACE}:{WHITESPACE}",
}
"""llguidance 1.7, which vLLM 0.32 needs, has no such escapes but for control characters, and no limit on blanks where
they are flexible: there they stand beside commas and colons alone."""
_LIMITS = {
    "initial_lexer_fuel": 2_000_000,
    "max_grammar_size": 500_000,
    "max_lexer_states": 250_000,
    "max_items_in_row": 2000,
    "step_max_items": 10_000,
    "step_lexer_fuel": 1_000_000,
    "verbose_errors": False,
}
"""Work that a grammar may take, counted by llguidance and not in seconds: what is refused does not depend on the
machine. Compiling one that uses all of it takes a few seconds."""

MAX_REMEMBERED_CHECKS = 64


def check_grammar(structure: StructuredOutputs) -> None:
    """Raises: RequestError where a structure cannot be followed, whatever the model."""
    refusal = _refusal(structure)
    if refusal is not None:
        raise refusal.with_traceback(None)  # else every raise would lengthen it


@lru_cache(maxsize=MAX_REMEMBERED_CHECKS)
def _refusal(structure: StructuredOutputs) -> RequestError | None:
    from llguidance import LLMatcher

    try:
        reason = LLMatcher.validate_grammar(grammar_text(structure), None, limits=parser_limits())
    except RequestError as error:
        return error
    return refusal_of(structure, reason) if reason and not reason.startswith("WARNING") else None


@cache
def _json_options() -> Any:
    """What the installed llguidance takes of our options."""
    from llguidance import LLMatcher

    every = _JSON_OPTIONS | _UNICODE_ESCAPES
    refusal = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema({}, overrides=every))  # type: ignore[arg-type]
    if "unknown field" not in refusal:
        return every
    return {name: value for name, value in _JSON_OPTIONS.items() if name != "whitespace_pattern"} | _OLDER_OPTIONS


def parser_limits() -> llguidance.LLParserLimits:
    """How much work a grammar may be."""
    from llguidance import LLParserLimits

    return LLParserLimits(**_LIMITS)  # type: ignore[arg-type]


def grammar_text(structure: StructuredOutputs, marker_token: int | None = None, begin_token: int | None = None) -> str:
    """A structure in llguidance's dialect of Lark. `marker_token` and `begin_token` are what `structure.after` and
    `structure.begin` are where they are special tokens.

    Raises: RequestError where the notation cannot be read.
    """
    rule = rule_of(structure)
    if rule is None:
        lark = _lark_of(structure)
        if not structure.after:
            return lark
        rule = f"%lark {{\n{lark}\n}}"
    return _after(structure, rule, marker_token, begin_token) if structure.after else f"start: {rule}"


def rule_of(structure: StructuredOutputs) -> str | None:
    """What stands behind the name of a rule for JSON and choices, and rules that this needs; None for other
    structures. Raises: RequestError for a schema that no answer could fit.
    """
    if structure.json is not None:
        schema = json.loads(structure.json)
        if (reference := endless_reference(schema)) is not None:
            raise refusal_of(structure, f"$ref {reference!r} leads back to itself, so that no answer could end")
        return _json_rule(schema)
    if structure.json_object:
        return _json_rule({"type": "object"})
    return _choice_rule(structure.choice) if structure.choice else None


def _choice_rule(choices: Sequence[str]) -> str:
    """One terminal, for a rule has few alternatives; a terminal is never empty."""
    listed = " | ".join(json.dumps(choice) for choice in choices if choice)
    if not listed:
        return '""'
    return ("CHOICE" if all(choices) else 'CHOICE | ""') + f"\nCHOICE: {listed}"


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _json_options()}, ensure_ascii=False)


def _lark_of(structure: StructuredOutputs) -> str:
    """The grammar of a structure that is none of JSON, with a rule `start`. Raises: RequestError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if structure.lark is not None:
        return structure.lark
    if structure.regex is not None:
        lark: str = json.loads(LLMatcher.grammar_from_regex(structure.regex))["grammars"][0]["lark_grammar"]
        return lark
    try:
        return any_to_lark(structure.grammar or "")
    except Exception as error:  # noqa: BLE001  # the converter has no error of its own
        raise refusal_of(structure, str(error)) from None


def _after(structure: StructuredOutputs, rule: str, marker_token: int | None, begin_token: int | None) -> str:
    """Free text; or free text, the marker and what `rule` describes. Where `begin` has to stand before the free text:
    what `rule` describes, or all that.
    """
    end = f"TEXT <[{marker_token}]>" if marker_token is not None else "marked"
    start = f"TEXT | {end} BLANK body"
    if structure.begin:
        begin = f"<[{begin_token}]>" if begin_token is not None else json.dumps(structure.begin)
        start = f"body | {begin} {end} BLANK body"
    return f"""start: {start}
TEXT: /(.|\\n)*/
marked[lazy]: TEXT {json.dumps(structure.after)}
BLANK: /{WHITESPACE}/
body: {rule}
"""


def refusal_of(structure: StructuredOutputs, reason: str) -> RequestError:
    is_json = structure.json is not None
    if is_json:  # without the grammar that we wrapped around the schema
        reason = re.split(r"\n\s*\d+ \| ", reason.partition(_SCHEMA_FAULT)[2] or reason)[0]
    what, remedy = ("schema", "change or remove that part") if is_json else ("grammar", "correct it")
    return RequestError(
        f"the {what} cannot be followed: {' '.join(reason.split())[:300]}; {remedy}",
        code="unsupported_schema" if is_json else "invalid_grammar",
        param=param_of(structure),
    )


def param_of(structure: StructuredOutputs) -> str:
    """The parameter of a body that most likely asked for a structure, for errors."""
    return "response_format" if structure.json is not None or structure.json_object else "structured_outputs"

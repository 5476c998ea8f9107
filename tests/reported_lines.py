"""Lines that real batch files hold and replies that servers give, as tables: what is special, and the right outcome."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from batch_fakes import batch_line

from blendserve import SamplingParams

LIMITS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "kv_memory_bytes": 1 << 22,
    "num_threads": 1,
}
"""Of an engine with a tiny model."""
SHORT = SamplingParams(max_tokens=3, temperature=0)
ANSWERED = "answered"
ABILITY_CODES = ("unsupported_parameter", "invalid_url")


class Malformed(NamedTuple):
    """The line is wrong for every engine: the code of its error, and words of the message."""

    code: str
    words: str


class Unable(NamedTuple):
    """The line is right, and the engine cannot do what it asks for: words of the message."""

    words: str
    code: str = "unsupported_parameter"


Outcome = str | Malformed | Unable


class Case(NamedTuple):
    """One line: what is special in its body and in `fields` beside it, and what becomes of it natively and on a server.

    Most lines pass to the server as they are: it alone knows what it can do.
    """

    body: dict[str, Any]
    native: Outcome = ANSWERED
    http: Outcome = ANSWERED
    fields: dict[str, Any] = {}  # noqa: RUF012

    def line(self, custom_id: str) -> dict[str, Any]:
        question = {} if {"prompt", "input", "messages"} & set(self.body) else {"messages": user("Name a river.")}
        limit = {} if "input" in self.body or "max_tokens" in self.body else {"max_tokens": 4}
        return {**batch_line(custom_id, {**question, **limit, **self.body}), **self.fields}


def user(content: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **fields}]


def after(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation: a greeting, `messages`, and a question."""
    return [*user("Good day."), *messages, *user("Name a river.")]


def said(content: Any = "Good day.", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **fields}


SCHEMA = {"type": "object", "properties": {"river": {"type": "string"}}, "required": ["river"]}
TOOL = {"type": "function", "function": {"name": "find_river", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find_river", "arguments": '{"river": "Elbe"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "1094 km"}
PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}

NO_TOOLS = Unable("how this model calls functions is not known; name a format that it follows with --tool-format")
NO_CALLS = Unable("template leaves tool_calls out; name a format that it follows with --tool-format")
NO_ENDPOINT = Unable("it must be /v1/chat/completions or /v1/completions or", "invalid_url")
NO_METHOD = Malformed("invalid_method", 'it must be "POST"')
NO_BODY = Malformed("missing_required_parameter", "it must be an object")
OUTSIDE = Malformed("unknown_parameter", "max_tokens stands outside the body; move it into the body")
FROM_SERVER = Malformed("fake_400", "messages or prompt is missing")
"""The server judged the line, and its words are kept."""

CASES_BY_KIND: dict[str, tuple[Case, ...]] = {
    "bookkeeping": (
        *(
            Case({name: value})
            for name, value in (
                ("store", True),
                ("store", False),
                ("metadata", {"batch": "12"}),
                ("user", "u-9"),
                ("service_tier", "flex"),
                ("safety_identifier", "x"),
                ("prompt_cache_key", "k"),
                ("prompt_cache_retention", "24h"),
                ("request_id", "r"),
                ("cache_salt", "s"),
                ("priority", 3),
                ("stream", False),
                ("stream_options", {"include_usage": True}),
                ("kv_transfer_params", None),
            )
        ),
        Case({"store": True, "metadata": {"a": "1", "b": "2"}, "user": "u", "seed": 3}),
        Case({"user": 7}),
    ),
    "streaming": (Case({"stream": True}, Unable("whole responses"), Unable("whole responses")),),
    "message fields": (
        Case({"messages": user("Name a river.", name="ana")}),
        Case({"messages": [{"role": "system", "content": "Be kind.", "name": "rules"}, *user("Name a river.")]}),
        Case({"messages": user("Name a river.", id="m-4")}),
        Case({"messages": user("Name a river.", weight=0)}),
        Case({"messages": after(said(refusal=None, audio=None, function_call=None, tool_calls=None, annotations=[]))}),
        Case({"messages": after(said(tool_calls=[]))}),
        Case({"messages": after(said(reasoning=None))}),
        Case({"messages": after(said(reasoning_content="be polite"))}),
        Case({"messages": [{"role": "developer", "content": "Be kind."}, *user("Name a river.")]}),
    ),
    "content parts": (
        Case({"messages": user([part("Name a river.")])}),
        Case({"messages": user([part("Name a"), part("river.")])}),
        Case({"messages": user([part("Name a river.", cache_control={"type": "ephemeral"})])}),
        Case({"messages": user([{"type": "input_text", "text": "Name a river."}])}),
        Case({"messages": user(["Name a river."])}),
        Case({"messages": after(said([{"type": "output_text", "text": "Hello."}]))}),
        Case({"messages": after(said([{"type": "refusal", "refusal": "I will not."}]))}),
        Case({"messages": [{"role": "system", "content": [part("Be kind.")]}, *user("Name a river.")]}),
        Case({"messages": user([part("")])}),
        Case(
            {"messages": user([])},
            Malformed("invalid_type", "content is []; it must be a text or a list of text parts"),
        ),
        Case({"messages": user("")}),
        Case({"messages": user("   ")}),
        Case({"messages": user([part("What is it?"), PIXEL])}, Unable("reads only text parts")),
        Case(
            {"messages": user({"text": "Name a river."})},
            Malformed("invalid_type", "it must be a text or a list of text parts"),
        ),
        Case({"messages": user(17)}, Malformed("invalid_type", "content is 17; it must be a text")),
        Case({"messages": user(None)}, Malformed("invalid_type", "content is null; it must be a text")),
    ),
    "nulls": (
        Case(
            dict.fromkeys(
                (
                    "temperature",
                    "top_p",
                    "stop",
                    "n",
                    "seed",
                    "logprobs",
                    "top_logprobs",
                    "logit_bias",
                    "user",
                    "tools",
                    "tool_choice",
                    "response_format",
                    "max_completion_tokens",
                    "presence_penalty",
                    "stream",
                    "metadata",
                )
            )
        ),
        Case({"model": None}),
        Case({"model": ""}, Malformed("invalid_value", "model is an empty string; name a model")),
        Case({"model": 4}, Malformed("invalid_type", "model is 4; it must be a string")),
        Case({"prompt": "A river is", **dict.fromkeys(("suffix", "echo", "best_of", "logprobs", "stop", "n", "user"))}),
        Case({"prompt": None}, Malformed("missing_required_parameter", "prompt is missing"), FROM_SERVER),
    ),
    "prompts": (
        Case({"prompt": "A river is"}),
        Case({"prompt": [70, 71, 72]}),
        Case({"prompt": ["A river is", "A lake is"], "n": 2}),
        Case({"prompt": [[70, 71], [72]]}),
        Case({"prompt": ["A river is", [70]]}),
        Case({"prompt": [70.0, 71.0]}),
        Case({"prompt": "a\x00b"}),
        Case({"prompt": ""}, Malformed("invalid_value", "prompt is empty; it needs at least one token"), FROM_SERVER),
        Case({"prompt": []}, Malformed("invalid_type", "prompt is []; it must be a string or a list"), FROM_SERVER),
        Case({"prompt": ["A river is", ""]}, Malformed("invalid_value", "prompt[1] is empty")),
        Case({"prompt": [[]]}, Malformed("invalid_value", "prompt[0] is empty")),
        Case({"prompt": [-3]}, Malformed("invalid_value", "prompt is -3; it must be between 0")),
        Case({"prompt": [99999]}, Malformed("invalid_value", "names the token 99999; the model has 320 tokens")),
        Case(
            {"prompt": [True]},
            Malformed("invalid_type", "prompt[0] is true; it must be a string or a list of token ids"),
        ),
        Case({"prompt": {"prompt_token_ids": [70]}}, Malformed("invalid_type", "it must be a string or a list")),
    ),
    "scoring": (
        Case({"prompt": "A river is", "echo": True}),
        Case({"prompt": "A river is", "echo": True, "logprobs": 1, "max_tokens": 0}),
        Case({"prompt": "A river is", "prompt_logprobs": 1}),
        Case({"prompt": "A river is", "logprobs": 0}),
        Case({"prompt": "A river is", "logprobs": True}),
        Case({"prompt": "A river is", "logprobs": False}),
        Case({"logprobs": True, "top_logprobs": 0}),
        Case({"logprobs": True, "top_logprobs": 2}),
    ),
    "sampling": (
        Case({"temperature": 2.5}),
        Case({"max_tokens": 4.0, "n": 2.0, "seed": 5.0}),
        Case(
            {"max_tokens": 4.5},
            Malformed("invalid_type", "max_tokens is 4.5; it must be an integer"),
            Malformed("fake_400", "must be whole numbers"),
        ),
        Case({"include_stop_str_in_output": True, "stop": ["e"]}),
        Case({"skip_special_tokens": False}),
        Case({"bad_words": ["the"]}),
        Case({"allowed_token_ids": [70, 71]}),
        Case({"truncate_prompt_tokens": 3}),
        Case({"return_token_ids": True}, Unable("responses hold texts, not token ids")),
        Case(
            {"prompt": "A river is", "return_tokens_as_token_ids": True, "logprobs": 1},
            Unable("responses hold texts, not token ids"),
        ),
        Case({"prompt": "A river is", "add_special_tokens": False}, Unable("give the prompt as token ids")),
        Case({"prompt": "A river is", "suffix": ""}),
        Case({"prompt": "A river is", "suffix": " end"}, Unable("fills no gap")),
        Case({"prompt": "A river is", "best_of": 1}),
        Case({"prompt": "A river is", "best_of": 3}, Unable("n gives several answers")),
        Case({"use_beam_search": True}, Unable("there is no beam search")),
        Case({"typical_p": 0.9}, Unable("top_k and min_p only")),
        Case({"dry_multiplier": 0.8}, Unable("top_k and min_p only")),
        Case({"n_predict": 5}, Unable("write max_tokens")),
        Case({"length_penalty": 1.0, "early_stopping": False}),
        Case({"logits_processors": []}),
    ),
    "templates": (
        Case({"chat_template_kwargs": {}}),
        Case({"chat_template_kwargs": {"enable_thinking": False}}),
        Case(
            {"chat_template": "{{ messages[0].content }}"}, Unable("give one for the whole file with --chat-template")
        ),
        Case({"add_generation_prompt": False}),
        Case(
            {
                "messages": [*user("Name a river."), said("It is the")],
                "continue_final_message": True,
                "add_generation_prompt": False,
            }
        ),
        Case({"messages": [*user("Name a river."), said("It is the")]}),
        Case({"reasoning_effort": "low"}),
        Case({"reasoning_effort": None}),
        Case({"include_reasoning": True}),
        Case({"thinking_token_budget": 64}, Unable("max_tokens limits reasoning and answer together")),
        Case({"verbosity": "low"}, Unable("ask for short answers in a message")),
        Case({"modalities": ["text"]}),
        Case({"prediction": {"type": "content", "content": "Elbe"}}, Unable("only OpenAI's service")),
        Case({"thinking": {"type": "disabled"}}),
    ),
    "structure": (
        Case({"response_format": {"type": "text"}}),
        Case({"response_format": None}),
        Case({"response_format": {"type": "json_object"}}),
        Case(
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "river", "strict": True, "schema": SCHEMA},
                }
            }
        ),
        Case({"guided_json": SCHEMA}),
        Case({"guided_choice": ["Elbe", "Oder"]}),
        Case({"guided_regex": "[A-Z][a-z]+"}),
        Case({"structured_outputs": {"choice": ["Elbe", "Oder"]}}),
        Case({"grammar": 'root ::= "Elbe" | "Oder"'}, Unable('write "structured_outputs"')),
        Case({"extra_body": {"guided_choice": ["Elbe"]}}),
        Case(
            {"response_format": {"type": "xml"}},
            Malformed("invalid_value", "an object of type text, json_object or json_schema"),
        ),
    ),
    "tools": (
        Case({"tools": []}),
        Case({"tools": [TOOL], "tool_choice": "none"}),
        Case({"tools": [TOOL]}, NO_TOOLS),
        Case({"tools": [TOOL], "tool_choice": "required"}, NO_TOOLS),
        Case({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "find_river"}}}, NO_TOOLS),
        Case({"messages": [*user("How long is it?"), said(None, tool_calls=[CALL]), RESULT]}, NO_CALLS),
        Case(
            {
                "messages": [*user("How long is it?"), {"role": "assistant", "tool_calls": [CALL]}, RESULT],
                "tools": [TOOL],
            },
            NO_TOOLS,
        ),
        Case(
            {"messages": [*user("How long is it?"), {"role": "function", "name": "find_river", "content": "1094"}]},
            Unable("OpenAI's old way to call functions; write role"),
        ),
        Case({"messages": after(said(None))}),
        Case({"messages": after({"role": "assistant"})}),
        Case({"tool_choice": "auto"}),
        Case({"parallel_tool_calls": False}),
        Case({"functions": []}),
    ),
    "urls": (
        Case({}, fields={"url": "/chat/completions"}),
        Case({}, fields={"url": "https://api.example.com/v1/chat/completions"}),
        Case({}, fields={"url": "/v1/chat/completions/"}),
        Case({}, fields={"url": "/v1/chat/completions?api-version=1"}),
        Case(
            {},
            Malformed("invalid_url", "it must be /v1/chat/completions or"),
            Malformed("invalid_url", "such as /v1/chat/completions"),
            fields={"url": "v1/chat/completions"},
        ),
        Case({}, fields={"url": "/openai/deployments/m/chat/completions"}),
        Case({"input": "a river"}),
        Case({"input": "Name a river."}, fields={"url": "/v1/responses"}),
        Case({"query": "a", "documents": ["b"], "input": ""}, NO_ENDPOINT, fields={"url": "/v1/rerank"}),
        Case({"text_1": "a", "text_2": ["b"], "input": ""}, NO_ENDPOINT, fields={"url": "/v1/score"}),
        Case({"input": "hi"}, NO_ENDPOINT, fields={"url": "/v1/moderations"}),
    ),
    "line fields": (
        Case({}, NO_METHOD, NO_METHOD, fields={"method": "post"}),
        Case({}, NO_METHOD, NO_METHOD, fields={"method": "GET"}),
        Case({}, NO_METHOD, NO_METHOD, fields={"method": None}),
        Case(
            {},
            Malformed("invalid_url", "url is null; it must be /v1/chat/completions"),
            Malformed("invalid_url", "url is null; it must be the path"),
            fields={"url": None},
        ),
        Case({}, NO_BODY, NO_BODY, fields={"body": "a text"}),
        Case({}, NO_BODY, NO_BODY, fields={"body": None}),
        Case({}, OUTSIDE, OUTSIDE, fields={"max_tokens": 5}),
        Case({}, fields={"priority": 1, "metadata": {"a": 1}, "row": 5}),
    ),
    "other fields": (
        Case({"max_token": 5}, Malformed("unknown_parameter", "did you mean max_tokens?")),
        Case({"api_key": "sk-1"}, Malformed("unknown_parameter", "unknown parameter 'api_key': remove it")),
        Case({"extra_headers": {"a": "b"}}),
        Case({"timeout": 60}),
        Case({"provider": {"order": ["x"]}}),
        Case({"web_search_options": {}}, Unable("nothing is fetched from the web")),
        Case({"safe_prompt": False}),
        Case({"echo": False}),
        Case({"detokenize": True}),
        Case({"spaces_between_special_tokens": False}),
        Case({"mm_processor_kwargs": {}}),
    ),
}

CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Elbe"}}
TAKEN = {"choices": [CHOICE]}
REPLIES: dict[str, tuple[int, Any, str, int]] = {  # status, body, the code of the row, and how often it is asked for
    "a plain answer": (200, TAKEN, ANSWERED, 1),
    "numbers beyond JSON": (200, '{"choices": [{"logprobs": {"x": [NaN, -Infinity, Infinity]}}]}', ANSWERED, 1),
    "no content": (200, {"choices": [{**CHOICE, "message": {"content": None}}]}, ANSWERED, 1),
    "no usage": (200, {**TAKEN, "usage": None}, ANSWERED, 1),
    "half a pair": (200, '{"choices": [{"message": {"content": "\\ud83d"}}]}', ANSWERED, 1),
    "odd line breaks": (200, {"choices": [{**CHOICE, "message": {"content": "a\u2028b\x85c"}}]}, ANSWERED, 1),
    "a mark": (200, "\ufeff" + json.dumps(TAKEN), ANSWERED, 1),
    "an error as an answer": (200, {"error": {"message": "odd words", "code": "content_filter"}}, "content_filter", 1),
    "no choices": (200, {"choices": [], "note": "odd words"}, "no_answer", 1),
    "busy as an answer": (200, {"error": {"message": "odd words", "code": 503}}, "server_error", 6),
    "a page": (200, "<html>odd words", "invalid_server_response", 6),
    "too long": (400, {"error": {"message": "odd words", "code": "context_length_exceeded"}}, "", 1),
    "wrong fields": (422, {"detail": [{"msg": "odd words"}]}, "", 1),
    "a page that refuses": (400, "<html>odd words", "", 1),
    "too large": (413, {"error": {"message": "odd words"}}, "", 1),
    "not made": (501, {"error": {"message": "odd words"}}, "", 1),
    "broken": (500, {"error": {"message": "odd words"}}, "", 6),
}

"""Conversations through templates of many shapes: as transformers renders them, in the form that each one takes."""

from __future__ import annotations

import datetime
import json
import random
from typing import Any

import pytest
from chat_templates import (
    CHATML,
    HARMONY_LIKE,
    HERMES_LIKE,
    LLAMA_LIKE,
    MISTRAL_LIKE,
    OPENS_THINKING,
    PARTS,
    TEXT_TEMPLATES,
)

from blendserve.dialect.messages import read_messages
from blendserve.errors import ConfigError, RequestError
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.chat_template import ChatTemplate
from blendserve.models.conversation import Conversation
from blendserve.models.reasoning_formats import recognised_reasoning
from blendserve.models.tool_formats.table import recognised_format

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def render(source: str, messages: Any, **fields: Any) -> str:
    date = datetime.date.today()
    return ChatTemplate(source, SPECIAL, date).render(Conversation(read_messages(messages), **fields))


def random_conversation(source: random.Random) -> list[dict[str, Any]]:
    """Turns of users and assistants, some of them calls and what came of them."""
    words = ["hi", "<b>", "naïve", "a\nb", '"quoted"', "{x}", "🙂", "  spaces  "]

    def text() -> str:
        return "say " + " ".join(source.choices(words, k=source.randint(1, 5)))

    messages: list[dict[str, Any]] = [{"role": "user", "content": text()}]
    for number in range(source.randint(0, 4)):
        if source.random() < 0.5:
            messages += [{"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
            continue
        call_id = f"call{number:05d}"
        arguments = {"city": text(), "days": source.randint(1, 9)}
        function = {"name": "get_weather", "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": text()},
        ]
    return messages


@pytest.mark.parametrize("template", TEXT_TEMPLATES, ids=["chatml", "hermes", "llama", "mistral"])
@pytest.mark.parametrize("tools", [(), (WEATHER,)], ids=["plain", "tools"])
def test_prompts_are_those_of_transformers(template: str, tools: tuple[dict[str, Any], ...]) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    source = random.Random(len(template) + len(tools))
    for _ in range(40):
        messages = random_conversation(source)
        adds = source.random() < 0.5
        texts, _ = utils.render_jinja_template(
            [messages], tools=[*tools] or None, chat_template=template, add_generation_prompt=adds, **SPECIAL
        )
        as_text = json.loads(json.dumps(messages))
        for message in as_text:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        for given in (messages, as_text):
            assert render(template, given, tools=tools, add_generation_prompt=adds) == texts[0]


def test_continued_messages_end_where_transformers_ends_them() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    messages = [{"role": "user", "content": "a colour"}, {"role": "assistant", "content": "It is a"}]
    for template in (CHATML, HERMES_LIKE, MISTRAL_LIKE):
        texts, _ = utils.render_jinja_template(
            [messages], chat_template=template, continue_final_message=True, **SPECIAL
        )
        assert render(template, messages, continue_final_message=True) == texts[0]
        assert texts[0].endswith("It is a")
    parts = [messages[0], {"role": "assistant", "content": [{"type": "text", "text": "It is a"}]}]
    assert render(PARTS, parts, continue_final_message=True) == "user: a colour;assistant: It is a"
    with pytest.raises(RequestError, match="changes or leaves out the last message"):
        render("{{ messages[0].content }}", messages, continue_final_message=True)


TWO_PARTS = [{"type": "text", "text": "Name a"}, {"type": "input_text", "text": "colour."}]


@pytest.mark.parametrize("content", ["Name a\ncolour.", TWO_PARTS, ["Name a", "colour."]])
def test_templates_get_the_form_of_content_that_they_take(content: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    assert "user\nName a\ncolour.<|im_end|>" in render(CHATML, messages)
    joined = "Name a\ncolour." if isinstance(content, str) else "Name acolour."
    assert render(PARTS, messages) == f"system: Be brief.;user: {joined};assistant: "


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{% set turns = messages[1:] %}{% for t in turns %}{% for c in t.content %}{{ c.text }}{% endfor %}"
            "{% endfor %}",
            "ab",
        ),
        (
            "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p['text'] }}{% endfor %}{% endfor %}",
            "ab",
        ),
        (
            "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ show(messages[1].content) }}",
            "ab",
        ),
        ("{{ messages[1].content | upper }}", "A\nB"),
    ],
    ids=["a slice", "a variable", "a macro that the rule does not see", "a change of the words"],
)
def test_words_of_the_user_reach_the_prompt(template: str, text: str) -> None:
    assert render(template, [{"role": "system", "content": "s"}, {"role": "user", "content": ["a", "b"]}]).endswith(
        text
    )


@pytest.mark.parametrize(
    "template", ["fixed", "{{ messages[0].contents }}", "{% for p in messages[0].x %}{{ p }}{% endfor %}"]
)
def test_a_prompt_without_a_word_of_the_user_is_refused(template: str) -> None:
    with pytest.raises(RequestError, match="no text of the user reaches the prompt") as refusal:
        render(template, [{"role": "user", "content": "Hello"}])
    assert refusal.value.param == "messages"
    assert render(template, [{"role": "user", "content": ""}]) in ("fixed", "")


def test_arguments_are_texts_for_templates_that_join_them() -> None:
    template = (
        "{{ messages[0].content }}{% for c in messages[1].tool_calls %}{{ 'f' + c.function.arguments }}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render(template, messages) == 'hif{"a": 1}'


def test_the_developer_speaks_as_system_where_templates_know_no_developer() -> None:
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert "<|im_start|>system\nbe kind" in render(CHATML, messages)
    template = "{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{{ m.content }}{% endfor %}"
    assert render(template, messages) == "Dbe kindhi"


def test_names_ids_and_reasoning_reach_the_template() -> None:
    template = (
        "{% for m in messages %}{{ m.name }}|{{ m.tool_call_id }}|{{ m.reasoning_content }}|{{ m.content }};"
        "{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "hi", "name": "dana", "id": "m1", "weight": 1},
        {"role": "assistant", "content": "x", "reasoning": "why", "refusal": None, "annotations": []},
        {"role": "tool", "content": "y", "tool_call_id": "c1"},
    ]
    assert render(template, messages) == "dana|||hi;||why|x;|c1||y;"
    assert "thinking: so" in render(
        "{{ 'thinking: ' + messages[1].thinking }}{{ messages[0].content }}",
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "reasoning_content": "so"}],
    )


def test_variables_and_what_the_template_raises() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert render(HERMES_LIKE, messages, variables={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert not render(HERMES_LIKE, messages).endswith("</think>\n\n")
    with pytest.raises(RequestError, match="roles are user, assistant and tool"):
        render(MISTRAL_LIKE, [{"role": "system", "content": "x"}, *messages])


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        (CHATML, None, None),
        (HERMES_LIKE, "hermes", "think"),
        (LLAMA_LIKE, "llama3", None),
        (MISTRAL_LIKE, "mistral", None),
        (OPENS_THINKING, None, "think"),
        ("<tool_call><function=f><parameter=p>", "qwen3_coder", None),
        ("<tool_call>{{ name }}<arg_key>", None, None),
        (HARMONY_LIKE, "harmony", "harmony"),
        ("[THINK]", None, "mistral"),
        ("<seed:think>", None, "seed_oss"),
    ],
)
def test_formats_are_recognised_by_the_template(template: str, tools: str | None, reasoning: str | None) -> None:
    format, marks = recognised_format(template, ()), recognised_reasoning(template, ())
    assert (format and format.name, marks and marks.name) == (tools, reasoning)


def test_formats_are_recognised_by_tokens_where_there_is_no_template() -> None:
    found = recognised_format(None, ("[TOOL_CALLS]", "x"))
    assert found is not None
    assert found.name == "mistral"
    marks = recognised_reasoning(CHATML, ("<think>", "</think>"))
    assert marks is not None
    assert marks.name == "think"


def test_formats_by_name() -> None:
    from tiny_files import byte_level_tokenizer

    from blendserve.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(byte_level_tokenizer(300), chat_template_source=CHATML)
    formats = ChatFormats.of(tokenizer, "hermes", "think")
    assert formats.tools is not None
    assert (formats.tools.name, formats.renders_tools) == ("hermes", False)
    assert ChatFormats.of(tokenizer, "none", "none") == ChatFormats.of(tokenizer)
    with pytest.raises(ConfigError, match="tool_format is 'xml'; it must be auto, none"):
        ChatFormats.of(tokenizer, "xml")

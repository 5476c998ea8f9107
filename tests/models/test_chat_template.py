"""Chat templates: what Hugging Face's environment offers, a fixed date, and a sandbox that holds."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from blendserve.errors import ConfigError, RequestError
from blendserve.models.chat_template import ChatTemplate
from blendserve.models.conversation import Conversation

DAY = datetime.date(2026, 1, 2)
USER = [{"role": "user", "content": "hi <b>"}]


def render(source: str, messages: Any = USER, **special: str) -> str:
    return ChatTemplate(source, special, DAY).render(Conversation(tuple(messages)))


def test_names_that_templates_rely_on() -> None:
    source = "{{ bos_token }}|{{ add_generation_prompt }}|{{ tools }}|{{ messages[0].content }}"
    assert render(source, bos_token="<s>") == "<s>|True|None|hi <b>"
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi <b>"}]'
    assert (
        render(
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}{{ messages[0].content }}"
        )
        == "hi <b>"
    )
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hi <b>!"


def test_blocks_leave_no_blank_lines() -> None:
    source = "a\n  {% for m in messages %}\n{{ m['content'] }}\n  {% endfor %}\nb"
    assert render(source) == "a\nhi <b>\nb"


def test_the_date_is_the_one_that_is_given() -> None:
    assert render("{{ messages[0].content }} {{ strftime_now('%d %b %Y') }}") == "hi <b> 02 Jan 2026"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[7].content.x }}", "7"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_messages_that_a_template_refuses_are_the_requests_error(source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as error:
        render(source)
    assert (error.value.param, error.value.status_code) == ("messages", 400)


def test_an_invalid_template_is_the_models_error() -> None:
    with pytest.raises(ConfigError, match="not valid, line 2"):
        ChatTemplate("a\n{% for %}", {}, DAY)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ('{0.__globals__[json]}' | attr('format'))(raise_exception) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError):
        render(source)


def test_messages_are_not_changed() -> None:
    messages = [dict(USER[0])]
    with pytest.raises(RequestError):
        render("{{ messages[0].update({'content': 'y'}) }}", messages)
    assert messages == USER

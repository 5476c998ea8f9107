"""Chat templates in their own process: the same texts as in this one, and bounds that hold."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from tiny_files import CHAT_TEMPLATE

from blendserve.errors import ConfigError, RequestError
from blendserve.models.chat_template import ChatTemplate
from blendserve.models.conversation import Conversation
from blendserve.models.template_process import RenderLimits, TemplateProcess

QUICK = RenderLimits(cpu_s=0.3, memory_bytes=200 << 20)
PATIENT = replace(QUICK, cpu_s=60.0)
TOO_LARGE = ("a product", "doubling", "a wide number")
"""Bombs that end by memory, however slow the machine is."""


def chat(*messages: dict[str, Any]) -> Conversation:
    return Conversation(messages)


USER = chat({"role": "user", "content": "hi"})
UNLESS_HI = "{% if messages[0].content == 'hi' %}fine: hi{% else %}BOMB{% endif %}"
BOMBS = {
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ messages[0].content * 10**9 }}",
    "doubling": "{% set at = namespace(x='a') %}{% for i in range(60) %}{% set at.x = at.x ~ at.x %}{% endfor %}",
    "a wide number": "{{ '%999999999d' % messages | length }}",
    "a power": "{% set n = messages | length + 8 %}{% set x = n ** (n ** n) %}",
    "a recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


def test_texts_are_those_of_the_template_in_this_process() -> None:
    contents = ["", "x" * 100_000, "\ud800 \U0001f600 \x00 \u2028", '"quoted" \\', *map(str, range(300))]
    conversations = [
        chat({"role": "system", "content": "be kind"}, {"role": "user", "content": one}) for one in contents
    ]
    here = ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<s>"}, datetime.date(2024, 7, 26))
    found = TemplateProcess(CHAT_TEMPLATE, {"bos_token": "<s>"}).render_each(conversations)
    assert found == [here.render(messages) for messages in conversations]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_its_own_conversation(bomb: str) -> None:
    limits = PATIENT if bomb in TOO_LARGE else QUICK
    template = TemplateProcess(UNLESS_HI.replace("BOMB", BOMBS[bomb]), {}, limits)
    answers = template.render_each([USER, chat({"role": "user", "content": "no"}), USER])
    assert [answers[0], answers[2]] == ["fine: hi", "fine: hi"]
    assert isinstance(answers[1], RequestError)
    assert answers[1].param == "messages"
    assert ("too much memory" in str(answers[1])) == (bomb in TOO_LARGE)


def test_a_template_that_cannot_be_read_is_the_models_error() -> None:
    with pytest.raises(ConfigError, match="not valid, line 2"):
        TemplateProcess("a\n{% for %}", {}).render_each([USER])
    with pytest.raises(ConfigError, match="too much time or memory to read"):
        TemplateProcess("{{ 9 ** (9 ** 9) }}", {}, QUICK).render_each([USER])


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    template = TemplateProcess("{{ messages[0].content }}", {})
    assert template.render_each([USER]) == ["hi"]
    assert template._process is not None
    with open(f"/proc/{template._process.pid}/environ", "rb") as file:
        assert b"sk-secret" not in file.read()


def test_a_process_that_somebody_ends_is_started_again() -> None:
    template = TemplateProcess("{{ messages[0].content }}", {})
    assert template.render_each([USER]) == ["hi"]
    assert template._process is not None
    os.kill(template._process.pid, signal.SIGKILL)
    assert template.render_each([USER, USER]) == ["hi", "hi"]


def test_an_interrupt_leaves_no_answer_to_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    template = TemplateProcess("{{ messages[0].content }}", {})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("blendserve.models.template_process._answer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            template.render_each([chat({"role": "user", "content": str(number)}) for number in range(9)])
    assert template.render_each([USER]) == ["hi"]


def test_messages_that_are_no_json_are_the_requests_error() -> None:
    circle: dict[str, Any] = {"role": "user"}
    circle["content"] = circle
    others = [chat(circle), USER, chat({"role": "user", "content": object()})]
    answers = TemplateProcess("{{ messages[0].content }}", {}).render_each(others)
    assert answers[1] == "hi"
    assert all(isinstance(answers[at], RequestError) for at in (0, 2))


def test_no_process_is_left_behind() -> None:
    code = (
        "from blendserve.models.conversation import Conversation\n"
        "from blendserve.models.template_process import TemplateProcess\n"
        "t = TemplateProcess('fine', {})\n"
        "assert t.render_each([Conversation(())]) == ['fine']\n"
        "print(t._process.pid)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)

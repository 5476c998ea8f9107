"""A chat template in a process of its own, with bounded time and memory, and without the environment.

A template is a program that comes with the model. One that loops or fills the memory costs the line that it was given,
never the job, and what escapes the sandbox finds no keys of the user.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any, NoReturn

from blendserve.errors import ConfigError, RequestError
from blendserve.models.conversation import Conversation

_GROUP_BYTES = 1 << 15
"""Of conversations on their way at once: less than a pipe holds (64 KiB), so that neither side waits for the other."""
_LENGTH_BYTES = 8
_START = (
    "import sys; sys.path[:] = sys.argv[1:]\nfrom blendserve.models.template_process import serve\nserve()"  # no -m: -I
)
_UNREADABLE = "the model's chat template takes too much time or memory to read"
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PYTHONHOME")


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Of one conversation: seconds of processor time, which do not depend on what else runs, and bytes of memory."""

    cpu_s: float = 10.0
    memory_bytes: int = 1 << 30

    def __str__(self) -> str:
        return f"{self.cpu_s:g} s of processor time or {self.memory_bytes >> 20} MiB of memory"


DEFAULT_LIMITS = RenderLimits()


class TemplateProcess:
    """Renders conversations in another process, which starts with the first one. Calls from several threads take turns.

    `tool_source`: the template of conversations with tools, where they have one of their own. `date`: what templates
    get as today; None: today.
    Raises: ConfigError with the first call when the template is not valid.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        limits: RenderLimits = DEFAULT_LIMITS,
        *,
        tool_source: str | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self._setup = {
            "source": source,
            "tool_source": tool_source,
            "special_tokens": dict(special_tokens),
            "date": (date or datetime.date.today()).isoformat(),
            **asdict(limits),
        }
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._end: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()

    def render_each(self, conversations: Sequence[Conversation]) -> list[str | RequestError]:
        """The prompt of every conversation, or why the template gives none."""
        requests = [_request(conversation) for conversation in conversations]
        with self._lock:
            answers = self._answers([request for request in requests if isinstance(request, bytes)])
        return [request if isinstance(request, RequestError) else next(answers) for request in requests]

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _answers(self, requests: Sequence[bytes]) -> Iterator[str | RequestError]:
        answers: list[str | RequestError] = []
        try:
            for group in _groups(requests):
                answers += self._answers_of_group(group)
        except BaseException:
            self.close()  # what it still has to say answers nobody
            raise
        return iter(answers)

    def _answers_of_group(self, group: Sequence[bytes]) -> list[str | RequestError]:
        answers: list[str | RequestError] = []
        num_deaths = 0
        while len(answers) < len(group):
            process = self._running()
            try:
                _send(process, b"".join(group[len(answers) :]))
                while len(answers) < len(group):
                    answers.append(_answer(_receive(process)))
                    num_deaths = 0
            except (EOFError, BrokenPipeError):
                num_deaths += 1
                code = process.wait()
                self.close()
                if code == -signal.SIGPROF or num_deaths > 1:  # else somebody else may have ended it
                    answers.append(_refused(f"it takes more than {self._limits}"))
                    num_deaths = 0
        return answers

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        process = self._process = _started()
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _ended, process, self._owner)
        try:
            _send(process, _frame(self._setup))
            problem = _receive(process).get("error")
        except (EOFError, BrokenPipeError):
            problem = _UNREADABLE
        if problem is not None:
            self.close()
            raise ConfigError(f"{problem}; use another model, or /v1/completions, which needs no template")
        return process


def serve() -> NoReturn:
    """What the process does: render what comes in until nothing more does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job, which ends this too
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    from blendserve.models.chat_template import ChatTemplate

    source, target = sys.stdin.buffer, sys.stdout.buffer
    setup = _read_frame(source)
    _bound_memory(setup["memory_bytes"])
    signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
    date = datetime.date.fromisoformat(setup["date"])
    try:
        template = ChatTemplate(setup["source"], setup["special_tokens"], date)
        tool_source = setup["tool_source"]
        of_tools = ChatTemplate(tool_source, setup["special_tokens"], date) if tool_source else template
    except ConfigError as error:
        _write_frame(target, {"error": str(error)})
        sys.exit()
    except (MemoryError, RecursionError):
        _write_frame(target, {"error": _UNREADABLE})
        sys.exit()
    _write_frame(target, {})
    try:
        while True:
            conversation = _conversation(_read_frame(source))
            _write_frame(target, _rendered(of_tools if conversation.tools else template, conversation, setup["cpu_s"]))
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _conversation(request: Mapping[str, Any]) -> Conversation:
    return Conversation(**{**request, "messages": tuple(request["messages"]), "tools": tuple(request["tools"])})


def _rendered(template: Any, conversation: Conversation, cpu_s: float) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        return {"text": template.render(conversation)}
    except RequestError as error:
        return {"refused": error.message}
    except MemoryError:
        return {"refused": "the model's chat template does not take these messages: it takes too much memory"}


def _bound_memory(num_bytes: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        present = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + num_bytes, present + num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _started() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot start {sys.executable}, which is to render chat templates: {error.strerror or error}"
        ) from error


def _ended(process: subprocess.Popen[bytes], owner: int) -> None:
    """Mutates: the process, unless it belongs to the one that we were forked from."""
    if owner != os.getpid():
        return
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    process.wait()


def _request(conversation: Conversation) -> bytes | RequestError:
    try:
        return _frame(
            {
                "messages": [dict(message) for message in conversation.messages],
                "tools": [dict(tool) for tool in conversation.tools],
                "variables": dict(conversation.variables),
                "add_generation_prompt": conversation.add_generation_prompt,
                "continue_final_message": conversation.continue_final_message,
            }
        )
    except (TypeError, ValueError, RecursionError) as error:
        return _refused(f"they hold what is no JSON ({error})")


def _refused(reason: str) -> RequestError:
    return RequestError(
        f"the model's chat template does not take these messages: {reason}", code="invalid_value", param="messages"
    )


def _answer(reply: Mapping[str, str]) -> str | RequestError:
    if "text" in reply:
        return reply["text"]
    return RequestError(reply["refused"], code="invalid_value", param="messages")


def _groups(requests: Sequence[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    num_bytes = 0
    for request in requests:
        if group and num_bytes + len(request) > _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(request)
        num_bytes += len(request)
    if group:
        yield group


def _frame(value: Mapping[str, Any]) -> bytes:
    data = json.dumps(value).encode()
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def _read_frame(source: IO[bytes]) -> dict[str, Any]:
    """Raises: EOFError when there is no more."""
    head = source.read(_LENGTH_BYTES)
    data = source.read(int.from_bytes(head, "little")) if len(head) == _LENGTH_BYTES else b""
    if not data:
        raise EOFError
    value: dict[str, Any] = json.loads(data)
    return value


def _write_frame(target: IO[bytes], value: Mapping[str, Any]) -> None:
    target.write(_frame(value))
    target.flush()


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()


def _receive(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    return _read_frame(process.stdout)

"""Single requests inside vLLM, beside those of a plan: they come in before what the plan has next, and tell their
tokens after every step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from blendserve.dialect.extras import Extras
from blendserve.engine.front import Front
from blendserve.engines.vllm.entrance import EngineDiedError, Entrance
from blendserve.engines.vllm.requests import failed_output, output_of, was_aborted
from blendserve.errors import RequestError

MAX_DEATHS = 2
"""Engines that may die with a single request inside; then it ends as an error."""


class Ahead:
    """The requests of a front that are inside now. After an engine's death they come in again one at a time, so that
    the one that engines die of takes no other along.
    """

    def __init__(self, front: Front, entrance: Entrance) -> None:
        self.inside: set[int] = set()
        self._front = front
        self._entrance = entrance
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        front.open()

    @property
    def has_work(self) -> bool:
        return bool(self.inside) or bool(self._suspects) or self._front.num_waiting > 0

    def enter(self) -> None:
        """Bring in those that wait, and take out those that nobody wants any more. Raises: EngineDiedError."""
        unwanted = set(self._front.take_unwanted())
        if unwanted:
            self._suspects = deque(index for index in self._suspects if index not in unwanted)
            self._entrance.abort(sorted(unwanted & self.inside))
            self.inside -= unwanted
        for index in self._front.take():
            if self._deaths[index]:
                self._suspects.append(index)
            else:
                self._add(index)
        if self._suspects and not any(self._deaths[index] for index in self.inside):
            self._add(self._suspects.popleft())

    def hear(self, outputs: Sequence[Any]) -> int:
        """Tell what a step has brought. Returns: how many have ended. Raises: EngineDiedError where the engine ends
        requests by itself.
        """
        num_ended = 0
        for output in outputs:
            index = int(output.request_id)
            if index not in self.inside:
                continue
            if not output.finished:
                self._tell(index, output)
            elif was_aborted(output):
                raise EngineDiedError("it ended requests that were not finished")
            else:
                self.inside.discard(index)
                self._front.end(output_of(index, output, self._front.request(index)))
                num_ended += 1
        return num_ended

    def lost(self, death: EngineDiedError) -> None:
        """The engine is gone, and all that were inside with it."""
        for index in sorted(self.inside):
            self._deaths[index] += 1
            if self._deaths[index] >= MAX_DEATHS:
                message = f"vLLM's engine died each time it ran this request; the last reason: {death}"
                error = RequestError(message, code="engine_failure", status_code=500)
                self._front.end(failed_output(index, error))
        self.inside.clear()
        self._suspects.clear()
        self._front.start_over()

    def leave(self) -> None:
        """Take out what is inside; it comes in again with the next run."""
        inside, self.inside = sorted(self.inside), set()
        self._suspects.clear()
        self._entrance.abort(inside)
        self._front.start_over()

    def _add(self, index: int) -> None:
        try:
            extras = Extras.from_bytes(self._front.body(index))
            self._entrance.add(index, self._front.request(index), extras, is_streamed=True)
        except RequestError as error:
            self._front.end(failed_output(index, error))
        else:
            self.inside.add(index)

    def _tell(self, index: int, output: Any) -> None:
        if not hasattr(output.outputs, "data"):
            self._front.tell(index, np.array(output.outputs[0].token_ids, np.int32))

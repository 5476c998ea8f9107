"""The way into an engine of vLLM: requests are handed over, steps are run, and an engine's death is told from the fault
of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from blendserve.dialect.extras import Extras
from blendserve.engines.vllm.api import VllmApi
from blendserve.engines.vllm.requests import GrammarOf, arguments_of
from blendserve.errors import BlendServeError, RequestError
from blendserve.request import Request


class EngineDiedError(Exception):
    """An engine that takes no more calls; `__cause__` is what it died of."""


class Opened(Protocol):
    """Who holds the engine that is open now."""

    @property
    def api(self) -> VllmApi: ...
    @property
    def adapters(self) -> Mapping[str, str]: ...
    @property
    def embeds(self) -> bool: ...
    @property
    def grammar_of(self) -> GrammarOf | None: ...
    @property
    def engine(self) -> Any | None: ...


class Entrance:
    """Speaks to whichever engine is open."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._api = opened.api
        numbered = enumerate(sorted(opened.adapters.items()), start=1)
        self._loras = {name: self._api.lora_request(name, number, path) for number, (name, path) in numbered}

    def add(self, index: int, request: Request, extras: Extras, *, is_streamed: bool = False) -> None:
        """Hand a request to vLLM. Raises: RequestError where vLLM refuses it; EngineDiedError."""
        opened = self._opened
        try:
            prompt, params, lora = arguments_of(
                request,
                extras,
                self._api,
                self._engine,
                self._loras,
                embeds=opened.embeds,
                grammar_of=opened.grammar_of,
                is_streamed=is_streamed,
            )
            self._engine.add_request(str(index), prompt, params, lora_request=lora)
        except RequestError:
            raise
        except Exception as error:
            if self._api.is_death(error):
                raise EngineDiedError(str(error) or type(error).__name__) from error
            raise RequestError(f"vLLM refuses the request: {error}", code="invalid_value") from error

    def step(self) -> Any:
        """Run one step. Whatever comes out of it but outputs is the engine's death: no request can be told apart."""
        try:
            return self._engine.step()
        except BlendServeError:
            raise
        except Exception as error:
            raise EngineDiedError(str(error) or type(error).__name__) from error

    def abort(self, indices: list[int]) -> None:
        """Take requests out that are inside."""
        if indices and self._opened.engine is not None:
            self._opened.engine.abort_request([str(index) for index in indices])

    @property
    def _engine(self) -> Any:
        engine = self._opened.engine
        assert engine is not None, "a run without an engine"
        return engine

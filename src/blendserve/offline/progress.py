"""The progress bar of `LLM.generate` and `LLM.chat`, as vLLM's looks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from blendserve.offline.outputs import RequestOutput

UseTqdm = bool | Callable[..., Any]
"""True: a bar on standard error. False: none. A class or function: what makes the bar, such as a subclass of tqdm."""


class ProgressBar:
    """Counts outputs. `total` is None where prompts are made one by one."""

    def __init__(self, use_tqdm: UseTqdm, total: int | None) -> None:
        self._bar: Any = None
        self._started_s = time.perf_counter()
        self._num_prompt_tokens = self._num_output_tokens = 0
        if use_tqdm and total != 0:
            self._bar = _make(use_tqdm)(
                total=total, desc="Processed prompts", dynamic_ncols=True, postfix=self._speed(), unit="prompt"
            )

    def add(self, outputs: list[RequestOutput]) -> None:
        """Count what was finished."""
        if self._bar is None or not outputs:
            return
        for output in outputs:
            self._num_prompt_tokens += len(output.prompt_token_ids)
            self._num_output_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        self._bar.postfix = self._speed()
        self._bar.update(len(outputs))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _speed(self) -> str:
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        return (
            f"est. speed input: {self._num_prompt_tokens / elapsed_s:.2f} toks/s, "
            f"output: {self._num_output_tokens / elapsed_s:.2f} toks/s"
        )


def _make(use_tqdm: UseTqdm) -> Callable[..., Any]:
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    bar: Callable[..., Any] = tqdm
    return bar

"""A peer of the race without a model: makes the tokens it is asked for, or misbehaves on demand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import blendserve

sys.path.insert(0, str(Path(blendserve.__path__[0]).parent.parent / "bench" / "peers"))

from worker_loop import serve  # found through the line above


class FakePeer:
    def __init__(self, settings: dict[str, Any]) -> None:
        if settings["fault"] == "load":
            raise RuntimeError("no such instruction set")
        self._fault = settings["fault"]

    def describe(self) -> dict[str, str]:
        print("engines print what they like")
        return {"version": "1", "precision": "exact", "settings": ""}

    def generate(self, prompts: list[list[int]], num_output_tokens: list[int]) -> list[int]:
        assert len(prompts) == len(num_output_tokens)
        if self._fault == "crash":
            raise RuntimeError("illegal instruction")
        return [count - (self._fault == "short") for count in num_output_tokens]

    def answer(self, prompt: list[int], max_tokens: int) -> str:
        return f"{len(prompt)} tokens in, at most {max_tokens} out"


if __name__ == "__main__":
    serve(FakePeer)

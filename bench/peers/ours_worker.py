"""BlendServe through its Python interface, token ids in."""

from __future__ import annotations

from typing import Any

from worker_loop import serve

from blendserve.offline.llm import LLM
from blendserve.request import SamplingParams


class Ours:
    """Keys of `settings`: any argument of `LLM` under `arguments`, `precision`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._llm = LLM(**settings["arguments"])

    def describe(self) -> dict[str, str]:
        arguments = ", ".join(
            f"{name} {value}" for name, value in self._settings["arguments"].items() if name != "model"
        )
        return {"version": "this commit", "precision": self._settings["precision"], "settings": arguments}

    def generate(self, prompts: list[list[int]], num_output_tokens: list[int]) -> list[int]:
        params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in num_output_tokens]
        outputs = self._llm.generate(prompts, params)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def answer(self, prompt: list[int], max_tokens: int) -> str:
        (output,) = self._llm.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=0))
        return str(output.outputs[0].text)


if __name__ == "__main__":
    serve(Ours)

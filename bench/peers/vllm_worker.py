"""vLLM's CPU build: LLM.generate on a Hugging Face directory, token ids in.

The environment variables that it needs are set by the caller, before torch loads.
"""

from __future__ import annotations

from typing import Any

import vllm
from worker_loop import serve


class Vllm:
    """Keys of `settings`: model; any argument of vllm.LLM under `arguments`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._llm = vllm.LLM(model=settings["model"], **settings["arguments"])

    def describe(self) -> dict[str, str]:
        arguments = ", ".join(f"{name} {value}" for name, value in self._settings["arguments"].items())
        return {"version": vllm.__version__, "precision": self._settings["precision"], "settings": arguments}

    def generate(self, prompts: list[list[int]], num_output_tokens: list[int]) -> list[int]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                vllm.SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
                for n in num_output_tokens
            ],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    def constrained(self, prompts: list[list[int]], schemas: list[str], max_tokens: int) -> list[int]:
        ask = {"max_tokens": max_tokens, "temperature": 0, "detokenize": False}
        structures = [vllm.sampling_params.StructuredOutputsParams(json=schema) for schema in schemas]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [vllm.SamplingParams(**ask, structured_outputs=structure) for structure in structures],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    def answer(self, prompt: list[int], max_tokens: int) -> str:
        (output,) = self._llm.generate(
            [{"prompt_token_ids": prompt}], vllm.SamplingParams(max_tokens=max_tokens, temperature=0), use_tqdm=False
        )
        return str(output.outputs[0].text)


if __name__ == "__main__":
    serve(Vllm)

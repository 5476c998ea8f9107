"""transformers' continuous batching on a Hugging Face directory, token ids in."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from worker_loop import serve


class Transformers:
    """Keys of `settings`: model, dtype, threads; any field of ContinuousBatchingConfig under `batching`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._settings = settings
        self._model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
        )
        self._tokenizer = AutoTokenizer.from_pretrained(settings["model"])

    def describe(self) -> dict[str, str]:
        batching = ", ".join(f"{name} {value}" for name, value in self._settings["batching"].items())
        return {
            "version": transformers.__version__,
            "precision": self._settings["precision"],
            "settings": batching,
        }

    def generate(self, prompts: list[list[int]], num_output_tokens: list[int]) -> list[int]:
        made = self._complete(prompts, num_output_tokens, end_of_sequence=-1)
        return [len(tokens) for tokens in made]

    def answer(self, prompt: list[int], max_tokens: int) -> str:
        (tokens,) = self._complete([prompt], [max_tokens], self._tokenizer.eos_token_id)
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _complete(self, prompts: list[list[int]], limits: list[int], end_of_sequence: int) -> list[list[int]]:
        options = {"do_sample": False, "max_new_tokens": max(limits), "eos_token_id": end_of_sequence}
        generation = GenerationConfig.from_dict(options)
        batching = ContinuousBatchingConfig(**self._settings["batching"])
        made: dict[str, list[int]] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, warmup=False
        ) as manager:
            ids = [f"r{i}" for i in range(len(prompts))]
            for request_id, prompt, limit in zip(ids, prompts, limits, strict=True):
                manager.add_request(prompt, request_id, max_new_tokens=limit, eos_token_id=end_of_sequence)
            while len(made) < len(ids):
                result = manager.get_result(timeout=5)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the generation loop stopped")
                elif result.error is not None:
                    raise RuntimeError(result.error)
                elif result.is_finished():
                    made[result.request_id] = result.generated_tokens
        return [made[request_id] for request_id in ids]


if __name__ == "__main__":
    serve(Transformers)

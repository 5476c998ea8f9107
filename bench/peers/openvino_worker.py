"""OpenVINO GenAI: ContinuousBatchingPipeline on a GGUF file, token ids in."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker_loop import serve


class OpenVino:
    """Keys of `settings`: model, threads; any field of SchedulerConfig under `scheduler`; plugin properties under
    `properties`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        for name, value in settings["scheduler"].items():
            setattr(scheduler, name, value)
        self._settings = settings
        properties = {"INFERENCE_NUM_THREADS": settings["threads"], **settings["properties"]}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", properties)

    def describe(self) -> dict[str, str]:
        scheduler = ", ".join(f"{name} {value}" for name, value in self._settings["scheduler"].items())
        properties = ", ".join(f"{name} {value}" for name, value in self._settings["properties"].items())
        return {
            "version": openvino_genai.__version__.split("-")[0],
            "precision": self._settings["precision"],
            "settings": scheduler + (f"; {properties}" if properties else ""),
        }

    def generate(self, prompts: list[list[int]], num_output_tokens: list[int]) -> list[int]:
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        configs = [_greedy(count, ignore_eos=True) for count in num_output_tokens]
        results = self._pipeline.generate(inputs, configs)
        return [len(result.m_generation_ids[0]) for result in results]

    def answer(self, prompt: list[int], max_tokens: int) -> str:
        tensor = openvino.Tensor(np.array([prompt], dtype=np.int64))
        (result,) = self._pipeline.generate([tensor], [_greedy(max_tokens, ignore_eos=False)])
        return str(self._pipeline.get_tokenizer().decode(list(result.m_generation_ids[0])))


def _greedy(max_new_tokens: int, *, ignore_eos: bool) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    config.do_sample = False
    config.ignore_eos = ignore_eos
    return config


if __name__ == "__main__":
    serve(OpenVino)

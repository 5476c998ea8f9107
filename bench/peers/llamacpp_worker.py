"""llama.cpp through xllamacpp: its server in this process, one slot per concurrent request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp
from worker_loop import serve


class LlamaCpp:
    """Keys of `settings`: model, threads, num_slots, tokens_per_slot; any field of CommonParams under `params`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = settings["model"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
        params.n_parallel = settings["num_slots"]
        params.n_ctx = settings["num_slots"] * settings["tokens_per_slot"]  # divided among slots: kv_unified is off
        params.n_threads_http = settings["num_slots"]
        params.verbosity = 0
        for name, value in settings["params"].items():
            setattr(params, name, value)
        self._settings = settings
        self._server = xllamacpp.Server(params)

    def describe(self) -> dict[str, str]:
        params = ", ".join(f"{name} {value}" for name, value in self._settings["params"].items())
        return {
            "version": f"xllamacpp {xllamacpp.__version__}",
            "precision": self._settings["precision"],
            "settings": f"{self._settings['num_slots']} slots of {self._settings['tokens_per_slot']} tokens, {params}",
        }

    def generate(self, prompts: list[list[int]], num_output_tokens: list[int]) -> list[int]:
        with ThreadPoolExecutor(self._settings["num_slots"]) as pool:
            replies = pool.map(lambda prompt, count: self._complete(prompt, count, True), prompts, num_output_tokens)
            return [reply["usage"]["completion_tokens"] for reply in replies]

    def answer(self, prompt: list[int], max_tokens: int) -> str:
        return str(self._complete(prompt, max_tokens, False)["choices"][0]["text"])

    def _complete(self, prompt: list[int], max_tokens: int, ignore_eos: bool) -> dict[str, Any]:
        body = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "ignore_eos": ignore_eos}
        reply: dict[str, Any] = self._server.handle_completions(body)
        if "usage" not in reply:
            raise RuntimeError(f"llama.cpp refused a request: {reply}")
        return reply


if __name__ == "__main__":
    serve(LlamaCpp)

"""What a service's rounds have made so far: tokens by kind, and how fast."""

from __future__ import annotations

from collections import Counter

from blendserve.serve.messages import Progress
from blendserve.serve.running import RunningRound


class Tally:
    """Counts over all rounds. `rates` are requests per second by model, as last seen; `token_rate` is that of the round
    that runs, in tokens computed per second.
    """

    def __init__(self) -> None:
        self.num_tokens = Counter[str]()
        self.rates: dict[str, float] = {}
        self.token_rate = 0.0
        self.engine_s = 0.0
        self._counted: dict[str, tuple[int, int, int]] = {}

    def begin_round(self) -> None:
        self._counted.clear()

    def end_round(self, run_s: float) -> None:
        self.token_rate = 0.0
        self.engine_s += run_s

    def note(self, progress: Progress, running: RunningRound, num_done: int, model: str | None, now: float) -> None:
        """Take what came of one batch of the round; `num_done` requests of the round have ended."""
        tokens = progress.num_prompt_tokens, progress.num_cached_tokens, progress.num_output_tokens
        before = self._counted.get(progress.batch_id, (0, 0, 0))
        for name, have, had in zip(("prompt", "cached", "output"), tokens, before, strict=True):
            self.num_tokens[name] += have - had
        self._counted[progress.batch_id] = tokens
        elapsed = now - running.started_at
        if elapsed > 1.0 and model is not None:
            self.rates[model] = max(num_done / elapsed, 1e-6)
            self.token_rate = sum(prompt + output for prompt, _, output in self._counted.values()) / elapsed

"""The verdict of the bench of predictions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import predict
import pytest
from predict import Outcome, Round, Setting

from blendserve.simulator.forecast import Forecast


def outcome(*predicted_s: float, others: float = 0.0, overlap: str = "on") -> Outcome:
    forecasts = [cast(Forecast, SimpleNamespace(time_s=time_s)) for time_s in predicted_s]
    rounds = [Round(forecast, {"run_s": 10.0}, others) for forecast in forecasts]
    return Outcome(Setting("int8", "96MiB", overlap, "blend"), rounds)


@pytest.mark.parametrize(
    ("outcomes", "status", "text"),
    [
        ([outcome(9.6), outcome(10.4)], 0, "predicted within 5%: 2 of 2 settings"),
        ([outcome(10.0), outcome(10.6, overlap="off")], 1, "1 of 2 settings; not int8 96MiB off blend"),
        ([outcome(7.0, 10.1, 13.0)], 0, "1 of 1 settings"),
        ([outcome(9.0, others=0.2)], 2, "Other processes took 20% of the machine"),
        ([outcome(10.0, others=0.2)], 0, "these times say nothing"),
    ],
)
def test_predictions_are_judged(outcomes: list[Outcome], status: int, text: str) -> None:
    assert predict.status(outcomes, 0.05) == status
    assert text in predict.verdict(outcomes, 0.05)


def test_settings_are_options_of_both_commands() -> None:
    setting = Setting("int8", "96MiB", "on", "blend")
    config = setting.config()
    assert (config.dtype, config.kv_memory_bytes, config.overlap) == ("int8", 96 << 20, "on")
    assert setting.options()[-2:] == ["--kv-memory", "96MiB"]
    assert "--kv-memory" not in setting._replace(kv_memory=predict.DEFAULT_MEMORY).options()

"""Simulated runs as lines of text, and as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blendserve.costs.hardware import HARDWARE_BY_NAME
from blendserve.report.format import format_count, format_duration, format_figure, format_number, format_share, plural
from blendserve.report.plan_text import describe_part, describe_refused, finite, target_name, text_table
from blendserve.simulator.forecast import Forecast, Forecasts

POWER_NOTE = "Energy is board power times time: an upper estimate, without the rest of the computer."


@dataclass(frozen=True, slots=True)
class SimulateReport:
    """All that `blendserve simulate` has to say. `num_lines` is 0 where the job did not come from a file."""

    source: str
    forecasts: Forecasts
    has_price: bool
    notes: Sequence[str]
    num_lines: int = 0
    num_refused_by_code: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Every figure, units in the names; null where a price, a power or a finite number is missing."""
        forecasts, bounds = self.forecasts, self.forecasts.bounds
        hardware = forecasts.machine.hardware
        value = {
            "source": self.source,
            "num_lines": self.num_lines,
            "num_refused_by_code": dict(self.num_refused_by_code),
            "hardware": hardware.name,
            "model": forecasts.machine.model.name,
            "num_replicas": forecasts.num_replicas,
            "tensor_parallel": forecasts.machine.tensor_parallel,
            "price_per_gpu_hour": hardware.price_per_hour if self.has_price else None,
            "watts_per_gpu": hardware.watts or None,
            "num_requests": forecasts.num_requests,
            "num_simulated": forecasts.num_simulated,
            "num_oversized": forecasts.num_oversized,
            "num_cut": forecasts.num_cut,
            "num_prompt_tokens": forecasts.num_prompt_tokens,
            "num_output_tokens": forecasts.num_output_tokens,
            "optimal_sharing": forecasts.optimal_sharing,
            "root_density": forecasts.root_density,
            "optimum_s": bounds.optimum_s,
            "lower_bound_s": bounds.lower_bound_s,
            "runs": [self._run_json(run) for run in forecasts.runs],
            "notes": list(self.notes),
        }
        cleaned: dict[str, Any] = finite(value)
        return cleaned

    def to_text(self) -> str:
        """A page of text for a person."""
        forecasts, bounds = self.forecasts, self.forecasts.bounds
        lines = [
            self.source + (f": {describe_refused(self.num_lines, self.num_refused_by_code)}" if self.num_lines else ""),
            f"  {plural(forecasts.num_requests, 'request')}, {format_count(forecasts.num_prompt_tokens)} prompt and "
            f"{format_count(forecasts.num_output_tokens)} output tokens, sharing "
            f"{format_share(forecasts.optimal_sharing)}",
            f"on {plural(forecasts.num_replicas, 'replica')} of {target_name(forecasts)}:",
            f"  density {format_number(forecasts.root_density)}; no schedule beats "
            f"{format_duration(bounds.lower_bound_s)}",
            "",
            f"{describe_part(forecasts)}:",
            *text_table(self.headers, self.rows, (0, 1)),
        ]
        return "\n".join([*lines, *self.notes])

    @property
    def headers(self) -> tuple[str, ...]:
        """Names of the columns of `rows`."""
        optional = [name for name, is_known in (("price", self.has_price), ("kWh", self._has_power)) if is_known]
        kept = ("share of bound", "sharing", "of possible")
        return ("policy", "engine", "time", "tokens/s", self.hours, *optional, *kept)

    @property
    def hours(self) -> str:
        """What device time is called: a calibrated machine is no GPU."""
        return "GPU-hours" if self.forecasts.machine.hardware.name in HARDWARE_BY_NAME else "machine-hours"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One row per run, fastest first."""
        return [self._row(run) for run in sorted(self.forecasts.runs, key=lambda run: run.time_s)]

    @property
    def _has_power(self) -> bool:
        return self.forecasts.machine.hardware.watts > 0

    def _row(self, run: Forecast) -> tuple[str, ...]:
        result = run.result
        return (
            result.policy,
            result.engine,
            format_duration(run.time_s),
            format_figure(run.tokens_per_s),
            format_figure(run.gpu_hours),
            *([f"{run.price:,.2f}"] if self.has_price else []),
            *([format_figure(run.energy_kwh)] if self._has_power else []),
            format_share(result.share_of_bound),
            format_share(result.sharing),
            format_share(result.sharing_kept),
        )

    def _run_json(self, run: Forecast) -> dict[str, Any]:
        result = run.result
        return {
            "policy": result.policy,
            "engine": result.engine,
            "time_s": run.time_s,
            "tokens_per_s": run.tokens_per_s,
            "gpu_hours": run.gpu_hours,
            "price": run.price if self.has_price else None,
            "energy_kwh": run.energy_kwh if self._has_power else None,
            "share_of_optimum": result.share_of_optimum,
            "share_of_bound": result.share_of_bound,
            "sharing": result.sharing,
            "sharing_kept": result.sharing_kept,
            "num_preemptions": run.num_preemptions,
        }

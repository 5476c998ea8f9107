"""What a run on the native engine tells of itself beyond its answers: the files of `--trace` and `--report`."""

from __future__ import annotations

from pathlib import Path

from blendserve.engines.native.measured import MeasuredRun
from blendserve.errors import ConfigError
from blendserve.executors.trace import MAX_SPANS, StepTrace
from blendserve.report.run_page import write_page
from blendserve.report.trace_file import write_trace


class FileObserver:
    """A `RunObserver` that writes what was asked for when a run ends, interrupted or not.

    Raises: ConfigError when there is no directory to write to.
    """

    def __init__(self, source: str, trace_path: Path | None, report_path: Path | None) -> None:
        for option, path in (("--trace", trace_path), ("--report", report_path)):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"{option} {path}: there is no directory {path.parent}; make it first")
        self.source = source
        self.trace = StepTrace(MAX_SPANS)
        self._trace_path = trace_path
        self._report_path = report_path

    def run_ended(self, run: MeasuredRun) -> tuple[str, ...]:
        """Write the files. Returns what the user should know: the answers are worth more than a file that failed."""
        try:
            if self._trace_path is not None:
                write_trace(self._trace_path, run)
            if self._report_path is not None:
                write_page(self._report_path, run)
        except ConfigError as error:
            return (str(error),)
        return ()

"""What a run would refuse, found without one: counts by error code, with the first lines of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blendserve.dialect.endpoint import Codec
from blendserve.dialect.schema import BatchLine, ServedModel
from blendserve.job.ingest import TokenLists, encode_lines
from blendserve.job.reader import DEFAULT_LIMITS, BadLine, BatchReader, ReadLimits

MAX_LISTED_LINES = 10


@dataclass(slots=True)
class CodeCount:
    """Lines with one error code. `line_numbers` lists the first few, `message` is that of the first."""

    message: str
    num_lines: int = 0
    line_numbers: list[int] = field(default_factory=list)


@dataclass(slots=True)
class CheckReport:
    """What a file holds. Units: `num_requests` counts choices, `num_prompt_tokens` is None where no codec was given.
    `refusal`: why a run would not begin, None where it would.
    """

    num_lines: int = 0
    num_valid: int = 0
    num_requests: int = 0
    num_prompt_tokens: int | None = None
    requested_model: str | None = None
    refusal: str | None = None
    errors: dict[str, CodeCount] = field(default_factory=dict)


def check_file(
    path: Path, served: ServedModel, codec: Codec | None = None, *, limits: ReadLimits = DEFAULT_LIMITS
) -> CheckReport:
    """Validate every line; with a codec also encode it, and hold it against the context.

    Raises: ConfigError when the file cannot be read at all.
    """
    report = CheckReport()
    reader = BatchReader(path, served, limits)

    def refuse(line: BadLine) -> None:
        count = report.errors.setdefault(line.error.code, CodeCount(line.error.message))
        count.num_lines += 1
        if len(count.line_numbers) < MAX_LISTED_LINES:
            count.line_numbers.append(line.line_number)

    def accept(line: BatchLine, token_ids: TokenLists) -> None:
        report.num_valid += 1
        report.num_requests += line.num_choices
        if codec is not None:
            num_tokens = sum(map(len, token_ids)) * line.sampling.n
            report.num_prompt_tokens = (report.num_prompt_tokens or 0) + num_tokens

    if codec is None:
        for line in reader:
            if isinstance(line, BadLine):
                refuse(line)
            else:
                accept(line, ())
    else:
        encode_lines(reader, codec, served.max_model_len, accept, refuse)
    report.num_lines, report.requested_model = reader.num_lines, reader.requested_model
    report.refusal = reader.other_models.reason(path, served.name)
    return report

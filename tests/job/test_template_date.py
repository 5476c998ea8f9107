"""The date in chat templates: a job keeps the day on which it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batch_fakes import FakeCodec, FakeEngine, batch_line, read_rows, run_fake, write_lines

from blendserve.errors import ConfigError
from blendserve.models.chat_settings import ChatSettings, TodaysDate

TODAY, TOMORROW = ({"template_date": TodaysDate(f"2026-11-{day}")} for day in (29, 30))


class Dated(FakeCodec):
    """Remembers the dates that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.dates: list[str] = []

    def use_date(self, date: str) -> None:
        self.dates.append(date)


def interrupted(path: Path, target: Path, settings: Any) -> None:
    def stop(count: int) -> None:
        if count == 1:
            raise KeyboardInterrupt

    with pytest.raises(BaseException, match="interrupted"):
        run_fake(path, target, FakeEngine(on_answer=stop), settings=settings)


def test_a_job_goes_on_the_next_day_with_its_own_day(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [batch_line(str(number)) for number in range(3)])
    interrupted(path, tmp_path / "out.jsonl", TODAY)
    engine = FakeEngine()
    run_fake(path, tmp_path / "out.jsonl", engine, settings=TOMORROW)
    assert engine.num_answers == 2
    assert run_fake(path, tmp_path / "out.jsonl", settings=TOMORROW).was_complete
    assert run_fake(path, tmp_path / "out.jsonl", settings={"template_date": "2026-11-29"}).was_complete


def test_another_date_is_another_job(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [batch_line("a"), batch_line("b")])
    interrupted(path, tmp_path / "out.jsonl", TODAY)
    with pytest.raises(ConfigError, match=r"--template-date\) was 2026-11-29, is 2026-11-30"):
        run_fake(path, tmp_path / "out.jsonl", settings={"template_date": "2026-11-30"})


def test_lines_that_come_later_get_the_day_of_the_job(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [batch_line("a")])
    run_fake(path, tmp_path / "out.jsonl", settings=TODAY)
    write_lines(path, [batch_line("a"), batch_line("b")])
    codec = Dated()
    run_fake(path, tmp_path / "out.jsonl", codec=codec, settings=TOMORROW, reuses=True)
    assert codec.dates == ["2026-11-29"]
    assert len(read_rows(tmp_path / "out.jsonl")) == 2


def test_dates_that_are_none() -> None:
    assert ChatSettings(template_date="2026-01-02").identity()["template_date"] == "2026-01-02"
    assert isinstance(ChatSettings().identity()["template_date"], TodaysDate)
    for date in ("tomorrow", "2026-13-01"):
        with pytest.raises(ConfigError, match="it must be a date such as"):
            ChatSettings(template_date=date)

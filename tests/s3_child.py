"""A process that answers a table or a batch file of an S3 server, and may be killed by its own n-th call of the server.

`python s3_child.py INPUT OUTPUT JOURNAL ROWS_PER_FILE [CALL NUMBER]`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import s3fs
from table_fakes import PROMPT, TableEngine

from blendserve.job.places import RunOptions
from blendserve.offline.batch import run_files
from blendserve.tables.layout import Layout
from blendserve.tables.mapping import TableJob, open_table, run_table
from blendserve.tables.staging import stage


def die_at(name: str, number: int) -> None:
    """Kill this process when it is about to make that call, with the data of the earlier ones on the server."""
    call = s3fs.S3FileSystem._call_s3
    num_calls = 0

    async def counted(self: Any, method: str, *arguments: Any, **fields: Any) -> Any:
        nonlocal num_calls
        num_calls += method == name
        if method == name and num_calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return await call(self, method, *arguments, **fields)

    s3fs.S3FileSystem._call_s3 = counted


def run_file(source: str, output: str, directory: Path) -> None:
    """A batch file, as `blendserve run` answers it."""
    staged, engine = stage(source, output, None, directory, is_fresh=False), TableEngine()
    files = staged.files
    (report,) = run_files([files], engine=engine, policy="blend", options=RunOptions())
    report = staged.publish(report)
    print(engine.fake.num_answers, report.output_path, report.was_complete)


def main(source: str, output: str, journal: str, rows_per_file: str, *death: str) -> None:
    if death:
        die_at(death[0], int(death[1]))
    if source.endswith(".jsonl"):
        run_file(source, output, Path(journal))
        return
    layout = Layout.of(output, rows_per_file=int(rows_per_file) or None)
    job = TableJob(open_table(source), output, PROMPT, layout, Path(journal), inputs=[source])
    engine = TableEngine()
    report = run_table(job, engine, "blend")
    print(engine.fake.num_answers, report.output_path, report.was_complete)


if __name__ == "__main__":
    main(*sys.argv[1:])

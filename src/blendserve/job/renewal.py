"""Answers of an earlier run, carried over to a changed input: those to lines that are still there as they were."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from blendserve.dialect.rows import key_of
from blendserve.job.record_log import RecordKind, RecordLog
from blendserve.job.store import TokenStore, hash_of_id

_HASH_BYTES = 16
_ROW_KEY = re.compile(rb'\{"id": ?"batch_req_([0-9a-f]{32})"')


class EarlierAnswer(NamedTuple):
    """The row of an answer, and the digest of the line that it answers."""

    digest: bytes
    row: bytes


def answers_of_records(log: RecordLog, store: TokenStore) -> Iterator[EarlierAnswer]:
    """What the records of a journal hold; a torn end is left out."""
    for record in log.whole_records():
        row = store.row_of(record.line_number) if record.kind == RecordKind.OUTPUT_ROW else None
        if row is not None:
            yield EarlierAnswer(store.digest(row), record.body)


def answers_of_output(output: Path, line_hashes: bytes) -> Iterator[EarlierAnswer]:
    """What a finished output file holds; `line_hashes` are those of `TokenStore.line_hashes`."""
    starts = range(0, len(line_hashes) - 2 * _HASH_BYTES + 1, 2 * _HASH_BYTES)
    digest_by_id = {
        line_hashes[at : at + _HASH_BYTES]: line_hashes[at + _HASH_BYTES : at + 2 * _HASH_BYTES] for at in starts
    }
    with output.open("rb") as file:
        for row in file:
            digest = digest_by_id.get(hash_of_id(json.loads(row)["custom_id"].encode()))
            if digest is not None:
                yield EarlierAnswer(digest, row)


def carry_over(answers: Iterable[EarlierAnswer], store: TokenStore, log: RecordLog) -> int:
    """Record the answers to lines of `store`, under their present numbers. Returns: how many there are."""
    row_by_digest = store.row_by_digest()
    num_carried = 0
    for digest, body in answers:
        row = row_by_digest.pop(digest, None)
        if row is None:
            continue
        line = store.line(row)
        key = _ROW_KEY.match(body)
        if key is not None:  # ids are made of line numbers
            body = body.replace(key.group(1), key_of(line.line_number, line.custom_id).encode())
        log.append(RecordKind.OUTPUT_ROW, line.line_number, 0, body)
        num_carried += 1
    return num_carried

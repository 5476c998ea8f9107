"""Memory of files made to take much of it: `python bench/amplification.py`.

Each file is one line of nearly 32 MiB, or several of a few MiB, and is checked with the default model's tokenizer in a
process of its own, whose peak of resident memory counts. The limit is a small multiple of the longest line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from common import print_header

from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.schema import ServedModel
from blendserve.host import cache_dir
from blendserve.job.check import check_file
from blendserve.job.reader import DEFAULT_MAX_LINE_BYTES
from blendserve.models.hub import resolve
from blendserve.models.load import load_model

LINE_BYTES = DEFAULT_MAX_LINE_BYTES - 1024
MOST_TIMES = 16
"""The longest line in memory: as bytes, as text (up to four bytes a character), parsed, and again for the tokenizer."""


def line(body: str, custom_id: str = "a") -> str:
    return f'{{"custom_id":"{custom_id}","method":"POST","url":"/v1/completions","body":{body}}}\n'


def filled(front: str, unit: str, back: str, num_bytes: int = LINE_BYTES) -> str:
    return front + unit * ((num_bytes - len(front) - len(back)) // len(unit)) + back


def files() -> Iterator[tuple[str, str]]:
    """Names and contents."""
    yield "an ordinary line", line('{"prompt":"hello"}')
    yield "lists", line(filled('{"prompt":"a","user":[', "[],", "0]}"))
    yield "objects", line(filled('{"prompt":"a","user":[', "{},", "0]}"))
    members = ",".join(f'"{number:x}":0' for number in range(LINE_BYTES // 10))
    yield "members", line(f'{{"prompt":"a","user":{{{members}}}}}')
    yield "numbers", line(filled('{"prompt":[', "999,", "0]}"))
    yield "text with a wide character", line(filled('{"prompt":"\U0001f600', "ab ", '"}'))
    yield "spaces", line(filled('{"prompt":"', " ", '"}'))
    yield (
        "stop_token_ids",
        "".join(
            line(filled(f'{{"prompt":"a","stop_token_ids":[{number},', "0,", "0]}", 8 << 20), str(number))
            for number in range(6)
        ),
    )
    yield "custom_ids", "".join(line('{"prompt":"a"}', filled(str(number), "x", "", 8 << 20)) for number in range(20))
    prompts = json.dumps(["a"] * 2048)
    yield "prompts times n", "".join(line(f'{{"prompt":{prompts},"n":128}}', str(number)) for number in range(20))


def peak_of_check(path: Path) -> int:
    """Bytes of resident memory at the most."""
    command = [sys.executable, __file__, str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def check(path: Path) -> None:
    model = load_model(resolve(None, cache_dir()))
    spec = model.spec
    served = ServedModel((spec.name,), vocab_size=spec.vocab_size, max_model_len=spec.max_position)
    check_file(path, served, ModelCodec(model.tokenizer, spec.max_position))
    status = Path("/proc/self/status").read_text()  # getrusage counts what the parent had before exec
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)


def run() -> int:
    print_header()
    base, most = 0, 0.0
    print(f"{'one line, or a few, of':<28}{'MiB more than an ordinary line':>32}{'times the limit of a line':>28}")
    with TemporaryDirectory() as name:
        path = Path(name) / "in.jsonl"
        for what, content in files():
            path.write_text(content)
            peak = peak_of_check(path)
            base = base or peak
            most = max(most, (peak - base) / DEFAULT_MAX_LINE_BYTES)
            print(f"{what:<28}{(peak - base) / 2**20:>32.0f}{(peak - base) / DEFAULT_MAX_LINE_BYTES:>28.1f}")
    return int(most > MOST_TIMES)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check(Path(sys.argv[1]))
    else:
        sys.exit(run())

"""Forms and batch files with a few random changes, by seed: `python bench/mutate_requests.py --inputs 1000000`.

Half of the inputs are multipart forms, which come in chunks of random sizes; half are batch files. Each must be read,
or be refused as the client's fault. Anything else ends this with an exception, after the seed of its round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import common

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

from serve_mutations import read_mutated_forms, validate_mutated_lines  # noqa: E402

from blendserve.serve.server import quiet_parser  # noqa: E402

_ROUND = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    common.print_header()
    quiet_parser()
    started, found = time.perf_counter(), Counter[str]()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        for done in range(0, arguments.inputs, 2 * _ROUND):
            count, seed = min(_ROUND, (arguments.inputs - done) // 2), arguments.seed + done
            try:
                found += read_mutated_forms(count, seed)
                found += validate_mutated_lines(Path(directory), count, seed)
            except Exception:
                print(f"the round of seed {seed} failed", file=sys.stderr)
                raise
    counts = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    print(f"{found.total()} inputs in {time.perf_counter() - started:.0f} s: {counts}")


if __name__ == "__main__":
    main()

"""Changed headers of model files for their readers, by seed: `python bench/mutate_models.py --inputs 1000000`.

Each input is a config.json, tokenizer settings, a safetensors header or a GGUF header in which a value, a name or a
few bytes are others. It must be read, or be refused in one line. Anything else is printed with its seed, and the exit
code is 1. Each reader works in a process of its own, which may be killed: a crash, a minute without an answer, or more
than 4 GiB of memory are found too.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from mmap import mmap
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, and no threads that a fork would lose
TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "models")]

from hostile_headers import READERS, Reader  # noqa: E402

MAX_BYTES = 4 << 30
MAX_QUIET_S = 60.0
BATCH = 20_000
GOOD_ENDS = ("read", "refused")
MEMORY = Path("/dev/shm")

Ends = Counter[tuple[str, str]]


def ends_of(reader: Reader, seeds: range, current: mmap) -> Ends:
    """Counts of what was changed and how it ended. Mutates: `current`, the seed being tried."""
    ends: Ends = Counter()
    for seed in seeds:
        current[:8] = seed.to_bytes(8, "little")
        what = reader.change(random.Random(seed))
        try:
            ends[what, reader.read()] += 1
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001  # what this looks for
            end = traceback.format_exc(limit=-1).splitlines()[-1][:100]
            ends[what, end] += 1
            if ends[what, end] == 1:
                print(f"seed {seed}, {what}:\n{traceback.format_exc(limit=-6)}", flush=True)
    return ends


def tried(reader: Reader, seeds: range) -> Ends:
    """As `ends_of`, in processes of their own: one that dies is told with its seed, and the next goes on behind it."""
    ends: Ends = Counter()
    while seeds:
        current = mmap(-1, 8)
        current[:8] = seeds.start.to_bytes(8, "little")
        read_end, write_end = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read_end)
            resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(ends_of(reader, seeds, current), pipe)
            os._exit(0)
        os.close(write_end)
        status = _watched(child, current)
        with os.fdopen(read_end, "rb") as pipe:
            if status == 0:
                found: Ends = pickle.load(pipe)
                return ends + found
        seed = int.from_bytes(current[:8], "little")
        print(f"seed {seed}: the process ended with {status}", flush=True)
        ends[reader.name, f"the process ended with {status}"] += 1
        seeds = range(seed + 1, seeds.stop)
    return ends


def _watched(child: int, current: mmap) -> int:
    """The exit status of a process, which is killed when it tries one seed for too long."""
    last, since = b"", time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if (seed := current[:8]) != last:
            last, since = seed, time.monotonic()
        elif time.monotonic() - since > MAX_QUIET_S:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000, help="how many for each reader (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed (default: 0)")
    parser.add_argument("--reader", choices=sorted(READERS), action="append", help="only this one (default: all)")
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # of scales that are no numbers any more
    ends: Ends = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
        for name in args.reader or READERS:
            reader, began_s = READERS[name](Path(directory) / name), time.monotonic()
            stop = args.seed + args.inputs
            for first in range(args.seed, stop, BATCH):
                ends += tried(reader, range(first, min(first + BATCH, stop)))
            print(f"{name}: {args.inputs} inputs in {time.monotonic() - began_s:.0f} s", flush=True)
    for (what, end), count in sorted(ends.items()):
        print(f"{count:8} {what}: {end}")
    return int(any(end not in GOOD_ENDS for _, end in ends))


if __name__ == "__main__":
    sys.exit(main())

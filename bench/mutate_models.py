"""Model files with one thing changed, by seed: `python bench/mutate_models.py --inputs 1000000`.

Each input is a directory or a GGUF file of a tiny model in which a value, a name or a few bytes are others. It must
load, or be refused in one line. Anything else is printed with its seed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "models")]

from hostile_models import GgufParts, HostileDirectory, use  # noqa: E402
from tiny_files import write_gguf  # noqa: E402
from tiny_models import random_weights, tiny_spec  # noqa: E402

RENDERED = 500
"""One input of so many also renders a conversation, in a process of its own."""
GOOD_ENDS = ("loaded", "ConfigError", "CapacityError")

Trial = Callable[[random.Random, bool], tuple[str, str]]
"""Changes one thing and loads the model. Returns: what was changed, and how it ended."""


def directory_trial(path: Path, *, lists_added_tokens: bool) -> Trial:
    directory = HostileDirectory.written(path, lists_added_tokens=lists_added_tokens)

    def trial(source: random.Random, renders: bool) -> tuple[str, str]:
        name = directory.change(source)
        try:
            return name, use(directory.path, renders=renders)
        finally:
            directory.restore(name)

    return trial


def gguf_trial(path: Path) -> Trial:
    spec = tiny_spec("llama3-rope", num_layers=1)
    write_gguf(path, spec, random_weights(spec))
    parts, changed = GgufParts.of(path), path.with_name("changed.gguf")

    def trial(source: random.Random, renders: bool) -> tuple[str, str]:
        changed.write_bytes(parts.changed(source))
        return "a GGUF file", use(changed, renders=renders)

    return trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000, help="how many (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed (default: 0)")
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # of scales that are no numbers any more
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        trials = (
            directory_trial(Path(name) / "one", lists_added_tokens=True),
            directory_trial(Path(name) / "two", lists_added_tokens=False),
            gguf_trial(Path(name) / "m.gguf"),
        )
        for seed in range(args.seed, args.seed + args.inputs):
            try:
                counts[trials[seed % 3](random.Random(seed), seed % RENDERED == 0)] += 1
            except KeyboardInterrupt:
                raise
            except BaseException:  # noqa: BLE001  # what this looks for
                counts["a traceback", traceback.format_exc(limit=-1).splitlines()[-1][:100]] += 1
                print(f"seed {seed}:\n{traceback.format_exc(limit=-6)}", flush=True)
    for (what, end), count in sorted(counts.items()):
        print(f"{count:8} {what}: {end}")
    return int(any(end not in GOOD_ENDS for _, end in counts))


if __name__ == "__main__":
    sys.exit(main())

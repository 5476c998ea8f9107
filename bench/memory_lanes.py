"""How many cores of a large machine should read KV while matrix products run: an emulation of counts.

    python bench/memory_lanes.py [--cores 96] [--gb-per-s 460]

A core alone draws several times its share of a server's bandwidth. Where every core takes KV beside its tile of a
matrix product, each gets so little bandwidth that it waits when its tile is done. `memory_lanes` limits how many take
KV at a time. The emulation moves cores from event to event: a tile of a matrix product, what was fetched beside it at
an even share of the bandwidth, then attention over it from cache. Nothing here is measured but the four rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import common

TILE_FLOP, CHUNK_BYTES = 3.5e6, 256 * 1024.0
"""As in csrc/overlap.h."""


@dataclass(frozen=True, slots=True)
class Server:
    """Rates of one core, and the bandwidth that all share. Defaults: a Zen 4 core (docs/benchmarks.md)."""

    num_cores: int
    bytes_per_s: float
    flop_per_s: float = 215e9
    core_bytes_per_s: float = 20e9
    cache_bytes_per_s: float = 50e9

    @property
    def tile_s(self) -> float:
        return TILE_FLOP / self.flop_per_s

    @property
    def attend_s(self) -> float:
        """Attention over a chunk that lies in cache."""
        return CHUNK_BYTES / self.cache_bytes_per_s

    def apart_s(self, num_tiles: int, num_chunks: int) -> float:
        """Matrix products, then attention, each on all cores."""
        rate = min(self.bytes_per_s, self.num_cores * self.core_bytes_per_s)
        return num_tiles * self.tile_s / self.num_cores + num_chunks * CHUNK_BYTES / rate


class Doing(Enum):
    NOTHING = 0
    TILE = 1  # with a fetch beside it, where the core has a lane
    FETCH = 2  # waits for the rest of a fetch, or reads with no tile left to hide it
    ATTEND = 3


@dataclass(slots=True)
class Core:
    doing: Doing = Doing.NOTHING
    busy_s: float = 0.0
    fetch_bytes: float = 0.0
    has_chunk: bool = False
    reads_alone: bool = False


def together_s(server: Server, num_tiles: int, num_chunks: int, num_lanes: int) -> float:
    """Time of all tiles and chunks where at most `num_lanes` cores hold a chunk while there are tiles."""
    cores = [Core() for _ in range(server.num_cores)]
    tiles, chunks, time_s = num_tiles, num_chunks, 0.0
    while True:
        for core in cores:
            if core.doing is not Doing.NOTHING:
                continue
            is_free = chunks > 0 and (tiles == 0 or sum(other.has_chunk for other in cores) < num_lanes)
            if tiles == 0 and not is_free:
                continue
            core.has_chunk, core.reads_alone = is_free, tiles == 0
            core.fetch_bytes = CHUNK_BYTES if is_free else 0.0
            core.doing, core.busy_s = (Doing.TILE, server.tile_s) if tiles else (Doing.FETCH, 0.0)
            chunks -= is_free
            tiles -= tiles > 0
        if all(core.doing is Doing.NOTHING for core in cores):
            return time_s
        time_s += _advance(server, cores)


def _advance(server: Server, cores: Iterable[Core]) -> float:
    """Go on to the next event; returns how long that took."""
    fetching = [core for core in cores if core.fetch_bytes > 0]
    rate = min(server.core_bytes_per_s, server.bytes_per_s / max(1, len(fetching)))
    events = [core.busy_s for core in cores if core.doing in (Doing.TILE, Doing.ATTEND)]
    passed_s = min([*events, *(core.fetch_bytes / rate for core in fetching)])
    for core in fetching:
        core.fetch_bytes = max(0.0, core.fetch_bytes - rate * passed_s)
        core.fetch_bytes = 0.0 if core.fetch_bytes < 1e-3 else core.fetch_bytes
    for core in cores:
        core.busy_s = max(0.0, core.busy_s - passed_s)
        _move_on(server, core)
    return passed_s


def _move_on(server: Server, core: Core) -> None:
    """What a core does next, where what it did is done."""
    is_done = core.busy_s < 1e-12
    if core.doing is Doing.TILE and is_done:
        core.doing = Doing.FETCH if core.has_chunk else Doing.NOTHING
    if core.doing is Doing.FETCH and core.fetch_bytes == 0:
        # Reading straight from memory, `core_bytes_per_s` counts attention in.
        core.doing, core.busy_s = Doing.ATTEND, 0.0 if core.reads_alone else server.attend_s
        is_done = core.reads_alone
    if core.doing is Doing.ATTEND and is_done:
        core.doing, core.has_chunk = Doing.NOTHING, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=96)
    parser.add_argument(
        "--gb-per-s", type=float, default=460.0, help="of all cores (460: twelve channels of DDR5-4800)"
    )
    parser.add_argument("--lanes", default="4,8,12,16,24,32,48,64,96", help="comma-separated")
    parser.add_argument("--tiles", type=int, default=24, help="of matrix products for each core (24)")
    arguments = parser.parse_args()
    common.print_header()
    server = Server(arguments.cores, arguments.gb_per_s * 1e9)
    num_tiles = arguments.tiles * server.num_cores
    rows = []
    balanced = num_tiles * server.tile_s / server.num_cores * server.bytes_per_s / CHUNK_BYTES
    for share in (0.5, 1.0, 2.0):
        num_chunks = round(balanced * share)
        apart_s = server.apart_s(num_tiles, num_chunks)
        lanes = [min(int(count), server.num_cores) for count in arguments.lanes.split(",")]
        gains = [apart_s / together_s(server, num_tiles, num_chunks, count) for count in lanes]
        rows.append([f"m = {share:g} c", *(f"{gain:.2f}x" for gain in gains)])
    print(f"emulated: {server}\nspeed over matrix products and attention one after the other, by memory lanes\n")
    print(common.table(["memory over compute", *arguments.lanes.split(",")], rows))


if __name__ == "__main__":
    main()

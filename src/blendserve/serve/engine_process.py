"""The engine process: opens one model, runs rounds of batches, and answers single requests ahead of them.

    python -m blendserve.serve.engine_process FD

The service starts it and speaks through the socket FD. It ends when that socket does, so it never outlives a service
that was killed.
"""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection

from blendserve.dialect.schema import ServedModel
from blendserve.engines.base import Engine, FrontedEngine
from blendserve.engines.opening import open_engine
from blendserve.errors import BlendServeError, CapacityError, ConfigError, ExecutorError, RequestError
from blendserve.job.disk import open_own
from blendserve.job.pending import WITHDRAWN, PendingRequests
from blendserve.report.icicle import icicle
from blendserve.report.plan_page import density_chart
from blendserve.request import SamplingParams, SequenceOutput, TokenIds
from blendserve.serve.joined import RoundRequests
from blendserve.serve.messages import (
    Ask,
    BatchBroken,
    BatchDone,
    Command,
    Draw,
    EngineState,
    Forget,
    Open,
    Opened,
    OpeningFailed,
    Picture,
    Progress,
    Release,
    Released,
    Report,
    RoundEnded,
    RunRound,
    Share,
    Yield,
)
from blendserve.serve.online import Online
from blendserve.serve.open_batch import OpenBatch, WithdrawnError

_REPORT_INTERVAL_S = 0.25
_MAX_DRAWN = 20_000


class EngineWorker:
    """Runs rounds in the main thread. `hear` is called by the thread that listens, and may let go of batches."""

    def __init__(self, connection: Connection, engine: Engine, served: ServedModel) -> None:
        self._connection = connection
        self._engine = engine
        self._served = served
        self._rounds: queue.SimpleQueue[RunRound | None] = queue.SimpleQueue()
        self._online: Online | None = None
        self._fronted: FrontedEngine | None = None
        if isinstance(engine, FrontedEngine):
            self._online, self._fronted = Online(engine, served, self.send), engine
            engine.front = self._online.front
        self._send_lock = threading.Lock()
        self._batches_lock = threading.Lock()
        self._open: dict[str, OpenBatch] = {}
        self._opening: set[str] = set()
        self._withdrawn: set[str] = set()
        self._yielded_round = -1
        self._drawn_round: tuple[int, RoundRequests] | None = None
        self._reported_s = 0.0

    def send(self, report: Report) -> None:
        with self._send_lock:
            self._connection.send(report)

    def hear(self, command: Command) -> None:
        """Act on a command, or leave it to the main thread."""
        match command:
            case RunRound():
                self._rounds.put(command)
                if self._online is not None:
                    self._online.front.hold()  # what runs by itself ends, and the round takes the others along
            case Draw(number):
                drawing = self._drawn_round
                if drawing is not None and drawing[0] == number:
                    threading.Thread(target=self._draw, args=drawing, name="draw", daemon=True).start()
            case Ask() if self._online is not None:
                self._online.ask(command)
                self._rounds.put(None)
            case Forget(id) if self._online is not None:
                self._online.forget(id)
            case Yield(number):
                self._yielded_round = number
            case Release(batch_id):
                self._release(batch_id)

    def run(self) -> None:
        """Run one round after the other, for ever, and single requests while there is none."""
        while True:
            command = self._rounds.get()
            if command is not None:
                self._run_round(command)
            if self._fronted is not None and self._online is not None:
                while self._online.front.has_work and self._rounds.empty():
                    self._fronted.answer_front()

    def _release(self, batch_id: str) -> None:
        with self._batches_lock:
            self._withdrawn.add(batch_id)
            if batch_id in self._opening:
                return  # the main thread answers once it has let go
            batch = self._open.pop(batch_id, None)
        if batch is not None:
            batch.close()
        self.send(Released(batch_id))

    def _run_round(self, command: RunRound) -> None:
        with self._batches_lock:
            self._withdrawn -= {share.batch.id for share in command.shares}
        num_rows, error, is_for_space, run_s = 0, None, False, 0.0
        try:
            num_rows, run_s = self._answer(command)
        except (BlendServeError, MemoryError) as failure:
            error = str(failure) or "out of memory"
            is_for_space = isinstance(failure, CapacityError)
        finally:
            with self._batches_lock:
                left = list(self._open.values())
                self._open.clear()
            self._drawn_round = None
            for batch in left:
                batch.close()
        self.send(RoundEnded(command.number, num_rows, error, is_for_space, run_s))

    def _answer(self, command: RunRound) -> tuple[int, float]:
        """Run a round. Returns: rows that it made, and the seconds in which requests ran."""
        batches: list[OpenBatch] = []
        parts: list[PendingRequests] = []
        for share in command.shares:
            batch = self._opened(share)
            if batch is not None:
                batches.append(batch)
                numbers = batch.rows.pending().numbers[: share.max_requests]
                parts.append(PendingRequests(batch.store, numbers))
        before = sum(batch.rows.num_rows for batch in batches)
        for batch in batches:
            self._report(batch)
            self._end_if_complete(batch)
        run_s = 0.0
        if any(map(len, parts)):
            pending = RoundRequests(
                parts, lambda part: batches[part].is_closed, lambda: self._yielded_round == command.number
            )
            self._drawn_round = (command.number, pending)
            self._generate(pending, batches, command.policy)
            run_s = self._engine.times.run_s
        return sum(batch.rows.num_rows for batch in batches) - before, run_s

    def _opened(self, share: Share) -> OpenBatch | None:
        """The batch with its journal; None where it was withdrawn or is broken, which the service is told."""
        id = share.batch.id
        with self._batches_lock:
            self._opening.add(id)
        batch, report = None, None
        try:
            batch = OpenBatch(share.batch, self._engine, self._served, lambda: id in self._withdrawn)
        except WithdrawnError:
            pass
        except ConfigError as error:
            report = BatchBroken(id, str(error))
        finally:
            with self._batches_lock:
                self._opening.discard(id)
                is_withdrawn = id in self._withdrawn
                if batch is not None and not is_withdrawn:
                    self._open[id] = batch
        if is_withdrawn:
            if batch is not None:
                batch.close()
            self.send(Released(id))
            return None
        if report is not None:
            self.send(report)
        return batch

    def _generate(self, pending: RoundRequests, batches: list[OpenBatch], policy: str) -> None:
        tokens = {batch.spec.id: [0, 0, 0] for batch in batches}
        changed: set[int] = set()
        outputs = self._engine.generate(pending, policy)
        for count, output in enumerate(outputs, start=1):
            if count == len(pending) and self._online is not None:
                self._online.front.hold()  # else single requests could keep a round from ending for ever
            part, number = pending.place_of(output.index)
            batch = batches[part]
            if _is_withdrawn(output) or not batch.apply(number, output):
                if all(batch.is_closed for batch in batches):
                    break  # replicas do not hear of what is withdrawn: their run ends here
                continue
            of_batch = tokens[batch.spec.id]
            of_batch[0] += output.num_prompt_tokens
            of_batch[1] += output.num_cached_tokens
            of_batch[2] += output.num_output_tokens
            changed.add(part)
            self._end_if_complete(batch, tokens[batch.spec.id])
            if time.monotonic() - self._reported_s >= _REPORT_INTERVAL_S:
                self._report_all([batches[part] for part in changed], tokens)
                changed.clear()
        self._report_all([batches[part] for part in changed], tokens)

    def _draw(self, number: int, pending: RoundRequests) -> None:
        """Plan once more, for a picture. Large rounds are not drawn: that would take time from answers."""
        if len(pending) > _MAX_DRAWN:
            return

        def decode(token_ids: TokenIds) -> str:
            return self._engine.codec.text_of(SequenceOutput(0, token_ids, "length", 0, 0), SamplingParams())

        with suppress(BlendServeError, OSError):
            plan = self._engine.plan(pending)
            tree, density = plan.tree, str(density_chart(plan).render())
            tokens = int(tree.num_prompt_tokens), int(tree.num_unique_tokens)
            drawn = str(icicle(plan, pending.flat_prompts(), decode))
            self.send(Picture(number, len(pending), *tokens, density, drawn))

    def _end_if_complete(self, batch: OpenBatch, tokens: list[int] | None = None) -> None:
        if not batch.is_complete or batch.is_closed:
            return
        with self._batches_lock:
            is_ours = self._open.pop(batch.spec.id, None) is not None
        if is_ours:
            batch.close()
            self._report(batch, tokens)
            self.send(BatchDone(batch.spec.id))

    def _report_all(self, batches: list[OpenBatch], tokens: dict[str, list[int]]) -> None:
        self._reported_s = time.monotonic()
        for batch in batches:
            if not batch.is_closed:
                self._report(batch, tokens[batch.spec.id])
        status = self._engine.status()
        totals = [sum(of_batch[column] for of_batch in tokens.values()) for column in range(3)]
        if status is not None:
            self.send(EngineState(status.num_running, status.kv_use, status.prefix_hit_rate, *totals))

    def _report(self, batch: OpenBatch, tokens: list[int] | None = None) -> None:
        rows = batch.rows
        counts = (batch.store.num_requests, rows.num_done, rows.num_succeeded, rows.errors_by_code.total())
        self.send(Progress(batch.spec.id, *counts, *(tokens or (0, 0, 0))))


def _is_withdrawn(output: SequenceOutput) -> bool:
    if output.finish_reason == "cancelled":
        return True
    return isinstance(output.error, RequestError) and output.error.code == WITHDRAWN


def served_as(engine: Engine, name: str, aliases: tuple[str, ...]) -> ServedModel:
    """The engine's model under the service's name, which answers then carry."""
    served = engine.served
    names = tuple(dict.fromkeys((name, *aliases, *served.names)))
    return served if served.is_remote else replace(served, names=names, accepts_any_name=True)


def _listen(connection: Connection, worker: EngineWorker) -> None:
    """Hear commands until the service is gone; then end at once, for nobody would read what comes."""
    try:
        while True:
            worker.hear(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def main(descriptor: int) -> int:
    """Serve one service until it ends. Returns: 1 when the model cannot be opened."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the service's to handle
    connection = Connection(descriptor)
    opening: Open = connection.recv()
    lock = open_own(opening.lock_path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # an engine of a killed service may need a moment to end
    model = opening.model
    try:
        engine = open_engine(model.engine, notify=lambda text: print(text, file=sys.stderr, flush=True))
    except (BlendServeError, MemoryError) as error:
        connection.send(OpeningFailed(model.name, str(error) or "out of memory", isinstance(error, ConfigError)))
        return 1
    worker = EngineWorker(connection, engine, served_as(engine, model.name, model.aliases))
    worker.send(Opened(model.name, engine.identity, can_ask=isinstance(engine, FrontedEngine)))
    threading.Thread(target=_listen, args=(connection, worker), name="listen", daemon=True).start()
    try:
        worker.run()
    except ExecutorError as error:
        print(f"blendserve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

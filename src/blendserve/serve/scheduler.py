"""Runs batches in rounds on the engine process: which model, which batches, and what to do when the engine dies.

Decisions are those of `queue`; answers are journalled by the engine process; this keeps the two in step.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from blendserve.engines.settings import HttpSettings
from blendserve.errors import CapacityError
from blendserve.job.reader import ReadLimits
from blendserve.serve.batches import Batches
from blendserve.serve.blobs import Blobs
from blendserve.serve.clock import Clock
from blendserve.serve.engine_host import Died, EngineHost
from blendserve.serve.forecast import Forecast
from blendserve.serve.messages import (
    BatchBroken,
    BatchDone,
    BatchSpec,
    Draw,
    EngineState,
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
from blendserve.serve.queue import Round, Waiting, choose_round
from blendserve.serve.records import BatchRecord, FileRecord
from blendserve.serve.running import RunningRound
from blendserve.serve.settings import ModelChoice, ServeSettings
from blendserve.serve.store import Store
from blendserve.serve.tally import Tally

_log = logging.getLogger("blendserve.serve")
MAX_FAILURES = 6
"""A batch that ran alone in so many rounds without one new row is given up."""
_ALONE_AFTER = 2
"""A batch of so many failed rounds runs alone, so that it takes no others along."""
_MIN_ROUND_S = 10.0
_RELEASE_S = 10.0
_MAX_BACKOFF_S = 60.0
_TICK_S = 0.5
_CHECK_S = 5.0
"""How often a running round is held against what waits."""


class Scheduler:
    """The one place that starts and stops engine work. `changed` is called when something that people watch moves."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        batches: Batches,
        settings: ServeSettings,
        clock: Clock,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.progress: dict[str, Progress] = {}
        self.engine_state: EngineState | None = None
        self.is_ready = False
        self.can_ask = False
        self.trouble: str | None = None
        self.tally = Tally()
        self.forecast = Forecast(self.waiting, self.tally.rates, clock)
        self.num_restarts = 0
        self.host = EngineHost(settings.data / "engine.lock", self._hear)
        self.on_report: Callable[[Report | Died], None] = lambda _: None
        self.on_hopeless: Callable[[str], None] = lambda _: None
        self._store = store
        self._blobs = blobs
        self._batches = batches
        self._settings = settings
        self._clock = clock
        self._changed = changed
        self._wake = asyncio.Event()
        self._running: RunningRound | None = None
        self._num_rounds = 0
        self._releasing: dict[str, asyncio.Future[None]] = {}
        self._failures = Counter[str]()
        self._has_opened = False
        self._num_misses = 0
        self._retry_at = 0.0
        self._is_swapping = False
        self._checked_at = 0.0
        self._picture: Picture | None = None
        self._wanted = settings.models[0]

    @property
    def running_ids(self) -> frozenset[str]:
        return frozenset(self._running.batch_ids if self._running else ())

    def is_running(self, batch_id: str) -> bool:
        """Is the batch in the round that runs?"""
        return self._running is not None and batch_id in self._running.num_done_before

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        self._start_engine(self._wanted)
        while True:
            with self._waiting_for_space():
                self._tick()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _TICK_S)
            self._wake.clear()

    async def release(self, batch_id: str) -> None:
        """Return once the engine process has let go of a batch's journal."""
        if self._running is None or batch_id not in self._running.batch_ids:
            return
        waiter = self._releasing.setdefault(batch_id, asyncio.get_running_loop().create_future())
        self.host.send(Release(batch_id))
        try:
            await asyncio.wait_for(asyncio.shield(waiter), _RELEASE_S)
        except TimeoutError:
            self.host.kill()  # then the system takes its locks back
            await waiter

    def picture_of(self, batch: BatchRecord) -> Picture | None:
        """The plan of the round that a batch is in, once it is drawn. Prompts of other keys are never shown: rounds of
        several keys have no picture.
        """
        running = self._running
        if running is None or batch.id not in running.batch_ids or running.owners != {batch.owner}:
            return None
        if self._picture is not None and self._picture.number == running.round.number:
            return self._picture
        if not running.is_drawn:
            running.is_drawn = True
            self.host.send(Draw(running.round.number))
        return None

    def has_model(self, model: ModelChoice) -> bool:
        return self.host.model == model

    def load(self, model: ModelChoice) -> bool:
        """Load a model for single requests where no batch needs another one. Returns: False where one does."""
        if self._running is not None or any(batch.model != model.name for batch in self.waiting()):
            return False
        self._swap(model)
        return True

    def counts(self, batch_id: str) -> tuple[int, int] | None:
        """Rows of answers and of errors that a batch has, as far as they were heard of."""
        known = self.progress.get(batch_id)
        return None if known is None else (known.num_completed, known.num_failed)

    def waiting(self) -> list[Waiting]:
        """Every batch that is in progress."""
        found = self._store.page(BatchRecord, label="in_progress", is_newest_first=False)
        return [self._waiting(batch) for batch in found]

    # Decisions

    def _tick(self) -> None:
        now = self._clock()
        for label in ("validating", "in_progress"):
            for batch in self._store.expired(BatchRecord, now, label):
                self._batches.expire(batch.id)
        if self._running is not None:
            self._yield_if_needed(now)
        elif now >= self._retry_at and (not self.host.is_running or self.is_ready):
            self._begin_round(now)

    def _begin_round(self, now: float) -> None:
        waiting = [batch for batch in self.waiting() if batch.id not in self._releasing]
        chosen = self._choose(waiting, now)
        model = self._settings.model_named(chosen.model) if chosen else None
        if chosen is None or model is None:
            if not self.host.is_running:
                self._start_engine(self._wanted)
            return
        if self.host.model != model:
            self._swap(model)
            return
        self._num_rounds += 1
        shares = tuple(share for id, most in chosen.max_requests.items() if (share := self._share(id, most)))
        done = {share.batch.id: self._num_done(share.batch.id) for share in shares}
        owners = frozenset(batch.owner for batch in waiting if batch.id in chosen.max_requests)
        self._running = RunningRound(RunRound(self._num_rounds, shares, self._settings.policy), now, owners, done)
        self.tally.begin_round()
        self.host.send(self._running.round)

    def _choose(self, waiting: list[Waiting], now: float) -> Round | None:
        suspects = [batch for batch in waiting if self._failures[batch.id] >= _ALONE_AFTER]
        if suspects:
            alone = min(waiting, key=lambda batch: (self._failures[batch.id], batch.deadline))
            return Round(alone.model, {alone.id: None})
        return choose_round(
            waiting, loaded=self._loaded, rates=self.tally.rates, now=now, round_s=self._settings.round_s
        )

    @property
    def _loaded(self) -> str | None:
        return self.host.model.name if self.host.model else None

    def _yield_if_needed(self, now: float) -> None:
        """End a round early for a key that has no share in it, or for a batch or a model that would else be late."""
        running = self._running
        assert running is not None
        if running.is_yielding or now - max(running.started_at + _MIN_ROUND_S - _CHECK_S, self._checked_at) < _CHECK_S:
            return
        self._checked_at = now
        waiting = self.waiting()
        chosen = choose_round(
            waiting, loaded=self._loaded, rates=self.tally.rates, now=now, round_s=self._settings.round_s
        )
        if chosen is None:
            return
        owners = {batch.owner for batch in waiting if batch.id in chosen.max_requests}
        in_round = {batch.id for batch in waiting} & set(running.batch_ids)
        goes_first = chosen.max_requests.keys() - in_round and in_round - chosen.max_requests.keys()
        if chosen.model != self._loaded or not owners <= running.owners or goes_first:
            running.is_yielding = True
            self.host.send(Yield(running.round.number))

    def _share(self, id: str, max_requests: int | None) -> Share | None:
        batch = self._store.get(BatchRecord, id)
        file = self._store.get(FileRecord, batch.input_file_id) if batch else None
        if batch is None or file is None:
            self._batches.finish(id, "failed", ({"code": "file_error", "message": "The input file is gone."},))
            return None
        spec = BatchSpec(
            id=batch.id,
            input_path=self._blobs.path(file.id),
            input_sha256=file.sha256,
            directory=self._batches.directory(batch.id),
            endpoint=batch.endpoint,
            created_at=batch.created_at,
            limits=ReadLimits(),
        )
        return Share(spec, max_requests)

    def _waiting(self, batch: BatchRecord) -> Waiting:
        known = self.progress.get(batch.id)
        num_left = known.num_requests - known.num_done if known else batch.num_lines
        choice = self._settings.model_named(batch.model)
        model = choice.name if choice else self._settings.models[0].name
        return Waiting(batch.id, batch.owner, model, max(1, num_left), batch.expires_at, batch.created_at)

    def _num_done(self, id: str) -> int:
        return self.progress[id].num_done if id in self.progress else 0

    # The engine process

    def _start_engine(self, model: ModelChoice) -> None:
        self.is_ready = False
        self.host.start(model)

    def _swap(self, model: ModelChoice) -> None:
        self._wanted = model
        if not self.host.is_running:
            self._start_engine(model)
        else:
            self.is_ready, self._is_swapping = False, True
            self.host.kill()  # nothing runs; what it knows is in journals

    def _hear(self, number: int, report: Report | Died) -> None:
        if number == self.host.number:
            with self._waiting_for_space():
                self._act_on(report)
            self.on_report(report)
            self._changed()

    @contextmanager
    def _waiting_for_space(self) -> Iterator[None]:
        """Let what a full disk keeps from being stored happen again later: its batch stays as it was."""
        try:
            yield
        except CapacityError as error:
            self.trouble = str(error)
            self._back_off(made_progress=False)

    def _act_on(self, report: Report | Died) -> None:
        match report:
            case Opened():
                self.is_ready, self.can_ask, self.trouble = True, report.can_ask, None
                self._has_opened = True
                self._wake.set()
            case OpeningFailed():
                self.trouble = report.message
                if report.is_final and not self._has_opened:
                    self.on_hopeless(f"cannot open the model {report.model}: {report.message}")
                _log.warning("the model %s cannot be opened, and is tried again: %s", report.model, report.message)
            case Progress():
                self._note(report)
            case BatchDone(batch_id):
                self._batches.finish(batch_id, "completed")
                self._freed(batch_id)
            case BatchBroken(batch_id, message):
                self._batches.finish(batch_id, "failed", ({"code": "invalid_file", "message": message},))
                self._freed(batch_id)
            case Released(batch_id):
                self._freed(batch_id)
            case RoundEnded():
                is_excused = report.is_for_space or _is_remote(self.host.model)
                self._end_round(report.error, is_excused=is_excused, run_s=report.run_s)
            case EngineState():
                self.engine_state = report
            case Picture():
                self._picture = report
            case Died():
                self._bury(report)

    def _note(self, progress: Progress) -> None:
        id, running = progress.batch_id, self._running
        self.progress[id] = progress
        if running is None or id not in running.num_done_before:
            return
        if progress.num_done > running.num_done_before[id]:
            running.progressed.add(id)
            self._failures.pop(id, None)
        done = sum(self._num_done(name) - before for name, before in running.num_done_before.items())
        self.tally.note(progress, running, done, self._loaded, self._clock())

    def _freed(self, batch_id: str) -> None:
        waiter = self._releasing.pop(batch_id, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self._is_over(batch_id):
            self.progress.pop(batch_id, None)

    def _is_over(self, batch_id: str) -> bool:
        batch = self._store.get(BatchRecord, batch_id)
        return batch is None or batch.status != "in_progress"

    def _end_round(self, error: str | None, *, is_excused: bool = False, run_s: float = 0.0) -> None:
        running, self._running = self._running, None
        self.tally.end_round(run_s)
        for id in list(self._releasing):
            self._freed(id)
        self._wake.set()
        if running is None:
            return
        if error is None:
            self._num_misses = 0
            self.trouble = None
            return
        self.trouble = error
        _log.warning("a round ended early; its batches go on with the next: %s", error)
        self._back_off(made_progress=bool(running.progressed))
        if not is_excused:
            self._blame(running, error)

    def _blame(self, running: RunningRound, error: str) -> None:
        """Count a failed round against the batches that had nothing from it."""
        for id in running.batch_ids:
            if id in running.progressed or self._is_over(id):
                continue
            self._failures[id] += 1
            if self._failures[id] >= MAX_FAILURES and len(running.batch_ids) == 1:
                message = f"The engine failed {self._failures[id]} times on this batch: {error}"
                self._batches.finish(id, "failed", ({"code": "engine_failed", "message": message},))

    def _back_off(self, *, made_progress: bool) -> None:
        self._num_misses = 0 if made_progress else self._num_misses + 1
        delay_s = min(_MAX_BACKOFF_S, 0.25 * 2**self._num_misses) if self._num_misses else 0.0
        self._retry_at = self._clock() + delay_s

    def _bury(self, died: Died) -> None:
        """The engine process is gone: its journals are free, and another one starts when there is work."""
        was_swapped, self._is_swapping = self._is_swapping, False
        self.host.forget()
        self.is_ready, self.engine_state = False, None
        if self._running is not None:
            self.num_restarts += 1
            self._end_round(self.trouble or f"the engine process ended with exit code {died.exit_code}")
        elif not was_swapped:
            self._back_off(made_progress=False)
        for id in list(self._releasing):
            self._freed(id)
        self._wake.set()


def _is_remote(model: ModelChoice | None) -> bool:
    """Does a server answer that may be down for a while, through no fault of a batch?"""
    return model is not None and isinstance(model.engine, HttpSettings)

"""A job on many replicas: one central plan, a part of it for each, one driver that hands on every answer once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from blendserve.engines.replicas.cluster import ReplicaShape, node_shapes, open_cluster, replica_shape
from blendserve.engines.replicas.drive import drive
from blendserve.engines.replicas.ledger import Ledger
from blendserve.engines.replicas.part import SharedJob
from blendserve.engines.replicas.ray_fleet import Expected, RayFleet
from blendserve.engines.replicas.replica import ReplicaEngine
from blendserve.engines.settings import ReplicaSettings
from blendserve.job.pending import PendingRequests
from blendserve.planner.partition import Partition, partition
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput

OpenReplica = Callable[[ReplicaShape], ReplicaEngine]
"""Opens the engine of one replica, in the replica's process; pickled on the way there."""


class ReplicaPool:
    """`ledger`, `partition` and `startup_s`, the time until a replica was up, are of the latest run."""

    def __init__(
        self,
        settings: ReplicaSettings,
        open_replica: OpenReplica,
        expected: Expected,
        *,
        is_restartable: bool = True,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.ledger: Ledger | None = None
        self.partition: Partition | None = None
        self.startup_s = 0.0
        self._open_replica = open_replica
        self._expected = expected
        self._is_restartable = is_restartable
        self._notify = notify

    def run(self, pending: PendingRequests, plan: Plan) -> Iterator[SequenceOutput]:
        """Yield the end of every request as it comes; closing the iterator ends all replicas.

        Raises: ConfigError when Ray or an engine cannot start; ExecutorError when all replicas are lost.
        """
        began_s = time.perf_counter()
        job = SharedJob.of(pending, plan)
        self.partition = partition(plan, self.settings.num_replicas)
        self.ledger = Ledger(self.partition.parts, job.rank)
        with open_cluster(self.settings.ray_address, job.num_bytes) as ray:
            shape = replica_shape(self.settings, node_shapes(ray))
            fleet = RayFleet(
                ray,
                self.settings,
                shape,
                partial(self._open_replica, shape),
                job,
                self._expected,
                is_restartable=self._is_restartable,
                notify=self._notify,
            )
            try:
                yield from drive(self.ledger, fleet, pending)
            finally:
                self.startup_s = (fleet.first_up_s or time.perf_counter()) - began_s
                fleet.close(is_at_ease=self.ledger.is_done)

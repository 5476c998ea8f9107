"""vLLM's schedulers with a waiting queue that follows a policy: for `scheduler_cls`, which takes them as strings.

Everything else is vLLM's own. The scheduler is no public interface of vLLM, so these refuse releases on which they were
not tested.
"""

from __future__ import annotations

from typing import Any

from vllm import __version__ as release
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from blendserve.engines.vllm.api import TESTED_RELEASES, is_tested
from blendserve.engines.vllm.queue import PolicyQueue
from blendserve.errors import ConfigError


class WaitsByPolicy:
    """Puts a `PolicyQueue` where vLLM has its queue of waiting requests."""

    waiting: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not is_tested(release):
            raise ConfigError(
                f"vLLM is {release}; this scheduler was tested on {', '.join(TESTED_RELEASES)}: leave scheduler_cls out"
            )
        super().__init__(*args, **kwargs)
        self.waiting = PolicyQueue()


class BlendScheduler(WaitsByPolicy, Scheduler):  # type: ignore[misc, unused-ignore]
    """For engines that schedule a step when the one before has ended."""


class BlendAsyncScheduler(WaitsByPolicy, AsyncScheduler):  # type: ignore[misc, unused-ignore]
    """For engines that schedule a step while the one before runs."""

"""Who asks: the owner of what a request makes, and the limits of its key."""

from __future__ import annotations

from dataclasses import dataclass

from blendserve.serve.keys import ApiKey


@dataclass(frozen=True, slots=True)
class Caller:
    """A client. Without keys everybody is the same nameless owner."""

    key: ApiKey | None = None

    @property
    def owner(self) -> str:
        return "" if self.key is None else self.key.id

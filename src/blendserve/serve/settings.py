"""What the service is started with: frozen values, checked when they are made. The command line fills them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from blendserve.engines.settings import EngineSettings
from blendserve.errors import ConfigError

DAY_S = 86400


@dataclass(frozen=True, slots=True)
class Limits:
    """How much clients may ask for. Units in names.

    - `max_file_bytes`: largest file (default: 4 GiB). `max_part_bytes`: largest part of an upload (default: 64 MiB).
    - `max_batch_lines`: most lines of a batch (default: 5000000).
    - `max_body_bytes`: largest JSON body (default: 4 MiB).
    - `quota_bytes`: bytes of all files together. None, the default: what the disk holds.
    - `min_free_bytes`: space that uploads leave free on the disk (default: 256 MiB).
    - `max_uploads`: uploads at the same time, for each key (default: 8).
    - `file_lifetime_s`: how long files stay (default: 30 days).
    - `stall_s`: a client that sends nothing for so long is cut off (default: 60).
    - `max_window_batches`: batches of one key that are not finished (default: 10000).
    """

    max_file_bytes: int = 4 << 30
    max_part_bytes: int = 64 << 20
    max_batch_lines: int = 5_000_000
    max_body_bytes: int = 4 << 20
    quota_bytes: int | None = None
    min_free_bytes: int = 256 << 20
    max_uploads: int = 8
    file_lifetime_s: int = 30 * DAY_S
    stall_s: float = 60.0
    max_window_batches: int = 10_000


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model by the name that clients use, and the engine that answers for it. `accepts_any_name`: another server
    answers, and it knows which models it has.
    """

    name: str
    engine: EngineSettings
    aliases: tuple[str, ...] = ()
    accepts_any_name: bool = False


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """Where ends of batches are told. `secret` signs (whsec_...). `allows_private`: addresses of this network too."""

    url: str
    secret: str = field(repr=False)
    allows_private: bool = False


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """One service.

    - `data`: the directory that holds all files, batches and keys.
    - `models`: at least one.
    - `refuses_late`: refuse a batch whose window the forecast says cannot be met (default: accept and flag it).
    - `round_s`: a round plans about so many seconds of work where several keys wait (default: 300).

    Raises: ConfigError for values that cannot work.
    """

    data: Path
    models: tuple[ModelChoice, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    policy: str = "blend"
    limits: Limits = Limits()
    webhook: WebhookSettings | None = None
    refuses_late: bool = False
    round_s: float = 300.0
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names:
            raise ConfigError("no model is served; give at least one with --model")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two models are called {twice}; name one of them otherwise: --model NAME=MODEL")
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("TLS needs both --tls-cert and --tls-key")

    @property
    def is_local(self) -> bool:
        """Can this machine alone reach the service?"""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def model_named(self, name: str | None) -> ModelChoice | None:
        """The model of a name; the only one where no name is given."""
        if name is None:
            return self.models[0] if len(self.models) == 1 else None
        named = (model for model in self.models if name in (model.name, *model.aliases))
        return next(named, None) or next((model for model in self.models if model.accepts_any_name), None)

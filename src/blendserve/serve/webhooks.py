"""Ends of batches, told to a URL: signed as Standard Webhooks says, tried again for days, never sent where they should
not go.

The address is looked up once per try, checked, and connected to by number: a name cannot lead elsewhere in between.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import socket
import ssl
from contextlib import closing, suppress
from dataclasses import replace
from urllib.parse import SplitResult, urlsplit

from blendserve.errors import ConfigError
from blendserve.serve.clock import Clock
from blendserve.serve.records import BatchRecord, DeliveryRecord, new_id
from blendserve.serve.settings import DAY_S, WebhookSettings
from blendserve.serve.store import Store

LIFETIME_S = 3 * DAY_S
TIMEOUT_S = 10.0
_FIRST_DELAY_S, _MAX_DELAY_S = 5.0, 3600.0
_IDLE_S = 1.0
_PREFIX = "whsec_"
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/32")
_log = logging.getLogger("blendserve.serve")


class NotDeliveredError(Exception):
    """A try failed; the message says why, without what was sent."""


def secret_bytes(secret: str) -> bytes:
    """Raises: ConfigError for what is no secret of Standard Webhooks."""
    try:
        found = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        found = b""
    if not secret.startswith(_PREFIX) or len(found) < 16:
        raise ConfigError("the secret for webhooks is none: it must be whsec_ and at least 16 bytes in base64")
    return found


def headers_of(secret: bytes, id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that prove where a webhook comes from."""
    signed = f"{id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
        "content-type": "application/json",
        "user-agent": "blendserve",
    }


def parse_url(text: str) -> SplitResult:
    """Raises: ConfigError when nothing can be sent there."""
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.username or parts.fragment:
        raise ConfigError(
            f"--webhook is {text!r}; it must look like https://example.com/hook, without user or fragment"
        )
    return parts


class Webhooks:
    """Remembers what is to be told, and tells it."""

    def __init__(self, store: Store, settings: WebhookSettings, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._secret = secret_bytes(settings.secret)
        self._url = parse_url(settings.url)
        self._wake = asyncio.Event()

    def told(self, batch: BatchRecord) -> None:
        """Note the end of a batch."""
        if not batch.is_ended:
            return
        now = int(self._clock())
        event = {
            "id": new_id("evt"),
            "object": "event",
            "type": f"batch.{batch.status}",
            "created_at": now,
            "data": {"id": batch.id},
        }
        delivery = DeliveryRecord(
            id=new_id("wh"),
            owner=batch.owner,
            created_at=now,
            expires_at=now + LIFETIME_S,
            url=self._settings.url,
            body=json.dumps(event),
        )
        self._store.put(delivery)
        self._wake.set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            for delivery in self._due():
                await self._deliver(delivery)
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _IDLE_S)

    def _due(self) -> list[DeliveryRecord]:
        now = self._clock()
        waiting = self._store.page(DeliveryRecord, is_newest_first=False)
        over = [delivery for delivery in waiting if delivery.expires_at <= now]
        self._store.delete(*over)
        return [delivery for delivery in waiting if delivery.next_at <= now and delivery not in over]

    async def _deliver(self, delivery: DeliveryRecord) -> None:
        now = self._clock()
        body = delivery.body.encode()
        headers = headers_of(self._secret, delivery.id, int(now), body)
        try:
            await asyncio.to_thread(post, self._url, body, headers, allows_private=self._settings.allows_private)
        except NotDeliveredError as error:
            delay_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**delivery.num_tries)
            _log.warning("webhook %s: %s; next try in %.0f s", delivery.id, error, delay_s)
            self._store.put(replace(delivery, num_tries=delivery.num_tries + 1, next_at=now + delay_s))
        else:
            self._store.delete(delivery)


def post(url: SplitResult, body: bytes, headers: dict[str, str], *, allows_private: bool) -> None:
    """Send once. Raises: NotDeliveredError unless the answer is 2xx."""
    host = url.hostname or ""
    port = url.port or (443 if url.scheme == "https" else 80)
    address = _address_of(host, port, allows_private=allows_private)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    try:
        with closing(_connection(url.scheme, host, port, address)) as connection:
            connection.request("POST", target, body, headers)
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise NotDeliveredError(f"no answer ({type(error).__name__})") from error
    if not 200 <= status < 300:
        raise NotDeliveredError(f"the answer was {status}; only 2xx counts, and redirects are not followed")


def _address_of(host: str, port: int, *, allows_private: bool) -> str:
    """An address of the host that may be written to. Raises: NotDeliveredError."""
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise NotDeliveredError("the host is not known") from error
    for address in map(str, found):
        if allows_private or is_public(address):
            return address
    raise NotDeliveredError("the host is in a private network; --webhook-private allows that")


def is_public(address: str) -> bool:
    """May a service write to this address without being told to? Addresses inside addresses count as what they hold."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found in _TRANSLATED:  # the network decides where these lead
            return False
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            found = inner
    return found.is_global and not found.is_multicast


def _connection(scheme: str, host: str, port: int, address: str) -> http.client.HTTPConnection:
    """A connection to a numbered address that speaks as the host."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    plain = socket.create_connection((address, port), TIMEOUT_S)
    connection.sock = plain
    if scheme == "https":
        try:
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
    return connection

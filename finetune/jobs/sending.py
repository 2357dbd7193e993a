"""Send what webhooks are to be told: to the address that was checked, and to no other.

A name is resolved once; each of its addresses must be public, or in a network that the operator allows; the connection goes to an
address that was checked, whatever the name means a moment later. Redirects are not followed.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from finetune.errors import FinetuneError
from finetune.jobs.webhooks import Delivery, Webhook, WebhookStore, signature_headers

TIMEOUT_SECONDS = 15.0
_WATCH_SECONDS = 1.0
_AT_ONCE = 4
_FORGET_SECONDS = 3600.0
_READ_BYTES = 1024  # of an answer, which nobody needs
_EMBEDDING_IPV4 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[str]]

log = logging.getLogger(__name__)


class Refused(Exception):
    """The webhook's address leads to where nothing may be sent."""


@dataclass(frozen=True)
class Reachable:
    """Where webhooks may lead: public addresses, and the networks of `allowed`."""

    allowed: tuple[Network, ...] = ()

    def is_allowed(self, address: Address) -> bool:
        """Return whether the operator has named a network that holds this address."""
        return any(address in network for network in self.allowed)

    def check(self, address: Address) -> None:
        """Raise `Refused` where nothing may be sent to an address."""
        inner = _embedded(address)
        if self.is_allowed(address) or self.is_allowed(inner):
            return
        if not inner.is_global or inner.is_multicast:
            raise Refused(f"{address} is not a public address; the operator can allow its network in FINETUNE_WEBHOOK_NETWORKS")


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for, if it stands for one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _EMBEDDING_IPV4:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1] or address


def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a name."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under the name that it was found by."""

    def __init__(self, host: str, port: int, address: str, context: ssl.SSLContext | None) -> None:
        super().__init__(host, port, timeout=TIMEOUT_SECONDS)
        self._address, self._context = address, context

    def connect(self) -> None:
        sock = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = sock if self._context is None else self._context.wrap_socket(sock, server_hostname=self.host)


def post(url: str, body: bytes, headers: dict[str, str], reachable: Reachable, resolver: Resolve = resolve) -> int:
    """Send a POST request and return the answer's status.

    Raises:
        Refused: the address leads to where nothing may be sent.
        OSError, http.client.HTTPException: nothing answered.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None, "an address without a host is refused when it is given"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in resolver(parts.hostname, port)]
    if not addresses:
        raise Refused(f"{parts.hostname} has no address")
    for address in addresses:
        reachable.check(address)
    if parts.scheme == "http" and not all(map(reachable.is_allowed, addresses)):
        raise Refused("http without encryption leads only into networks of FINETUNE_WEBHOOK_NETWORKS; give an https address")
    context = ssl.create_default_context() if parts.scheme == "https" else None
    connection = _Connection(parts.hostname, port, str(addresses[0]), context)
    try:
        path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read(_READ_BYTES)
        return answer.status
    finally:
        connection.close()


def attempt(webhook: Webhook, delivery: Delivery, reachable: Reachable, now: float) -> tuple[int | None, str | None]:
    """Try to deliver; return the answer's status, and why it failed, None where it did not."""
    headers = {
        "content-type": "application/json",
        "user-agent": "finetune-webhooks",
        **signature_headers(webhook.secret, delivery.id, delivery.payload, now),
    }
    try:
        status = post(webhook.url, delivery.payload.encode(), headers, reachable)
    except Refused as error:
        return None, str(error)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return None, f"no answer ({type(error).__name__}: {error})"[:300]
    return status, None if 200 <= status < 300 else f"answered with status {status}"


class Sender:
    """A thread that asks `collect` each second for what is to be queued, and starts a thread for each delivery that is due.

    At most `_AT_ONCE` run at a time; a receiver that does not answer holds one of them for `TIMEOUT_SECONDS`.
    """

    def __init__(
        self, store: Callable[[], WebhookStore], reachable: Reachable, collect: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._reachable, self._collect = store, reachable, collect
        self._stopping = threading.Event()
        self._free = threading.BoundedSemaphore(_AT_ONCE)
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Start no delivery more; one that is cut short, and what is due, is delivered by the next server."""
        self._stopping.set()

    def _run(self) -> None:
        forget_at = 0.0
        while not self._stopping.wait(_WATCH_SECONDS):
            try:
                self._collect()
                while not self._stopping.is_set() and self._start_one():
                    pass
                if (now := time.time()) >= forget_at:
                    self._store().forget_old(now)
                    forget_at = now + _FORGET_SECONDS
                self._trouble = ""
            except FinetuneError as error:  # the database is out of reach: the next round tries again
                if str(error) != self._trouble:
                    log.warning("webhooks wait: %s", error)
                self._trouble = str(error)

    def _start_one(self) -> bool:
        """Start a delivery that is due; return whether there was one, and a thread free for it."""
        if not self._free.acquire(blocking=False):
            return False
        try:
            taken = self._store().take_due(time.time())
        except BaseException:
            self._free.release()
            raise
        if taken is None:
            self._free.release()
            return False
        threading.Thread(target=self._deliver, args=taken, name="webhook delivery", daemon=True).start()
        return True

    def _deliver(self, webhook: Webhook, delivery: Delivery) -> None:
        try:
            status, error = attempt(webhook, delivery, self._reachable, time.time())
            self._store().settle(delivery, time.time(), status=status, error=error)
            if error is not None:
                log.warning("webhook %s, %s: %s", webhook.id, delivery.type, error)
        except FinetuneError as error:  # not written, so it is delivered once more
            log.warning("webhook %s: what came of a delivery could not be written: %s", webhook.id, error)
        finally:
            self._free.release()

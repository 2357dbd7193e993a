"""Send webhook deliveries, only to addresses that were checked (protection against server-side request forgery).

The host name is resolved once. Each of its addresses must be public or in a network that the operator allows. The connection is
made to one of these addresses without resolving the name again. Redirects are not followed.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from finetune.errors import FinetuneError, InvalidInput
from finetune.jobs.webhooks import Delivery, Webhook, WebhookStore, check_url, signature_headers

TIMEOUT_SECONDS = 15.0  # of one delivery, from resolving the name to the headers of the response
RESOLVE_SECONDS = 5.0  # of these, for resolving the name
_WATCH_SECONDS = 1.0
_STOP_SECONDS = 5.0
_AT_ONCE = 4
_RESOLVING_AT_ONCE = 32
_FORGET_SECONDS = 3600.0
_MAX_HEAD_BYTES = 64 * 1024  # of a response's status line and headers; its body is not read
_SETTING = "FINETUNE_WEBHOOK_NETWORKS"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[str]]

# From the registries of IANA: "IPv4 Special-Purpose Address Space", "IPv6 Special-Purpose Address Space" and "Internet Protocol
# Version 6 Address Space" (which assigns global unicast addresses from 2000::/3 alone). `ipaddress` of Python 3.11 knows fewer.
_SPECIAL: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/4", "240.0.0.0/4"),
        *("2001::/23", "2001:db8::/32", "3fff::/20"),  # protocol assignments with Teredo among them; documentation
    )
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052; the last 32 bits are an IPv4 address, as in the next three
_IPV4_AT_THE_END = (
    _NAT64,
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # NAT64 of local use, RFC 8215
    ipaddress.IPv6Network("::/96"),  # IPv4-compatible, RFC 4291
    ipaddress.IPv6Network("::ffff:0:0:0/96"),  # IPv4-translated, RFC 2765
)
_ISATAP = 0x00005EFE  # RFC 5214: the 32 bits before the IPv4 address, except for one bit

log = logging.getLogger(__name__)
_resolving = threading.BoundedSemaphore(_RESOLVING_AT_ONCE)


class Refused(Exception):
    """Sending to the webhook's address is not allowed.

    Args:
        for_the_log: details for the operator only, such as the address that the name resolved to.
    """

    def __init__(self, message: str, for_the_log: str = "") -> None:
        super().__init__(message)
        self.for_the_log = for_the_log


@dataclass(frozen=True)
class Reachable:
    """The addresses to which deliveries may be sent: public addresses, and those in the networks of `allowed`."""

    allowed: tuple[Network, ...] = ()

    def is_allowed(self, address: Address) -> bool:
        """Return whether the address, or the IPv4 address embedded in it, is in a network that the operator allows."""
        inner = embedded_ipv4(address)
        return self._is_named(address) or (bool(inner) and all(map(self._is_named, inner)))

    def check(self, address: Address) -> None:
        """Raise `Refused` if sending to the address is not allowed. The message does not contain the address."""
        if self.is_allowed(address):
            return
        if not is_public(address):
            message = f"the host leads to an address that is not public; the operator can allow its network in {_SETTING}"
            raise Refused(message, f"resolved to {address}, which is not public")

    def check_url(self, url: str) -> None:
        """Raise `InvalidInput` for a URL to which sending can never be allowed, without resolving its host name."""
        check_url(url)
        parts = urlsplit(url)
        if parts.scheme == "http" and not self.allowed:
            raise InvalidInput(f"{url[:100]!r}: http without encryption is not sent here; give an https address")
        try:
            address = ipaddress.ip_address(parts.hostname or "")
        except ValueError:
            return  # a name
        if not self.is_allowed(address) and (parts.scheme == "http" or not is_public(address)):
            wrong = "is not public" if not is_public(address) else "is reached with https alone"
            raise InvalidInput(f"{url[:100]!r}: the address {wrong}; the operator can allow its network in {_SETTING}")

    def _is_named(self, address: Address) -> bool:
        return any(address in network for network in self.allowed)


def is_public(address: Address) -> bool:
    """Return whether an address and all IPv4 addresses embedded in it are on the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:  # the connection is made over IPv4
            return is_public(address.ipv4_mapped)
        if address not in _GLOBAL_UNICAST and address not in _NAT64:
            return False
    if not address.is_global or address.is_multicast or any(address in network for network in _SPECIAL):
        return False
    return all(map(is_public, embedded_ipv4(address)))


def embedded_ipv4(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """Return the IPv4 addresses embedded in an IPv6 address, for all known transition mechanisms."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    number = int(address)
    if any(address in network for network in _IPV4_AT_THE_END) or (number >> 32) & 0xFDFFFFFF == _ISATAP:
        found.append(ipaddress.IPv4Address(number & 0xFFFFFFFF))
    return tuple(one for one in found if one is not None)


def resolve(host: str, port: int) -> Sequence[str]:
    """Return the IP addresses of a host name. It may take as long as the system's resolver waits for name servers."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def resolve_within(seconds: float, resolver: Resolve, host: str, port: int) -> Sequence[str]:
    """Return the IP addresses of a host name, found in a thread of its own, because a resolution cannot be interrupted.

    The thread of a resolution that takes too long ends when the resolver gives up. There are at most `_RESOLVING_AT_ONCE`.

    Raises:
        TimeoutError: there was no answer in time, or too many resolutions have not ended yet.
        OSError: the name cannot be resolved.
    """
    if not _resolving.acquire(blocking=False):
        raise TimeoutError(f"{_RESOLVING_AT_ONCE} other host names are still waiting for their name servers")
    found: Future[Sequence[str]] = Future()

    def work() -> None:
        try:
            found.set_result(resolver(host, port))
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be encoded
            found.set_exception(error)
        finally:
            _resolving.release()

    threading.Thread(target=work, name="resolve", daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"the name servers of {host} did not answer within {seconds:.0f} s") from None


class _Deadline:
    """The deadline of a delivery, on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._at = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left; raise `TimeoutError` if there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the exchange was not complete within {self._seconds:g} s")
        return left


class _Answer(io.RawIOBase):
    """The stream of a response, limited by the deadline and by `_MAX_HEAD_BYTES`."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        super().__init__()
        self._sock, self._deadline, self._room = sock, deadline, _MAX_HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._room:
            raise http.client.HTTPException(f"the headers of the response are larger than {_MAX_HEAD_BYTES:,} bytes")
        self._sock.settimeout(self._deadline.left())  # a plain timeout would restart with each byte
        received = self._sock.recv_into(memoryview(buffer)[: self._room])
        self._room -= received
        return received


class _TimedSocket:
    """The methods of a socket that `http.client` uses, with one deadline for all of them together."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._sock.settimeout(self._deadline.left())
            rest = rest[self._sock.send(rest) :]

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(_Answer(self._sock, self._deadline))

    def close(self) -> None:
        self._sock.close()


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked; its host name is used for the Host header and TLS."""

    def __init__(self, host: str, port: int, address: str, context: ssl.SSLContext | None, deadline: _Deadline) -> None:
        super().__init__(host, port)
        self._address, self._context, self._deadline = address, context, deadline

    def connect(self) -> None:
        sock = socket.create_connection((self._address, self.port), self._deadline.left())
        try:
            sock.settimeout(self._deadline.left())
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        self.sock = _TimedSocket(sock, self._deadline)


def post(
    url: str,
    body: bytes,
    headers: dict[str, str],
    reachable: Reachable,
    resolver: Resolve = resolve,
    *,
    seconds: float = TIMEOUT_SECONDS,
) -> int:
    """Send a POST request and return the status of the response.

    Args:
        seconds: time limit for the whole delivery.

    Raises:
        Refused: sending to the address is not allowed.
        OSError, http.client.HTTPException: there was no valid response.
    """
    deadline = _Deadline(seconds)
    parts = urlsplit(url)
    assert parts.hostname is not None, "an address without a host is refused when it is given"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = resolve_within(min(RESOLVE_SECONDS, deadline.left()), resolver, parts.hostname, port)
    addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
    if not addresses:
        raise Refused(f"{parts.hostname} has no address")
    for address in addresses:
        reachable.check(address)
    if parts.scheme == "http" and not all(map(reachable.is_allowed, addresses)):
        raise Refused(f"http without encryption leads only into networks of {_SETTING}; give an https address")
    context = ssl.create_default_context() if parts.scheme == "https" else None
    connection = _Connection(parts.hostname, port, str(addresses[0]), context, deadline)
    try:
        path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def attempt(webhook: Webhook, delivery: Delivery, reachable: Reachable, now: float) -> tuple[int | None, str | None]:
    """Try a delivery; return the response's status, and why it failed, None if it succeeded."""
    headers = {
        "content-type": "application/json",
        "user-agent": "finetune-webhooks",
        **signature_headers(webhook.secret, delivery.id, delivery.payload, now),
    }
    try:
        status = post(webhook.url, delivery.payload.encode(), headers, reachable)
    except Refused as error:
        if error.for_the_log:
            log.warning("webhook %s: %s %s", webhook.id, urlsplit(webhook.url).hostname, error.for_the_log)
        return None, str(error)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return None, f"no answer ({type(error).__name__}: {error})"[:300]
    return status, None if 200 <= status < 300 else f"answered with status {status}"


class Sender:
    """A thread that calls `collect` every second to queue new events, and starts a thread for each delivery that is due.

    At most `_AT_ONCE` deliveries run at a time, and only one per webhook, so that a receiver that does not respond blocks one
    thread only, for `TIMEOUT_SECONDS`.
    """

    def __init__(
        self, store: Callable[[], WebhookStore], reachable: Reachable, collect: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._reachable, self._collect = store, reachable, collect
        self._stopping = threading.Event()
        self._woken = threading.Event()  # a delivery has ended, or the sender stops
        self._busy: set[str] = set()  # ids of webhooks with a delivery in progress
        self._free = threading.BoundedSemaphore(_AT_ONCE)
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Start no more deliveries. Interrupted and due ones are delivered by the next server.

        The thread has ended on return, unless it waits for the database.
        """
        self._stopping.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        collect_at = forget_at = 0.0
        while True:
            self._woken.wait(_WATCH_SECONDS)
            self._woken.clear()
            if self._stopping.is_set():
                return
            try:
                if time.monotonic() >= collect_at:
                    self._collect()
                    collect_at = time.monotonic() + _WATCH_SECONDS
                while not self._stopping.is_set() and self._start_one():
                    pass
                if (now := time.time()) >= forget_at:
                    self._store().delete_old(now)
                    forget_at = now + _FORGET_SECONDS
                self._trouble = ""
            except (FinetuneError, OSError) as error:  # the database or the models cannot be read: try again in the next round
                if str(error) != self._trouble:
                    log.warning("webhooks wait: %s", error)
                self._trouble = str(error)

    def _start_one(self) -> bool:
        """Start a delivery that is due; return False if none is due or no thread is free."""
        if not self._free.acquire(blocking=False):
            return False
        try:
            taken = self._store().claim_due(time.time(), except_for=tuple(self._busy))
        except BaseException:
            self._free.release()
            raise
        if taken is None:
            self._free.release()
            return False
        self._busy.add(taken[0].id)
        threading.Thread(target=self._deliver, args=taken, name="webhook delivery", daemon=True).start()
        return True

    def _deliver(self, webhook: Webhook, delivery: Delivery) -> None:
        try:
            status, error = attempt(webhook, delivery, self._reachable, time.time())
            self._store().record_attempt(delivery, time.time(), status=status, error=error)
            if error is not None:
                log.warning("webhook %s, %s: %s", webhook.id, delivery.type, error)
        except FinetuneError as error:  # the result was not recorded, so the delivery will be repeated
            log.warning("webhook %s: the result of a delivery could not be recorded: %s", webhook.id, error)
        finally:
            self._busy.discard(webhook.id)
            self._free.release()
            self._woken.set()
